"""The outputs of `kdtl sweep`: results.json, sweep.csv, report.html, and the printed table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax.recipes import _choice, _evidence, _students, _tables
from kdtl_jax.recipes._choice import rounded
from kdtl_jax.recipes._pair import Pair
from kdtl_jax.recipes._seeds import Trained
from kdtl_jax.run import report, scores
from kdtl_jax.run.report import plots

SCHEMA_VERSION = 1
SHOWN = 12  # rows of the printed table
BINS = 6  # per side of a heat map, if an axis has more values
PATHS = {
    "together": "all students of a call together (vmap)",
    "mapped": "students one after another within one program (lax.map)",
    "one-by-one": "students one after another, one call per epoch or step",
}


class Sweep(NamedTuple):
    """All results of a sweep."""

    pair: Pair
    settings: Any
    swept: Sequence[Any]  # `sweep.Swept`, by method
    notes: list[str]
    teacher: Trained
    run: Mapping[str, Any]  # the command, its time and all settings


class SweepLine(NamedTuple):
    """One setting of one method, its seeds aggregated."""

    method: str
    setting: dict[str, float]
    validation: report.Interval
    test: report.Interval
    epochs: tuple[int, ...]  # [S], after which a student was not trained further
    complete: bool
    student: _students.SavedStudent | None = None  # of the method's best setting

    @property
    def settings(self) -> dict[str, Any]:
        """The entries that name the student's file."""
        return _students.file_fields(self.student)


def lines(outcome: Sweep) -> list[SweepLine]:
    """All settings by mean validation score; those stopped early follow the others.

    Settings without a finite score come last.
    """
    ranked, share = [], _score(outcome).is_share
    for swept in outcome.swept:
        for k in range(len(swept.epochs)):
            setting = {name: rounded(column[k]) for name, column in swept.columns.items()}
            validation, test = (
                report.interval(score[k], is_share=share)
                for score in (swept.validation, swept.test)
            )
            epochs, complete = tuple(swept.epochs[k].tolist()), bool(swept.complete[k])
            ranked.append(SweepLine(swept.method, setting, validation, test, epochs, complete))
    ranked = [ranked[i] for i in scores.ranked([line.validation.mean for line in ranked])]
    ranked.sort(key=lambda line: (not math.isfinite(line.validation.mean), not line.complete))
    for swept in outcome.swept:
        first = next(i for i, x in enumerate(ranked) if x.complete and x.method == swept.method)
        student = _students.best(
            swept.method, swept.best.variables, ranked[first].validation.values
        )
        ranked[first] = ranked[first]._replace(student=student)
    return ranked


def learning(outcome: Sweep) -> dict[str, dict[str, list[float]]]:
    """The learning curves of each method's best setting, means over seeds."""
    epochs, score = outcome.settings.epochs, _score(outcome)
    return {x.method: _choice.learning_curve(x.best, epochs, score) for x in outcome.swept}


def to_json(outcome: Sweep) -> dict[str, Any]:
    """The content of results.json."""
    ranked, settings, splits = lines(outcome), outcome.settings, outcome.pair.splits
    score, best = _score(outcome).key, _students.best_row(ranked)
    return {
        "schema_version": SCHEMA_VERSION,
        "task": "kdtl sweep",
        "data": {
            "name": splits.train.name,
            **{name: len(part.labels) for name, part in splits._asdict().items()},
            "recommended": best and best.settings["file"],
        },
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "rungs": settings.halving,
        "teacher": {
            f"validation_{score}": float(outcome.teacher.validation[0]),
            f"test_{score}": float(outcome.teacher.test[0]),
        },
        "programs": [
            {
                "method": swept.method,
                "path": swept.path,
                "students_per_call": swept.per_call,
                "seconds": round(swept.seconds, 3),
                "probed_seconds_per_student": swept.probed,
            }
            for swept in outcome.swept
        ],
        "rows": [_row(line, score) for line in ranked],
        "best": _row(ranked[0], score) if math.isfinite(ranked[0].validation.mean) else None,
        "run": dict(outcome.run),
        "curves": {"learning": learning(outcome)},
        "notes": outcome.notes,
        "environment": report.environment(),
    }


