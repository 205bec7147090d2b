"""`report.html`: one file, readable offline, on a phone and in the dark.

A page is data: sections with notes, tables, charts and definitions, all plain text. The template
`page.html.jinja` lays it out and escapes everything.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jinja2

from kdtl_jax.run import scores
from kdtl_jax.run.report import plots
from kdtl_jax.run.report._drawing import COLORS, printable
from kdtl_jax.run.report._intervals import Interval
from kdtl_jax.run.report._pictures import Pictures
from kdtl_jax.run.report._results import ACCURACY, Results, Row, Score, environment
from kdtl_jax.run.report.plots import Chart

_MAX_LEADING_NOTES = 4  # with more, all but the first follow the results
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("kdtl_jax.run.report", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: printable(value) if type(value) is str else value,
)

Cell = str | tuple[str, str]  # text, or text and small print below it


class Table(NamedTuple):
    """A table; columns from `narrow` on are hidden on a phone."""

    header: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]  # (title or "", rows)
    narrow: int = 99


class Definitions(NamedTuple):
    """Terms and their definitions."""

    entries: Sequence[tuple[str, str]]


class Section(NamedTuple):
    """A heading and its contents."""

    title: str
    notes: Sequence[str] = ()
    parts: Sequence[Table | Chart | Definitions | Pictures] = ()
    level: int = 2  # of the heading


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, narrow: int = 99) -> Table:
    """A table without groups."""
    return Table(header, [("", rows)], narrow)


def page(title: str, sections: Sequence[Section], *, notes: Sequence[str] = ()) -> str:
    """A self-contained HTML page without any outside reference; notes precede the sections."""
    template = _TEMPLATES.get_template("page.html.jinja")
    return template.render(title=title, sections=sections, notes=notes)


def run_sections(run: Mapping[str, object]) -> list[Section]:
    """The command, its time and all settings; then versions, devices and processor."""
    summary = {name: run[name] for name in ("command", "begun", "ended") if name in run}
    settings = {name: value for name, value in run.items() if name not in summary}
    entries = [*((k, f"{v}") for k, v in summary.items()), ("settings", _format_settings(settings))]
    return [Section("How it was run", (), [Definitions(entries)]), environment_section()]


def environment_section() -> Section:
    """Versions, devices and processor, as a section."""
    return Section("Environment", [", ".join(f"{k} {v}" for k, v in environment().items())])


def html_page(results: Results) -> str:
    """The whole report of a run."""
    is_short = len(results.notes) <= _MAX_LEADING_NOTES
    sections = [_results_section(results), *_score_sections(results)]
    sections += _alpha_sections(results) if results.alpha else []
    sections += _learning_sections(results) if results.learning else []
    sections += _agreement_sections(results.rows)
    sections += results.sections
    if not is_short:  # all but the first come after the results
        sections.append(Section("Notes", results.notes[1:]))
    settings = [(row.label, _format_settings(row.settings)) for row in results.rows]
    sections.append(Section("Settings of each method", (), [Definitions(settings)]))
    sections += run_sections(results.run) if results.run else [environment_section()]
    return page(results.task, sections, notes=results.notes if is_short else results.notes[:1])


def percent(interval: Interval, score: Score = ACCURACY) -> str:
    """`90.6 (89.7–91.5)`, the mean and its interval; `nan` if a value was not finite.

    For a score that is not a share, plain numbers: `0.873 (0.850–0.896)`.
    """
    return f"{score.number(interval.mean)}{_interval_suffix(interval, '–', score)}"


def points(interval: Interval, score: Score = ACCURACY) -> str:
    """A difference, in percentage points for shares: `+10.0 (7.5 to 12.5)`."""
    return f"{score.number(interval.mean, sign=True)}{_interval_suffix(interval, ' to ', score)}"


def _interval_suffix(interval: Interval, separator: str, score: Score) -> str:
    if interval.low is None or interval.high is None or math.isnan(interval.low):
        return ""
    separator = " to " if interval.low < 0 else separator  # a dash would look like a sign
    return f" ({score.number(interval.low)}{separator}{score.number(interval.high)})"


def _families(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for family in dict.fromkeys(row.family for row in rows):
        yield family.capitalize(), [row for row in rows if row.family == family]


def _results_section(results: Results) -> Section:
    rows, score = results.rows, results.score
    comparison_count = sum(
        row.versus is not None and not math.isnan(row.versus.p_value) for row in rows
    )
    in_percent = " in percent" if score.is_share else ""
    is_paired = any(row.examples is not None for row in rows)  # example by example
    and_examples = " and test examples" if is_paired else ""
    by_example = " and example by example" if is_paired else ""
    note = (
        f"{score.name[0].upper()}{score.name[1:]} on the test split{in_percent}: the mean over "
        f"seeds with its 95% interval, which covers the variation over seeds{and_examples}. "
        f"Comparisons are made seed by seed{by_example}."
    )
    verdicts = "With fewer than 3 seeds, nothing is tested."
    if comparison_count:
        comparisons = "comparison" if comparison_count == 1 else f"{comparison_count} comparisons"
        verdicts = (
            f"p-values are corrected for the {comparisons} in this table (Holm); a method is "
            "called better or worse if p is at most 0.05."
        )
    test = f"Test {score.unit or score.name}"
    header = ("Method", test, "Against the baseline", "Seeds", "Parameters", "Seconds")
    groups = [
        (family, [_row_cells(row, score) for row in members]) for family, members in _families(rows)
    ]
    return Section("Results", [note, verdicts], [Table(header, groups)])


def _row_cells(row: Row, score: Score) -> list[Cell]:
    comparison: Cell = "–"
    if row.versus is not None:
        p, verdict = row.versus.p_adjusted, row.versus.verdict
        p_text = "" if math.isnan(p) else ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"
        comparison = points(row.versus.difference, score), verdict + p_text
    name, seeds = (row.label, row.method), f"{len(row.test.values)}"
    size, seconds = f"{row.parameters:,}", f"{row.seconds:.1f}"
    return [name, percent(row.test, score), comparison, seeds, size, seconds]


def _score_sections(results: Results) -> list[Section]:
    score = results.score
    title = f"{score.name[0].upper()}{score.name[1:]} by method"
    sections, families = [Section(title)], list(_families(results.rows))
    # Families of one, such as the teacher, appear in every plot.
    single_rows = [row for _, members in families if len(members) == 1 for row in members]
    for i, (family, members) in enumerate(families):
        plotted = members if len(members) == 1 else [*single_rows, *members]
        bars = [
            plots.Bar(r.label, r.test.mean, r.test.low, r.test.high, i if r in members else i - 1)
            for r in plotted
        ]
        if len(members) > 1:
            axis = f"test {score.axis} (with 95% interval)"
            chart = plots.dots(bars, axis=axis, percent=score.is_share)
            sections.append(Section(family, (), [chart], level=3))
    return sections


def _alpha_sections(results: Results) -> list[Section]:
    labels = {row.method: row.label for row in results.rows}
    curves = [
        plots.Curve(
            labels.get(method, method), curve["alpha"], curve["validation_accuracy"], curve["best"]
        )
        for method, curve in results.alpha.items()
    ]
    note = (
        "Validation accuracy after fine-tuning from α times the teacher's selected weights; the "
        "ringed α was chosen."
    )
    chart = plots.lines(curves, x_axis="α", y_axis="validation accuracy, %")
    return [Section("How much of the teacher: the α-curve", [note], [chart])]


def _learning_sections(results: Results) -> list[Section]:
    score = results.score
    note = (
        f"Validation {score.name}{' in percent' if score.is_share else ''}, mean over seeds; if "
        "there are many methods, the baseline and the best are shown."
    )
    sections = [Section("Learning curves", [note])]
    for family, rows in _families(results.rows):
        curves = [
            (row.label, results.learning[row.method])
            for row in _plotted_rows(rows, results.learning)
        ]
        if curves:
            axis, key = f"validation {score.axis}", f"validation_{score.key}"
            lines = [plots.Curve(label, curve["epoch"], curve[key]) for label, curve in curves]
            chart = plots.lines(lines, x_axis="epoch", y_axis=axis, percent=score.is_share)
            sections.append(Section(family, (), [chart], level=3))
        losses = [
            plots.Curve(label, range(1, len(values) + 1), values)
            for label, curve in curves
            if (values := curve.get("loss"))
        ]
        if losses:
            chart = plots.lines(losses, x_axis="epoch", y_axis="training loss", percent=False)
            title = f"{family}: loss"
            note = "Each method's own training objective; not comparable across methods."
            sections.append(Section(title, [note], [chart], level=3))
    return [*sections, *_learning_rate_sections(results)]


def _learning_rate_sections(results: Results) -> list[Section]:
    """The learning rate by epoch, if it changes; methods of a run share one schedule."""
    schedules = [
        curve["learning_rate"] for curve in results.learning.values() if "learning_rate" in curve
    ]
    configured = [row.settings.get("learning_rate") for row in results.rows]
    rates = [*(schedules[0] if schedules else ()), *(x for x in configured if isinstance(x, float))]
    peak = max(rates, default=0.0)  # epochs end below it
    if not schedules or not (0 < peak < math.inf) or len(set(schedules[0])) == 1:
        return []
    shares = [rate / peak for rate in schedules[0]]
    line = plots.Curve("all methods", range(1, len(shares) + 1), shares)
    chart = plots.lines([line], x_axis="epoch", y_axis="learning rate, % of its peak")
    note = f"As a percentage of its peak, {peak:.3g}."
    return [Section("Learning rate", [note], [chart], level=3)]


def _plotted_rows(rows: Sequence[Row], learning: Mapping[str, object]) -> list[Row]:
    """Rows with curves to draw: at most as many as there are distinct colors.

    If there are more, the first (the baseline) and those best on validation.
    """
    candidates = [row for row in rows if row.method in learning]
    if len(candidates) <= COLORS:
        return candidates
    best = scores.ranked([row.validation.mean for row in candidates[1:]])[: COLORS - 1]
    return [candidates[0], *(candidates[1 + i] for i in sorted(best))]


def _agreement_sections(rows: Sequence[Row]) -> list[Section]:
    bars = [
        plots.Bar(row.label, row.agreement.mean, row.agreement.low, row.agreement.high, 1)
        for row in rows
        if row.agreement is not None
    ]
    if not bars:
        return []
    note = "The share of test examples on which student and teacher agree, right or wrong."
    chart = plots.dots(bars, axis="agreement with the teacher, % (with 95% interval)")
    return [Section("Teacher–student agreement", [note], [chart])]


def _format_settings(settings: Mapping[str, object]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in settings.items())
