"""Reports of whatever a run found: any names, any numbers, no markup comes to life."""

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bounds import HOSTILE, bounded, values
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_report import Page

from kdtl_jax import _files
from kdtl_jax.datasets import Dataset
from kdtl_jax.recipes import _evidence, _language_report
from kdtl_jax.run import report
from kdtl_jax.run.report import Results, Row, Section, plots

NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 5e-324, 1e-310, 0.5, 1.0, 1e16]
NAMES = [
    *("<script>alert('a')</script>", "</title></style></svg>", "<svg onload=alert(1)>", "x" * 5000),
    *(
        "a\nb\x1b[2J\0\ud800",
        "{{ 1 }}{% raw %}",
        "&lt;b&gt;]]>",
        "#010101",
        "$\\frac{",
        "title:halo:",
    ),
    *("' onmouseover='alert(1)", '" style="background:red', "", "\u202e\ufeff", " word" * 900),
]
# A page takes a tenth of a second: where one fails, the example is told as it was found.
FOUND = (Phase.explicit, Phase.reuse, Phase.generate)
numbers = st.sampled_from(NUMBERS) | st.floats()
names = st.sampled_from(NAMES) | st.text(max_size=4)
ALLOWED = {"g", "path", "svg", "text", "title", "tspan"}


def harmless(text: str) -> Page:
    """A page in which nothing of a stranger's runs or loads."""
    page = Page(text)
    banned = {"script", "iframe", "object", "embed", "link", "base", "form", "a", "use", "image"}
    assert not page.seen & banned and text.encode()
    return page


def drawn(chart: plots.Chart) -> None:
    """A chart is well formed and draws, and does nothing else."""
    for element in ET.fromstring(chart.svg).iter():
        assert element.tag in ALLOWED, element.tag
        for name, value in element.attrib.items():
            assert not name.startswith("on") and "href" not in name
            assert name != "style" or "background" not in value
    page = report.page("a chart", [Section("drawn", (), [chart])])
    harmless(page)


def curves(draw: Any, name: str) -> dict[str, list[float]]:
    ys = draw(st.lists(numbers, min_size=1, max_size=5))
    xs = draw(st.lists(numbers, min_size=len(ys), max_size=len(ys)))
    return {"epoch": xs, name: ys, "loss": ys, "learning_rate": xs}


@st.composite
def any_results(draw: Any) -> Results:
    methods = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    families = draw(st.lists(names, min_size=1, max_size=2))

    def interval() -> report.Interval:
        return report.interval(draw(st.lists(numbers, min_size=1, max_size=3)), is_share=False)

    rows = [
        Row(
            method, draw(st.sampled_from(families)), draw(names), draw(st.integers(0, 10**30)),
            interval(), interval(), draw(numbers), draw(st.dictionaries(names, values, max_size=2)),
            agreement=interval() if draw(st.booleans()) else None,
        )
        for method in methods
    ]  # fmt: skip
    score = draw(st.sampled_from([report.ACCURACY, report.Score("r2", "R²", is_share=False)]))
    seeds = min(len(row.test.values) for row in rows)
    if all(len(row.test.values) == seeds for row in rows):
        rows = report.compared(rows, {rows[0].family: methods[0]}, minimize=draw(st.booleans()))
    learning = {m: curves(draw, f"validation_{score.key}") for m in methods if draw(st.booleans())}
    alpha = {}
    for method in methods[: draw(st.integers(0, 1))]:
        ys = draw(st.lists(numbers, min_size=1, max_size=4))
        alpha[method] = {
            "alpha": [0.1 * i for i in range(len(ys))],
            "validation_accuracy": ys,
            "test_accuracy": ys,
            "best": draw(numbers),
        }
    return Results(
        draw(names), draw(st.dictionaries(names, values, max_size=2)), rows, learning, alpha,
        draw(st.lists(names, max_size=6)), draw(st.dictionaries(names, values, max_size=3)),
        score=score,
    )  # fmt: skip


@given(any_results())
@settings(max_examples=8, phases=FOUND)
def test_any_results(found: Results) -> None:
    with bounded(8):
        harmless(report.html_page(found))
        text = json.dumps(report.to_json(found), allow_nan=False)
    assert json.loads(text)["schema_version"] == 2


def rows_of(draw: Any, make: Callable[..., Any], count: int) -> list[Any]:
    return [
        make(draw(names), *(draw(numbers) for _ in range(count)))
        for _ in range(draw(st.integers(1, 4)))
    ]


