"""Metrics of predictions: classes, probabilities, multiple labels, and numbers.

They run on the host, in float64: `labels` `[N]` are 0..K-1, and `predicted` `[N]` are classes,
where -1 means no answer (`run.scores.predicted` of logits that are not finite): it belongs to no
class, and shares of correct answers are NaN. `probabilities` `[N, K]` have rows that sum to 1.
Undefined values, such as the precision of a class that was never predicted, are NaN.

Raises ValueError if there are no examples, shapes differ, a label or a prediction is not one of the
classes, a multi-label target is not 0 or 1, or a probability lies outside 0..1.
"""

from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import _checks


class PerClass(NamedTuple):
    """One number per class, `[K]`."""

    precision: np.ndarray  # of the examples predicted as k, the share that are k
    recall: np.ndarray  # of the examples that are k, the share predicted as k
    f1: np.ndarray  # 2 TP / (2 TP + FP + FN)
    support: np.ndarray  # examples that are k


class Calibration(NamedTuple):
    """Confidence and accuracy in bins of equal width over 0..1, `[bins]`; NaN in an empty bin."""

    error: float  # expected calibration error: sum_b n_b / N |accuracy_b - confidence_b|
    confidence: np.ndarray  # mean of the largest probabilities
    accuracy: np.ndarray
    counts: np.ndarray


def accuracy(predicted: Any, labels: Any) -> float:
    """The share of correct classes `[N]`; NaN if an answer is missing (`run.scores.accuracy`)."""
    predicted, labels = _check_classes(predicted, labels)
    return float(np.mean(predicted == labels)) if _all_answered(predicted) else float("nan")


def confusion(predicted: Any, labels: Any, classes: int) -> np.ndarray:
    """Counts `[K, K]`: row i, column j counts the examples of class i that were predicted as j.

    An example without an answer is in no column.
    """
    _checks.count(1, classes=classes)
    predicted, labels = _check_classes(predicted, labels, classes)
    is_answered = predicted >= 0
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels[is_answered], predicted[is_answered]), 1)
    return counts


def per_class(predicted: Any, labels: Any, classes: int) -> PerClass:
    """Precision, recall and F1 of every class, from classes `[N]`."""
    counts = confusion(predicted, labels, classes)
    support = np.bincount(np.asarray(labels), minlength=classes)
    return _per_class(np.diagonal(counts), counts.sum(axis=0), support)


def balanced_accuracy(predicted: Any, labels: Any, classes: int) -> float:
    """The mean recall over the classes that occur in `labels` `[N]`; NaN as in `accuracy`."""
    recall = per_class(predicted, labels, classes).recall
    return float(np.nanmean(recall)) if _all_answered(np.asarray(predicted)) else float("nan")


def negative_log_likelihood(probabilities: Any, labels: Any) -> float:
    """`-mean log p(label)` of `[N, K]` and `[N]`; infinite if a label has probability 0."""
    p, labels = _check_probabilities(probabilities, labels)
    with np.errstate(divide="ignore"):
        return float(-np.mean(np.log(p[np.arange(len(labels)), labels])))


def brier(probabilities: Any, labels: Any) -> float:
    """`mean sum_k (p_k - y_k)^2` of `[N, K]`, y one-hot: 0 to 2. Brier, 1950."""
    p, labels = _check_probabilities(probabilities, labels)
    p_label = p[np.arange(len(labels)), labels]
    return float(np.mean(np.sum(p**2, axis=-1) - p_label**2 + (1 - p_label) ** 2))


def calibration(probabilities: Any, labels: Any, *, bins: int = 15) -> Calibration:
    """Compares confidence (the largest probability) with the share of correct answers, bin by bin.

    Expected calibration error: Naeini et al., AAAI 2015, and Guo et al., 2017 (1706.04599), with
    bins `((b - 1) / bins, b / bins]`.
    """
    p, labels = _check_probabilities(probabilities, labels)
    _checks.count(1, bins=bins)
    confidence, is_correct = p.max(axis=-1), p.argmax(axis=-1) == labels
    if not np.isfinite(confidence).all():
        nans = np.full(bins, np.nan)
        return Calibration(float("nan"), nans, nans, np.zeros(bins, np.int64))
    bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_index, confidence, bins) / count
        share = np.bincount(bin_index, is_correct.astype(np.float64), bins) / count
    gaps = np.where(count > 0, np.abs(share - mean), 0.0)
    return Calibration(float(np.sum(gaps * count) / len(labels)), mean, share, count)


# Multiple labels: `targets` `[N, K]` of 0 and 1.


def average_precision(ranking: Any, targets: Any) -> np.ndarray:
    """`sum_n (R_n - R_(n-1)) P_n` per label `[K]` over descending scores; equal scores count once.

    Args:
      ranking: scores `[N, K]`, logits or probabilities; only their order matters.
      targets: 0 or 1, `[N, K]`. NaN for a label without a positive example.
    """
    ranking, targets = _check_multi_label(ranking, targets)
    return np.array([_average_precision(r, t) for r, t in zip(ranking.T, targets.T, strict=True)])


def per_label(predicted: Any, targets: Any) -> PerClass:
    """Precision, recall and F1 of every label; `predicted` `[N, K]` is 0 or 1."""
    predicted, targets = _check_binary(predicted, targets)
    return _per_class((predicted & targets).sum(0), predicted.sum(0), targets.sum(0))


def micro_f1(predicted: Any, targets: Any) -> float:
    """`2 TP / (2 TP + FP + FN)` with the counts of all labels `[N, K]` added up."""
    predicted, targets = _check_binary(predicted, targets)
    totals = _per_class((predicted & targets).sum(), predicted.sum(), targets.sum())
    return float(totals.f1)


