"""Teachers made or corrected from labels, and logits made comparable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import losses

LOGITS = jnp.asarray(2 * np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
BEST = jnp.argmax(LOGITS, axis=-1).astype(jnp.int32)
LABELS = jnp.where(jnp.arange(6) % 2 == 0, BEST, (BEST + 1) % 5)  # every second row is wrong


def test_a_virtual_teacher_is_label_smoothing() -> None:
    teacher = losses.virtual_teacher(LABELS, 5, correct_probability=0.9)
    p = np.exp(np.asarray(teacher))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(p[np.arange(6), LABELS], 0.9, rtol=1e-6)
    np.testing.assert_allclose(p.min(-1), 0.025, rtol=1e-5)
    smooth = optax.smooth_labels(jax.nn.one_hot(LABELS, 5), 0.2)
    want = optax.softmax_cross_entropy(LOGITS, smooth)
    virtual = losses.virtual_teacher(LABELS, 5, correct_probability=1 - 0.2 + 0.2 / 5)
    np.testing.assert_allclose(losses.soft_cross_entropy(LOGITS, virtual), want, rtol=1e-5)
    certain = losses.virtual_teacher(LABELS, 5, correct_probability=1.0)
    np.testing.assert_array_equal(np.exp(certain), jax.nn.one_hot(LABELS, 5))
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        losses.virtual_teacher(LABELS, 1)


def test_a_shifted_teacher_is_right_and_as_sure_as_before() -> None:
    before = np.asarray(LOGITS).copy()
    shifted = np.asarray(losses.probability_shift(LOGITS, LABELS))
    np.testing.assert_array_equal(shifted.argmax(-1), LABELS)
    np.testing.assert_array_equal(np.sort(shifted), np.sort(before))
    np.testing.assert_array_equal(shifted[::2], before[::2])
    np.testing.assert_array_equal(LOGITS, before)
    assert losses.probability_shift(LOGITS.astype(jnp.bfloat16), LABELS).dtype == jnp.bfloat16


def test_the_corrected_teacher_leads_by_the_threshold() -> None:
    p = np.exp(np.asarray(losses.mft_teacher(LOGITS, LABELS, threshold=0.3)))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    right = p[np.arange(6), LABELS]
    others = np.where(np.eye(5, dtype=bool)[LABELS], 0, p).max(-1)
    np.testing.assert_allclose((right - others)[1::2], 0.3, atol=1e-4)
    was = np.asarray(jax.nn.softmax(LOGITS))[np.arange(6), LABELS]
    np.testing.assert_allclose(right[::2], np.minimum(was[::2] + 0.3, 1), atol=1e-4)
    with pytest.raises(ValueError, match="threshold must lie in"):
        losses.mft_teacher(LOGITS, LABELS, threshold=1.5)


def test_zipf_targets_by_hand() -> None:
    scores = jnp.asarray([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]], jnp.float32)
    got = np.exp(np.asarray(losses.zipf_targets(scores, jnp.asarray([3, 0], jnp.int32))))
    want = np.asarray([[1 / 4, 1, 1 / 3, 0], [0, 1 / 2, 1 / 3, 1 / 4]])
    np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), rtol=1e-6)
    two = jnp.asarray([[3, 1], [0, 2]], jnp.int32)
    assert np.asarray(losses.zipf_targets(scores, two) == -jnp.inf).sum() == 4
    with pytest.raises(ValueError, match="labels must be"):
        losses.zipf_targets(scores, two[:1])
    for wrong in (4, -1):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
            losses.zipf_targets(scores, jnp.asarray([wrong, 0], jnp.int32))


def test_standardized_logits_forget_scale_and_shift() -> None:
    z = np.asarray(losses.standardize_logits(LOGITS))
    np.testing.assert_allclose(z.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(-1), 1, rtol=1e-5)
    again = losses.standardize_logits(3 * LOGITS + 7)
    np.testing.assert_allclose(again, z, atol=1e-5)
    unbiased = losses.standardize_logits(LOGITS, ddof=1)
    np.testing.assert_allclose(unbiased * np.sqrt(5 / 4), z, rtol=1e-5, atol=1e-6)
    assert not np.asarray(losses.standardize_logits(jnp.ones((1, 5), jnp.float32))).any()
    with pytest.raises(ValueError, match="needs more than ddof=1 classes"):
        losses.standardize_logits(LOGITS[:, :1], ddof=1)
