"""What `kdtl sweep` writes and prints: results.json, sweep.csv, report.html, the table."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdtl_jax.recipes import _choice, _evidence, _students, _tables
from kdtl_jax.recipes._choice import rounded
from kdtl_jax.recipes._pair import Pair
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
    teacher_validation: float
    teacher_test: float
    teacher_named: np.ndarray  # [1, N], classes of the test examples
    run: Mapping[str, Any]  # the command, its time and all settings


class Line(NamedTuple):
    """One setting of one method, its seeds aggregated."""

    method: str
    setting: dict[str, float]
    validation: report.Interval
    test: report.Interval
    epochs: tuple[int, ...]  # [S], after which a student was not trained further
    complete: bool
    student: _students.Student | None = None  # of the method's best setting

    @property
    def settings(self) -> dict[str, Any]:
        """Its file."""
        return _students.described(self.student)


def lines(outcome: Sweep) -> list[Line]:
    """All settings by mean validation score, with those stopped early after the others.

    Settings without a finite score come last.
    """
    found, share = [], _score(outcome).is_share
    for swept in outcome.swept:
        for k in range(len(swept.epochs)):
            setting = {name: rounded(column[k]) for name, column in swept.columns.items()}
            found.append(
                Line(
                    swept.method,
                    setting,
                    report.interval(swept.validation[k], is_share=share),
                    report.interval(swept.test[k], is_share=share),
                    tuple(swept.epochs[k].tolist()),
                    bool(swept.complete[k]),
                )
            )
    order = scores.ranked([line.validation.mean for line in found])
    last = [not math.isfinite(line.validation.mean) for line in found]
    found = [found[i] for i in sorted(order, key=lambda i: (last[i], not found[i].complete))]
    for swept in outcome.swept:
        at = next(i for i, x in enumerate(found) if x.complete and x.method == swept.method)
        student = _students.best(swept.method, swept.best.kept, found[at].validation.values)
        found[at] = found[at]._replace(student=student)
    return found


def learning(outcome: Sweep) -> dict[str, dict[str, list[float]]]:
    """The learning curves of each method's best setting, means over seeds."""
    epochs, score = outcome.settings.epochs, _score(outcome)
    return {x.method: _choice.learning_curve(x.best, epochs, score) for x in outcome.swept}


