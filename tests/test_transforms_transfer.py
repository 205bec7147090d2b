"""`transfer`, `plan`, `apply`: exactness by default, every difference by rule, nothing silent."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfer_trees import assert_equal, dense_tree

from kdtl_jax import transforms, trees
from kdtl_jax._types import Array, Params

# --- the identity --------------------------------------------------------------------------------


def _odddense_tree() -> Params:
    return {
        "list": [jnp.ones(2), (jnp.zeros((1, 2), jnp.bfloat16), None)],
        "3": {"w": jnp.ones((), jnp.float16)},
        "complex": jnp.ones(2, jnp.complex64),
        "count": jnp.array(7, jnp.uint32),
        "key": jax.random.key(1),
        "activation": jax.nn.relu,
        "name": "net",
        "flag": np.array([True]),
        "numpy": np.arange(3, dtype=np.float32),
    }


def test_transfer_to_itself_is_the_identity_and_reports_everything() -> None:
    tree = _odddense_tree()
    params, report = transforms.transfer(tree, tree)
    assert report.fraction == 1.0 and not report.cast and not report.untied
    assert {k.path for k in report.kept} == {"count", "key", "activation", "name", "flag"}
    for name in ("count", "key", "activation", "name", "flag"):
        assert params[name] is tree[name]
    for path, leaf in trees.flatten(params).items():
        if trees.is_inexact(leaf):
            np.testing.assert_array_equal(leaf, trees.flatten(tree)[path])
            assert leaf.dtype == trees.flatten(tree)[path].dtype, path
    assert isinstance(params["numpy"], np.ndarray) and params["numpy"] is not tree["numpy"]


def test_the_target_is_the_source_bit_for_bit() -> None:
    source, target = dense_tree(seed=0), dense_tree(seed=1)
    params, report = transforms.transfer(source, target)
    assert_equal(params, source)
    assert report.copied == tuple(trees.flatten(target)) and report.fraction == 1


@given(alpha=st.floats(-2, 2, width=32).filter(lambda a: a != 1))
def test_the_target_is_alpha_times_the_source(alpha: float) -> None:
    source, target = dense_tree(seed=0), dense_tree(seed=1)
    params, report = transforms.transfer(source, target, alpha=alpha)
    assert_equal(params, transforms.scale(source, alpha))
    assert len(report.scaled) == len(trees.flatten(target)) and report.fraction == 1


def test_a_copy_is_a_copy() -> None:
    source = dense_tree()
    params, _ = transforms.transfer(source, dense_tree(seed=1))
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # what donating the student does
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(source))


def test_the_targets_dtype_is_kept_and_the_cast_reported() -> None:
    target = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense_tree(seed=1))
    params, report = transforms.transfer(dense_tree(), target)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {(c.source_dtype, c.target_dtype) for c in report.cast} == {("float32", "bfloat16")}
    with pytest.raises(ValueError, match="complex64 cannot become float32"):
        transforms.transfer({"w": jnp.ones(2, jnp.complex64)}, {"w": jnp.ones(2)})


@st.composite
def _trees(draw: st.DrawFn) -> Any:
    def leaf() -> st.SearchStrategy[Any]:
        shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
        dtypes = st.sampled_from(["float32", "float16", "bfloat16", "complex64", "int32", "bool"])
        kinds = st.sampled_from([np.asarray, jnp.asarray])
        return st.builds(
            lambda shape, dtype, kind: kind(np.full(shape, 2).astype(jnp.dtype(dtype))),
            shapes,
            dtypes,
            kinds,
        )

    keys = st.text("ab0/.", min_size=1, max_size=3)
    return draw(
        st.recursive(
            leaf() | st.sampled_from([None, "text", jax.nn.relu]),
            lambda child: (
                st.lists(child, max_size=3)
                | st.dictionaries(keys, child, max_size=3)
                | st.tuples(child, child)
            ),
            max_leaves=8,
        ).map(lambda tree: {"root": tree, "w": jnp.ones(2)})
    )


@given(_trees())
def test_no_tree_is_changed_by_a_transfer_to_itself(tree: Any) -> None:
    try:
        flat = trees.flatten(tree)
    except ValueError:
        return  # two leaves of one canonical path, which is refused
    params, report = transforms.transfer(tree, tree, alpha=[("w", 2.0)])
    assert jax.tree.structure(params) == jax.tree.structure(tree) and report.fraction == 1
    for path, got in trees.flatten(params).items():
        want = flat[path]
        if not hasattr(want, "dtype"):
            assert got is want
            continue
        assert (got.shape, got.dtype, type(got)) == (want.shape, want.dtype, type(want))
        np.testing.assert_array_equal(got, 2 * np.ones(2) if path == "w" else want)


# --- names ---------------------------------------------------------------------------------------


def test_missing_and_extra_are_all_named_with_the_nearest_path() -> None:
    source, target = dense_tree(layers=2), dense_tree(layers=3, seed=1)
    source["old"] = {"w": jnp.ones(2)}
    with pytest.raises(ValueError) as caught:
        transforms.transfer(source, target)
    message = str(caught.value)
    for words in ("layer_2/kernel", "layer_2/bias", "old/w", "on_missing='keep'", "nearest"):
        assert words in message, words
    params, report = transforms.transfer(source, target, on_missing="keep", on_extra="ignore")
    assert report.missing == ("layer_2/bias", "layer_2/kernel") and report.extra == ("old/w",)
    assert params["layer_2"]["kernel"] is target["layer_2"]["kernel"]
    assert report.fraction == pytest.approx(1 - 20 / trees.count(target))


def test_where_acts_here_and_asks_for_nothing_else() -> None:
    source, target = dense_tree(classes=7), dense_tree(classes=3, seed=1)
    source["projector"] = jnp.ones(2)
    params, report = transforms.transfer(source, target, where="layer_.*")
    assert_equal(params["layer_0"], source["layer_0"])
    assert params["head"]["kernel"] is target["head"]["kernel"]
    assert [k.path for k in report.kept] == ["head/bias", "head/kernel"]
    assert set(report.unused) == {"head/bias", "head/kernel", "projector"}
    bools = trees.mask(target, "layer_.*")
    with pytest.raises(ValueError, match="no place for 1 leaves"):
        transforms.transfer(source, target, where=bools)
    assert_equal(transforms.transfer(source, target, where=bools, on_extra="ignore")[0], params)


def test_renames() -> None:
    source = {"encoder": dense_tree(), "junk": jnp.ones(1)}
    rules = [("junk", None), (r"encoder/layer_(\d)/(.*)", r"layer_\1/\2"), (r"encoder/(.*)", r"\1")]
    params, report = transforms.transfer(source, dense_tree(seed=1), rename=rules)
    assert_equal(params, source["encoder"])
    assert report.unused == ("junk",)
    swap = {"head": "layer_0", "layer_0": "head"}
    square = dense_tree(classes=4)
    params, _ = transforms.transfer(
        square, dense_tree(classes=4, seed=1), rename=lambda path: _swapped(path, swap)
    )
    assert_equal(params["head"], square["layer_0"])


def _swapped(path: str, names: dict[str, str]) -> str:
    first, rest = path.split("/", 1)
    return f"{names.get(first, first)}/{rest}"


def test_one_leaf_to_several_places() -> None:
    source, target = {"w": jnp.ones(2)}, {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    params, _ = transforms.transfer(source, target, rename=lambda _: ("a", "b"))
    assert_equal(params, {"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="no place for 1 leaves"):  # not even for one of its copies
        transforms.transfer(source, {"a": jnp.zeros(2)}, rename=lambda _: ("a", "b"))


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        ([("hed/(.*)", r"top/\1")], "matches no path"),
        ([("layer_0/.*", "x"), ("head/.*", "y")], "sends both"),
        ([("layer_./(.*)", r"body/\1")], "sends both"),
        ([("layer_0/(.*)", r"layer_1/\1"), ("layer_1/(.*)", r"layer_0/\1")], "cycle"),
        ([("layer_(", "x")], "regular expression"),
        ([("head/(.*)", r"head/\2")], "filled in"),
        ([("head/(.*)", r"layer_0/\1")], "sends both"),
        (lambda path: 3, "must return a path"),
    ],
)
def test_bad_renames(rename: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transforms.transfer(dense_tree(), dense_tree(seed=1), rename=rename)


def test_an_unused_later_rule_raises() -> None:
    with pytest.raises(ValueError, match="earlier rules take all"):
        transforms.plan_transfer(
            dense_tree(), dense_tree(), rename=[("(.*)", r"\1"), ("head/(.*)", r"\1")]
        )


def test_int_and_string_keys_meet_but_not_in_onedense_tree() -> None:
    params, _ = transforms.transfer({"0": jnp.ones(2)}, {0: jnp.zeros(2)})
    np.testing.assert_array_equal(params[0], [1, 1])
    params, _ = transforms.transfer({"w": [jnp.ones(2)]}, {"w": {"0": jnp.zeros(2)}})
    np.testing.assert_array_equal(params["w"]["0"], [1, 1])
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        transforms.transfer({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="keys must be of one type"):
        transforms.transfer({0: jnp.ones(2), "0": jnp.ones(2)}, {"0": jnp.ones(2)})


# --- what else leaves can be ---------------------------------------------------------------------


def test_abstract_targets_must_be_filled() -> None:
    source = dense_tree()
    abstract = jax.eval_shape(lambda: dense_tree(seed=1))
    params, report = transforms.transfer(source, abstract)
    assert_equal(params, source)
    assert report.fraction == 1
    with pytest.raises(ValueError, match="would stay abstract"):
        transforms.transfer(source, abstract, where="layer.*")
    with pytest.raises(ValueError, match="'head/bias'.* would stay abstract"):
        dropped = [("head/.*", None)]
        transforms.transfer(source, abstract, rename=dropped, on_missing="keep")
    counter = {**abstract, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    with pytest.raises(ValueError, match="'count'.*never transferred"):
        transforms.transfer({**source, "count": jnp.array(3)}, counter)
    with pytest.raises(ValueError, match="abstract"):
        transforms.transfer(abstract, source)


def test_prng_keys_and_counters_stay_the_targets() -> None:
    source = {"w": jnp.ones(2), "rngs": {"key": jax.random.key(0), "count": jnp.uint32(9)}}
    target = {"w": jnp.zeros(2), "rngs": {"key": jax.random.key(5), "count": jnp.uint32(0)}}
    params, report = transforms.transfer(source, target, alpha=0.5)
    assert params["rngs"]["key"] is target["rngs"]["key"] and params["rngs"]["count"] == 0
    np.testing.assert_array_equal(params["w"], [0.5, 0.5])
    assert report.fraction == 1 and report.kept[0].reason == "not a floating-point array"


def test_a_quantized_source_leaf_counts_as_missing() -> None:
    with pytest.raises(ValueError, match="the source's is int8"):
        transforms.transfer({"w": jnp.ones(2, jnp.int8)}, {"w": jnp.ones(2)})


def test_nan_is_reported_by_path() -> None:
    source = dense_tree()
    source["head"]["bias"] = source["head"]["bias"].at[1].set(jnp.nan)
    source["layer_0"]["bias"] = jnp.full(4, 1e30)
    target = dense_tree(seed=1)
    target["layer_0"]["bias"] = jnp.zeros(4, jnp.float16)  # 1e30 overflows here
    _, report = transforms.transfer(source, target)
    assert report.nonfinite == ("head/bias", "layer_0/bias")
    assert "NaN or inf" in str(report)
    assert transforms.transfer(source, target, check_finite=False)[1].nonfinite == ()


def test_ties_survive_where_the_source_is_tied_and_are_reported_where_not() -> None:
    shared, fresh = jnp.ones((3, 2)), jnp.zeros((3, 2))
    target = {"embed": fresh, "head": fresh}
    params, report = transforms.transfer({"embed": shared, "head": shared}, target)
    assert params["embed"] is params["head"] and report.untied == ()
    params, report = transforms.transfer({"embed": shared, "head": 2 * shared}, target)
    assert report.untied == (("embed", "head"),) and "untied" in str(report)
    # Tied in the source alone: two arrays, so that both can be donated.
    params, _ = transforms.transfer(
        {"embed": shared, "head": shared}, {"embed": fresh, "head": jnp.zeros((3, 2))}
    )
    assert params["embed"] is not params["head"]


def test_a_replicated_student_may_be_donated() -> None:
    """Of its copies on four devices, none is the teacher's array."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    source = {"w": jnp.ones(8)}
    params, _ = transforms.transfer(source, {"w": jax.device_put(jnp.zeros(8), sharding)})
    jax.jit(lambda params: params["w"] + 1, donate_argnums=0)(params)
    assert float(jnp.sum(source["w"])) == 8


