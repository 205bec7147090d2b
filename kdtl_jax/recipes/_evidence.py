"""What a student gets wrong: its confusion matrix, and where it differs from its teacher."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax import datasets
from kdtl_jax._text import shown
from kdtl_jax.datasets import Dataset
from kdtl_jax.run import report
from kdtl_jax.run.report import plots

EXAMPLES, FEATURES = 12, 6  # shown
CLASSES = 20  # of a matrix that fits a page
PAIRS = 12  # of confused classes, if it does not


class Named(NamedTuple):
    """The classes that a method's students predict for the test examples."""

    label: str  # of the method
    classes: np.ndarray  # [S, N]


def sections(
    test: Dataset, student: Named, teacher: np.ndarray, *, called: str = "teacher"
) -> list[report.Section]:
    """Confusion matrix of a method, and examples on which it differs from its teacher.

    Args:
      test: the test split.
      student: of the recommended method.
      teacher: the classes that it predicts, `[1, N]` or `[S, N]`; or those of another method.
      called: the report's name for the teacher, or for that method.
    """
    return [_confusion(test, student), *_differences(test, student, np.asarray(teacher), called)]


def counts(labels: np.ndarray, named: np.ndarray, classes: int) -> np.ndarray:
    """How often each class is predicted as each, `[K, K]`; non-finite logits do not count."""
    found = np.zeros((classes, classes), np.int64)
    truth, said = np.broadcast_to(labels, named.shape).ravel(), named.ravel()
    np.add.at(found, (truth[said >= 0], said[said >= 0]), 1)
    return found


def _confusion(test: Dataset, student: Named) -> report.Section:
    found, names = counts(test.labels, student.classes, test.classes), _names(test)
    title, seeds = "Confusion", len(student.classes)
    whose = f"{student.label}, test split, all {seeds} seeds" if seeds > 1 else student.label
    if test.classes > CLASSES:
        wrong = found - np.diag(np.diag(found))
        order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
        pairs = [np.unravel_index(i, found.shape) for i in order]
        rows = [(names[a], names[b], f"{wrong[a, b]}") for a, b in pairs if wrong[a, b]]
        table = report.table(("Class", "Taken for", "Times"), rows)
        return report.Section(title, [f"The most frequent confusions of {whose}."], [table])
    whose = whose[:1].upper() + whose[1:]
    note = f"{whose}: of the examples of each class (rows), the percentage predicted as each one."
    shares = found / np.maximum(found.sum(axis=1, keepdims=True), 1)
    chart = plots.heat_map(
        np.where(found > 0, shares, np.nan).tolist(), rows=names, columns=names,
        row_axis="class", column_axis="named", percent=True,
    )  # fmt: skip
    return report.Section(title, [note], [chart])


def _differences(
    test: Dataset, student: Named, teacher: np.ndarray, called: str
) -> list[report.Section]:
    apart = (student.classes != teacher).mean(axis=0)
    # Among examples on which equally many differ: one of every class before the second of any.
    seen: collections.Counter[tuple[float, int]] = collections.Counter()
    ranked = []
    for i in np.flatnonzero(apart).tolist():
        tie = float(apart[i]), int(test.labels[i])
        ranked.append((-apart[i], seen[tie], i))
        seen[tie] += 1
    order = [i for *_, i in sorted(ranked)[:EXAMPLES]]
    if not order:
        return []
    names = _names(test)

    def words(row: int) -> list[str]:
        def said(classes: np.ndarray) -> str:
            known, times = np.unique(classes[:, row], return_counts=True)
            first = int(known[np.argmax(times)])
            share = f" ({times.max()} of {len(classes)})" if len(classes) > 1 else ""
            return f"{names[first] if first >= 0 else 'nothing'}{share}"

        return [names[int(test.labels[row])], said(teacher), said(student.classes)]

    note = (
        f"The test examples on which most seeds of {student.label} and the {called} predict "
        "different classes. Shown are the most frequent prediction and its number of seeds."
    )
    examples = _shown(test, order, words, called)
    return [report.Section(f"Where {called} and student differ", [note], [examples])]


def _shown(
    test: Dataset, order: Sequence[int], words: Any, called: str
) -> report.Pictures | report.Table:
    first = test.inputs[0]
    if first.ndim == 3 and first.shape[-1] in (1, 3):
        captions = [dict(zip(("is", called, "student"), words(i), strict=True)) for i in order]
        texts = [", ".join(f"{k} {v}" for k, v in caption.items()) for caption in captions]
        images = [report.png(test.inputs[i]) for i in order]
        return report.Pictures([*map(report.Picture, images, texts)])
    columns = test.form.columns if first.ndim == 1 else ()
    names = [shown(column.name, 16) for column in columns[:FEATURES]] or ["Inputs"]
    more = ["…"] if len(columns) > FEATURES else []
    header = ("Example", "Is", called.capitalize(), "Student", *names, *more)
    rows = [(f"{i}", *words(i), *_inputs(test, i), *more) for i in order]
    return report.table(header, rows)


def _inputs(test: Dataset, row: int) -> list[str]:
    """The first inputs of an example as in its file: a cell per column, or one cell for all."""
    values, form = np.asarray(test.inputs[row], np.float64), test.form
    if form.scaling is not None:
        scale = form.scaling.scale
        values = values * scale + form.scaling.mean
        values = np.where(np.abs(values) < 1e-6 * scale, 0.0, values)  # except for rounding
    flat = values.ravel()
    if not form.columns or values.ndim != 1:
        more = " …" if flat.size > FEATURES else ""
        return [" ".join(f"{value:.3g}" for value in flat[:FEATURES]) + more]
    cells, at = [], 0
    for column in form.columns[:FEATURES]:
        part = flat[at : at + (len(column.categories) or 1)]
        cells.append(shown(datasets.cell_of(column, part), 16))
        at += len(part)
    return cells


def _names(test: Dataset) -> list[str]:
    return [shown(name, 16) for name in test.class_names()]
