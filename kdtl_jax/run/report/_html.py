"""`report.html`: one file, readable offline, on a phone and in the dark."""

import html
from collections.abc import Sequence

from kdtl_jax.run.report import _svg
from kdtl_jax.run.report._results import Interval, Results, Row, environment

_STYLE = """
:root{--surface:#fcfcfb;--ink:#1c1c1a;--ink-2:#55554f;--rule:#dcdcd6;--band:#f1f1ec;
--series-0:#2a78d6;--series-1:#1baf7a;--series-2:#b87400;--series-3:#008300;--series-4:#4a3aa7;
--series-5:#d03f3e;--series-6:#d1588f;--series-7:#cf5a22}
@media(prefers-color-scheme:dark){:root{--surface:#1a1a19;--ink:#f0f0ec;--ink-2:#b5b5ad;
--rule:#3a3a37;--band:#262624;--series-0:#5b9ce8;--series-1:#2fbf8b;--series-2:#d99a2b;
--series-3:#4caf50;--series-4:#9085e9;--series-5:#e66767;--series-6:#dd7aa8;--series-7:#e0773f}}
*{box-sizing:border-box}
body{margin:0;background:var(--surface);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.25rem}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.2rem;margin-top:2.2rem}
p{max-width:44rem}.note{color:var(--ink-2);font-size:.93rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{padding:.4rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:10rem}
th{font-weight:600;color:var(--ink-2)}tr.family td{background:var(--band);font-weight:600}
td small{display:block;color:var(--ink-2)}
svg{display:block;width:100%;max-width:44rem;height:auto;font:15px system-ui,sans-serif}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem;padding:0;list-style:none}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.4rem}
code{font-size:.9em;overflow-wrap:anywhere}dl{font-size:.9rem;color:var(--ink-2)}
dt{font-weight:600}dd{margin:0 0 .3rem;overflow-wrap:anywhere}
@media(max-width:34rem){body{font-size:15px}main{padding:.9rem}svg{font-size:19px}
th,td{padding:.35rem .35rem}.wide{display:none}}
"""


_COLORS = 8  # --series-0 … --series-7
_NOTES = 4  # so many stand before the results


