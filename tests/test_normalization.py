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


@pytest.mark.parametrize("shape", [(6, 3), (6, 2, 3)])
def test_padding_enters_neither_the_batch_nor_the_running_statistics(
    shape: tuple[int, ...],
) -> None:
    x, one, zero = normal(0, *shape), jnp.ones(3), jnp.zeros(3)
    running = normalization.Running(jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([1.0, 4.0, 9.0]))
    drawn = jnp.asarray([True, False, True])
    where = jnp.asarray([True, True, False, True, False, True])
    garbage = x.at[2].set(jnp.nan).at[4].set(-1e6)

    @jax.jit
    def run(x: jnp.ndarray, where: jnp.ndarray) -> tuple[jnp.ndarray, normalization.Running]:
        return normalization.stoch_norm(x, one, zero, running, drawn, where=where)

    out, new = run(garbage, where)
    short, of_real = normalization.stoch_norm(x[where], one, zero, running, drawn)
    np.testing.assert_allclose(out[where], short, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, of_real)
    weights = normal(3, *shape)

    def total(x: jnp.ndarray, where: jnp.ndarray | None, weights: jnp.ndarray) -> jnp.ndarray:
        y = normalization.stoch_norm(x, one, zero, running, drawn, where=where)[0]
        return jnp.sum(weights * (y if where is None else jnp.where(drop(where, y), y, 0)))

    def drop(where: jnp.ndarray, y: jnp.ndarray) -> jnp.ndarray:
        return where.reshape(-1, *[1] * (y.ndim - 1))

    gradient = jax.grad(total)(garbage, where, weights)
    np.testing.assert_allclose(
        gradient[where], jax.grad(total)(x[where], None, weights[where]), rtol=1e-3, atol=1e-5
    )
    assert not gradient[~where].any()
    _, kept = run(garbage[:, ...], jnp.zeros(6, jnp.bool_))
    jax.tree.map(np.testing.assert_array_equal, kept, running)


def test_a_channel_that_does_not_vary_becomes_its_offset_even_without_eps() -> None:
    x = normal(0, 6, 3).at[:, 1].set(7.0)
    running = normalization.Running(jnp.zeros(3), jnp.asarray([1.0, 0.0, 0.0]))

    def run(x: jnp.ndarray) -> jnp.ndarray:
        drawn = jnp.asarray([True, True, False])
        return normalization.stoch_norm(x, 2 + running.mean, jnp.ones(3), running, drawn, eps=0)[0]

    out, pull = jax.vjp(run, x)
    np.testing.assert_array_equal(out[:, 1:], 1)
    np.testing.assert_allclose(jnp.std(out[:, 0]), 2, rtol=1e-5)
    assert np.isfinite(pull(jnp.ones_like(out))[0]).all()
