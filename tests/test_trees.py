"""Paths, selectors, masks, labels, partition and combine."""

from collections import OrderedDict
from typing import Any, NamedTuple

import equinox
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kdtl_jax import trees
from kdtl_jax.trees import Glob, all_of, any_of, none_of


def leaf() -> jax.Array:
    return jnp.zeros((2, 3), jnp.float32)


def network() -> dict[str, Any]:
    return {
        "encoder": {
            f"layer_{i}": {"kernel": leaf(), "bias": leaf()[0], "norm": {"scale": leaf()[0]}}
            for i in (1, 2, 10)
        },
        "head": {"kernel": leaf(), "bias": leaf()[0]},
    }


class Named(NamedTuple):
    value: Any


class Pair(NamedTuple):
    weight: Any
    bias: Any


def chosen(tree: Any, where: trees.Selector, **expect: Any) -> list[str]:
    mask = jax.tree.leaves(trees.mask(tree, where, **expect))
    return [path for path, hit in zip(trees.flatten(tree), mask, strict=True) if hit]


def test_paths_of_every_kind_of_key() -> None:
    tree = {
        "block": [leaf(), (leaf(), None)],
        "named": Named(leaf()),
        "pair": Pair(leaf(), leaf()),
        "ordered": OrderedDict(b=leaf(), a=leaf()),
    }
    assert list(trees.flatten(tree)) == [
        "block/0",
        "block/1/0",
        "named/value",
        "ordered/b",
        "ordered/a",
        "pair/weight",
        "pair/bias",
    ]
    assert list(trees.flatten({7: leaf(), 11: leaf()})) == ["7", "11"]


def test_an_entry_or_field_called_value_is_part_of_the_path() -> None:
    assert list(trees.flatten({"value": leaf()})) == ["value"]
    assert list(trees.flatten({"value": {"kernel": leaf()}})) == ["value/kernel"]
    assert list(trees.flatten({"a": {"query": leaf(), "value": leaf()}})) == ["a/query", "a/value"]
    assert chosen({"a": {"query": leaf(), "value": leaf()}}, ".*/value") == ["a/value"]
    assert trees.map_with_path(lambda path, _: path, {"a": {"value": 1}}) == {
        "a": {"value": "a/value"}
    }


def test_a_haiku_key_is_not_split() -> None:
    haiku = {"resnet/~/block_1/conv": {"w": leaf()}, "resnet/~/logits": {"w": leaf(), "b": leaf()}}
    assert list(trees.flatten(haiku)) == [
        "resnet/~/block_1/conv/w",
        "resnet/~/logits/b",
        "resnet/~/logits/w",
    ]
    assert chosen(haiku, "resnet/~/logits/.*") == ["resnet/~/logits/b", "resnet/~/logits/w"]
    selected, rest = trees.partition(haiku, Glob("**/w"))
    assert set(trees.combine(selected, rest)) == set(haiku)


def test_a_bare_leaf_has_the_empty_path() -> None:
    assert list(trees.flatten(leaf())) == [""]
    assert trees.mask(leaf(), trees.everything) is True
    assert trees.count(leaf()) == 6


def test_equal_paths_raise() -> None:
    tree = {"a": {"b": leaf()}, "a/b": leaf()}
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        trees.flatten(tree)


def test_paths_and_map_with_path_agree() -> None:
    tree = network()
    assert trees.paths(tree)["encoder"]["layer_2"]["kernel"] == "encoder/layer_2/kernel"
    named = trees.map_with_path(lambda path, a, b: (path, a.shape == b.shape), tree, tree)
    assert named["head"]["bias"] == ("head/bias", True)


def test_natural_sort() -> None:
    names = ["layer_10/b", "layer_2/a", "layer_1", "layer_2", "10", "9", "a"]
    assert sorted(names, key=trees.natural_key) == [
        "9", "10", "a", "layer_1", "layer_2", "layer_2/a", "layer_10/b",
    ]  # fmt: skip


