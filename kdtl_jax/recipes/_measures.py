"""The task loss and the score for each kind of targets; larger scores are better.

Classes: cross-entropy and accuracy. Several labels at once: sigmoid cross-entropy and the mean over
labels of their average precision. Numbers: squared error of standardized targets and R².
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import methods, metrics, objective, trees
from kdtl_jax._types import Params
from kdtl_jax.datasets import Dataset, Kind, Preprocessing
from kdtl_jax.objective import TermsFn
from kdtl_jax.recipes import _choice, _training
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import report, scores


class Measure(NamedTuple):
    """The loss and the scores of one kind of targets."""

    kind: Kind
    score_name: report.Score
    task: TermsFn
    methods: tuple[str, ...]  # compared if the user names none
    # From logits [..., K] to answers [...] or [..., K], within a program.
    answers: Callable[[Array], Array]
    # (answers [..., N] or [..., N, K], targets) -> scores [...]; NaN if an answer is not finite.
    score: Callable[[Any, Any], np.ndarray]
    # 1 where two answers are the same decision, else 0, [..., N]; NaN where one is not finite.
    agree: Callable[[Any, Any], np.ndarray] | None = None
    # `answers` and `score` of one student `[N, K]` within a program; the score is float32.
    judge: Callable[[Array, Array], tuple[Array, Array]] = _training.judge_classes
    # Other scores, means over seeds.
    extra_scores: Callable[[Any, Any], dict[str, float]] = lambda answers, targets: {}


def measure_of(form: Preprocessing) -> Measure:
    """The measure for data with this preprocessing."""
    if form.kind == "labels":
        return _LABELS
    if form.kind == "numbers":
        scale = np.ones(1) if form.target_scaling is None else form.target_scaling.scale
        return _NUMBERS._replace(extra_scores=lambda y, t: _extra_number_scores(y, t, scale))
    return CLASSES


def measure_of_data(form: Preprocessing, settings: Any, part: Dataset) -> Measure:
    """`measure_of`, with the loss that the settings request for these training examples.

    Raises:
      UsageError: if class settings are given for other targets.
    """
    check(settings, form.kind)
    measure = measure_of(form)
    if form.kind != "classes":
        return measure
    return measure._replace(task=cross_entropy_of(settings, part.labels, part.classes))


def row(
    measure: Measure,
    method: str,
    family: str,
    label: str,
    params: Params,
    results: Any,
    seconds: float,
    settings: Mapping[str, Any],
    *,
    targets: Any,
    teacher: Any = None,
) -> report.Row:
    """A method's line of the table: one student per seed.

    Args:
      measure: of the targets.
      method: its key in results.json.
      family: group in the table.
      label: in the table.
      params: of all students, to count those of one.
      results: with scores `test` and `validation` `[S]`, and `answers` `[S, N, ...]`.
      seconds: total wall time.
      settings: fixed and chosen ones.
      targets: of the test examples.
      teacher: its answers, `[S or 1, N, ...]`, for the agreement.
    """
    share, is_correct, agrees = measure.score_name.is_share, None, None
    if measure.kind == "classes":  # the score is a mean over examples
        is_correct = np.asarray(results.answers) == np.asarray(targets)
    if teacher is not None and measure.agree is not None:
        agrees = measure.agree(results.answers, teacher)
    extra = {
        name: _choice.rounded(x)
        for name, x in measure.extra_scores(results.answers, targets).items()
    }
    return report.Row(
        method,
        family,
        label,
        trees.count(params) // len(results.test),
        report.interval(results.test, is_correct, is_share=share),
        report.interval(results.validation, is_share=share),
        seconds,
        {**settings, **extra},
        None if agrees is None else report.interval(agrees.mean(axis=1), agrees, is_share=True),
        examples=is_correct,
        is_share=share,
    )


def _judge_by(
    score: Callable[[Array, Array], Array],
) -> Callable[[Array, Array], tuple[Array, Array]]:
    def judge(logits: Array, targets: Array) -> tuple[Array, Array]:
        value = score(logits, targets.astype(logits.dtype))
        return logits, jnp.where(jnp.isfinite(logits).all() & jnp.isfinite(value), value, jnp.nan)

    return judge


def _traced_precision(logits: Array, targets: Array) -> Array:
    """`_mean_average_precision`: for each positive, the precision among scores not below it."""

    def precision_of_label(y: Array, t: Array) -> Array:
        positive = t > 0
        lower = jnp.searchsorted(jnp.sort(y), y)
        missed = jnp.searchsorted(jnp.sort(jnp.where(positive, y, jnp.inf)), y)
        precision = (jnp.sum(positive) - missed) / (len(y) - lower)
        return jnp.sum(jnp.where(positive, precision, 0.0)) / jnp.sum(t)

    return jnp.nanmean(jax.vmap(precision_of_label, in_axes=1)(logits, targets))


def _traced_r_squared(numbers: Array, targets: Array) -> Array:
    residual = jnp.sum(jnp.square(numbers - targets), axis=0)
    deviations = targets - jnp.mean(targets, axis=0, keepdims=True)
    return jnp.mean(1 - residual / jnp.sum(jnp.square(deviations), axis=0))


def _by_seed(
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[Any, Any], np.ndarray]:
    """Lifts a score of one seed's answers `[N, K]` to answers `[..., N, K]`."""

    def scores_by_seed(answers: Any, targets: Any) -> np.ndarray:
        answers, targets = np.asarray(answers), np.asarray(targets)
        flat = answers.reshape(-1, *answers.shape[-2:])
        values = [score(y, targets) if y.size and np.isfinite(y).all() else np.nan for y in flat]
        return np.array(values).reshape(answers.shape[:-2])

    return scores_by_seed