def test_numpy_float64_targets_stay_float64_without_x64() -> None:
    source, target = {"w": np.array([1 / 3])}, {"w": np.zeros(1)}
    params, report = transforms.transfer(source, target)
    np.testing.assert_array_equal(params["w"], source["w"])
    assert params["w"].dtype == np.float64 and not report.cast


def test_a_sharded_target_gets_sharded_values() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    source = {"w": jnp.arange(8.0)}
    for target in (
        {"w": jax.device_put(jnp.zeros(8), sharding)},
        {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)},
    ):
        params, report = transforms.transfer(source, target)
        assert params["w"].sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_array_equal(params["w"], source["w"])
        assert report.nonfinite == ()
    params, _ = transforms.transfer(
        {"w": jax.device_put(source["w"], sharding)}, {"w": jnp.ones(8)}
    )
    assert params["w"].sharding.is_equivalent_to(sharding, 1)


def test_apply_keeps_shardings_within_one_program() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    source = {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), rows)}
    target = {"w": jax.device_put(jnp.zeros((4, 2)), rows)}
    planned = transforms.plan_transfer(
        source, target, on_mismatch=transforms.select_uniform, alpha=2.0
    )
    small = jax.jit(lambda s, t: transforms.apply_plan(planned, s, t), out_shardings={"w": rows})
    got = small(source, target)["w"]
    assert got.sharding.is_equivalent_to(rows, 2) and len(got.addressable_shards) == 4
    np.testing.assert_array_equal(got, 2 * np.arange(32.0).reshape(8, 4)[::2, ::2])


