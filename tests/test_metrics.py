"""Scores of predictions, against sums written out by hand."""

from typing import Any

import numpy as np
import pytest

from kdtl_jax import metrics
from kdtl_jax.datasets import Preprocessing
from kdtl_jax.recipes import _measures, evaluate
from kdtl_jax.run import scores

LABELS = np.array([0, 0, 0, 1, 1, 2])
NAMED = np.array([0, 0, 1, 1, -1, 1])  # the fifth has no answer


def test_classes_one_by_one() -> None:
    assert metrics.confusion(NAMED, LABELS, 4).tolist() == [
        [2, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip
    actual = metrics.per_class(NAMED, LABELS, 4)
    np.testing.assert_allclose(actual.precision, [1, 1 / 3, np.nan, np.nan])
    np.testing.assert_allclose(actual.recall, [2 / 3, 1 / 2, 0, np.nan])
    np.testing.assert_allclose(actual.f1, [4 / 5, 2 / 5, 0, np.nan])
    assert actual.support.tolist() == [3, 2, 1, 0]
    answers = NAMED != -1
    assert metrics.accuracy(NAMED[answers], LABELS[answers]) == 3 / 5
    assert metrics.balanced_accuracy([0, 0, 1, 1, 2, 1], LABELS, 4) == pytest.approx(
        (2 / 3 + 1 / 2) / 3
    )


def test_without_an_answer_there_is_no_share_of_right_ones() -> None:
    assert np.isnan(metrics.accuracy(NAMED, LABELS)) and np.isnan(scores.accuracy(NAMED, LABELS))
    assert np.isnan(metrics.balanced_accuracy(NAMED, LABELS, 4))
    with pytest.raises(ValueError, match="whole numbers"):  # -1 is not a label that could be right
        metrics.accuracy([0, -1], [0, -1])


def test_probabilities() -> None:
    p, labels = np.array([[0.9, 0.1], [0.8, 0.2], [0.45, 0.55], [0.5, 0.5]]), [0, 1, 1, 0]
    assert metrics.negative_log_likelihood(p, labels) == pytest.approx(
        -np.mean(np.log([0.9, 0.2, 0.55, 0.5]))
    )
    assert metrics.brier(p, labels) == pytest.approx(
        np.mean([0.1**2 * 2, 0.8**2 * 2, 0.45**2 * 2, 0.5])
    )
    actual = metrics.calibration(p, labels, bins=5)
    assert actual.counts.tolist() == [0, 0, 2, 1, 1]  # an edge belongs to the bin below it
    np.testing.assert_allclose(actual.accuracy, [np.nan, np.nan, 1, 0, 1])
    np.testing.assert_allclose(actual.confidence, [np.nan, np.nan, 0.525, 0.8, 0.9])
    assert actual.error == pytest.approx((2 * 0.475 + 0.8 + 0.1) / 4)
    assert metrics.negative_log_likelihood([[1.0, 0.0]], [1]) == np.inf
    assert np.isnan(metrics.calibration([[np.nan, 1.0]], [1]).error)


@pytest.mark.parametrize("labels", [[0, -1], [0, 2], [0.0, 1.0], [False, True]])
def test_labels_are_classes(labels: list[float]) -> None:
    p = np.full((2, 2), 0.5)
    for call in (metrics.negative_log_likelihood, metrics.brier, metrics.calibration):
        with pytest.raises(ValueError, match=r"whole numbers in 0\.\.1, got"):
            call(p, labels)
    with pytest.raises(ValueError, match=r"whole numbers in 0\.\.1, got"):
        metrics.per_class([0, 1], labels, 2)


def test_several_labels_at_once() -> None:
    ranking = np.array([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    targets = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    actual = metrics.average_precision(ranking, targets)
    # Of equal scores (rows 0 and 1 of the second label) all or none are taken.
    np.testing.assert_allclose(actual, [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2, np.nan])
    named = (ranking > 0.5).astype(int)
    each = metrics.per_label(named, targets)
    np.testing.assert_allclose(each.precision, [2 / 3, 2 / 3, np.nan])
    np.testing.assert_allclose(each.recall, [1, 1, np.nan])
    assert metrics.micro_f1(named, targets) == pytest.approx(8 / 10)
    f1 = metrics.per_label(named, targets).f1
    assert metrics.macro_f1(named, targets) == pytest.approx(np.nanmean(f1))
    assert np.isnan(metrics.macro_f1([[0, 0]], [[0, 0]]))


def test_numbers() -> None:
    y, t = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 5.0])
    assert metrics.mean_absolute_error(y, t) == pytest.approx(2 / 3)
    assert metrics.root_mean_squared_error(y, t) == pytest.approx((2 / 3) ** 0.5)
    assert metrics.r_squared(y, t) == pytest.approx(1 - 2 / 8)
    assert metrics.r_squared(y[:, None], t) == pytest.approx(1 - 2 / 8)
    assert metrics.r_squared([1.0, 1.0], [2.0, 2.0]) == -np.inf
    with pytest.raises(ValueError, match="one shape"):
        metrics.mean_absolute_error(np.ones((2, 2)), np.ones(2))
    for result, expected in (([], []), ([1], [1, 2]), (1, [1])):
        with pytest.raises(ValueError, match="same examples"):
            metrics.accuracy(result, expected)


@pytest.mark.parametrize(
    ("call", "found", "wanted", "says"),
    [
        (metrics.accuracy, [[0], [1]], [0, 1], r"classes \[2\], whole numbers, got int64\[2, 1\]"),
        (metrics.accuracy, [0, 1], [[0], [1]], r"labels must be \[2\], one class per example"),
        (metrics.accuracy, [0.2, 0.9], [0, 1], "take the argmax"),
        (metrics.brier, [[0.5, 0.5]] * 2, [[0], [1]], "one class per example"),
        (metrics.brier, [0.5, 0.5], [0, 1], r"must be \[2, classes\]"),
        (metrics.calibration, [[2.0, -3.0]], [0], "take the softmax"),
        (metrics.brier, [[0.9], [0.8]], [0, 0], r"one class are always 1, got \[2, 1\]: for a sig"),
        (metrics.per_label, [[1, 0]], [[1, -1]], "targets must be 0 or 1, got -1"),
        (metrics.per_label, [[1, 0]], [[1]], "one shape"),
        (metrics.micro_f1, [[0.7, 0.2]], [[1, 0]], "predicted must be 0 or 1, got 0.7: compare"),
        (metrics.average_precision, [[0.7, 0.2]], [[1, 2]], "targets must be 0 or 1, got 2"),
    ],
)
def test_what_would_broadcast_or_count_as_something_else_is_refused(
    call: Any, found: Any, wanted: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        call(found, wanted)
    with pytest.raises(ValueError, match=r"predictions must lie in 0\.\.1, got 2"):
        metrics.confusion([0, 2], [0, 1], 2)


def test_labels_of_an_example_without_an_answer_leave_no_score_of_all() -> None:
    logits = np.array([[1.0, -1.0], [np.nan, -1.0]])
    actual = evaluate.score_labels(logits, np.array([[1, 0], [0, 0]]), ["a", "b"])
    assert actual["not_finite"] == 1
    for name in ("exact", "mean_average_precision", "micro_f1", "macro_f1"):
        assert np.isnan(actual[name])


def test_a_class_without_an_answer_leaves_no_score_of_all() -> None:
    logits = np.array([[1.0, -1.0], [np.nan, -1.0], [-np.inf, 2.0]])
    actual = evaluate.score_classes(logits, np.array([0, 1, 1]), ["a", "b"])
    assert actual["not_finite"] == 1
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "negative_log_likelihood", "brier"):
        assert np.isnan(actual[name]), name
    known = evaluate.score_classes(logits[[0, 2]], np.array([0, 1]), ["a", "b"])
    assert known["macro_f1"] == known["accuracy"] == 1


def test_a_diverged_student_agrees_with_nobody_and_names_nothing() -> None:
    """NaN > 0 is false: as an answer that would be "none of the labels"."""
    answers = np.array([[[1.0, -1.0], [-2.0, -1.0]], [[np.nan] * 2, [1.0, 1.0]]])  # [S, N, K]
    labels = _measures.measure_of(Preprocessing(kind="labels"))
    assert all(np.isnan(x) for x in labels.extra_scores(answers, [[1, 0], [0, 0]]).values())
    assert labels.extra_scores(answers[:1], [[1, 0], [0, 0]])["subset_accuracy"] == 1
    assert labels.agree is not None and _measures.CLASSES.agree is not None
    np.testing.assert_array_equal(labels.agree(answers, answers[:1]), [[1, 1], [np.nan, 0]])
    alike = _measures.CLASSES.agree([[0, 1, 2], [-1, 1, 0]], [[0, 1, -1]])
    np.testing.assert_array_equal(alike, [[1, 1, np.nan], [np.nan, 1, np.nan]])