@hypothesis.given(st.lists(st.text("ab/_019²٣", max_size=6), unique=True))
@hypothesis.example(["0", "00"])
@hypothesis.example(["²", "2"])
def test_natural_sort_is_a_total_order(names: list[str]) -> None:
    ordered = sorted(names, key=trees.natural_key)
    assert sorted(reversed(ordered), key=trees.natural_key) == ordered
    for a, b in zip(ordered, ordered[1:], strict=False):
        if a.isdecimal() and b.isdecimal():
            assert int(a) <= int(b)


def test_natural_sort_of_any_length_of_digits() -> None:
    names = ["a" + "9" * 5000, "a1" + "0" * 5000, "a3", "a٣", "a03", "a2"]
    assert sorted(names, key=trees.natural_key) == ["a2", "a03", "a3", "a٣", names[0], names[1]]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (r"head/.*", ["head/bias", "head/kernel"]),
        (r"head/kernel", ["head/kernel"]),
        (r".*layer_1/kernel", ["encoder/layer_1/kernel"]),  # whole paths: not layer_10
        (Glob("head/*"), ["head/bias", "head/kernel"]),
        (Glob("*/kernel"), ["head/kernel"]),  # one segment only
        (Glob("**/layer_?/kernel"), ["encoder/layer_1/kernel", "encoder/layer_2/kernel"]),
        (Glob("encoder/layer_[!12]*/bias"), []),
        (Glob("encoder/layer_[12]/bias"), ["encoder/layer_1/bias", "encoder/layer_2/bias"]),
        (Glob("**/scale"), [f"encoder/layer_{i}/norm/scale" for i in (1, 10, 2)]),
        (Glob("head/**"), ["head/bias", "head/kernel"]),
        (lambda path, leaf: leaf.ndim == 2 and "layer_2" in path, ["encoder/layer_2/kernel"]),
        (any_of("head/bias", Glob("**/layer_2/kernel")), ["encoder/layer_2/kernel", "head/bias"]),
        (all_of("head/.*", Glob("**/bias")), ["head/bias"]),
        (all_of("head/.*", none_of(".*bias")), ["head/kernel"]),
        (none_of("encoder/.*", "head/bias"), ["head/kernel"]),
    ],
)
def test_selectors(where: trees.Selector, expected: list[str]) -> None:
    assert chosen(network(), where, expect=None) == expected


def test_glob_special_characters_are_literal() -> None:
    tree = {"a.b": leaf(), "axb": leaf(), "a+(c)": leaf()}
    assert chosen(tree, Glob("a.b")) == ["a.b"]
    assert chosen(tree, Glob("a+(c)")) == ["a+(c)"]


def test_a_bool_tree_selects_itself() -> None:
    tree = network()
    mask = trees.mask(tree, "head/.*")
    assert trees.mask(tree, mask) == mask
    with pytest.raises(ValueError, match="structure of the parameters"):
        trees.mask(tree, {"head": True})
    with pytest.raises(ValueError, match="only be used on its own"):
        any_of(mask, "head/.*")
    with pytest.raises(ValueError, match="any_of"):
        trees.mask(tree, ["head/.*", "encoder/.*"])


def test_an_empty_match_names_the_nearest_paths() -> None:
    with pytest.raises(ValueError, match=r"'haed/kernel' matches no leaf.*'head/kernel'"):
        trees.mask(network(), "haed/kernel")
    with pytest.raises(ValueError, match=r"Glob\(pattern='\*\*/kernal'\).*kernel"):
        trees.mask(network(), Glob("**/kernal"))
    with pytest.raises(ValueError, match=r"none_of\(any_of\('x', .* matches no leaf.*kernel"):
        trees.mask(network(), none_of(any_of("x", Glob("**"))))
    with pytest.raises(ValueError, match="The tree has no leaves"):
        trees.mask({}, "head")
    with pytest.raises(ValueError, match=r"not a regular expression.*Glob\('\*/kernel'\)"):
        trees.mask(network(), "*/kernel")
    with pytest.raises(ValueError, match=r"^Glob\(pattern='\[z-a\]'\) is not a shell pattern"):
        trees.mask(network(), Glob("[z-a]"))