# --- plan and apply ------------------------------------------------------------------------------


def test_apply_is_jit_vmap_and_grad_able() -> None:
    source, target = dense_tree(width=4), dense_tree(width=2, seed=1)
    planned = transforms.plan_transfer(source, target, on_mismatch=transforms.select_uniform)
    eager = transforms.apply_plan(planned, source, target)
    assert_equal(jax.jit(lambda s, t: transforms.apply_plan(planned, s, t))(source, target), eager)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), source)
    many = jax.vmap(lambda s: transforms.apply_plan(planned, s, target))(stacked)
    assert_equal(jax.tree.map(lambda x: x[0], many), eager)

    def loss(alpha: Array, source: Params) -> Array:
        params, _ = transforms.transfer(
            source, target, alpha=alpha, on_mismatch=transforms.select_uniform
        )
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, params))

    slope, kernels = jax.grad(loss, argnums=(0, 1))(jnp.float32(1.0), source)
    np.testing.assert_allclose(slope, loss(jnp.float32(1.0), source), rtol=1e-5)
    np.testing.assert_array_equal(
        kernels["layer_0"]["kernel"], np.kron(np.eye(2) * 0 + 1, [[1, 0], [0, 0]])
    )
    sweep = jax.vmap(lambda a: loss(a, source))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(sweep[0], 0.5 * sweep[1], rtol=1e-6)


