"""Penalties against NumPy in float64, their gradients, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import penalties


def tree(seed: int, dtype: str = "float32") -> dict:
    rng = np.random.default_rng(seed)
    return {
        "backbone": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), dtype)},
        "head": {"bias": jnp.asarray(rng.normal(size=4), dtype)},
        "count": jnp.asarray(3, jnp.int32),
    }


def test_l2_is_half_the_sum_of_squares_and_its_gradient_the_parameter() -> None:
    params = tree(0)
    floats = params["backbone"]["kernel"], params["head"]["bias"]  # the counter takes no part
    want = sum(np.square(np.asarray(x, np.float64)).sum() for x in floats) / 2
    np.testing.assert_allclose(penalties.l2(params), want, rtol=1e-6)
    head_only = jax.grad(lambda b: penalties.l2(params | {"head": {"bias": b}}, where="head/.*"))
    bias = params["head"]["bias"]
    np.testing.assert_allclose(head_only(bias), bias, rtol=1e-6)


def test_l2_sp_sees_only_what_is_selected() -> None:
    params, source = tree(0), tree(1)
    source = {"backbone": source["backbone"], "old_head": jnp.ones(7)}
    gap = np.asarray(params["backbone"]["kernel"]) - np.asarray(source["backbone"]["kernel"])
    value = penalties.l2_sp(params, source, where="backbone/.*")
    np.testing.assert_allclose(value, np.square(gap.astype(np.float64)).sum() / 2, rtol=1e-6)
    by_tree = {"backbone": {"kernel": True}, "head": {"bias": False}, "count": False}
    assert penalties.l2_sp(params, source, where=by_tree) == value
    assert penalties.l2_sp(params, params) == 0
    assert value.shape == () and value.dtype == jnp.float32


def test_l2_sp_half_precision_accumulates_in_float32() -> None:
    params = {"w": jnp.full((4096,), 1.0, jnp.bfloat16)}
    source = {"w": jnp.zeros((4096,), jnp.float32)}
    assert penalties.l2_sp(params, source) == 2048


def test_ewc_weighs_every_entry() -> None:
    params, anchor, fisher = tree(0), tree(1), jax.tree.map(jnp.abs, tree(2))
    want = 0.0
    for name, leaf in (("backbone", "kernel"), ("head", "bias")):
        p, a, f = (np.asarray(t[name][leaf], np.float64) for t in (params, anchor, fisher))
        want += 0.5 * (f * (p - a) ** 2).sum()
    np.testing.assert_allclose(penalties.ewc(params, anchor, fisher), want, rtol=1e-6)


def test_every_difference_is_named_with_a_near_miss() -> None:
    params = {"layer_1": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(3)}
    source = {"layer1": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones(1)}
    with pytest.raises(ValueError, match="lacks 'layer_1/kernel' .nearest there: 'layer1/kernel'"):
        penalties.l2_sp(params, source)
    with pytest.raises(ValueError, match=r"'b' is params\[3\], source\[1\]"):
        penalties.l2_sp(params, source, where="b")
    with pytest.raises(ValueError, match="matches no leaf"):
        penalties.l2(params, where="bakbone")
