"""Numerics in float32 against float64, at the places where the plain formula fails."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import _numerics, _pooling, _softmax, losses

KL = jax.jit(_softmax.kl_from_logits)
KL_GRADS = jax.jit(jax.vjp, static_argnums=0)
LOG_SOFTMAX = jax.jit(_softmax.log_softmax)


def exact_kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    """In long double, with p log(p/q) + q - p summed, so that it is itself accurate."""
    p, q = p_logits.astype(np.longdouble), q_logits.astype(np.longdouble)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = p - np.log(np.exp(p - p.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_q = q - np.log(np.exp(q - q.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_p, log_q = log_p - p.max(-1, keepdims=True), log_q - q.max(-1, keepdims=True)
        terms = np.exp(log_p) * (log_p - log_q) + np.exp(log_q) - np.exp(log_p)
    return np.where(np.exp(log_p) > 0, terms, np.exp(log_q)).sum(-1).astype(np.float64)


@pytest.mark.parametrize("distance", [10.0, 1.0, 1e-1, 1e-2, 1e-3])
def test_kl_keeps_its_relative_accuracy_at_any_distance(distance: float) -> None:
    rng = np.random.default_rng(0)
    q = rng.normal(size=(64, 10)).astype(np.float32)
    p = (q + distance * rng.normal(size=q.shape)).astype(np.float32)
    want = exact_kl(p, q)
    np.testing.assert_allclose(KL(p, q), want, rtol=2e-5)
    if distance <= 1e-3:  # the plain formula in float32 is off by percents here
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        plain = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        assert np.max(np.abs(np.asarray(plain) / want - 1)) > 1e-2


TEMPERATURES = (0.05, 1.0, 4.0, 20.0, 100.0)


@functools.cache
def value_and_gradients(classes: int) -> Callable[..., Any]:
    """One program per number of classes; the temperature is traced."""

    def both(student: jax.Array, teacher: jax.Array, temperature: jax.Array) -> Any:
        kl = functools.partial(losses.forward_kl, temperature=temperature)
        value, pull = jax.vjp(kl, student, teacher)
        return value, pull(jnp.ones_like(value))

    return jax.jit(both)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_kl_of_any_number_of_classes_at_any_temperature(classes: int, temperature: float) -> None:
    """Within 1e-4 of exact in float32, never negative, finite gradients, far and near."""
    rng = np.random.default_rng(classes)
    both = value_and_gradients(classes)
    for distance in (3.0, 0.1, 0.01):
        teacher = (3 * rng.normal(size=(4, classes))).astype(np.float32)
        student = teacher + (distance * rng.normal(size=teacher.shape)).astype(np.float32)
        value, gradients = both(student, teacher, np.float32(temperature))
        t = np.longdouble(np.float32(temperature))
        want = exact_kl(teacher / t, student / t)
        np.testing.assert_allclose(value, want, rtol=1e-4, atol=1.2e-38)
        assert (np.asarray(value) >= 0).all()
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_kl_at_extremes_of_any_number_of_classes(classes: int, temperature: float) -> None:
    """Logits of 1e4 and -inf masks, on both sides alike and on the teacher's alone."""
    rng = np.random.default_rng(classes)
    student, teacher = (np.copysign(1e4, rng.normal(size=(4, classes))) for _ in range(2))
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    masked = rng.random(student.shape) < 0.3
    masked[:, 0] = False
    one_sided = student, np.where(masked, np.float32(-np.inf), teacher)
    both_sided = tuple(np.where(masked, np.float32(-np.inf), z) for z in (student, teacher))
    for pair in ((student, teacher), one_sided, both_sided, (teacher, teacher)):
        value, gradients = value_and_gradients(classes)(*pair, np.float32(temperature))
        assert np.isfinite(value).all() and (np.asarray(value) >= 0).all()
        assert all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[0]).any() and not np.asarray(value).any()


@pytest.mark.parametrize("classes", [10, 1000, 32000])
def test_kl_of_bfloat16_logits_at_temperature_20(classes: int) -> None:
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(4, classes)), jnp.bfloat16) for _ in range(2))
    got = jax.jit(functools.partial(losses.forward_kl, temperature=20.0))(student, teacher)
    want = exact_kl(np.asarray(teacher, np.float64) / 20, np.asarray(student, np.float64) / 20)
    np.testing.assert_allclose(got, want, rtol=1e-2)


