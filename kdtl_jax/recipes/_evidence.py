"""What a student gets wrong: its confusion matrix, and where it differs from its teacher."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import datasets, metrics
from kdtl_jax._text import shown
from kdtl_jax.datasets import Dataset
from kdtl_jax.run import report
from kdtl_jax.run.report import plots

EXAMPLES, FEATURES = 12, 6  # shown
CLASSES = 20  # of a matrix that fits a page
PAIRS = 12  # of confused classes, if it does not


class Predictions(NamedTuple):
    """The classes predicted by a method's students for the test examples."""

    label: str  # of the method
    classes: np.ndarray  # [S, N]


def sections(
    test: Dataset, student: Predictions, teacher: np.ndarray, *, teacher_name: str = "teacher"
) -> list[report.Section]:
    """The confusion matrix of a method, and examples on which it differs from its teacher.

    `teacher` has the classes predicted by the teacher or by another method, `[1, N]` or `[S, N]`;
    the report calls it `teacher_name`.
    """
    return [
        _confusion(test, student),
        *_differences(test, student, np.asarray(teacher), teacher_name),
    ]


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each class is predicted as each, `[K, K]`; non-finite logits do not count."""
    counts = [metrics.confusion(answers, labels, classes) for answers in predicted]
    return np.sum(counts, axis=0)


def _confusion(test: Dataset, student: Predictions) -> report.Section:
    counts, names = confusion_counts(test.labels, student.classes, test.classes), _names(test)
    title, seeds = "Confusion", len(student.classes)
    caption = f"{student.label}, test split, all {seeds} seeds" if seeds > 1 else student.label
    if test.classes > CLASSES:
        errors = counts - np.diag(np.diag(counts))
        order = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
        pairs = [np.unravel_index(i, counts.shape) for i in order]
        rows = [(names[a], names[b], f"{errors[a, b]}") for a, b in pairs if errors[a, b]]
        table = report.table(("Class", "Taken for", "Times"), rows)
        return report.Section(title, [f"The most frequent confusions of {caption}."], [table])
    caption = caption[:1].upper() + caption[1:]
    note = f"{caption}: of the examples of each class (rows), the percentage predicted as each one."
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    chart = plots.heat_map(
        np.where(counts > 0, shares, np.nan).tolist(), rows=names, columns=names,
        row_axis="class", column_axis="named", percent=True,
    )  # fmt: skip
    return report.Section(title, [note], [chart])


def _differences(
    test: Dataset, student: Predictions, teacher: np.ndarray, teacher_name: str
) -> list[report.Section]:
    difference_rate = (student.classes != teacher).mean(axis=0)
    # Break ties between examples by taking one of every class before a second of any.
    count_by_tie: collections.Counter[tuple[float, int]] = collections.Counter()
    ranked = []
    for i in np.flatnonzero(difference_rate).tolist():
        tie = float(difference_rate[i]), int(test.labels[i])
        ranked.append((-difference_rate[i], count_by_tie[tie], i))
        count_by_tie[tie] += 1
    order = [i for *_, i in sorted(ranked)[:EXAMPLES]]
    if not order:
        return []
    names = _names(test)

    def describe(row: int) -> list[str]:
        def most_frequent(classes: np.ndarray) -> str:
            predictions, frequencies = np.unique(classes[:, row], return_counts=True)
            mode = int(predictions[np.argmax(frequencies)])
            share = f" ({frequencies.max()} of {len(classes)})" if len(classes) > 1 else ""
            return f"{names[mode] if mode >= 0 else 'nothing'}{share}"

        label = names[int(test.labels[row])]
        return [label, most_frequent(teacher), most_frequent(student.classes)]

    note = (
        f"The test examples on which most seeds of {student.label} and the {teacher_name} predict "
        "different classes. Shown are the most frequent prediction and its number of seeds."
    )
    examples = _show_examples(test, order, describe, teacher_name)
    return [report.Section(f"Where {teacher_name} and student differ", [note], [examples])]


def _show_examples(
    test: Dataset, order: Sequence[int], describe: Any, teacher_name: str
) -> report.Pictures | report.Table:
    first = test.inputs[0]
    if first.ndim == 3 and first.shape[-1] in (1, 3):
        roles = ("is", teacher_name, "student")
        captions = [", ".join(map(" ".join, zip(roles, describe(i), strict=True))) for i in order]
        images = [report.png(test.inputs[i]) for i in order]
        return report.Pictures([*map(report.Picture, images, captions)])
    columns = test.form.columns if first.ndim == 1 else ()
    names = [shown(column.name, 16) for column in columns[:FEATURES]] or ["Inputs"]
    ellipsis = ["…"] if len(columns) > FEATURES else []
    header = ("Example", "Is", teacher_name.capitalize(), "Student", *names, *ellipsis)
    rows = [(f"{i}", *describe(i), *_inputs(test, i), *ellipsis) for i in order]
    return report.table(header, rows)


def _inputs(test: Dataset, row: int) -> list[str]:
    """The first inputs of an example in the units of its file: a cell per column, or one in all."""
    values, form = np.asarray(test.inputs[row], np.float64), test.form
    if form.scaling is not None:
        scale = form.scaling.scale
        values = values * scale + form.scaling.mean
        values = np.where(np.abs(values) < 1e-6 * scale, 0.0, values)  # except for rounding
    flat = values.ravel()
    if not form.columns or values.ndim != 1:
        ellipsis = " …" if flat.size > FEATURES else ""
        return [" ".join(f"{value:.3g}" for value in flat[:FEATURES]) + ellipsis]
    cells, start = [], 0
    for column in form.columns[:FEATURES]:
        part = flat[start : start + (len(column.categories) or 1)]
        cells.append(shown(datasets.cell_of(column, part), 16))
        start += len(part)
    return cells


def _names(test: Dataset) -> list[str]:
    return [shown(name, 16) for name in test.class_names()]
