"""Names and axes between PyTorch and JAX: invertible, complete, and right."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax.interop import naming
from kdtl_jax.interop.naming import Axes, Rule

RULES = (
    Rule("blocks.{i}.fc.weight", "blocks_{i}/fc/kernel", naming.linear),
    Rule("blocks.{i}.fc.bias", "blocks_{i}/fc/bias"),
    Rule("stem.weight", "stem/kernel", naming.conv2d),
    Rule("wave.weight", "wave/kernel", naming.conv1d),
    Rule("up.weight", "up/kernel", naming.conv_transpose2d),
)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.sets(st.integers(0, 3)), st.integers(0, 2**31))
def test_any_permutation_and_flip_is_undone(order: list[int], flip: set[int], seed: int):
    rules = (Rule("w", "k", Axes(tuple(order), tuple(flip))),)
    array = np.random.default_rng(seed).standard_normal((2, 3, 4, 5)).astype(np.float32)
    there = naming.from_torch({"w": array}, rules)
    np.testing.assert_array_equal(naming.to_torch(there, rules)["w"], array)
    np.testing.assert_array_equal(
        naming.from_torch(naming.to_torch({"k": array}, rules), rules)["k"], array
    )


def test_nothing_is_copied_and_shapes_can_be_abstract():
    array = np.ones((2, 3), np.float32)
    (kernel,) = naming.from_torch({"blocks.11.fc.weight": array}, RULES).values()
    assert np.shares_memory(kernel, array) and kernel.shape == (3, 2)
    shape = jax.ShapeDtypeStruct((8, 3, 5, 5), jnp.float32)
    out = naming.from_torch({"stem.weight": shape}, RULES)
    assert out["stem/kernel"].shape == (5, 5, 3, 8)
    assert naming.to_torch(out, RULES)["stem.weight"].shape == (8, 3, 5, 5)


def test_layer_numbers_carry_over_and_trees_may_be_nested():
    tree = {f"blocks_{i}": {"fc": {"bias": np.full(2, i)}} for i in range(12)}
    names = naming.to_torch(tree, RULES)
    assert names["blocks.10.fc.bias"].tolist() == [10, 10]
    assert naming.from_torch(names, RULES)["blocks_10/fc/bias"].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: naming.from_torch({"blocks.0.fc.wieght": 0}, RULES), "blocks.{i}.fc.weight"),
        (lambda: naming.to_torch({"blocks_0": {"fc": {"krnel": 0}}}, RULES), "no rule covers"),
        (lambda: naming.from_torch({"a.b": np.ones(1)}, [Rule("a.{i}", "x"), *RULES]), None),
        (
            lambda: naming.from_torch({"a": 1, "b": 2}, [Rule("a", "x"), Rule("b", "x")]),
            "both become 'x'",
        ),
        (
            lambda: naming.to_torch({"a": 1, "b": 2}, [Rule("x", "a"), Rule("x", "b")]),
            "both become",
        ),
        (
            lambda: naming.from_torch({"stem.weight": np.ones((2, 3))}, RULES),
            r"shape \[2, 3\], but its rule permutes 4 axes",
        ),
    ],
)
def test_incomplete_or_contradictory_rules_raise(call: Any, says: str | None):
    if says is None:
        assert list(call()) == ["x"]
        return
    with pytest.raises(ValueError, match=says):
        call()


def test_buffers_are_dropped_only_when_named():
    tensors = {"step": np.ones(1), "blocks.0.fc.bias": np.ones(2)}
    assert list(naming.from_torch(tensors, RULES, ignore=["step"])) == ["blocks_0/fc/bias"]
    with pytest.raises(ValueError, match="'step'"):
        naming.from_torch(tensors, RULES)


def test_convolutions_compute_what_torch_defines():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 5, 6, 2))
    weight = rng.standard_normal((3, 2, 2, 3))  # [out, in, kh, kw]
    kernel = naming.from_torch({"stem.weight": weight}, RULES)["stem/kernel"]
    ours = nn.Conv(3, (2, 3), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, jnp.asarray(x, jnp.float32)
    )
    expected = np.zeros((1, 4, 4, 3))
    for i in range(4):
        for j in range(4):
            patch = x[:, i : i + 2, j : j + 3, :]
            expected[:, i, j] = np.einsum("bhwc,ochw->bo", patch, weight)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-5)


def test_transposed_convolutions_compute_what_torch_defines():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 4, 2))
    weight = rng.standard_normal((2, 5, 3, 2))  # [in, out, kh, kw]
    kernel = naming.from_torch({"up.weight": weight}, RULES)["up/kernel"]
    ours = nn.ConvTranspose(5, (3, 2), strides=(2, 2), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, jnp.asarray(x, jnp.float32)
    )
    expected = np.zeros((1, 2 * 2 + 3, 2 * 3 + 2, 5))
    for i in range(3):
        for j in range(4):
            spread = np.einsum("bc,cohw->bhwo", x[:, i, j], weight)
            expected[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2] += spread
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.sets(st.integers(0, 3)), st.integers(0, 2))
def test_any_split_and_join_is_undone(order: list[int], flip: set[int], joined: int):
    join = [(2, 1, 1), (1, 3), (4,)][joined]
    axes = Axes(tuple(order), tuple(flip), split=(None, (2, 3), None), join=join)
    array = np.random.default_rng(0).standard_normal((5, 6, 4))
    rules = (Rule("w", "k", axes),)
    there = naming.from_torch({"w": array}, rules)
    if joined == 2:  # two axes of unknown length in one: not undone, but refused
        with pytest.raises(ValueError, match="its rule joins"):
            naming.to_torch(there, rules)
        return
    unknown = {0, 3}
    groups = np.split(np.asarray(order), np.cumsum(join)[:-1])
    if any(len(unknown & set(map(int, group))) > 1 for group in groups):
        return
    np.testing.assert_array_equal(naming.to_torch(there, rules)["w"], array)
    abstract = jax.eval_shape(lambda: jnp.zeros((5, 6, 4)))
    assert naming.from_torch({"w": abstract}, rules)["k"].shape == there["k"].shape
    assert naming.to_torch({"k": jax.eval_shape(lambda: there["k"])}, rules)["w"].shape == (5, 6, 4)


def test_a_linear_layer_behind_a_flattened_map():
    rng = np.random.default_rng(2)
    image = rng.standard_normal((2, 4, 3, 5))  # [batch, channels, height, width]
    weight = rng.standard_normal((7, 4 * 3 * 5))
    rules = (Rule("fc.weight", "fc/kernel", naming.flattened(4, 3, 5)),)
    kernel = naming.from_torch({"fc.weight": weight}, rules)["fc/kernel"]
    ours = image.transpose(0, 2, 3, 1).reshape(2, -1) @ kernel
    np.testing.assert_allclose(ours, image.reshape(2, -1) @ weight.T)
    np.testing.assert_array_equal(
        naming.to_torch({"fc/kernel": kernel}, rules)["fc.weight"], weight
    )
    with pytest.raises(ValueError, match=r"splits an axis into \[4, 3, 5\]"):
        naming.from_torch({"fc.weight": np.ones((7, 61))}, rules)
    with pytest.raises(ValueError, match="its rule joins"):
        naming.to_torch({"fc/kernel": np.ones((61, 7))}, rules)


def test_attention_kernels_with_an_axis_of_heads():
    weight = np.arange(24.0).reshape(6, 4)  # [heads * width, in]
    rules = (Rule("q.weight", "q/kernel", Axes((2, 0, 1), split=((2, 3), None))),)
    kernel = naming.from_torch({"q.weight": weight}, rules)["q/kernel"]
    assert kernel.shape == (4, 2, 3)
    np.testing.assert_array_equal(kernel.reshape(4, 6), weight.T)
    np.testing.assert_array_equal(naming.to_torch({"q/kernel": kernel}, rules)["q.weight"], weight)


def _network(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {n: {"kernel": np.zeros(s), "bias": np.zeros(s[-1])} for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (_network(conv=(3, 3, 3, 4)), r"conv/kernel \[3, 3, 3, 4\]: naming.conv2d, "),
        (_network(wave=(3, 2, 4)), "wave/kernel .*naming.conv_transpose1d"),
        (_network(cube=(3, 3, 3, 2, 4)), "cube/kernel .*naming.conv3d"),
        (_network(conv=(3, 3, 1, 8), fc=(32, 32), head=(32, 2)), r"fc/kernel \[32, 32\]"),
        # Inputs that are another layer's outputs may be a flattened map all the same.
        (_network(conv=(3, 3, 1, 8), fc=(32, 5), side=(7, 32)), r"fc/kernel \[32, 5\]"),
        (_network(conv=(3, 3, 1, 8), wide=(3, 3, 8, 32), fc=(32, 5)), r"fc/kernel \[32, 5\]"),
        (_network(seed=(5, 72), conv=(3, 3, 8, 1)), r"seed/kernel \[5, 72\]: naming.unflattened"),
        ({"norm": {"scale": np.zeros((4, 4, 8))}}, r"norm/scale \[4, 4, 8\]: Axes"),
        # A color image that is flattened before the first layer, without any convolution.
        (_network(fc1=(90, 8), fc2=(8, 10)), r"fc1/kernel \[90, 8\]: naming.flattened"),
        (_network(fc1=(3072, 64), fc2=(64, 10)), r"fc1/kernel \[3072, 64\]"),
        # An autoencoder and a generator of color images.
        (_network(a=(192, 7), b=(7, 192)), r"a/kernel.*b/kernel \[7, 192\]: naming.unflattened"),
        (_network(a=(5, 8), b=(8, 48)), r"b/kernel \[8, 48\]: naming.unflattened"),
        (_network(seed=(5, 64), up=(3, 3, 4, 1)), r"seed/kernel \[5, 64\]: naming.unflattened"),
        # Maps of 4 and 6 channels, joined and flattened.
        (_network(a=(3, 3, 1, 4), b=(3, 3, 1, 6), fc=(50, 2)), r"fc/kernel \[50, 2\]"),
        # Matrices of another name: nothing says which way round they are.
        ({"a": {"w": np.zeros((4, 4))}}, r"a/w \[4, 4\]: naming.same, naming.linear"),
        ({"a": {"weight": np.zeros((4, 2, 4))}}, r"a/weight \[4, 2, 4\]: naming.same or"),
        # One channel to one, which a transposed convolution stores backward.
        ({"a": {"weight": np.zeros((1, 1, 3))}}, r"a/weight \[1, 1, 3\]: naming.same or"),
    ],
)
def test_the_convention_refuses_to_guess_axes(tree: Any, named: str):
    with pytest.raises(ValueError, match=f"(?s)cannot be inferred from their shapes.*{named}"):
        naming.convention(tree)


def test_the_convention_needs_no_words_where_shapes_tell():
    tables = {"words": {"embedding": np.zeros((48, 48))}, "cls": np.zeros((1, 1, 48))}
    for tree in (
        _network(fc1=(784, 48), fc2=(48, 10)),  # a gray image; 48 is another layer's
        _network(fc1=(64, 30), fc2=(30, 12)),  # twelve classes
        _network(up=(48, 192), down=(192, 48)) | tables,  # a Transformer's
    ):
        assert len(naming.convention(tree)) == len(jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "axes",
    [
        Axes((0, 0)),
        Axes((1, 2)),
        Axes((1, 0), flip=(-1,)),
        Axes((1, 0), flip=(2,)),
        Axes((1, 0), join=(1,)),
        Axes((1, 0), join=(2, 1)),
        Axes((1, 0), split=(None, (2, 2))),
    ],
)
def test_axes_that_do_not_name_each_axis_once_are_refused(axes: Axes):
    rules = [Rule("w", "k", axes)]
    for wrong in (
        lambda: naming.from_torch({"w": np.ones((4, 4))}, rules),
        lambda: naming.from_torch({"w": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, rules),
        lambda: naming.to_torch({"k": np.ones((4, 4))}, rules),
    ):
        with pytest.raises(ValueError, match="rule of '.' must name each of its . axes once"):
            wrong()


def test_the_convention_takes_axes_that_are_said():
    tree = _network(conv=(3, 3, 1, 8), up=(2, 2, 8, 8), fc=(32, 16), head=(16, 2))
    rules = naming.convention(
        {"params": tree},
        axes=[
            (".*/conv/kernel", naming.conv2d),
            (".*/up/kernel", naming.conv_transpose2d),
            (".*/fc/kernel", naming.flattened(8, 2, 2)),
            (".*/head/kernel", naming.linear),  # its 16 inputs might be two places of 8 channels
        ],
    )
    axes = {rule.torch: rule.axes for rule in rules}
    assert axes["conv.weight"] == naming.conv2d and axes["head.weight"] == naming.linear
    assert axes["up.weight"] == naming.conv_transpose2d
    assert naming.to_torch({"params": tree}, rules)["fc.weight"].shape == (16, 32)
    # Behind global pooling the inputs are the channels: nothing to say.
    pooled = _network(conv=(3, 3, 1, 8), head=(8, 2))
    assert len(naming.convention(pooled, axes=[("conv/kernel", naming.conv2d)])) == 4
    with pytest.raises(ValueError, match="labels no leaf"):
        naming.convention(pooled, axes=[("cnov/kernel", naming.conv2d)])


def test_a_linear_layer_that_makes_a_map():
    rng = np.random.default_rng(3)
    x, weight, bias = (rng.standard_normal(s) for s in ((2, 6), (8 * 3 * 5, 6), (8 * 3 * 5,)))
    tree = _network(seed=(6, 120), conv=(3, 3, 8, 1))
    axes = [("conv/kernel", naming.conv2d), ("seed/kernel", naming.unflattened(8, 3, 5))]
    with pytest.raises(ValueError, match=r"seed/bias \[120\]: naming.unflattened_vector"):
        naming.convention(tree, axes=axes)
    rules = naming.convention(tree, axes=[*axes, ("seed/bias", naming.unflattened_vector(8, 3, 5))])
    got = naming.from_torch({"seed.weight": weight, "seed.bias": bias}, rules)
    ours = (x @ got["seed/kernel"] + got["seed/bias"]).reshape(2, 3, 5, 8)
    torchs = (x @ weight.T + bias).reshape(2, 8, 3, 5).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, torchs)
    np.testing.assert_array_equal(naming.to_torch(got, rules)["seed.weight"], weight)
    np.testing.assert_array_equal(naming.to_torch(got, rules)["seed.bias"], bias)


def test_transposed_convolutions_of_any_rank_are_undone():
    axes = {3: naming.conv_transpose1d, 4: naming.conv_transpose2d, 5: naming.conv_transpose3d}
    for rank, each in axes.items():
        weight = np.random.default_rng(rank).standard_normal(tuple(range(2, 2 + rank)))
        kernel = naming.from_torch({"w": weight}, [Rule("w", "k", each)])["k"]
        assert kernel.shape == (*weight.shape[2:], *weight.shape[:2])
        np.testing.assert_array_equal(
            naming.to_torch({"k": kernel}, [Rule("w", "k", each)])["w"], weight
        )


def test_a_norm_of_a_flattened_map_is_asked_for_without_a_linear_layer():
    """`nn.LayerNorm(8 * 3 * 5)` behind a flatten; not one of as many numbers as a layer makes."""
    axes = [("conv/kernel", naming.conv2d)]
    tree = _network(conv=(3, 3, 1, 8)) | {"norm": {"scale": np.zeros(120), "bias": np.zeros(120)}}
    with pytest.raises(
        ValueError, match=r"(?s)norm/bias \[120\]: naming.unflattened_vector.*scale"
    ):
        naming.convention(tree, axes=axes)
    places = [*axes, ("norm/.*", naming.unflattened_vector(8, 3, 5))]
    assert len(naming.convention(tree, axes=places)) == 4
    # Concatenated maps of a DenseNet, pooled before the head, which a rule says is linear.
    dense = tree | _network(head=(120, 2))
    head = [*axes, ("head/kernel", naming.linear)]
    assert {rule.axes for rule in naming.convention(dense, axes=head) if "norm" in rule.jax} == {
        naming.same
    }


def test_a_square_kernel_beside_one_that_is_kept_is_asked_for():
    """GPT-2 stores `[in, out]`; what a rule leaves out would be transposed, and fit."""
    tree = _network(fc=(48, 192), proj=(192, 48), square=(48, 48)) | {
        "words": {"embedding": np.zeros((50, 48))}
    }
    axes = [("(fc|proj)/kernel", naming.same)]
    with pytest.raises(ValueError, match=r"square/kernel \[48, 48\]: naming.same, as another"):
        naming.convention(tree, axes=axes)
    assert len(naming.convention(tree, axes=[*axes, ("square/kernel", naming.linear)])) == 7
