"""Scores a student on labeled data: accuracy, scores per class, confusion, and calibration.

kdtl evaluate runs/distill/students/kd.safetensors test.npz --out scores.json
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from kdtl_jax import _files, metrics
from kdtl_jax.recipes import _inputs, _tables
from kdtl_jax.recipes.settings import setting
from kdtl_jax.run import scores

BINS = 15  # of the calibration
LARGEST_CONFUSION = 20  # classes whose confusion is printed
EXAMPLES = """
  kdtl evaluate runs/distill/students/kd.safetensors digits
  kdtl evaluate runs/distill/students/kd.safetensors test.npz --out scores.json

If DATA is what the student was trained on, only the held-out test examples are scored.
"""


@dataclass(frozen=True)
class Settings(_inputs.Used, _inputs.Written):
    """Settings of `kdtl evaluate`."""

    data: str | None = setting(
        None, "labeled examples, as for kdtl distill", positional=True
    )  # fmt: skip
    out: str | None = setting(None, "write all numbers to this JSON file", metavar="FILE")


def run(settings: Settings) -> int:
    """Prints and writes the scores."""
    example = EXAMPLES.strip().splitlines()[0]
    _inputs.check_out(settings)
    model, examples = _inputs.load(settings, example, with_labels=True)
    assert examples.labels is not None
    names = _inputs.class_names(model)
    logits, kind = model.predict(examples.inputs), _inputs.target_kind(model)
    if kind == "numbers":
        result = score_numbers(logits.astype(np.float64), examples.labels)
    elif kind == "labels":
        result = score_labels(logits, examples.labels, names)
    else:
        result = score_classes(logits, examples.labels, names)
    print(f"{settings.student}: {examples.description}", file=sys.stderr)
    print("\n".join(lines(result)))
    show(result, names)
    if settings.out is not None:
        fields = {"student": settings.student, "data": settings.data, "classes": list(names)}
        _inputs.check_out(settings)  # another command may have written there in the meantime
        _files.write_json(Path(settings.out), {**fields, **result})
    return 0


def show(result: dict[str, Any], names: tuple[str, ...]) -> None:
    """Prints the scores per class and, for few classes, the confusion matrix."""
    rows = result.get("per_class")
    if not rows:
        return
    header = list(rows[0])
    cells = [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    _tables.show(header, cells)
    if "confusion" in result and len(names) <= LARGEST_CONFUSION:
        counts, lines_ = [], []
        for name, row in zip(names, result["confusion"], strict=True):
            counts.append([name, *map(str, row)])
            answers = [f"{n} named {other}" for n, other in zip(row, names, strict=True) if n]
            lines_.append(f"of class {name}: {', '.join(answers)}")
        _tables.show(["is \\ named", *names], counts, lines_)


def score_classes(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Scores of mutually exclusive classes: logits `[N, K]`, labels `[N]`."""
    predicted, count = np.asarray(scores.predicted(jnp.asarray(logits))), len(names)
    with np.errstate(invalid="ignore", over="ignore"):
        p = softmax(logits.astype(np.float64), axis=-1)
    scores_per_class = metrics.per_class(predicted, labels, count)
    is_finite = not (predicted == scores.WRONG).any()  # else scores over all examples are NaN
    calibration = metrics.calibration(p, labels, bins=BINS)
    return {
        "examples": len(labels),
        "not_finite": int(np.sum(predicted == scores.WRONG)),
        "accuracy": metrics.accuracy(predicted, labels),
        "balanced_accuracy": metrics.balanced_accuracy(predicted, labels, count),
        "macro_f1": float(np.nanmean(scores_per_class.f1)) if is_finite else float("nan"),
        "negative_log_likelihood": metrics.negative_log_likelihood(p, labels),
        "brier": metrics.brier(p, labels),
        "calibration_error": calibration.error,
        "calibration": {
            "bins": BINS,
            "confidence": calibration.confidence.tolist(),
            "accuracy": calibration.accuracy.tolist(),
            "counts": calibration.counts.tolist(),
        },
        "per_class": class_rows(scores_per_class, names),
        "confusion": metrics.confusion(predicted, labels, count).tolist(),
    }


def score_labels(logits: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Scores of labels that may occur together: logits `[N, K]`, targets `[N, K]` of 0 and 1.

    A label is predicted if its logit is above 0. If any logit is not finite, scores over all
    examples are NaN.
    """
    predicted, is_nonfinite = (logits > 0).astype(np.int64), ~np.isfinite(logits).all(axis=1)
    scores_per_label = metrics.per_label(predicted, targets)
    precision = metrics.average_precision(logits, targets)
    finite = precision[~np.isnan(precision)]
    rows = class_rows(scores_per_label, names)
    for row, value in zip(rows, precision.tolist(), strict=True):
        row["average_precision"] = value
    totals = {
        "exact": float(np.mean((predicted == targets).all(axis=1))),
        "mean_average_precision": float(finite.mean()) if finite.size else float("nan"),
        "micro_f1": metrics.micro_f1(predicted, targets),
        "macro_f1": metrics.macro_f1(predicted, targets),
    }
    if is_nonfinite.any():
        totals = dict.fromkeys(totals, float("nan"))
    return {
        "examples": len(targets),
        "not_finite": int(is_nonfinite.sum()),
        **totals,
        "per_class": rows,
    }


def score_numbers(predicted: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Scores of numbers, `[N]` or `[N, K]`."""
    return {
        "examples": len(targets),
        "not_finite": int(np.sum(~np.isfinite(predicted.reshape(len(predicted), -1)).all(axis=1))),
        "r2": metrics.r_squared(predicted, targets),
        "mean_absolute_error": metrics.mean_absolute_error(predicted, targets),
        "root_mean_squared_error": metrics.root_mean_squared_error(predicted, targets),
    }


def class_rows(scores_: metrics.PerClass, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class."""
    rows = zip(*(np.asarray(column).tolist() for column in scores_), strict=True)
    return [
        {"class": name, **dict(zip(scores_._fields, row, strict=True))}
        for name, row in zip(names, rows, strict=True)
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """The scalar scores, one per line."""
    shares = ("accuracy", "balanced_accuracy", "exact")
    out = []
    for name, value in result.items():
        if isinstance(value, (int, float)):
            text = f"{100 * value:.2f}%" if name in shares else f"{value:,.4g}"
            out.append(f"{name.replace('_', ' '):26s} {text}")
    return out