def to_csv(outcome: Sweep) -> str:
    """One line per student: method, settings, seed, accuracies, loss, epochs."""
    axes = _axes(outcome)
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["method", *axes, "seed", "validation", "test", "loss", "epochs"])
    for swept in outcome.swept:
        for k in range(len(swept.epochs)):
            setting = [rounded(swept.columns[a][k]) if a in swept.columns else "" for a in axes]
            for seed in range(swept.validation.shape[1]):
                scores = (swept.validation, swept.test, swept.loss)
                values = [f"{score[k, seed]:.6g}" for score in scores]
                out.writerow([swept.method, *setting, seed, *values, swept.epochs[k, seed]])
    return text.getvalue()


def html_page(outcome: Sweep) -> str:
    """The report: best settings, parallel coordinates, heat map, and how it ran."""
    ranked, axes, score = lines(outcome), _axes(outcome), _score(outcome)
    seeds = len(ranked[0].validation.values)
    size = f"{len(ranked)} settings, {seeds} seeds each"
    stopped_count = sum(not line.complete for line in ranked)
    stopped_note = f" {stopped_count} settings were stopped early." if stopped_count else ""
    summary = (
        f"{outcome.pair.splits.train.name}: {size}. Teacher {outcome.pair.teacher_text}, "
        f"{score.shown(outcome.teacher.test[0])} on the test split; student "
        f"{outcome.settings.student}. Settings are ordered by mean validation score; the test "
        f"split is not used to choose.{stopped_note}"
    )
    best_table = report.table(
        ("method", *axes, *_headings(score)),
        [_cells(line, axes, score) for line in ranked[:SHOWN]],
    )
    lines_note = (
        "One line per setting, ending at the mean validation score it reached; stronger lines "
        "reached more, and the best one is orange."
    )
    runtime_table = report.table(
        ("method", "path", "students per call", "seconds"),
        [[s.method, PATHS[s.path], str(s.per_call), f"{s.seconds:.1f}"] for s in outcome.swept],
    )
    sections = [
        report.Section(
            "Best settings",
            [
                "The mean over seeds with its 95% interval, which covers the variation over seeds.",
                *_students.notes(ranked, None),
            ],
            [best_table],
        ),
        report.Section("All settings", [lines_note], [parallel(ranked, axes, score)]),
        *_heat_maps(outcome),
        *_curves(outcome),
        *_best_student(outcome, ranked[0]),
        report.Section("How it ran", outcome.notes, [runtime_table]),
        *report.run_sections(outcome.run),
    ]
    return report.page("kdtl sweep", sections, notes=[summary])


def _best_student(outcome: Sweep, best: SweepLine) -> list[report.Section]:
    """The confusion of the best setting, and where it differs from the teacher."""
    if outcome.pair.measure.kind != "classes" or not math.isfinite(best.test.mean):
        return []
    answers = next(swept.best.answers for swept in outcome.swept if swept.method == best.method)
    student = _evidence.Predictions(f"the best setting of {best.method}", np.asarray(answers))
    return _evidence.sections(outcome.pair.splits.test, student, outcome.teacher.answers)


def _curves(outcome: Sweep) -> list[report.Section]:
    """Validation scores and losses of the best settings."""
    score, curves = _score(outcome), learning(outcome)
    validation_chart = plots.lines(
        [
            plots.Curve(method, curve["epoch"], curve[f"validation_{score.key}"])
            for method, curve in curves.items()
        ],
        x_axis="epoch",
        y_axis=f"validation {score.axis}",
        percent=score.is_share,
    )
    loss_chart = plots.lines(
        [
            plots.Curve(method, range(1, len(curve["loss"]) + 1), curve["loss"])
            for method, curve in curves.items()
        ],
        x_axis="epoch",
        y_axis="training loss",
        percent=False,
    )
    loss_note = "Each method's own training objective; not comparable across methods."
    return [
        report.Section("Learning curves", ["Each method's best setting, mean over seeds."]),
        report.Section(f"Validation {score.axis}", (), [validation_chart], level=3),
        report.Section("Training loss", [loss_note], [loss_chart], level=3),
    ]


