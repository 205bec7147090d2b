"""Teachers stacked, run as one, and their mixtures against the definitions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses
from kdtl_jax.train import ensembles

K, B, C = 3, 4, 5


def logits(seed: int = 0, scale: float = 2.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(K, B, C)), jnp.float32)


def linear(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> tuple[dict[str, jax.Array], Any]:
    noise = 0.0 if key is None else jax.random.normal(key, ())
    return {"logits": inputs @ params["w"] + noise}, model_state


def test_stacked_teachers_equal_a_loop() -> None:
    teachers = [{"w": logits(seed)[0]} for seed in range(K)]
    inputs = logits(9)[0, :, :B]
    stacked = ensembles.stack_teachers(teachers)
    outputs, state = ensembles.vmap_teacher(linear)(stacked, None, inputs)
    assert state is None and outputs["logits"].shape == (K, B, C)
    for k, teacher in enumerate(teachers):
        alone, _ = linear(teacher, None, inputs)
        np.testing.assert_allclose(outputs["logits"][k], alone["logits"], rtol=1e-5)
    noisy, state = ensembles.vmap_teacher(linear)(
        stacked, {"n": jnp.arange(K)}, inputs, key=jax.random.key(0)
    )
    noise = np.asarray(noisy["logits"] - outputs["logits"])[:, 0, 0]
    assert len(set(noise.round(3))) == K  # a key each
    assert state["n"].shape == (K,)


def test_stacking_needs_equal_leaves() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ensembles.stack_teachers([])
    with pytest.raises(ValueError, match=r"'w' is first\[2\], other\[3\]"):
        ensembles.stack_teachers([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}])
    with pytest.raises(ValueError, match="lacks 'w'"):
        ensembles.stack_teachers([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}])
    read = ensembles.stack_teachers([{"w": [jnp.ones(2)]}, {"w": (jnp.zeros(2),)}])
    assert read["w"][0].shape == (2, 2), "containers may differ where paths do not"


WEIGHTS = [
    None,
    jnp.asarray([1.0, 2.0, 5.0]),
    jnp.asarray(np.random.default_rng(3).uniform(0.1, 1, (K, B)), jnp.float32),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=["equal", "per_teacher", "per_example"])
def test_mixtures_are_what_their_names_say(weights: jax.Array | None) -> None:
    z, temperature = np.asarray(logits(), np.float64), 3.0
    w = np.ones((K, 1)) if weights is None else np.asarray(weights, np.float64).reshape(K, -1)
    w = (w / w.sum(0))[..., None]
    p = np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)

    geometric = (p**w).prod(0)
    got = jax.nn.softmax(ensembles.mean_logits(logits(), weights=weights) / temperature)
    np.testing.assert_allclose(got, geometric / geometric.sum(-1, keepdims=True), rtol=1e-4)

    mixed = ensembles.mean_probabilities(logits(), temperature=temperature, weights=weights)
    np.testing.assert_allclose(jnp.exp(mixed / temperature), (w * p).sum(0), rtol=1e-4)

    summed = ensembles.log_sum_exp(logits(), temperature=temperature, weights=weights)
    want = temperature * np.log((w * np.exp(z / temperature)).sum(0))
    np.testing.assert_allclose(summed, want, rtol=1e-4, atol=1e-5)


def test_one_teacher_is_itself() -> None:
    z = logits()[:1]
    np.testing.assert_allclose(ensembles.mean_logits(z), z[0], rtol=1e-6)
    np.testing.assert_allclose(ensembles.log_sum_exp(z), z[0], rtol=1e-5, atol=1e-6)
    alone = jax.nn.softmax(ensembles.mean_probabilities(z))
    np.testing.assert_allclose(alone, jax.nn.softmax(z[0]), rtol=1e-5)


def test_log_sum_exp_on_log_probabilities_is_the_mean_of_probabilities() -> None:
    log_p = jax.nn.log_softmax(logits())
    mixed = ensembles.mean_probabilities(logits())
    np.testing.assert_allclose(ensembles.log_sum_exp(log_p), mixed, rtol=1e-4, atol=1e-5)
    shifted = logits().at[0].add(7.0)
    np.testing.assert_allclose(ensembles.mean_probabilities(shifted), mixed, rtol=1e-4, atol=1e-5)
    assert np.abs(ensembles.log_sum_exp(shifted) - ensembles.log_sum_exp(logits())).max() > 1


@pytest.mark.parametrize(
    "mix", [ensembles.mean_logits, ensembles.mean_probabilities, ensembles.log_sum_exp]
)
def test_mixtures_are_finite_at_extremes_and_keep_absent_classes(mix: Any) -> None:
    huge = jnp.sign(logits()) * 1e4

    @jax.jit
    def value_and_pullback(z: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(mix, z)
        return value, pull(cotangent)[0]

    cotangent = jnp.ones((B, C), jnp.float32)
    value, slope = value_and_pullback(huge, cotangent)
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    masked = logits().at[:, :, 0].set(-jnp.inf)
    value, slope = value_and_pullback(masked, cotangent.at[:, 0].set(0))
    assert (value[:, 0] == -jnp.inf).all() and np.isfinite(value[:, 1:]).all()
    assert np.isfinite(slope).all()
    half = mix(logits().astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_a_sum_of_kls_has_k_times_the_gradient_of_the_mixture() -> None:
    student = logits(5)[0]
    summed = ensembles.over_teachers(losses.forward_kl)
    mixture = ensembles.mean_probabilities(logits())
    a = jax.jit(jax.grad(lambda s: jnp.sum(summed(s, logits()))))(student)
    b = jax.jit(jax.grad(lambda s: jnp.sum(losses.forward_kl(s, mixture))))(student)
    np.testing.assert_allclose(a, K * b, rtol=1e-3, atol=1e-5)


def test_over_teachers_weights_each_loss() -> None:
    student = logits(5)[0]
    each = np.asarray(jax.vmap(losses.mse, (None, 0))(student, logits()))
    np.testing.assert_allclose(
        ensembles.over_teachers(losses.mse)(student, logits()), each.sum(0), rtol=1e-5
    )
    for w in WEIGHTS[1:]:
        assert w is not None
        got = ensembles.over_teachers(losses.mse, weights=w)(student, logits())
        np.testing.assert_allclose(got, (np.asarray(w).reshape(K, -1) * each).sum(0), rtol=1e-5)
    hot = functools.partial(losses.kd_kl, temperature=2.0)
    assert jax.eval_shape(ensembles.over_teachers(hot), student, logits()).shape == (B,)


def test_a_teacher_without_a_share_excludes_nothing() -> None:
    """One teacher per example; the other one lacks a class there, so that its KL is infinite."""
    teachers = logits()[:2].at[0, 2:, 1].set(-jnp.inf)
    own, student = jnp.asarray([[1.0, 1, 0, 0], [0, 0, 1, 1]]), logits(1)[0]
    expected = jnp.concatenate([teachers[0, :2], teachers[1, 2:]])
    np.testing.assert_allclose(ensembles.mean_logits(teachers, weights=own), expected, rtol=1e-6)
    gated = ensembles.gated_logits(teachers, 300 * own.T)  # shares below the smallest number
    np.testing.assert_allclose(gated, expected, rtol=1e-6)

    def summed(student: jax.Array) -> jax.Array:
        return jnp.sum(ensembles.over_teachers(losses.reverse_kl, weights=own)(student, teachers))

    value, slope = jax.value_and_grad(summed)(student)
    np.testing.assert_allclose(value, jnp.sum(losses.reverse_kl(student, expected)), rtol=1e-5)
    want = jax.grad(lambda s: jnp.sum(losses.reverse_kl(s, expected)))(student)
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_a_gate_picks_branches_per_example() -> None:
    scores = jnp.zeros((B, K)).at[0, 1].set(1e4)
    gated = ensembles.gated_logits(logits(), scores)
    np.testing.assert_allclose(gated[0], logits()[1, 0], rtol=1e-6)
    np.testing.assert_allclose(gated[1], logits()[:, 1].mean(0), rtol=1e-4, atol=1e-6)
    slope = jax.grad(lambda s: jnp.sum(ensembles.gated_logits(logits(), s)[:, 0]))(scores)
    assert slope.shape == (B, K) and np.abs(slope[1]).max() > 0


BAD_WEIGHTS = {
    "together must be finite and > 0": [0.0, 0.0, 0.0],
    "together must": jnp.ones((K, B)).at[:, 1].set(0),
    "weights must be finite and >= 0": [1.0, -2.0, 3.0],
    "weights must": jnp.asarray([1.0, jnp.nan, 1.0]),
}


@pytest.mark.parametrize(
    "mix", [ensembles.mean_logits, ensembles.mean_probabilities, ensembles.log_sum_exp]
)
@pytest.mark.parametrize("says", BAD_WEIGHTS)
def test_weights_must_share(mix: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mix(logits(), weights=BAD_WEIGHTS[says])


def test_weights_may_be_a_list_or_traced() -> None:
    want = ensembles.mean_logits(logits(), weights=jnp.asarray([1.0, 2.0, 5.0]))
    np.testing.assert_array_equal(ensembles.mean_logits(logits(), weights=[1, 2, 5]), want)
    traced = jax.eval_shape(lambda w: ensembles.mean_logits(logits(), weights=w), jnp.zeros(K))
    assert traced.shape == (B, C)
    summed = ensembles.over_teachers(losses.mse, weights=[1.0, -1.0, 0.0])
    assert summed(logits(5)[0], logits()).shape == (B,)


def test_malformed_input_raises() -> None:
    with pytest.raises(ValueError, match=r"weights must be \[K\] or \[K, B\] = \[3, 4\]"):
        ensembles.mean_logits(logits(), weights=jnp.ones(B))
    with pytest.raises(TypeError, match="floating point"):
        ensembles.mean_probabilities(jnp.ones((K, B, C), jnp.int32))
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        ensembles.log_sum_exp(logits(), temperature=0.0)
    with pytest.raises(ValueError, match="a softmax over one class is always 1"):
        ensembles.mean_probabilities(jnp.ones((K, B, 1)))
    with pytest.raises(ValueError, match="at least 2 dimension"):
        ensembles.mean_logits(jnp.ones(3, jnp.float32))
    with pytest.raises(ValueError, match=r"scores must be \[4, 3\].*scores\[3, 4\]"):
        ensembles.gated_logits(logits(), jnp.ones((K, B)))
