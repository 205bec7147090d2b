"""Replacing a head with proof, and carrying classes and tokens over by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import transforms, trees
from kdtl_jax._types import Params
from kdtl_jax.transforms import Axis


def _params(classes: int, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)

    def dense(n: int, m: int) -> dict[str, np.ndarray]:
        return {
            name: rng.normal(size=s).astype(np.float32)
            for name, s in (("kernel", (n, m)), ("bias", (m,)))
        }

    return {
        "body": {"layer_0": dense(3, 4), "layer_1": dense(4, 4)},
        "head": dense(4, classes),
        "step": np.int32(seed),
    }


@pytest.mark.parametrize(
    "head", ["head/.*", trees.Glob("head/*"), lambda path, leaf: "head" in path]
)
def test_exactly_the_head_is_new(head: Any) -> None:
    source, target = _params(10), _params(4, seed=1)
    params, report = transforms.replace_head(source, target, head, expect=2)
    assert [k.path for k in report.kept] == ["head/bias", "head/kernel", "step"]
    assert params["head"]["kernel"] is target["head"]["kernel"] and params["step"] == 1
    jax.tree.map(np.testing.assert_array_equal, params["body"], source["body"])
    bools = trees.mask(target, head)
    again, _ = transforms.replace_head(source, target, bools)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_body_that_would_stay_random_raises() -> None:
    source, target = _params(10), _params(4, seed=1)
    with pytest.raises(ValueError, match="head/bias: source\\[10\\]"):
        transforms.replace_head(source, target, "head/kernel")
    with pytest.raises(ValueError, match="matches 2 of 7 leaves, expected 1"):
        transforms.replace_head(source, target, "head/.*", expect=1)
    with pytest.raises(ValueError, match="Nearest paths"):
        transforms.replace_head(source, target, "hed/.*")
    with pytest.raises(ValueError, match="every leaf"):
        transforms.replace_head(source, target, ".*")
    del source["body"]["layer_1"]
    with pytest.raises(ValueError, match="lacks 2 leaves"):
        transforms.replace_head(source, target, "head/.*")


def test_a_head_of_another_name_is_dropped_by_a_rename() -> None:
    source = _params(10)
    source["fc"] = source.pop("head")
    target = _params(4, seed=1)
    with pytest.raises(ValueError, match="no place for 2 leaves"):
        transforms.replace_head(source, target, "head/.*")
    _, report = transforms.replace_head(source, target, "head/.*", rename=[("fc/.*", None)])
    assert report.unused == ("fc/bias", "fc/kernel")


SPEC = [("head/kernel", (None, "class")), ("head/bias", ("class",)), (".*", None)]


def test_classes_are_carried_by_name() -> None:
    source = _params(3)
    index = transforms.index_map(["cat", "dog", "ship"], ["ship", "frog", "cat"])
    np.testing.assert_array_equal(index, [2, -1, 0])
    mapped = transforms.remap_units(source, SPEC, {"class": index})
    kernel = source["head"]["kernel"]
    np.testing.assert_array_equal(mapped["head"]["kernel"][:, [0, 2]], kernel[:, [2, 0]])
    np.testing.assert_allclose(mapped["head"]["kernel"][:, 1], kernel.mean(1), rtol=1e-5)
    fresh = _params(3, seed=5)
    mapped = transforms.remap_units(source, SPEC, {"class": index}, fresh=fresh)
    np.testing.assert_array_equal(mapped["head"]["bias"][1], fresh["head"]["bias"][1])
    np.testing.assert_array_equal(mapped["head"]["bias"][0], source["head"]["bias"][2])
    assert mapped["body"]["layer_0"]["kernel"] is source["body"]["layer_0"]["kernel"]


def test_vocabularies_of_tied_and_structured_axes() -> None:
    params = {"embed": jnp.arange(8.0).reshape(4, 2), "out": jnp.arange(16.0).reshape(2, 8)}
    spec = [("embed", ("vocab", None)), ("out", (None, Axis("vocab", outer=2)))]
    index = transforms.index_map("abcd", "daxe")
    fresh = {"embed": -jnp.ones((4, 2)), "out": -jnp.ones((2, 8))}
    mapped = transforms.remap_units(params, spec, {"vocab": index}, fresh=fresh)
    np.testing.assert_array_equal(mapped["embed"], [[6, 7], [0, 1], [-1, -1], [-1, -1]])
    np.testing.assert_array_equal(mapped["out"][0], [3, 0, -1, -1, 7, 4, -1, -1])
    same = transforms.index_map("abcd", "abcd")
    jax.tree.map(
        np.testing.assert_array_equal, transforms.remap_units(params, spec, {"vocab": same}), params
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: transforms.index_map(["a", "a"], ["b"]), "old names must be distinct"),
        (lambda p: transforms.remap_units(p, SPEC, {"class": [0, 3]}), "must lie in"),
        (lambda p: transforms.remap_units(p, SPEC, {"classes": [0]}), "no axis is named"),
        (
            lambda p: transforms.remap_units(p, SPEC, {"class": [0, 1]}, fresh=p),
            "must have the new shapes",
        ),
        (lambda p: transforms.remap_units(p, SPEC, {"class": [0]}, fresh={}), "structure"),
    ],
)
def test_bad_maps(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(_params(3))
