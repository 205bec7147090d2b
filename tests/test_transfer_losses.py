"""What the table of losses cannot say of Bi-Tuning, AFN and DELTA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses


def normal(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_afn_asks_every_norm_to_grow() -> None:
    x = normal(0, 4, 3)
    grads = jax.grad(lambda x: losses.afn(x, jax.lax.stop_gradient(losses.feature_norms(x))).sum())
    norms = np.linalg.norm(np.asarray(x), axis=-1, keepdims=True)
    np.testing.assert_allclose(grads(x), -2 * np.asarray(x) / norms, rtol=1e-5)
    assert bool(jnp.all(grads(jnp.zeros((2, 3))) == 0))


def test_uniform_contrast_by_hand_and_without_positives() -> None:
    scores = normal(0, 3, 4)
    positives = jnp.asarray([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], jnp.bool_)
    log_p = np.log(softmax(np.asarray(scores, np.float64) / 0.5))
    want = [-np.log(2) - log_p[0, :2].mean(), -log_p[1, 3], 0]
    got = losses.uniform_contrast(scores, positives, temperature=0.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bi_tuning_classifier_by_hand() -> None:
    features, kernel, bias = normal(0, 4, 3), normal(1, 3, 2), normal(2, 2)
    labels = jnp.asarray([0, 1, 1, 0])
    f, w, b = (np.asarray(each, np.float64) for each in (features, kernel, bias))
    g = np.concatenate([f, np.ones((4, 1))], -1)
    v = np.concatenate([w.T, b[:, None]], -1)
    g, v = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (g, v))
    log_p = np.log(softmax(v[np.asarray(labels)] @ g.T / 0.07))
    same = np.asarray(labels)[:, None] == np.asarray(labels)[None]
    want = [-np.log(2) - row[mask].mean() for row, mask in zip(log_p, same, strict=True)]
    got = losses.bi_tuning_classifier(features, labels, class_weights=kernel, class_bias=bias)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    with pytest.raises(TypeError, match="class_bias must be floating point"):
        losses.unit_classes(kernel, jnp.ones(len(bias), jnp.int32))


def test_delta_attention_sums_to_one_and_prefers_damage() -> None:
    damage = jnp.asarray([0.0, 1.0, 3.0])
    standard = (np.asarray(damage) - 4 / 3) / np.std(np.asarray(damage), ddof=1)
    np.testing.assert_allclose(losses.delta_attention(damage), softmax(standard / 5), rtol=1e-6)
    np.testing.assert_allclose(losses.delta_attention(jnp.ones(4)), 0.25, rtol=1e-6)


def test_a_projection_s_ignored_labels_are_no_class_of_their_own() -> None:
    """Rows of -1 were each other's positives, and every row's candidates."""
    queries, keys = normal(3, 5, 3), normal(4, 5, 3)
    labels, known = jnp.asarray([7, -1, 7, -100, 300]), jnp.asarray([1, 0, 1, 0, 1], bool)
    with pytest.raises(ValueError, match=r"got -100\.\.300"):
        losses.bi_tuning_projection(queries, keys, labels)
    unmasked = np.asarray(jax.jit(losses.bi_tuning_projection)(queries, keys, labels))
    alone = losses.bi_tuning_projection(queries[known], keys[known], labels[known])
    np.testing.assert_array_equal(np.isnan(unmasked), ~np.asarray(known))
    np.testing.assert_allclose(unmasked[np.asarray(known)], alone, rtol=1e-5)
    masked = losses.bi_tuning_projection(queries, keys, labels, where=known)
    np.testing.assert_allclose(masked, np.nan_to_num(unmasked), rtol=1e-6)