@hypothesis.given(st.integers(0, 2**16), st.floats(0.01, 300.0), st.floats(0, 1), st.integers(0, 4))
def test_kl_is_finite_nonnegative_and_zero_at_equality(
    seed: int, scale: float, near: float, masked: int
) -> None:
    rng = np.random.default_rng(seed)
    p = (scale * rng.normal(size=(3, 5))).astype(np.float32)
    q = (near * p + (1 - near) * scale * rng.normal(size=(3, 5))).astype(np.float32)
    p[:, :masked], q[:, :masked] = -np.inf, -np.inf
    kl = np.asarray(KL(p, q))
    assert np.isfinite(kl).all() and (kl >= 0).all()
    assert not np.asarray(KL(p, p)).any()
    value, pull = KL_GRADS(_softmax.kl_from_logits, p, q)
    for grad in pull(jnp.ones_like(value)):
        assert np.isfinite(grad).all() and not np.asarray(grad[:, :masked]).any()
        np.testing.assert_allclose(np.sum(grad, axis=-1), 0, atol=1e-4 * max(1, scale))


@pytest.mark.parametrize("size", [1e4, 1e9])
def test_kl_of_one_hot_logits_however_large(size: float) -> None:
    """As of hard labels written as logits: the KL of a one-hot teacher is the cross-entropy."""
    labels, hot = np.arange(6) % 4, np.eye(4, dtype=np.float32)[np.arange(6) % 4]
    student = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    value, pull = KL_GRADS(_softmax.kl_from_logits, np.float32(size) * hot, student)
    ours = np.asarray(student, np.float64)
    p = np.exp(ours) / np.exp(ours).sum(-1, keepdims=True)
    np.testing.assert_allclose(value, -np.log(p[np.arange(6), labels]), rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(value))[1], p - hot, atol=1e-6)


def test_the_gradient_of_kl_by_the_student_is_the_difference_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    value, pull = KL_GRADS(_softmax.kl_from_logits, p, q)
    expected = jax.nn.softmax(q) - jax.nn.softmax(p)
    np.testing.assert_allclose(pull(jnp.ones_like(value))[1], expected, atol=1e-6)


def test_kl_of_one_sided_support() -> None:
    inf = np.inf
    z = np.asarray([[0.0, 0.0, -inf], [0.0, -inf, -inf], [0.0, 0.0, 0.0]], np.float32)
    log = np.log
    np.testing.assert_allclose(KL(z[1], z[0]), log(2), rtol=1e-6)  # p within q
    assert KL(z[0], z[1]) == inf  # q misses a class of p: truly infinite
    np.testing.assert_allclose(KL(z[0], z[2]), log(1.5), rtol=1e-6)
    assert KL(z[0], z[0]) == 0


def test_kl_with_where_equals_slicing() -> None:
    rng = np.random.default_rng(1)
    p, q = (rng.normal(size=(4, 6)).astype(np.float32) for _ in range(2))
    where = np.zeros((4, 6), bool)
    where[:, 1:4] = True
    masked = jax.jit(lambda p, q, w: _softmax.kl_from_logits(p, q, where=w))(p, q, where)
    np.testing.assert_allclose(masked, KL(p[:, 1:4], q[:, 1:4]), rtol=1e-5)


def test_log_softmax_of_absent_classes() -> None:
    inf = np.inf
    z = np.asarray([[0.0, -inf, 1.0], [-inf, -inf, -inf], [1e4, -1e4, 1e4]], np.float32)
    got = np.asarray(LOG_SOFTMAX(z))
    np.testing.assert_allclose(got[0, [0, 2]], jax.nn.log_softmax(z[0, [0, 2]]), rtol=1e-6)
    assert got[0, 1] == -inf and (got[1] == -inf).all()
    np.testing.assert_allclose(got[2], [-np.log(2), -2e4 - np.log(2), -np.log(2)], rtol=1e-6)

    def total(z: jax.Array) -> jax.Array:
        log_p = _softmax.log_softmax(z)
        return jnp.sum(jnp.where(log_p > -jnp.inf, log_p, 0))

    assert np.isfinite(jax.jit(jax.grad(total))(z)).all()


