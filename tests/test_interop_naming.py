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