def _mean_average_precision(answers: np.ndarray, targets: np.ndarray) -> float:
    precision = metrics.average_precision(answers, targets)
    known = precision[~np.isnan(precision)]
    return float(known.mean()) if known.size else float("nan")


def _r_squared(answers: np.ndarray, targets: np.ndarray) -> float:
    value = metrics.r_squared(answers, targets)
    return value if np.isfinite(value) else float("nan")


def _same_class(answers: Any, other: Any) -> np.ndarray:
    answers, other = np.asarray(answers), np.asarray(other)
    broken = (answers == scores.WRONG) | (other == scores.WRONG)
    return np.where(broken, np.nan, answers == other)


def _same_labels(answers: Any, other: Any) -> np.ndarray:
    answers, other = np.asarray(answers), np.asarray(other)
    broken = ~np.isfinite(answers).all(axis=-1) | ~np.isfinite(other).all(axis=-1)
    return np.where(broken, np.nan, ((answers > 0) == (other > 0)).all(axis=-1))


def _extra_label_scores(answers: Any, targets: Any) -> dict[str, float]:
    """Macro F1 and subset accuracy; a label is predicted if its logit is above 0.

    Both are NaN if any logit is not finite.
    """
    answers, targets = np.asarray(answers), np.asarray(targets)
    if not np.isfinite(answers).all():
        return {"macro_f1": float("nan"), "subset_accuracy": float("nan")}
    predicted = answers > 0
    return {
        "macro_f1": float(np.mean([metrics.macro_f1(y, targets) for y in predicted])),
        "subset_accuracy": float((predicted == targets).all(axis=-1).mean()),
    }


def _extra_number_scores(answers: Any, targets: Any, scale: np.ndarray) -> dict[str, float]:
    """The mean absolute error in the units of the data."""
    error = np.abs(np.asarray(answers, np.float64) - np.asarray(targets)) * scale
    return {"mean_absolute_error": float(error.mean())}


def cross_entropy(inputs: objective.Inputs) -> dict[str, Array]:
    """Cross-entropy with the labels, or with the mixed labels `batch["targets"]` `[B, K]`."""
    if "targets" not in inputs.batch:
        return objective.classification(inputs)
    logits = inputs.student["logits"]
    return {"task": optax.softmax_cross_entropy(logits, inputs.batch["targets"])}


def cross_entropy_of(settings: Any, labels: np.ndarray, classes: int) -> TermsFn:
    """`inputs -> {"task": [B]}`, with the settings' smoothing and class weights.

    `--label-smoothing e` mixes the labels with the uniform distribution, `(1 - e) y + e / K`.
    `--class-weights balanced` weights an example of class k by `N / (K n_k)`, so that all classes
    count equally and the mean weight of the training examples is 1. Both affect only this term;
    without either it is `cross_entropy`.
    """
    smoothing = settings.label_smoothing
    weights = balanced_weights(labels, classes) if settings.class_weights == "balanced" else None
    if not smoothing and weights is None:
        return cross_entropy

    def terms(inputs: objective.Inputs) -> dict[str, Array]:
        logits, batch = inputs.student["logits"], inputs.batch
        targets = batch.get("targets")  # mixed labels
        if targets is None:
            targets = jax.nn.one_hot(batch["labels"], classes, dtype=logits.dtype)
        values = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
        if weights is not None:
            values = values * (targets @ jnp.asarray(weights, logits.dtype))
        return {"task": values}

    return terms


def check(settings: Any, kind: str | None = None) -> None:
    """Raises UsageError if class settings are given for other targets.

    Before the data are read, their kind is `settings.target`, which may be "auto".
    """
    kind = kind or settings.target
    if kind in ("labels", "numbers") and (
        settings.label_smoothing or settings.class_weights != "none"
    ):
        raise UsageError(
            f"--label-smoothing and --class-weights are for classes, but the targets are {kind}."
        )


def balanced_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """`N / (K n_k)` by class, with K the number of classes that occur; 0 for the others."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (np.sum(counts > 0) * np.maximum(counts, 1)), 0.0)


CLASSES = Measure(
    "classes",
    report.ACCURACY,
    cross_entropy,
    ("kd", "dkd"),
    scores.predicted,
    scores.accuracy,
    _same_class,
)
_LABELS = Measure(
    "labels",
    report.Score("mean_average_precision", "mean average precision", is_share=True),
    methods.multi_label,
    ("binary_kd", "logit_mse"),
    jnp.asarray,
    _by_seed(_mean_average_precision),
    _same_labels,
    judge=_judge_by(_traced_precision),
    extra_scores=_extra_label_scores,
)
_NUMBERS = Measure(
    "numbers",
    report.Score("r2", "R²", is_share=False),
    methods.regression,
    ("logit_mse", "hint"),
    jnp.asarray,
    _by_seed(_r_squared),
    judge=_judge_by(_traced_r_squared),
)
ALL = (CLASSES, _LABELS, _NUMBERS)