def test_log1mexp_at_both_ends() -> None:
    x = np.asarray([-1e-7, -1e-3, -0.5, -0.6931472, -1.0, -20.0, -80.0], np.float32)
    wide = x.astype(np.float64)
    want = np.where(wide < -1, np.log1p(-np.exp(wide)), np.log(-np.expm1(wide)))
    np.testing.assert_allclose(jax.jit(_numerics.log1mexp)(x), want, rtol=1e-6)
    slope = jax.jit(jax.vmap(jax.grad(_numerics.log1mexp)))
    np.testing.assert_allclose(slope(x), np.exp(wide) / np.expm1(wide), rtol=1e-5)
    assert _numerics.log1mexp(jnp.float32(0)) == -jnp.inf
    assert np.isfinite(slope(jnp.zeros(1, jnp.float32))).all()


def test_norms_have_gradient_zero_at_zero_and_do_not_overflow() -> None:
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30], [3e-30, 4e-30]], jnp.float32)
    np.testing.assert_allclose(_numerics.safe_norm(x), [5, 0, 5e30, 5e-30], rtol=1e-6)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(_numerics.safe_norm(x))))(x)
    np.testing.assert_allclose(grad, [[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-5)
    assert _numerics.safe_norm(x, keepdims=True).shape == (4, 1)
    np.testing.assert_allclose(
        _numerics.safe_norm(jnp.full((2, 3), 2, jnp.float32), axis=(0, 1)), np.sqrt(24), rtol=1e-6
    )
    second = jax.jit(jax.hessian(lambda x: _numerics.safe_norm(x)))(jnp.zeros(2, jnp.float32))
    assert np.isfinite(second).all()


def test_normalize_keeps_zero_and_has_unit_length() -> None:
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [3e20, 4e20]], jnp.float32)
    np.testing.assert_allclose(_numerics.normalize(x), [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)
    jacobian = jax.jit(jax.vmap(jax.jacobian(_numerics.normalize)))(x)
    assert np.isfinite(jacobian).all() and not np.asarray(jacobian[1]).any()


@pytest.mark.parametrize("value", [0.0, -1e-25, 2.0, 1e25])
def test_normalize_of_a_single_number_is_its_sign(value: float) -> None:
    x = jnp.full((1, 1), value, jnp.float32)
    np.testing.assert_allclose(jax.jit(_numerics.normalize)(x), np.sign([[value]]), rtol=1e-6)


def test_second_derivatives_of_directions_are_finite_in_single_precision() -> None:
    x = np.asarray([0.6, 0.8, 0.0])

    def bend(x: jax.Array) -> jax.Array:  # homogeneous of degree 0
        return jnp.sum(jnp.sin(_numerics.normalize(x)))

    with jax.enable_x64(True):
        want = np.asarray(jax.jit(jax.hessian(bend))(x))
    project, slope = np.eye(3) - np.outer(x, x), np.cos(x)  # in closed form, for length 1
    by_hand = project @ (np.diag(-np.sin(x)) - slope @ x * np.eye(3)) @ project
    by_hand -= np.outer(project @ slope, x) + np.outer(x, project @ slope)
    np.testing.assert_allclose(want, by_hand, atol=1e-12)
    hessian = jax.jit(lambda x: jnp.stack([jax.hessian(bend)(x), jax.jacrev(jax.grad(bend))(x)]))
    for scale in (1e-12, 1e-4, 1.0, 1e4, 1e12):
        got = np.asarray(hessian(jnp.asarray(scale * x, jnp.float32)), np.float64)
        np.testing.assert_allclose(got * scale**2, np.stack([want, want]), atol=1e-5)
    assert not np.asarray(hessian(jnp.zeros(3))).any()


def test_derivatives_of_log1mexp_from_both_ends_of_single_precision() -> None:
    x = np.asarray([-1e4, -100.0, -20.0, -1.0, -1e-3, 0.0])
    log1mexp = _numerics.log1mexp
    twice = [jax.grad(jax.grad(log1mexp)), jax.jacfwd(jax.grad(log1mexp))]
    result = jax.jit(jax.vmap(lambda x: jnp.stack([jax.grad(log1mexp)(x), *(d(x) for d in twice)])))
    p = np.exp(x[:-1])
    want = np.stack([-p / (1 - p), -p / (1 - p) ** 2, -p / (1 - p) ** 2], axis=1)
    got = np.asarray(result(jnp.asarray(x, jnp.float32)))
    np.testing.assert_allclose(got[:-1], want, rtol=1e-5, atol=1e-37)
    assert np.isfinite(got[-1]).all()


def test_normalize_of_half_precision_has_unit_length() -> None:
    x = jnp.asarray([[300.0, 400.0], [0.0, 0.0], [3e-4, 4e-4], [-6e4, 0.0]], jnp.float16)
    actual, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(_numerics.normalize(x)[:2, 0])))(x)
    want = [[0.6, 0.8], [0, 0], [0.6, 0.8], [-1, 0]]
    np.testing.assert_allclose(_numerics.normalize(x), want, rtol=1e-3)
    assert _numerics.normalize(x).dtype == jnp.float16
    assert np.isfinite(actual) and np.isfinite(slope).all() and not np.asarray(slope[1]).any()