def test_expected_counts() -> None:
    assert len(chosen(network(), "head/.*", expect=2)) == 2
    with pytest.raises(ValueError, match="matches 2 of 11 leaves, expected 3"):
        trees.mask(network(), "head/.*", expect=3)
    with pytest.raises(ValueError, match="expected all of them"):
        trees.mask(network(), "head/.*", expect="all")
    assert chosen(network(), "nothing", expect=None) == []


def test_labels_first_rule_wins() -> None:
    tree = network()
    labels = trees.labels(tree, [("head/bias", "b"), ("head/.*", "h"), (Glob("**"), "rest")])
    assert labels["head"] == {"bias": "b", "kernel": "h"}
    assert set(jax.tree.leaves(labels["encoder"])) == {"rest"}
    mask = trees.mask(tree, "encoder/.*")
    by_mask = trees.labels(tree, [(mask, 0), (".*", 1)])
    assert by_mask["head"] == {"bias": 1, "kernel": 1}


def test_labels_refuse_unused_rules_and_uncovered_leaves() -> None:
    with pytest.raises(ValueError, match=r"rule 'head/bias' labels no leaf"):
        trees.labels(network(), [(".*", 0), ("head/bias", 1)])
    with pytest.raises(ValueError, match="'haed/.*' labels no leaf.*Nearest paths: 'head"):
        trees.labels(network(), [("haed/.*", 0), (".*", 1)])
    with pytest.raises(ValueError, match="no rule covers 'encoder/layer_1/bias'.* and 1 more"):
        trees.labels(network(), [("head/.*", 0)])
    defaulted = trees.labels(network(), [("head/.*", 0)], default=9)
    assert defaulted["encoder"]["layer_1"]["bias"] == 9


def mixed() -> dict[str, Any]:
    """Everything a parameter tree may hold."""
    return {
        "kernel": leaf(),
        "half": jnp.zeros(2, jnp.bfloat16),
        "complex": jnp.zeros(2, jnp.complex64),
        "numpy": np.ones(2, np.float32),
        "number": 1.5,
        "counter": jnp.zeros((), jnp.int32),
        "flag": True,
        "mask": jnp.ones(2, bool),
        "none": None,
        "empty": (),
        "name": "conv",
        "function": jax.nn.relu,
        "key": jax.random.key(0),
        "old_key": jax.random.PRNGKey(0),
        "tuple": (leaf(), [jnp.ones(1, jnp.float32), None]),
        "abstract": jax.ShapeDtypeStruct((4,), jnp.float32),
    }


def test_only_inexact_leaves_are_selected() -> None:
    tree = mixed()
    selected, rest = trees.partition(tree, trees.everything)
    held = [path for path, x in trees.flatten(selected).items() if x is not None]
    assert held == [
        "abstract", "complex", "half", "kernel", "number", "numpy", "tuple/0", "tuple/1/0",
    ]  # fmt: skip
    assert rest["key"] is tree["key"] and rest["function"] is tree["function"]
    assert rest["kernel"] is None


@pytest.mark.parametrize("where", [".*", "kernel", Glob("tuple/**"), "counter", lambda p, x: False])
def test_combine_inverts_partition(where: trees.Selector) -> None:
    tree = mixed()
    if callable(where):
        with pytest.raises(ValueError, match="matches no leaf"):
            trees.partition(tree, where)
        return
    selected, rest = trees.partition(tree, where)
    for whole in (trees.combine(selected, rest), trees.combine(rest, selected)):
        assert jax.tree.structure(whole) == jax.tree.structure(tree)
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True)
        assert all(a is b for a, b in pairs)


@hypothesis.given(st.lists(st.booleans(), min_size=11, max_size=11))
def test_any_mask_partitions_and_counts(bits: list[bool]) -> None:
    tree = network()
    mask = jax.tree.unflatten(jax.tree.structure(tree), bits)
    inverse = jax.tree.map(lambda b: not b, mask)
    selected, rest = trees.partition(tree, mask) if any(bits) else (None, tree)
    assert len(jax.tree.leaves(selected)) == sum(bits)
    assert len(jax.tree.leaves(rest)) == 11 - sum(bits)
    assert trees.count(tree, mask) + trees.count(tree, inverse) == trees.count(tree)