def to_json(outcome: Sweep) -> dict[str, Any]:
    """The content of results.json."""
    found, settings, splits = lines(outcome), outcome.settings, outcome.pair.splits
    score = _score(outcome).key
    return {
        "schema_version": SCHEMA_VERSION,
        "task": "kdtl sweep",
        "data": {
            "name": splits.train.name,
            **{name: len(part.labels) for name, part in splits._asdict().items()},
            "recommended": _students.recommended(found),
        },
        "seeds": settings.seeds,
        "epochs": settings.epochs,
        "rungs": settings.halving,
        "teacher": {
            f"validation_{score}": outcome.teacher_validation,
            f"test_{score}": outcome.teacher_test,
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
        "rows": [_row(line, score) for line in found],
        "best": _row(found[0], score) if math.isfinite(found[0].validation.mean) else None,
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
    found, axes, score = lines(outcome), _axes(outcome), _score(outcome)
    seeds = len(found[0].validation.values)
    many = f"{len(found)} settings, {seeds} seeds each"
    stopped = sum(not line.complete for line in found)
    early = f" {stopped} settings were stopped early." if stopped else ""
    setting = (
        f"{outcome.pair.splits.train.name}: {many}. Teacher {outcome.pair.teacher_text}, "
        f"{score.shown(outcome.teacher_test)} on the test split; student "
        f"{outcome.settings.student}. Settings are ordered by mean validation score; the test "
        f"split is not used to choose.{early}"
    )
    best = report.table(
        ("method", *axes, *_headings(score)),
        [_cells(line, axes, score) for line in found[:SHOWN]],
    )
    lines_note = (
        "One line per setting, ending at the mean validation score it reached; stronger lines "
        "reached more, and the best one is orange."
    )
    ran = report.table(
        ("method", "path", "students per call", "seconds"),
        [[s.method, PATHS[s.path], str(s.per_call), f"{s.seconds:.1f}"] for s in outcome.swept],
    )
    sections = [
        report.Section(
            "Best settings",
            [
                "The mean over seeds with its 95% interval, which covers the variation over seeds.",
                *([] if (advice := _students.note(found, None)) is None else [advice]),
            ],
            [best],
        ),
        report.Section("All settings", [lines_note], [parallel(found, axes, score)]),
        *_heat_maps(outcome),
        *_curves(outcome),
        *_best_student(outcome, found[0]),
        report.Section("How it ran", outcome.notes, [ran]),
        *report.run_sections(outcome.run),
    ]
    return report.page("kdtl sweep", sections, notes=[setting])


def _best_student(outcome: Sweep, best: Line) -> list[report.Section]:
    """What the overall best setting confuses, and where it differs from the teacher."""
    if outcome.pair.measure.kind != "classes" or not math.isfinite(best.test.mean):
        return []
    named = next(swept.best.named for swept in outcome.swept if swept.method == best.method)
    student = _evidence.Named(f"the best setting of {best.method}", np.asarray(named))
    return _evidence.sections(outcome.pair.splits.test, student, outcome.teacher_named)


def _curves(outcome: Sweep) -> list[report.Section]:
    """Validation and loss of the best settings."""
    score, found = _score(outcome), learning(outcome)
    validation = [
        plots.Line(method, curve["epoch"], curve[f"validation_{score.key}"])
        for method, curve in found.items()
    ]
    losses = [
        plots.Line(method, range(1, len(curve["loss"]) + 1), curve["loss"])
        for method, curve in found.items()
    ]
    reached = plots.lines(
        validation, x_axis="epoch", y_axis=f"validation {score.axis}", percent=score.is_share
    )
    lost = plots.lines(losses, x_axis="epoch", y_axis="training loss", percent=False)
    own = "Each method's own training objective; not comparable across methods."
    return [
        report.Section("Learning curves", ["Each method's best setting, mean over seeds."]),
        report.Section(f"Validation {score.axis}", (), [reached], level=3),
        report.Section("Training loss", [own], [lost], level=3),
    ]


def parallel(
    found: Sequence[Line], axes: Sequence[str], score: report.Score = report.ACCURACY
) -> plots.Chart:
    """Parallel coordinates of all settings; the method is an axis if there is more than one."""
    names = list(dict.fromkeys(line.method for line in found))
    drawn = [plots.Axis("method", [names.index(x.method) for x in found], names)]
    drawn = drawn if len(names) > 1 else []
    for axis in axes:
        values = [line.setting.get(axis, math.nan) for line in found]
        if len(set(values)) > 1:
            drawn.append(plots.Axis(axis, values))
    if not drawn:
        drawn = [plots.Axis("method", [0.0] * len(found), names)]
    reached = [score.factor * line.validation.mean for line in found]
    return plots.parallel([*drawn, plots.Axis(_headings(score)[0], reached)], best=0)


def _heat_maps(outcome: Sweep) -> list[report.Section]:
    """One map per method with two axes or more: its two axes with the most values."""
    parts = []
    for swept in outcome.swept:
        varied = {n: c for n, c in swept.columns.items() if len(set(c.tolist())) > 1}
        chosen = sorted(varied, key=lambda n: -len(set(varied[n].tolist())))[:2]
        if len(chosen) < 2:
            continue
        across, down = chosen
        scores = np.where(swept.complete, swept.validation.mean(axis=1), np.nan)
        columns, rows = _binned(varied[across]), _binned(varied[down])
        cells = [
            [
                _largest(scores[(columns.place == j) & (rows.place == i)])
                for j in range(len(columns.labels))
            ]
            for i in range(len(rows.labels))
        ]
        chart = plots.heat_map(
            cells,
            rows=rows.labels,
            columns=columns.labels,
            row_axis=down,
            column_axis=across,
        )
        parts.append(report.Section(swept.method, (), [chart], level=3))
    if not parts:
        return []
    note = f"Mean validation {_score(outcome).axis}: the best over all other settings."
    return [report.Section("Two axes at a time", [note]), *parts]


class _Bins(NamedTuple):
    labels: list[str]
    place: np.ndarray  # [K], the bin of every setting


def _binned(column: np.ndarray) -> _Bins:
    """Its values, or equally full ranges of them if there are many."""
    values = np.unique(column)
    if len(values) <= BINS + 2:
        return _Bins([f"{rounded(v):g}" for v in values], np.searchsorted(values, column))
    parts = np.array_split(values, BINS)
    starts = np.array([part[0] for part in parts])
    place = np.searchsorted(starts, column, side="right") - 1
    return _Bins([f"{part[0]:.2g}–{part[-1]:.2g}" for part in parts], place)


def _largest(scores: np.ndarray) -> float:
    known = scores[np.isfinite(scores)]
    return float(known.max()) if known.size else math.nan


def print_table(outcome: Sweep) -> None:
    """The best settings, and which path was taken."""
    found, axes, score = lines(outcome), _axes(outcome), _score(outcome)
    header = ("method", *axes, *_headings(score))
    shown = [_cells(line, axes, score) for line in found[:SHOWN]]
    title = f"Best of {len(found)} settings, by validation"
    _tables.show(header, shown, title=title, bold=[0])
    for swept in outcome.swept:
        per = f", {swept.per_call} per call" if swept.path == "together" else ""
        print(f"{swept.method}: {PATHS.get(swept.path, swept.path)}{per}, {swept.seconds:.1f} s")
    for note in (*outcome.notes, _students.note(found, None)):
        print(note or "no student was saved: none has a finite score")


def _cells(line: Line, axes: Sequence[str], score: report.Score) -> list[str]:
    setting = [f"{line.setting[a]:.4g}" if a in line.setting else "–" for a in axes]
    return [
        line.method,
        *setting,
        *(report.percent(x, score) for x in (line.validation, line.test)),
    ]


def _row(line: Line, score: str) -> dict[str, Any]:
    several = len(set(line.epochs)) > 1
    return {
        "method": line.method,
        "setting": line.setting,
        f"validation_{score}": line.validation._asdict(),
        f"test_{score}": line.test._asdict(),
        "epochs": max(line.epochs),
        **({"epochs_kept": list(line.epochs)} if several else {}),
        "stopped_early": not line.complete,
        **line.settings,
    }


def _score(outcome: Sweep) -> report.Score:
    return outcome.pair.measure.score_name


def _headings(score: report.Score) -> list[str]:
    """Accuracy needs no name; other scores do."""
    named = "" if score == report.ACCURACY else f" {score.name}"
    return [f"{part}{named} {score.unit}".rstrip() for part in ("validation", "test")]


def _axes(outcome: Sweep) -> list[str]:
    return list(dict.fromkeys(name for swept in outcome.swept for name in swept.columns))