def test_apply_refuses_trees_that_were_not_planned_for() -> None:
    planned = transforms.plan_transfer(dense_tree(), dense_tree())
    with pytest.raises(ValueError, match="source is not the one"):
        transforms.apply_plan(planned, dense_tree(width=5), dense_tree())
    with pytest.raises(ValueError, match="target is not the one.*layer_2"):
        transforms.apply_plan(planned, dense_tree(layers=3), dense_tree(layers=3))


def test_seventy_billion_parameters_are_planned_without_memory() -> None:
    def model(width: int, layers: int) -> Params:
        kernel = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
        wide = jax.ShapeDtypeStruct((width, 3 * width), jnp.bfloat16)
        block = {"q": kernel, "k": kernel, "v": kernel, "o": kernel, "up": wide, "gate": wide}
        return {f"layers_{i}": {**block, "norm": kernel} for i in range(layers)}

    source, target = model(9216, 80), model(4608, 80)
    assert trees.count(source) > 70e9
    before = len(jax.live_arrays())
    report = transforms.plan_transfer(source, target, on_mismatch=transforms.select_uniform).report
    assert len(jax.live_arrays()) <= before  # seconds: benchmarks/transforms_bandwidth.py
    assert report.fraction == 1 and len(report.adapted) == 560
    assert len(str(report).splitlines()) == 8  # layers collapse
