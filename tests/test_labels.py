"""Teachers made or corrected from labels, and logits made comparable."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdtl_jax import discrepancies, losses, objective, temperatures
from kdtl_jax.train import online

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


STUDENT = LOGITS[::-1]


def inputs(logits: jax.Array, labels: jax.Array, where: Any = None) -> objective.Inputs:
    batch = {"labels": labels} | ({} if where is None else {"weights": jnp.float32(where)})
    return objective.Inputs(student={"logits": logits}, teacher={}, batch=batch)


IGNORED = jnp.asarray([0, 1, -100, 255, -1, 4], jnp.int32)
KNOWN = (IGNORED >= 0) & (IGNORED < 5)
# Each way to a value per example from (student, teacher, labels).
LABELLED: dict[str, Any] = {
    "tckd": losses.tckd,
    "nckd": losses.nckd,
    "target_cross_entropy": losses.target_cross_entropy,
    "token_log_probs": lambda s, t, y, **k: losses.token_log_probs(s, y, **k),
}
# Tasks, whose weights are of whole rows.
TASKS: dict[str, Any] = {
    "classification": lambda s, t, y, **k: objective.classification(inputs(s, y, **k))["task"],
    "mutual": lambda s, t, y, **k: online.mutual_terms(jnp.stack([s, t]), y, **k)["task"],
}
# And those through a teacher or a weight made from the labels, which let a row be.
THROUGH_PIECES: dict[str, Any] = {
    "probability_shift": lambda s, t, y: losses.kd_kl(s, losses.probability_shift(t, y)),
    "non_target_logits": lambda s, t, y: losses.soft_cross_entropy(
        *(losses.non_target_logits(z, y) for z in (s, t))
    ),
    "mft_teacher": lambda s, t, y: losses.forward_kl(s, losses.mft_teacher(t, y)),
    "virtual_teacher": lambda s, t, y: losses.kd_kl(s, losses.virtual_teacher(y, 5)),
    "zipf_targets": lambda s, t, y: losses.soft_cross_entropy(s, losses.zipf_targets(t, y)),
    "wsld_weight": lambda s, t, y: losses.wsld_weight(s, t, y) * losses.kd_kl(s, t),
    "uskd_weight": lambda s, t, y: losses.uskd_weight(s, y) * jnp.sum(s, axis=-1),
}


@pytest.mark.parametrize("name", LABELLED | TASKS | THROUGH_PIECES)
def test_ignored_labels_leave_no_nan_under_a_mask_applied_later(name: str) -> None:
    """As optax's cross-entropy behaves under jit: the mean and gradient of the real rows alone."""
    loss, known = (LABELLED | TASKS | THROUGH_PIECES)[name], np.asarray(KNOWN)

    def masked(student: jax.Array, labels: jax.Array) -> jax.Array:
        return objective.reduce("x", objective.Masked(loss(student, LOGITS, labels), KNOWN)).value()

    value, gradient = jax.jit(jax.value_and_grad(masked))(STUDENT, IGNORED)

    def alone(student: jax.Array) -> jax.Array:
        return jnp.mean(
            loss(student, *(jnp.asarray(np.asarray(x)[known]) for x in (LOGITS, IGNORED)))
        )

    want, by_hand = jax.jit(jax.value_and_grad(alone))(np.asarray(STUDENT)[known])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(gradient)[known], by_hand, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradient)[~known].any()


@pytest.mark.parametrize("name", LABELLED | TASKS)
def test_a_label_out_of_range_is_nan_and_a_masked_one_is_zero(name: str) -> None:
    loss = (LABELLED | TASKS)[name]
    unmasked = np.asarray(jax.jit(loss)(STUDENT, LOGITS, IGNORED))
    np.testing.assert_array_equal(np.isnan(unmasked), ~np.asarray(KNOWN))
    # Eagerly the labels are seen: refused without the mask, looked at only where it holds.
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, got -100\.\.255"):
        loss(STUDENT, LOGITS, IGNORED)
    masked = np.asarray(loss(STUDENT, LOGITS, IGNORED, where=KNOWN))
    np.testing.assert_allclose(masked, np.where(KNOWN, unmasked, 0), rtol=1e-6)