def parallel(
    lines: Sequence[SweepLine], axes: Sequence[str], score: report.Score = report.ACCURACY
) -> plots.Chart:
    """Parallel coordinates of all settings; the method is an axis if there is more than one."""
    names = list(dict.fromkeys(line.method for line in lines))
    plot_axes = [plots.PlotAxis("method", [names.index(x.method) for x in lines], names)]
    plot_axes = plot_axes if len(names) > 1 else []
    for axis in axes:
        values = [line.setting.get(axis, math.nan) for line in lines]
        if len(set(values)) > 1:
            plot_axes.append(plots.PlotAxis(axis, values))
    if not plot_axes:
        plot_axes = [plots.PlotAxis("method", [0.0] * len(lines), names)]
    final = [score.factor * line.validation.mean for line in lines]
    return plots.parallel([*plot_axes, plots.PlotAxis(_headings(score)[0], final)], best=0)


def _heat_maps(outcome: Sweep) -> list[report.Section]:
    """One map per method with at least two axes, over the two axes with the most values."""
    maps = []
    for swept in outcome.swept:
        varying = {n: c for n, c in swept.columns.items() if len(set(c.tolist())) > 1}
        axes = sorted(varying, key=lambda n: -len(set(varying[n].tolist())))[:2]
        if len(axes) < 2:
            continue
        across, down = axes
        scores = np.where(swept.complete, swept.validation.mean(axis=1), np.nan)
        columns, column_bins = _binned(varying[across])
        rows, row_bins = _binned(varying[down])
        cells = [
            [_largest(scores[(column_bins == j) & (row_bins == i)]) for j in range(len(columns))]
            for i in range(len(rows))
        ]
        chart = plots.heat_map(cells, rows=rows, columns=columns, row_axis=down, column_axis=across)
        maps.append(report.Section(swept.method, (), [chart], level=3))
    if not maps:
        return []
    note = f"Mean validation {_score(outcome).axis}: the best over all other settings."
    return [report.Section("Two axes at a time", [note]), *maps]


def _binned(column: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Labels of a column's bins, and the bin of every setting, `[K]`.

    Bins are its values, or ranges with equally many if there are many values.
    """
    values = np.unique(column)
    if len(values) <= BINS + 2:
        return [f"{rounded(v):g}" for v in values], np.searchsorted(values, column)
    parts = np.array_split(values, BINS)
    bins = np.searchsorted([part[0] for part in parts], column, side="right") - 1
    return [f"{part[0]:.2g}–{part[-1]:.2g}" for part in parts], bins


def _largest(scores: np.ndarray) -> float:
    finite = scores[np.isfinite(scores)]
    return float(finite.max()) if finite.size else math.nan


def print_table(outcome: Sweep) -> None:
    """Prints the best settings, and the path of each method."""
    ranked, axes, score = lines(outcome), _axes(outcome), _score(outcome)
    header = ("method", *axes, *_headings(score))
    cells = [_cells(line, axes, score) for line in ranked[:SHOWN]]
    title = f"Best of {len(ranked)} settings, by validation"
    _tables.show(header, cells, title=title, bold=[0])
    for swept in outcome.swept:
        per_call = f", {swept.per_call} per call" if swept.path == "together" else ""
        print(f"{swept.method}: {PATHS[swept.path]}{per_call}, {swept.seconds:.1f} s")
    advice = _students.notes(ranked, None) or ["no student was saved: none has a finite score"]
    for note in (*outcome.notes, *advice):
        print(note)


def _cells(line: SweepLine, axes: Sequence[str], score: report.Score) -> list[str]:
    setting = [f"{line.setting[a]:.4g}" if a in line.setting else "–" for a in axes]
    shown = [report.percent(x, score) for x in (line.validation, line.test)]
    return [line.method, *setting, *shown]


def _row(line: SweepLine, score: str) -> dict[str, Any]:
    varies = len(set(line.epochs)) > 1
    return {
        "method": line.method,
        "setting": line.setting,
        f"validation_{score}": line.validation._asdict(),
        f"test_{score}": line.test._asdict(),
        "epochs": max(line.epochs),
        **({"epochs_kept": list(line.epochs)} if varies else {}),
        "stopped_early": not line.complete,
        **line.settings,
    }


def _score(outcome: Sweep) -> report.Score:
    return outcome.pair.measure.score_name


def _headings(score: report.Score) -> list[str]:
    """Headings of the two scores; accuracy is not named."""
    name = "" if score == report.ACCURACY else f" {score.name}"
    return [f"{part}{name} {score.unit}".rstrip() for part in ("validation", "test")]


def _axes(outcome: Sweep) -> list[str]:
    return list(dict.fromkeys(name for swept in outcome.swept for name in swept.columns))
