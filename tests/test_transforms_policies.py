"""Policies for leaves of another shape: by rule, by function, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transfer_trees import dense_tree

from kdtl_jax import transforms, trees
from kdtl_jax._types import Array


def test_a_shape_never_changes_silently() -> None:
    for source, target in [((4, 1), (4,)), ((1,), (4,)), ((), (1,)), ((2, 3), (3, 2))]:
        with pytest.raises(ValueError, match="does not fit"):
            transforms.transfer({"w": jnp.ones(source)}, {"w": jnp.ones(target)})


def test_policies() -> None:
    leaf = jnp.arange(12.0).reshape(3, 4)
    x = np.asarray(leaf)
    transfer, to = transforms.transfer, lambda *shape: {"w": jnp.full(shape, -1.0)}
    got = {
        "crop": transfer({"w": leaf}, to(2, 3), on_mismatch=transforms.crop)[0]["w"],
        "pad": transfer({"w": leaf}, to(4, 5), on_mismatch=transforms.pad)[0]["w"],
        "both": transfer({"w": leaf}, to(2, 5), on_mismatch=transforms.crop_or_pad)[0]["w"],
        "uniform": transfer({"w": leaf}, to(2, 2), on_mismatch=transforms.select_uniform)[0]["w"],
        "keep": transfer({"w": leaf}, to(2, 2), on_mismatch=transforms.keep_on_mismatch)[0]["w"],
        "resize": transfer({"w": leaf}, to(5, 2), on_mismatch=transforms.resize_linear)[0]["w"],
    }
    np.testing.assert_array_equal(got["crop"], x[:2, :3])
    np.testing.assert_array_equal(got["pad"], np.pad(x, ((0, 1), (0, 1))))
    np.testing.assert_array_equal(got["both"], np.pad(x[:2], ((0, 0), (0, 1))))
    np.testing.assert_array_equal(got["uniform"], x[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(got["keep"], -np.ones((2, 2)))
    rows = np.stack([np.interp(np.linspace(0, 2, 5), range(3), x[:, j]) for j in (0, 3)], 1)
    np.testing.assert_allclose(got["resize"], rows, rtol=1e-6)


def test_policies_by_rule_with_alpha_and_report() -> None:
    source, target = dense_tree(width=4, classes=5), dense_tree(width=2, classes=3, seed=1)
    rules = [
        ("head/bias", transforms.keep_on_mismatch),
        (trees.Glob("**/kernel"), transforms.select_uniform),
    ]
    with pytest.raises(ValueError, match="layer_0/bias: source\\[4\\] does not fit target\\[2\\]"):
        transforms.transfer(source, target, on_mismatch=rules)
    rules.append((".*", transforms.crop))
    alphas = [(".*kernel", 2.0)]
    params, report = transforms.transfer(source, target, on_mismatch=rules, alpha=alphas)
    np.testing.assert_array_equal(
        params["layer_0"]["kernel"], 2 * np.asarray(source["layer_0"]["kernel"])[::2, ::2]
    )
    np.testing.assert_array_equal(params["layer_0"]["bias"], source["layer_0"]["bias"][:2])
    assert [k.path for k in report.kept] == ["head/bias"]
    assert report.adapted[0] == ("head/kernel", (4, 5), (2, 3), "select_uniform")
    assert "[4, 5] -> [2, 3] by select_uniform × 2\n" in str(report) and "by crop\n" in str(report)


def test_the_report_says_what_was_multiplied_by_how_much() -> None:
    source = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    _, report = transforms.transfer(source, source, alpha={"a": 0.5, "b": jnp.array(2.0), "c": 1})
    rows = [line.split(maxsplit=2) for line in str(report).splitlines()[1:]]
    assert rows == [
        ["copied", "c", "[2]"],
        ["scaled", "a", "[2] × 0.5"],
        ["scaled", "b", "[2] × alpha"],
    ]
    assert report.factors == {"a": 0.5, "b": None}


@pytest.mark.parametrize(
    ("policy", "source", "target", "words"),
    [
        (transforms.crop, (2, 2), (2, 3), "crop cannot grow axis 1 from 2 to 3"),
        (transforms.pad, (2, 3), (2, 2), "pad cannot shrink axis 1"),
        (transforms.select_uniform, (2,), (3,), "uniform cannot grow"),
        (transforms.resize_linear, (2,), (2, 1), "one rank"),
        (transforms.pad, (0,), (2,), "empty"),
        (lambda leaf, shape, path: leaf, (2,), (3,), r"made \(2,\)"),
    ],
)
def test_policies_that_do_not_apply(policy: Any, source: Any, target: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transforms.plan_transfer(
            {"w": jnp.ones(source)}, {"w": jnp.ones(target)}, on_mismatch=policy
        )


def test_a_policy_is_any_function() -> None:
    def tile(leaf: Array, shape: tuple[int, ...], path: str) -> Array | None:
        return None if path == "skip" else jnp.resize(leaf, shape)

    source = {"w": jnp.arange(2.0), "skip": jnp.ones(1)}
    target = {"w": jnp.zeros(5), "skip": jnp.zeros(3)}
    params, report = transforms.transfer(source, target, on_mismatch=tile)
    np.testing.assert_array_equal(params["w"], [0, 1, 0, 1, 0])
    assert report.adapted[0].policy == "tile" and report.kept[0].path == "skip"


def test_selection_by_any_rule_is_a_policy() -> None:
    leaf = jnp.arange(12.0).reshape(3, 4)
    key = jax.random.key(0)
    chosen = transforms.select_with(lambda size, n: transforms.random_indices(key, size, n))
    target = {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2)), "c": jnp.zeros((2, 4))}
    params, _ = transforms.transfer({"a": leaf, "b": leaf, "c": leaf}, target, on_mismatch=chosen)
    rows = transforms.random_indices(key, 4, 2)
    np.testing.assert_array_equal(params["a"], leaf[:, rows])
    np.testing.assert_array_equal(params["b"], params["a"])
    with pytest.raises(ValueError, match="select_with cannot grow"):
        transforms.plan_transfer({"w": jnp.ones(2)}, {"w": jnp.ones(3)}, on_mismatch=chosen)


@pytest.mark.parametrize("bad", ["crop", [("head", "crop")], 3, [("hed/.*", transforms.crop)]])
def test_bad_policies(bad: Any) -> None:
    with pytest.raises(ValueError, match="on_mismatch|labels no leaf"):
        transforms.transfer(dense_tree(), dense_tree(), on_mismatch=bad)


def test_misspelt_options_raise() -> None:
    misspelt: Any = "skip"
    with pytest.raises(ValueError, match="on_missing must be one of"):
        transforms.plan_transfer(dense_tree(), dense_tree(), on_missing=misspelt)
    with pytest.raises(ValueError, match="on_extra must be one of"):
        transforms.plan_transfer(dense_tree(), dense_tree(), on_extra=misspelt)
    with pytest.raises(ValueError, match="Nearest paths"):
        transforms.transfer(dense_tree(), dense_tree(), where="bakcbone/.*")


def test_a_policy_of_ones_own_is_asked_also_where_shapes_agree() -> None:
    def transposed(leaf: Array, shape: tuple[int, ...], path: str) -> Array:
        return leaf.T

    source = {"square": jnp.arange(4.0).reshape(2, 2), "wide": jnp.ones((2, 3)), "b": jnp.ones(2)}
    target = {"square": jnp.zeros((2, 2)), "wide": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    rules = [("square|wide", transposed)]
    params, report = transforms.transfer(source, target, on_mismatch=rules)
    np.testing.assert_array_equal(params["square"], source["square"].T)
    assert [a.path for a in report.adapted] == ["square", "wide"] and report.copied == ("b",)
    # 2 x 8 cells are as many as 4 x 4.
    grid = jnp.arange(16.0)[:, None]
    resized, _ = transforms.transfer(
        {"positions": grid},
        {"positions": jnp.zeros((16, 1))},
        on_mismatch=lambda leaf, shape, path: transforms.resize_positions(leaf, (2, 8)),
    )
    want = transforms.resize_positions(grid, (2, 8), old_grid=(4, 4))
    np.testing.assert_allclose(resized["positions"], want)
    assert not np.allclose(want, grid)


@pytest.mark.parametrize(
    "policy",
    [
        transforms.raise_on_mismatch,
        transforms.keep_on_mismatch,
        transforms.crop,
        transforms.pad,
        transforms.crop_or_pad,
        transforms.select_uniform,
        transforms.resize_linear,
        transforms.select_with(lambda size, n: np.arange(n)),
        lambda leaf, shape, path: None,
    ],
)
def test_a_leaf_that_fits_is_copied(policy: Any) -> None:
    source, target = {"w": jnp.arange(3.0)}, {"w": jnp.zeros(3)}
    params, report = transforms.transfer(source, target, on_mismatch=policy)
    assert report.copied == ("w",) and not report.adapted and not report.kept
    np.testing.assert_array_equal(params["w"], source["w"])


def test_a_square_weight_for_a_kernel_is_not_taken_for_granted():
    weight = np.arange(9.0, dtype=np.float32).reshape(3, 3)
    source, rename = {"fc.weight": weight}, [(r"(.*)\.weight", r"\1/kernel")]
    target = {"fc": {"kernel": np.zeros((3, 3), np.float32)}}

    def filled(policy: Any) -> Any:
        params, _ = transforms.transfer(source, target, rename=rename, on_mismatch=policy)
        return params["fc"]["kernel"]

    with pytest.raises(
        ValueError, match=r"fc/kernel: source\[3, 3\] fits both as it is and transposed"
    ):
        transforms.transfer(source, target, rename=rename)
    np.testing.assert_array_equal(filled(lambda leaf, shape, path: leaf.T), weight.T)
    np.testing.assert_array_equal(filled(lambda leaf, shape, path: None), weight)
    # A leaf that fits one way alone shows how the others stand.
    more = source | {"head.weight": np.ones((3, 2), np.float32)}
    expected = target | {"head": {"kernel": np.zeros((3, 2), np.float32)}}
    params, _ = transforms.transfer(more, expected, rename=rename)
    np.testing.assert_array_equal(params["fc"]["kernel"], weight)