WRONG_LABELS: dict[str, tuple[Any, type[Exception], str]] = {
    "column": (np.zeros((6, 1), np.int32), ValueError, r"jnp\.squeeze\(labels, axis=-1\)"),
    "one-hot": (np.eye(6, 5, dtype=np.int32), ValueError, r"One-hot labels: jnp\.argmax"),
    "one-hot of floats": (np.eye(6, 5, dtype=np.float32), TypeError, r"Use jnp\.argmax"),
    "floats": (np.zeros(6, np.float32), TypeError, r"Use labels\.astype\(jnp\.int32\)"),
    "text": (np.asarray(list("aabbcc")), TypeError, r"got text: \['a', 'a', 'b'\].*np\.unique"),
    "a list": ([0, 1, 2, 3, 4, 9], TypeError, r"got a list of 6\. Use jnp\.asarray\(labels\)"),
    "objects": (np.asarray(["a", None] * 3, object), TypeError, "got text"),
    "from one": (np.asarray([1, 2, 3, 4, 5, 1]), ValueError, "count from 1: use labels - 1"),
    "codes": (np.asarray([10, 20, 30] * 2), ValueError, r"np\.unique\(labels, return_inverse"),
    "ignored": (np.asarray([0, 1, 2, 255, 3, 255]), ValueError, r"where=\(labels != 255\)"),
    "more classes": (np.asarray([0, 1, 2, 3, 5, 6]), ValueError, "The logits have 5 classes"),
    "another length": (np.zeros(5, np.int32), ValueError, r"must have shape \[6\].*labels\[5\]"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_what_is_no_class_number_is_refused_with_its_repair(name: str) -> None:
    labels, kind, says = WRONG_LABELS[name]
    with pytest.raises(kind, match=says):
        losses.tckd(STUDENT, LOGITS, labels)


def test_several_labels_per_example_are_no_one_hot_rows_and_no_text() -> None:
    with pytest.raises(ValueError, match="One-hot labels: jnp.argmax"):
        losses.zipf_targets(STUDENT, jnp.eye(6, 5, dtype=jnp.int32))
    with pytest.raises(TypeError, match="got text"):
        losses.zipf_targets(STUDENT, np.asarray(list("abcdea")))  # pyright: ignore[reportArgumentType]  # text on purpose


def test_labels_of_eight_bits_may_belong_to_more_classes_than_fit() -> None:
    rng = np.random.default_rng(1)
    student, teacher = (jnp.asarray(rng.normal(size=(2, 300)), jnp.float32) for _ in range(2))
    narrow = losses.tckd(student, teacher, jnp.asarray([3, 255], jnp.uint8))
    wide = losses.tckd(student, teacher, jnp.asarray([3, 255], jnp.int32))
    np.testing.assert_array_equal(narrow, wide)


def test_uskd_s_mean_is_over_the_examples_that_count() -> None:
    where = jnp.arange(6) < 4
    np.testing.assert_allclose(
        losses.uskd_weight(STUDENT, LABELS, where=where)[:4],
        losses.uskd_weight(STUDENT[:4], LABELS[:4]),
        rtol=1e-6,
    )


def test_kd_decomposes_into_the_target_class_and_the_others() -> None:
    """Equation 7 of Zhao et al.: `KD = TCKD + (1 - p_T(y)) NCKD`."""
    parts = [f(STUDENT, LOGITS, LABELS, temperature=2.0) for f in (losses.tckd, losses.nckd)]
    p = jax.nn.softmax(LOGITS / 2)[jnp.arange(6), LABELS]
    want = losses.kd_kl(STUDENT, LOGITS, temperature=2.0)
    np.testing.assert_allclose(parts[0] + (1 - p) * parts[1], want, rtol=1e-5)


SOFTMAX_LOSSES = (
    "forward_kl kd_kl reverse_kl symmetric_kl skew_forward_kl skew_reverse_kl total_variation "
    "adaptive_kl_weight jensen_shannon jsd_gkd jsd_continuous jsd_normalized soft_cross_entropy "
    "hard_kd ttm wttm dist_inter dist_intra class_correlation batch_correlation uld uld_w1 "
    "co_tuning"
).split()


@pytest.mark.parametrize("name", SOFTMAX_LOSSES)
def test_a_softmax_of_one_class_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"softmax over one class .* pass the pair \[z, 0\]"):
        getattr(losses, name)(LOGITS[:, :1], STUDENT[:, :1])


def test_what_a_softmax_of_one_class_hides_in_elsewhere_is_refused() -> None:
    one, zeros = LOGITS[:, :1], jnp.zeros(6, jnp.int32)
    batch = objective.Inputs({"logits": one}, {}, {"labels": zeros})
    for call in (
        lambda: objective.classification(batch),
        lambda: discrepancies.mcc(one),
        lambda: discrepancies.entropy_weights(one),
        lambda: temperatures.fit_logit_scale(one, zeros),
    ):
        with pytest.raises(ValueError, match="softmax over one class"):
            call()


def test_makers_of_teachers_refuse_one_class_and_a_top_k_of_one_has_no_renormalized_kl() -> None:
    one, zeros = LOGITS[:, :1], jnp.zeros(6, jnp.int32)
    makers = (losses.probability_shift, losses.mft_teacher, losses.non_target_logits)
    for make in (losses.standardize_logits, *(lambda z, f=f: f(z, zeros) for f in makers)):
        with pytest.raises(ValueError, match="one class"):
            make(one)
    with pytest.raises(ValueError, match="one class"):
        losses.top_k_kl_renormalized(STUDENT, losses.top_k_targets(LOGITS, k=1))
    assert (losses.top_k_kl_tail(STUDENT, losses.top_k_targets(LOGITS, k=1)) > 0).all()


def test_binary_kl_is_kd_of_the_pair() -> None:
    """One logit z is the pair [z, 0] to a softmax; labels add up, masked ones do not count."""
    one, other = LOGITS[:, :1], STUDENT[:, :1]
    pair = [jnp.concatenate([z, jnp.zeros_like(z)], axis=-1) for z in (one, other)]
    np.testing.assert_allclose(
        losses.binary_kl(one, other, temperature=4.0),
        losses.kd_kl(*pair, temperature=4.0),
        rtol=1e-5,
    )
    each = [losses.binary_kl(LOGITS[:, k : k + 1], STUDENT[:, k : k + 1]) for k in range(5)]
    where = jnp.asarray([True, False, True, True, False])
    weights = jnp.asarray([1.0, 9.0, 0.5, 2.0, 9.0])
    got = losses.binary_kl(
        LOGITS,
        STUDENT.at[:, 1].set(jnp.nan),
        class_weights=weights,
        where=jnp.broadcast_to(where, LOGITS.shape),
    )
    np.testing.assert_allclose(got, each[0] + 0.5 * each[2] + 2 * each[3], rtol=1e-5)
    # A weight of 0 leaves a label out, as a mask does.
    for anything in (jnp.nan, -jnp.inf, jnp.inf):
        student = STUDENT.at[:, 1].set(anything).at[:, 4].set(anything)
        left = jax.value_and_grad(
            lambda z: jnp.sum(
                losses.binary_kl(LOGITS, z, class_weights=jnp.where(where, weights, 0))
            )
        )(student)
        np.testing.assert_allclose(left[0], jnp.sum(got), rtol=1e-5)
        assert np.isfinite(left[1]).all()
    for bad, says in (
        ({"class_weights": weights[:2]}, r"class_weights must be \[num_labels\]"),
        ({"class_weights": -weights}, "class_weights must be finite and >= 0"),
        ({"temperature": jnp.ones(5)}, "temperature must be one number or one per example"),
    ):
        with pytest.raises(ValueError, match=says):
            losses.binary_kl(LOGITS, STUDENT, **bad)
    with pytest.raises(ValueError, match="at least 2"):
        losses.binary_kl(LOGITS[:, 0], STUDENT[:, 0])


def test_stored_classes_out_of_range_are_nan_without_a_nan_gradient() -> None:
    targets = losses.top_k_targets(LOGITS, k=3)
    padded = targets._replace(indices=targets.indices.at[1, 2].set(-1))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda z, stored: jnp.sum(losses.top_k_kl_tail(z, stored)[2:]))
    )(STUDENT, padded)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    rows = np.asarray(jax.jit(losses.top_k_kl_tail)(STUDENT, padded))
    np.testing.assert_array_equal(np.isnan(rows), np.arange(6) == 1)