@st.composite
def any_chart(draw: Any) -> Callable[[], plots.Chart]:
    kind = draw(st.sampled_from(["dots", "spans", "lines", "parallel", "heat_map", "roofline"]))
    label, percent = draw(names), draw(st.booleans())
    if kind == "dots":
        bars = rows_of(draw, plots.Bar, 3)
        return lambda: plots.dots(bars, axis=label, percent=percent)
    if kind == "spans":
        result = rows_of(draw, plots.Span, 3)
        return lambda: plots.spans(result, unit=label, axis=label)
    if kind == "roofline":
        worked = rows_of(draw, plots.Worked, 2)
        tops = [draw(st.floats(1e-3, 1e18)) for _ in range(2)]  # measured
        return lambda: plots.roofline(worked, flops=tops[0], bytes=tops[1])
    size = draw(st.integers(1, 4))
    some = st.lists(numbers, min_size=size, max_size=size)
    if kind == "lines":
        curved = [plots.Curve(draw(names), draw(some), draw(some), draw(numbers)) for _ in range(2)]
        return lambda: plots.lines(curved, x_axis=label, y_axis=label, percent=percent)
    if kind == "parallel":
        axes = [plots.PlotAxis(draw(names) + str(i), draw(some)) for i in range(3)]
        return lambda: plots.parallel(axes, best=0)
    named = [draw(names) for _ in range(size)]
    cells = [draw(some) for _ in range(size)]
    return lambda: plots.heat_map(
        cells, rows=named, columns=named, row_axis=label, column_axis=label, percent=percent
    )


@given(any_chart())
@settings(max_examples=24, phases=FOUND)
def test_any_chart(draw_it: Callable[[], plots.Chart]) -> None:
    with bounded(4):
        drawn(draw_it())


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)  # as data sets are


@given(st.lists(names, min_size=3, max_size=3), st.lists(finite, min_size=8, max_size=8))
@settings(max_examples=8, phases=FOUND)
def test_any_classes_and_examples(found: list[str], inputs: list[float]) -> None:
    x = np.asarray(inputs * 4, np.float32).reshape(8, 2, 2, 1)
    answers = np.array([[0, 1, 2, -1, 0, 1, 2, -1]])
    labels = np.arange(8, dtype=np.int32) % 3
    for inputs_of in (x, x.reshape(8, 4)):
        test = Dataset("any", inputs_of, labels, 3, names=tuple(found))
        sections = _evidence.sections(
            test, _evidence.Predictions(found[0], answers), answers[:, ::-1]
        )
        with bounded(4):
            harmless(report.page(found[1], sections))


def test_files_of_a_language_report(tmp_path: Path) -> None:
    names_of: tuple[str, ...] = (
        "bits_per_byte",
        "forward_kl",
        "reverse_kl",
        "agreement",
        "overlap",
        "entropy",
    )
    rows, curves_of, samples, texts = [], {}, [], list(NAMES)
    for value in HOSTILE:
        text = value if isinstance(value, str) else f"{value}"[:9999]
        measures = {name: math.nan for name in names_of}
        rows.append(
            _language_report.LanguageRow(text, text, measures, 3, 4, math.inf, 0.0, {text: value})
        )
        curves_of[text] = [{"step": i, "eval/agreement": y} for i, y in enumerate([math.nan, 0.5])]
        samples.append(_language_report.Sample(text, {text: text}))
        texts.append(text)
    with bounded(4):
        about = dict.fromkeys(texts, list(HOSTILE))
        _language_report.write(tmp_path, NAMES[0], about, rows, curves_of, samples, texts)
    harmless((tmp_path / "report.html").read_text())
    assert _files.read_json(tmp_path / "results.json")["schema_version"] == 1


def test_a_language_report_says_what_its_curves_are(tmp_path: Path) -> None:
    names_of = ("bits_per_byte", "forward_kl", "reverse_kl", "agreement", "overlap", "entropy")
    measures: dict[str, float] = dict.fromkeys(names_of, 0.5)
    rows = [
        _language_report.LanguageRow(name, name, measures, 3, 4, 5.0, 6.0, trained)
        for name, trained in {"Beginner": {}, "Learner": {"steps": 4}}.items()
    ]
    curves = {"Learner": [{"step": 1, "eval/agreement": 0.5}]}
    _language_report.write(tmp_path, "language", {}, rows, curves, [], [])
    page = (tmp_path / "report.html").read_text()
    assert "On held-out text: top-1 agreement with the teacher, %." in page
    settings_of = page.split("Settings</h2>")[1].split("<h2")[0]
    assert "Learner" in settings_of and "Beginner" not in settings_of


def test_a_curve_of_very_many_points() -> None:
    many = list(range(20_000))
    with bounded(4):
        chart = plots.lines([plots.Curve("loss", many, many, 7.0)], x_axis="x", y_axis="y")
    assert chart.svg.count("<title>") < 500