def test_square_root_has_gradient_zero_at_zero() -> None:
    x = jnp.asarray([4.0, 0.0], jnp.float32)
    np.testing.assert_allclose(_numerics.safe_sqrt(x), [2, 0])
    np.testing.assert_allclose(jax.vmap(jax.grad(_numerics.safe_sqrt))(x), [0.25, 0])


def test_masked_mean_of_nothing_is_zero() -> None:
    x = jnp.asarray([[1.0, 3.0, jnp.nan], [jnp.nan] * 3], jnp.float32)
    where = jnp.asarray([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(_numerics.masked_mean(x, where, axis=-1), [2, 0])
    assert _numerics.masked_mean(x, where) == 2
    grad = jax.grad(lambda x: jnp.sum(_numerics.masked_mean(x, where, axis=-1)))(x)
    np.testing.assert_array_equal(grad, [[0.5, 0.5, 0], [0, 0, 0]])
    assert _numerics.masked_mean(jnp.asarray([1.0, 2.0], jnp.float32)) == 1.5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("given", "wide"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_upcast_is_to_float32_or_wider(given: str, wide: str) -> None:
    x = _numerics.upcast(jnp.ones(2, given))
    assert x.dtype == wide and not x.weak_type


def test_scalars_take_the_dtype_of_the_array() -> None:
    like = jnp.ones((2, 3), jnp.float32)
    for value in (2, 2.0, np.float64(2), jnp.asarray(2, jnp.bfloat16)):
        made = _numerics.scalar(value, like)
        assert made.dtype == jnp.float32 and not made.weak_type
    np.testing.assert_array_equal(
        like * _numerics.per_example(jnp.asarray([1.0, 2.0]), like), [[1] * 3, [2] * 3]
    )


def test_batch_flat() -> None:
    assert _numerics.batch_flat(jnp.ones((2, 3, 4), jnp.float32)).shape == (2, 12)


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (4, 6), (5, 7), (1, 1)])
def test_pooling_has_the_cells_of_adaptive_pooling(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    want = np.zeros((2, *size, 3))
    for i, (top, bottom) in enumerate(_pooling.pool_bounds(4, size[0])):
        for j, (left, right) in enumerate(_pooling.pool_bounds(6, size[1])):
            want[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(_pooling.pool_to(jnp.asarray(x), size), want, rtol=1e-5, atol=1e-6)


def test_pool_bounds_are_floor_and_ceil() -> None:
    assert _pooling.pool_bounds(5, 2) == [(0, 3), (2, 5)]
    assert _pooling.pool_bounds(2, 3) == [(0, 1), (0, 2), (1, 2)]


def test_gram_is_the_matrix_of_inner_products() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, n, 5)).astype(np.float32) for n in (3, 4))
    want = np.matmul(x, np.swapaxes(y, -1, -2))
    np.testing.assert_allclose(_numerics.gram(jnp.asarray(x), jnp.asarray(y)), want, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, _softmax.FEW_CLASSES, _softmax.FEW_CLASSES + 1])
def test_kl_is_the_same_on_either_side_of_few_classes(classes: int) -> None:
    """Which axis is summed is a matter of speed alone, in any rank and under vmap."""
    rng = np.random.default_rng(classes)
    p, q = (jnp.asarray(rng.normal(size=(2, 3, classes)), jnp.float32) for _ in range(2))

    def plain(p: jax.Array, q: jax.Array) -> jax.Array:
        log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    @jax.jit
    def all_of(p: jax.Array, q: jax.Array) -> list[list[jax.Array]]:
        """Value and both gradients by each function."""
        results = []
        for kl in (plain, _softmax.kl_from_logits, jax.vmap(_softmax.kl_from_logits)):
            value, pull = jax.vjp(kl, p, q)
            results.append([value, *pull(jnp.ones_like(value))])
        return results

    want, *each = all_of(p, q)
    for got in each:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
