"""Stochastic normalization and statistics that do not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import normalization


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_stoch_norm_is_batch_norm_where_drawn_and_the_running_one_elsewhere() -> None:
    x, one, zero = normal(0, 8, 3), jnp.ones(3), jnp.zeros(3)
    running = normalization.Running(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([1.0, 4.0, 9.0]))
    drawn = jnp.asarray([True, False, True])
    out, new = normalization.stoch_norm(x, one, zero, running, drawn)
    a = np.asarray(x, np.float64)
    batch = (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
    fixed = (a - np.asarray(running.mean)) / np.sqrt(np.asarray(running.var) + 1e-5)
    np.testing.assert_allclose(
        out, np.where([True, False, True], batch, fixed), rtol=1e-4, atol=1e-5
    )
    want = 0.9 * np.asarray(running.var) + 0.1 * a.var(0, ddof=1)
    np.testing.assert_allclose(new.var, want, rtol=1e-5)
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(
        lambda leaf: leaf.dtype, running
    )
    with pytest.raises(ValueError, match="one value per channel"):
        normalization.stoch_norm(x[:1], one, zero, running, drawn)