def html_page(results: Results) -> str:
    """The whole report as one HTML text without any outside reference."""
    sections = [_head(results), _table(results.rows), _accuracy(results.rows)]
    if results.alpha:
        sections.append(_alpha(results))
    if results.learning:
        sections.append(_learning(results))
    if any(row.agreement for row in results.rows):
        sections.append(_agreement(results.rows))
    sections += [_more_notes(results), _settings(results.rows)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(results.task)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(results: Results) -> str:
    first = results.notes if len(results.notes) <= _NOTES else results.notes[:1]
    return f"<h1>{html.escape(results.task)}</h1>{_paragraphs(first)}"


def _more_notes(results: Results) -> str:
    """Where there are many, all but the first stand behind the results."""
    if len(results.notes) <= _NOTES:
        return ""
    return f"<h2>Notes</h2>{_paragraphs(results.notes[1:])}"


def _paragraphs(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _table(rows: Sequence[Row]) -> str:
    body = []
    for family in dict.fromkeys(row.family for row in rows):
        title = html.escape(family.capitalize())
        body.append(f'<tr class="family"><td colspan="5">{title}</td></tr>')
        for row in rows:
            if row.family == family:
                body.append(_table_row(row))
    return (
        "<h2>Results</h2><p class='note'>Accuracy on the test split: mean ± 95 % interval over "
        f"{max(len(row.test.values) for row in rows)} seeds. The comparison is seed by seed.</p>"
        "<div class='scroll'><table><thead><tr><th>Method</th><th>Test %</th>"
        "<th>Against the baseline</th><th class='wide'>Parameters</th>"
        "<th class='wide'>Seconds</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _table_row(row: Row) -> str:
    if row.versus is None:
        compared = "–"
    else:
        points = _points(row.versus.difference)
        compared = f"{points}<small>{html.escape(row.versus.verdict)}</small>"
    return (
        f"<tr><td>{html.escape(row.label)}<small><code>{html.escape(row.method)}</code></small>"
        f"</td><td>{percent(row.test)}</td><td>{compared}</td>"
        f"<td class='wide'>{row.parameters:,}</td><td class='wide'>{row.seconds:.1f}</td></tr>"
    )


def _accuracy(rows: Sequence[Row]) -> str:
    parts = ["<h2>Accuracy by method</h2>"]
    for i, family in enumerate(dict.fromkeys(row.family for row in rows)):
        bars = [_svg.Bar(r.label, r.test.mean, r.test.ci95, i) for r in rows if r.family == family]
        if len(bars) < 2:
            continue
        parts.append(f"<h3>{html.escape(family.capitalize())}</h3>")
        parts.append(_svg.dots(bars, axis="test accuracy, % (with 95 % interval)"))
    return "".join(parts)


def _alpha(results: Results) -> str:
    labels = {row.method: row.label for row in results.rows}
    curves = [
        _svg.Line(
            labels.get(method, method), found["alpha"], found["validation_accuracy"], found["best"]
        )
        for method, found in results.alpha.items()
    ]
    return (
        "<h2>How much of the teacher: the α-curve</h2><p class='note'>Validation accuracy after "
        "fine-tuning from α times the teacher's selected weights; the ringed α was chosen.</p>"
        + _key(curves)
        + _svg.lines(curves, x_axis="α", y_axis="validation accuracy, %")
    )


def _learning(results: Results) -> str:
    labels = {row.method: row.label for row in results.rows}
    parts = [
        "<h2>Learning curves</h2><p class='note'>Validation accuracy in %, mean over seeds; "
        "of many methods, the baseline and the best.</p>"
    ]
    for family in dict.fromkeys(row.family for row in results.rows):
        methods = _clearest([r for r in results.rows if r.family == family], results)
        curves = [
            _svg.Line(
                labels[method],
                results.learning[method]["epoch"],
                results.learning[method]["validation_accuracy"],
            )
            for method in methods
        ]
        if curves:
            parts.append(f"<h3>{html.escape(family.capitalize())}</h3>{_key(curves)}")
            parts.append(_svg.lines(curves, x_axis="epoch", y_axis="validation accuracy, %"))
    return "".join(parts)


def _clearest(rows: Sequence[Row], results: Results) -> list[str]:
    """The methods whose curves are drawn: at most as many as there are colors to tell them apart.

    Of more, the first (the baseline) and those best on validation.
    """
    drawn = [row for row in rows if row.method in results.learning]
    if len(drawn) > _COLORS:
        ranked = sorted(drawn[1:], key=lambda row: -row.validation.mean)
        chosen = {row.method for row in [drawn[0], *ranked[: _COLORS - 1]]}
        drawn = [row for row in drawn if row.method in chosen]
    return [row.method for row in drawn]


def _agreement(rows: Sequence[Row]) -> str:
    bars = [
        _svg.Bar(row.label, row.agreement.mean, row.agreement.ci95, 1)
        for row in rows
        if row.agreement is not None
    ]
    return (
        "<h2>Teacher–student agreement</h2><p class='note'>The share of test images on which "
        "student and teacher name the same class, right or wrong.</p>"
        + _svg.dots(bars, axis="agreement with the teacher, % (with 95 % interval)")
    )


def _settings(rows: Sequence[Row]) -> str:
    items = "".join(
        f"<dt>{html.escape(row.label)}</dt><dd>{html.escape(_described(row))}</dd>" for row in rows
    )
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    return (
        f"<h2>Settings</h2><dl>{items}</dl>"
        f"<h2>Environment</h2><p class='note'>{html.escape(versions)}</p>"
    )


def _described(row: Row) -> str:
    return "; ".join(f"{name}: {value}" for name, value in row.settings.items())


def _key(curves: Sequence[_svg.Line]) -> str:
    items = "".join(
        f'<li><i style="background:var(--series-{i % 8})"></i>{html.escape(curve.label)}</li>'
        for i, curve in enumerate(curves)
    )
    return f'<ul class="key">{items}</ul>'


def percent(found: Interval) -> str:
    """`90.6 ± 0.9`."""
    half = "" if found.ci95 is None else f" ± {100 * found.ci95:.1f}"
    return f"{100 * found.mean:.1f}{half}"


def _points(found: Interval) -> str:
    half = "" if found.ci95 is None else f" ± {100 * found.ci95:.1f}"
    return f"{100 * found.mean:+.1f}{half}"