def test_given_classes_out_of_range_are_nan() -> None:
    """JAX reads -1 as the last class."""
    index = np.tile([1, 2], (6, 1))
    index[1, 0], index[4, 1] = -1, LOGITS.shape[1]
    outside = (index < 0) | (index >= LOGITS.shape[1])
    known = jax.jit(losses.top_k_at)(LOGITS, index)
    np.testing.assert_array_equal(np.isnan(known.log_probs), outside)
    np.testing.assert_array_equal(np.isnan(known.log_tail), outside.any(axis=1))
    weighted = jax.jit(losses.random_sampling_targets)(LOGITS, index)
    np.testing.assert_array_equal(np.isnan(weighted.weights), outside)
    shared = jax.jit(losses.shared_vocabulary)(LOGITS, LOGITS, index[1], index[4])
    for side, ids in zip(shared, outside[[1, 4]], strict=True):
        np.testing.assert_array_equal(np.isnan(side)[:, :2], np.tile(ids, (6, 1)))
    accepted = jax.jit(lambda ids: losses.acceptance(LOGITS[:, :2], LOGITS, draft_ids=ids))
    assert np.isnan(accepted(index[1])).all() and np.isfinite(accepted(index[2])).all()


def test_labels_of_tokens_are_those_of_rows() -> None:
    tokens, other, labels, where = (
        x.reshape(2, 3, *x.shape[1:]) for x in (STUDENT, LOGITS, IGNORED, KNOWN)
    )
    for loss in LABELLED.values():
        want, got = jax.jit(
            lambda loss=loss: (
                loss(STUDENT, LOGITS, IGNORED, where=KNOWN).reshape(2, 3),
                loss(tokens, other, labels, where=where),
            )
        )()
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_task_of_half_precision_logits_is_computed_in_float32() -> None:
    half = LOGITS.astype(jnp.bfloat16)
    got = objective.classification(inputs(half, LABELS))["task"]
    want = objective.classification(inputs(half.astype(jnp.float32), LABELS))["task"]
    np.testing.assert_array_equal(got, want)
