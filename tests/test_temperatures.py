"""Schedules within terms, and the temperature that learns against the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses, temperatures


def test_the_gradient_is_reversed_and_the_value_kept() -> None:
    x = jnp.asarray([0.1, -3.0, 1e7], jnp.float32)
    np.testing.assert_array_equal(temperatures.reverse_gradient(x, 0.3), x)

    def loss(x: jax.Array, scale: float) -> jax.Array:
        return jnp.sum(temperatures.reverse_gradient(x, scale) ** 2)

    np.testing.assert_allclose(jax.grad(loss)(x, 0.5), -0.5 * 2 * x, rtol=1e-6)
    assert not jax.grad(loss)(x, 0.0).any()
    _, tangent = jax.jvp(temperatures.reverse_gradient, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, -jnp.ones_like(x))
    with pytest.raises(TypeError, match="floating"):
        temperatures.reverse_gradient(jnp.arange(3))


def test_the_published_initial_temperature() -> None:
    start = temperatures.learned_temperature(temperatures.temperature_init())
    np.testing.assert_allclose(start, 15.62, atol=0.005)
    per_example = temperatures.learned_temperature(jnp.asarray([-1e4, 0.0, 1e4]))
    np.testing.assert_allclose(per_example, [1, 11, 21])
    with pytest.raises(ValueError, match="start must be"):
        temperatures.learned_temperature(jnp.ones(()), start=0.0)


def test_descending_the_loss_makes_it_harder_for_the_student() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2))

    def loss(g: jax.Array, reversal: float) -> jax.Array:
        temperature = temperatures.learned_temperature(g, reversal=reversal)
        return jnp.mean(losses.kd_kl(student, teacher, temperature=temperature))

    g = temperatures.temperature_init()
    slope = jax.jit(jax.grad(loss))
    lower = g - 100.0 * slope(g, 1.0)
    harder = jax.jit(loss)
    assert harder(lower, 1.0) > harder(g, 1.0)
    np.testing.assert_allclose(slope(g, 0.5), 0.5 * slope(g, 1.0), rtol=1e-6)


def test_the_ramp_rises_to_its_strength_and_stays() -> None:
    ramp = temperatures.adversarial_ramp(10, strength=2.0)
    reached = [float(ramp(jnp.int32(i))) for i in (0, 5, 10, 99)]
    np.testing.assert_allclose(reached, [0, 1, 2, 2], atol=1e-6)
    with pytest.raises(ValueError, match="steps"):
        temperatures.adversarial_ramp(0)


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_fitted_logit_scale_minimizes_the_cross_entropy() -> None:
    logits, labels = 3 * normal(0, 40, 4), jnp.asarray(np.random.default_rng(1).integers(0, 4, 40))
    labels = jnp.where(
        jnp.arange(40) < 25, jnp.argmax(logits, axis=-1).astype(labels.dtype), labels
    )
    scale = temperatures.fit_logit_scale(logits, labels)

    def entropy(s: float) -> float:
        log_p = np.log(softmax(s * np.asarray(logits, np.float64)))
        return -log_p[np.arange(40), np.asarray(labels)].mean()

    s = float(scale)
    assert entropy(s) <= min(entropy(0.99 * s), entropy(1.01 * s))
