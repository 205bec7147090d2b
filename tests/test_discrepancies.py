"""Numbers of whole batches, by hand, at their edges, and with padding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import discrepancies, transferability


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_bss_is_the_smallest_of_the_spectrum() -> None:
    x = normal(0, 5, 3)
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    np.testing.assert_allclose(discrepancies.bss(x, k=1), s[-1] ** 2, rtol=1e-5)
    np.testing.assert_allclose(discrepancies.bss(x, k=3), np.square(np.asarray(x)).sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        discrepancies.bss(x, k=4)


@pytest.mark.parametrize("x", [jnp.eye(3), jnp.zeros((3, 3)), jnp.ones((3, 2))])
def test_bss_gradient_is_finite_for_repeated_and_zero_singular_values(x: jnp.ndarray) -> None:
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda x: discrepancies.bss(x, k=2))(x))))


def test_coral_by_hand() -> None:
    a, b = normal(0, 6, 3), normal(1, 4, 3)
    gap = np.cov(np.asarray(a).T) - np.cov(np.asarray(b).T)
    np.testing.assert_allclose(discrepancies.coral(a, b), (gap**2).sum() / (4 * 9), rtol=1e-5)
    assert discrepancies.coral(a, a) == 0
    with pytest.raises(ValueError, match="of one width"):
        discrepancies.coral(a, normal(1, 4, 2))


def test_mmd_by_double_loop() -> None:
    a, b, alphas = normal(0, 4, 3), normal(1, 5, 3), (0.5, 2.0)
    joint = np.concatenate([a, b]).astype(np.float64)
    every = np.square(joint[:, None] - joint[None]).sum(-1)
    distance = jax.jit(discrepancies.mean_squared_distance)(a, b)
    np.testing.assert_allclose(distance, every.mean(), rtol=1e-5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        square = np.square(np.float64(x) - np.float64(y)).sum()
        return sum(np.exp(-square / (2 * alpha * 3.0)) for alpha in alphas)

    x, y = np.asarray(a), np.asarray(b)
    inside = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (x, y)
    ]
    want = sum(inside) - 2 * np.mean([kernel(p, q) for p in x for q in y])
    mk_mmd = functools.partial(discrepancies.mk_mmd, scale=3.0, alphas=alphas)
    got = jax.jit(mk_mmd)(a, b)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    linear = np.mean([
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0))
    ])  # fmt: skip
    mk_mmd_linear = functools.partial(discrepancies.mk_mmd_linear, scale=3.0, alphas=alphas)
    got = jax.jit(mk_mmd_linear)(a, b[:4])
    np.testing.assert_allclose(got, linear, rtol=1e-4, atol=1e-6)


def test_mcc_is_zero_for_sure_predictions_and_largest_for_unsure_ones() -> None:
    mcc = jax.jit(jax.value_and_grad(lambda z: discrepancies.mcc(z)))  # one program for all three
    sure = np.float32(1e4) * np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    assert mcc(sure)[0] == 0
    np.testing.assert_allclose(mcc(np.zeros_like(sure))[0], 2 / 3, rtol=1e-6)
    sure[:, 2] = -1e4  # nobody predicts class 2: no NaN
    assert np.isfinite(mcc(sure)[1]).all()
    weights = discrepancies.entropy_weights(normal(0, 4, 3))
    np.testing.assert_allclose(np.mean(weights), 1, rtol=1e-6)


def test_what_is_no_array_is_named() -> None:
    x, rows = normal(0, 3, 2), [[0.5, 0.5]] * 3
    several: tuple[Any, ...] = (rows, None, {"features": x}, x[0])
    for wrong in several:
        with pytest.raises((TypeError, ValueError), match="student_features"):
            discrepancies.coral(wrong, x)
        with pytest.raises((TypeError, ValueError), match="target_features"):
            discrepancies.mean_squared_distance(x, wrong)
        with pytest.raises((TypeError, ValueError), match="probabilities"):
            transferability.category_relation(wrong, jnp.asarray([0, 1, 1]), num_classes=2)