def test_partition_within_grad_and_jit() -> None:
    tree = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float32), "step": jnp.int32(3)}
    selected, rest = trees.partition(tree, "a")

    @jax.jit
    def loss(selected: Any, rest: Any) -> jax.Array:
        whole = trees.combine(selected, rest)
        return jnp.sum(whole["a"] * whole["b"]) * whole["step"].astype(jnp.float32)

    grad = jax.grad(loss)(selected, rest)
    assert grad["b"] is None and grad["step"] is None
    np.testing.assert_array_equal(grad["a"], [3, 3])


def test_count_is_of_parameters() -> None:
    assert trees.count(network()) == 3 * (6 + 3 + 3) + 6 + 3
    assert trees.count(network(), "head/.*") == 9
    assert trees.count({"step": jnp.zeros((), jnp.int32), "w": leaf()}) == 6
    large = {"w": jax.ShapeDtypeStruct((2**20, 2**13), jnp.bfloat16)}
    assert trees.count(large) == 2**33  # more than an int32 holds


def test_nearest_falls_back_to_the_first_names() -> None:
    assert trees.nearest("zzz", ["layer_10", "layer_2"], n=1)
    assert trees.nearest("head/kernal", list(trees.flatten(network())))[0] == "head/kernel"


def test_nnx_variables_and_linen_boxes_add_nothing_to_a_path() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert sorted(trees.flatten(nnx.state(model, nnx.Param))) == ["bias", "kernel"]
    assert sorted(trees.flatten(model)) == ["bias", "kernel"]
    held = nnx.State({"q": nnx.Param({"value": leaf(), "key": leaf()}), "value": nnx.Param(leaf())})
    assert sorted(trees.flatten(held)) == ["q/key", "q/value", "value"]
    named = trees.paths(held)
    assert named["value"].get_value() == "value" and named["q"].get_value()["key"] == "q/key"
    boxed = {"kernel": nn.Partitioned(leaf(), (None, "mlp")), "value": leaf()}
    assert list(trees.flatten(boxed)) == ["kernel", "value"]


@pytest.mark.parametrize(
    "where", [nnx.PathContains("q"), nnx.Not(nnx.PathContains("q")), nnx.Any("q"), nnx.Param]
)
def test_filters_of_nnx_are_no_selectors(where: Any) -> None:
    """`PathContains` tests a tuple; of a path as text it finds parts of names, too."""
    for selector in (lambda: where, lambda: any_of(where), lambda: none_of("k", where)):
        with pytest.raises(ValueError, match="is not a selector: paths are text here"):
            trees.mask({"q": leaf(), "queue": leaf()}, selector())


def test_equinox_fields_and_bool_modules() -> None:
    linear = equinox.nn.Linear(2, 3, key=jax.random.key(0))
    assert list(trees.flatten(linear)) == ["weight", "bias"]

    class Attention(equinox.Module):
        query: jax.Array
        value: jax.Array

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.query * x

    module = Attention(leaf(), leaf())
    assert list(trees.flatten({"a": module})) == ["a/query", "a/value"]
    # Such a module is callable, but as a selector it is a tree of bools, not a predicate.
    mask = trees.mask(module, "value")
    assert (mask.query, mask.value) == (False, True)
    assert trees.mask(module, mask).value is True and trees.count(module, mask) == 6
    selected, _ = trees.partition(module, mask)
    assert selected.query is None and selected.value is module.value
    assert trees.labels(module, [(mask, "hot"), (".*", "cold")]).query == "cold"
    with pytest.raises(ValueError, match="only be used on its own"):
        none_of(mask)
    with pytest.raises(ValueError, match="structure of the parameters"):
        trees.mask({"a": module}, mask)
    partial = jax.tree_util.Partial(lambda path, _: path == "query")
    assert chosen(module, partial) == ["query"]