def macro_f1(predicted: Any, targets: Any) -> float:
    """The mean F1 over the labels `[N, K]` that have one (`per_label`); NaN if none has."""
    f1 = per_label(predicted, targets).f1
    defined = f1[~np.isnan(f1)]
    return float(defined.mean()) if defined.size else float("nan")


# Numbers: `predicted` and `targets` are `[N]` or `[N, K]`, and results are means over K.


def mean_absolute_error(predicted: Any, targets: Any) -> float:
    """`mean |y - t|` over `[N]` or `[N, K]`."""
    y, t = _check_numbers(predicted, targets)
    return float(np.mean(np.abs(y - t)))


def root_mean_squared_error(predicted: Any, targets: Any) -> float:
    """`sqrt(mean (y - t)^2)` over all of `[N]` or `[N, K]`."""
    y, t = _check_numbers(predicted, targets)
    return float(np.sqrt(np.mean((y - t) ** 2)))


def r_squared(predicted: Any, targets: Any) -> float:
    """`1 - sum (y - t)^2 / sum (t - mean t)^2` over `[N]`, or the mean over K of `[N, K]`.

    The coefficient of determination.
    """
    y, t = _check_numbers(predicted, targets)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = 1 - ((y - t) ** 2).sum(axis=0) / ((t - t.mean(axis=0)) ** 2).sum(axis=0)
    return float(np.mean(scores))


def _per_class(correct: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> PerClass:
    with np.errstate(invalid="ignore"):
        correct = np.asarray(correct, np.float64)
        return PerClass(
            correct / predicted, correct / support, 2 * correct / (predicted + support), support
        )


def _average_precision(ranking: np.ndarray, targets: np.ndarray) -> float:
    positives = int(targets.sum())
    if not positives or not np.isfinite(ranking).all():
        return float("nan")
    order = np.argsort(-ranking, kind="stable")
    ranked, hits = ranking[order], np.cumsum(targets[order].astype(np.int64))
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of equal scores
    recall = hits[ends] / positives
    return float(np.sum(np.diff(recall, prepend=0.0) * hits[ends] / (ends + 1)))


def _check_numbers(predicted: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    pair = _check_pair(predicted, targets)
    y, t = (x.reshape(len(x), -1).astype(np.float64) for x in pair)
    if y.shape != t.shape:
        raise ValueError(
            f"predictions and targets must be of one shape, got {list(y.shape)} and {list(t.shape)}"
        )
    return y, t


def _check_pair(predicted: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    has_rows = predicted.ndim and labels.ndim and len(predicted)
    if not has_rows or len(predicted) != len(labels):
        raise ValueError(
            "needs predictions and labels of the same examples, at least one, got "
            f"{list(predicted.shape)} and {list(labels.shape)}"
        )
    return predicted, labels


def _check_labels(predictions: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Refuses labels that indexing would accept: -1 is not the last class."""
    if labels.ndim != 1:
        raise ValueError(
            f"labels must be [{len(predictions)}], one class per example, got {list(labels.shape)}"
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must be whole numbers in 0..{max(classes, 1) - 1}, got {labels.dtype} from "
            f"{labels.min()} to {labels.max()}"
        )


def _check_classes(
    predicted: Any, labels: Any, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    predicted, labels = _check_pair(predicted, labels)
    _check_labels(predicted, labels, int(labels.max()) + 1 if classes is None else classes)
    if predicted.shape != labels.shape or predicted.dtype.kind not in "iu":
        raise ValueError(
            f"predictions must be classes [{len(labels)}], whole numbers, got {predicted.dtype}"
            f"{list(predicted.shape)}: for scores, take the argmax over the last axis"
        )
    if classes is not None and predicted.max() >= classes:
        raise ValueError(f"predictions must lie in 0..{classes - 1}, got {predicted.max()}")
    return predicted, labels


def _check_probabilities(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    p, labels = _check_pair(probabilities, labels)
    if p.ndim != 2:
        raise ValueError(f"probabilities must be [{len(labels)}, classes], got {list(p.shape)}")
    if p.shape[1] == 1:
        raise ValueError(
            f"probabilities of one class are always 1, got {list(p.shape)}: for a sigmoid's p, use "
            "np.concatenate([1 - p, p], axis=1)"
        )
    _check_labels(p, labels, p.shape[-1])
    if np.any((p < 0) | (p > 1 + 1e-3)):  # allows for rounding in half precision
        raise ValueError(
            f"probabilities must lie in 0..1, got {p.min():.3g}..{p.max():.3g}: for logits, "
            "take the softmax"
        )
    return p.astype(np.float64), labels


def _check_multi_label(scores: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = _check_pair(scores, targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(
            "predictions and targets must be of one shape [examples, labels], got "
            f"{list(scores.shape)} and {list(targets.shape)}"
        )
    _check_zero_or_one("targets", targets)
    return scores, targets


def _check_binary(predicted: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    predicted, targets = _check_multi_label(predicted, targets)
    _check_zero_or_one("predicted", predicted, ": compare scores with a threshold")
    return predicted.astype(bool), targets.astype(bool)


def _check_zero_or_one(name: str, array: np.ndarray, repair: str = "") -> None:
    is_invalid = (array != 0) & (array != 1)
    if is_invalid.any():
        raise ValueError(f"{name} must be 0 or 1, got {array[is_invalid][0]}{repair}")


def _all_answered(predicted: np.ndarray) -> bool:
    return bool((predicted >= 0).all())
