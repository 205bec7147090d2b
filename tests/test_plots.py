"""Charts: every mark stands where its value is, nothing from outside, any text, both schemes."""

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest

from kdtl_jax.run.report import plots

AXES = [
    plots.PlotAxis("method", [0.0, 1.0, 0.0, 1.0], ["kd & co", "dkd"]),
    plots.PlotAxis("rate", [1e-4, 1e-3, 1e-2, 1e-1]),
    plots.PlotAxis("validation %", [50.0, 90.0, 70.0, math.nan]),
]
CELLS = [[0.5, 0.9, math.nan], [0.6, 0.7, 0.8]]


class Mark(NamedTuple):
    """A path with a title."""

    points: np.ndarray  # [n, 2], down is more
    style: str

    @property
    def center(self) -> np.ndarray:
        return (self.points.max(axis=0) + self.points.min(axis=0)) / 2

    @property
    def radius(self) -> float:
        return float(np.ptp(self.points, axis=0).mean() / 2)


def points(path: ET.Element) -> np.ndarray:
    numbers = re.findall(r"-?[\d.]+", path.attrib["d"])
    return np.array(numbers, np.float64).reshape(-1, 2)


def marks(chart: plots.Chart) -> dict[str, Mark]:
    """Everything with a title, in the order it is drawn."""
    results = {}
    for group in ET.fromstring(chart.svg).iter("g"):
        if len(group) and group[0].tag == "title":
            path = group[1]
            results[group[0].text or ""] = Mark(points(path), path.attrib["style"])
    return results


def numbers(chart: plots.Chart, anchor: str, axis: str) -> dict[float, float]:
    """Tick labels: value -> place."""
    texts = [t for t in ET.fromstring(chart.svg).iter("text") if anchor in t.attrib["style"]]
    return {
        float(t.text or ""): float(t.attrib[axis])
        for t in texts
        if re.fullmatch(r"[\d.]+", t.text or "")
    }


def test_dots_and_whiskers_stand_where_their_values_are() -> None:
    chart = plots.dots([plots.Bar("a", 0.5, 0.3, 0.6), plots.Bar("b", 0.9)], axis="accuracy")
    actual = marks(chart)
    assert list(actual) == ["a: 50.0% (30.0 to 60.0)", "b: 90.0%"]
    ticks = numbers(chart, "middle", "x")
    (low, x_low), (high, x_high) = min(ticks.items()), max(ticks.items())
    per_point = (x_high - x_low) / (high - low)
    places = [mark.center[0] for mark in actual.values()]
    np.testing.assert_allclose(places, [x_low + per_point * (v - low) for v in (50, 90)], atol=0.2)
    paths = [p for p in ET.fromstring(chart.svg).iter("path") if "width: 3" in p.attrib["style"]]
    actual = [points(path)[:, 0] for path in paths]
    ends = [x_low + per_point * (v - low) for v in (30, 60, 90, 90)]  # without an interval a point
    np.testing.assert_allclose([end(x) for x in actual for end in (min, max)], ends, atol=0.2)


def test_labels_stand_beside_their_rows_and_never_over_the_drawing() -> None:
    long = "A method with a name that is much longer than one line"
    chart = plots.dots([plots.Bar("a", 0.1, 0.0, 0.9), plots.Bar(long, 0.9)], axis="accuracy")
    texts = {t.text: t for t in ET.fromstring(chart.svg).iter("text")}
    assert "a" in texts and "A method with a name that is" in texts
    left = min(mark.center[0] for mark in marks(chart).values())
    whisker = min(
        float(points(path)[:, 0].min())
        for path in ET.fromstring(chart.svg).iter("path")
        if "width: 3" in path.attrib["style"]
    )
    for label in ("a", "A method with a name that is", "much longer than one line"):
        at = texts[label]
        assert "end" in at.attrib["style"], "it ends there"
        assert float(at.attrib["x"]) < min(left, whisker)


def test_a_value_that_is_not_finite_has_its_row_and_no_dot() -> None:
    bars = [plots.Bar("a", 0.5, 0.4, 0.6), plots.Bar("lost", math.nan, math.nan, math.nan)]
    chart = plots.dots(bars, axis="accuracy")
    assert list(marks(chart)) == ["a: 50.0% (40.0 to 60.0)"]
    texts = [t.text for t in ET.fromstring(chart.svg).iter("text")]
    assert "lost" in texts and "nan" in texts
    nothing = plots.lines([plots.Curve("x", [1, 2], [math.nan, math.nan])], x_axis="x", y_axis="y")
    assert not marks(nothing) and nothing.key == ("x",)


def test_lines_ring_the_chosen_place_and_bear_flat_curves() -> None:
    curve = plots.Curve("a", [0.1, 0.5, 1.0], [0.2, 0.6, 0.4], marked=0.5)
    chart = plots.lines([curve], x_axis="x", y_axis="y")
    line, *dots = marks(chart).items()
    assert line[0] == "a" and chart.key == ("a",)
    assert [title for title, _ in dots] == [
        "a: 0.1 gives 20.0%",
        "a: 0.5 gives 60.0%",
        "a: 1 gives 40.0%",
    ]
    np.testing.assert_allclose([mark.radius for _, mark in dots], [4, 6, 4], atol=1e-3)
    assert ["var(--ink)" in mark.style for _, mark in dots] == [False, True, False]
    heights = [mark.center[1] for _, mark in dots]
    assert heights[1] < heights[2] < heights[0], "up is more"
    np.testing.assert_allclose([m.center for _, m in dots], line[1].points, atol=1e-3)
    for flat in ([0.5], [0.5, 0.5]):  # no extent at all
        same = plots.Curve("a", [1.0] * len(flat), flat)
        assert marks(plots.lines([same], x_axis="x", y_axis="y"))


def test_parallel_coordinates_draw_every_row_and_bring_out_the_best() -> None:
    drawn = marks(plots.parallel(AXES, best=1))
    words = list(drawn)
    assert len(words) == 4 and words[-1] == "method dkd, rate 0.001, validation % 90"
    assert drawn[words[-1]].style != drawn[words[0]].style
    # Logarithmic: equal factors are equal distances on the second axis.
    at = {w.split(",")[1]: mark.points[1, 1] for w, mark in drawn.items()}
    heights = [at[f" rate {r}"] for r in ("0.0001", "0.001", "0.01", "0.1")]
    steps = [a - b for a, b in zip(heights, heights[1:], strict=False)]
    assert steps[0] > 50 and max(steps) - min(steps) < 0.3
    # What has no score passes below the lowest one.
    ends = [mark.points[-1, 1] for mark in drawn.values()]
    assert words[0].endswith("validation % none") and ends[0] > max(ends[1:]) + 10


def test_lines_that_meet_in_a_choice_stay_apart() -> None:
    drawn = marks(plots.parallel(AXES, best=1)).values()
    assert len({mark.points[0, 1] for mark in drawn}) == 4, "two methods, four rows, four places"


def test_a_thousand_settings_are_drawn_in_seconds() -> None:
    values = np.random.default_rng(0).uniform(size=(3, 1000))
    axes = [plots.PlotAxis(name, list(v)) for name, v in zip("abc", values, strict=True)]
    chart = plots.parallel(axes, best=5)
    assert chart.svg.count("<title>") == 1000 and len(chart.svg) < 1_000_000


def test_a_heat_map_holds_every_known_cell_stronger_where_larger() -> None:
    chart = plots.heat_map(
        CELLS, rows=["1", "4"], columns=["a", "b", "<c>"], row_axis="T", column_axis="rate"
    )
    strength = {
        title: float(re.findall(r"opacity: ([\d.]+)", mark.style)[0])
        for title, mark in marks(chart).items()
    }
    assert len(strength) == 5
    assert strength["T 1, rate b: 90.0"] == max(strength.values())
    assert strength["T 1, rate a: 50.0"] == min(strength.values())
    assert "T 4, rate <c>: 80.0" in strength
    with pytest.raises(ValueError, match="do not fit"):
        plots.heat_map(CELLS, rows=["1"], columns=["a"], row_axis="T", column_axis="rate")


def test_labels_of_a_heat_map_that_are_wider_than_its_columns_lean() -> None:
    names = [f"category {i}" for i in range(10)]
    leaning = plots.heat_map(
        np.eye(10).tolist(), rows=names, columns=names, row_axis="", column_axis=""
    ).svg
    short = [str(i) for i in range(10)]
    upright = plots.heat_map(
        np.eye(10).tolist(), rows=short, columns=short, row_axis="", column_axis=""
    ).svg
    assert leaning.count("rotate(-35 ") == 10 and "rotate(" not in upright


def test_spans_and_roofline_show_every_program() -> None:
    spans = [plots.Span("mlp", 1.0, 2.0, 3.0), plots.Span("vit", 20.0, 25.0, 90.0)]
    assert list(marks(plots.spans(spans, unit="ms", axis="ms"))) == [
        "mlp: 2 ms (1 to 3)",
        "vit: 25 ms (20 to 90)",
    ]
    worked = [plots.Worked("mlp", 2.0, 1e9), plots.Worked("vit", 64.0, 9e10)]
    actual = marks(plots.roofline(worked, flops=1e11, bytes=1e10))
    assert list(actual) == [
        "100 GFLOP/s, 10 GB/s",
        "mlp: 1 GFLOP/s at 2 FLOP/B",
        "vit: 90 GFLOP/s at 64 FLOP/B",
    ]
    roof, *programs = actual.values()
    corner, dots = roof.points[1], [mark.center for mark in programs]
    assert dots[0][0] < corner[0] < dots[1][0], "the ridge is at 10 FLOP/B"
    assert all(y > corner[1] for _, y in dots), "both below the roof"


def every_chart(text: str) -> list[plots.Chart]:
    return [
        plots.dots([plots.Bar(text, 0.5, 0.4, 0.6)], axis=text),
        plots.lines([plots.Curve(text, [1, 2], [0.1, 0.2])], x_axis=text, y_axis=text),
        plots.parallel([plots.PlotAxis(text, [0.0], [text]), plots.PlotAxis("b", [1.0])], best=0),
        plots.heat_map([[0.5]], rows=[text], columns=[text], row_axis=text, column_axis=text),
        plots.spans([plots.Span(text, 1, 2, 3)], unit=text, axis=text),
        plots.roofline([plots.Worked(text, 1.0, 1.0)], flops=2.0, bytes=1.0),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<script>&\"'",
        "$\\frac{",
        "a$b$c",
        "nul \x00 bell \a",
        "half \ud800",
        "蒸馏 🔥",
        "two\nlines",
        "",
    ],
    ids=["markup", "math", "dollars", "control", "surrogate", "no glyph", "newline", "empty"],
)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    for chart in every_chart(text):
        root = ET.fromstring(chart.svg)
        assert chart.svg.encode() and "<script" not in chart.svg
        shown = "".join(root.itertext())
        safe = text.encode("utf-8", "backslashreplace").decode()
        safe = re.sub(r"[\x00-\x1f]", lambda found: ascii(found[0])[1:-1], safe)
        assert safe in shown


def test_charts_load_nothing_and_leave_colors_to_the_page() -> None:
    for chart in every_chart("a"):
        assert not re.search(r"href|url\(|@import|https?:|\bid=|font|#[0-9a-f]{3}", chart.svg)
        assert "var(--" in chart.svg and 'role="img"' in chart.svg


def test_the_same_chart_is_the_same_text_and_leaves_no_state() -> None:
    before = dict(matplotlib.rcParams)
    first, second = (every_chart("a") for _ in range(2))
    assert first == second and dict(matplotlib.rcParams) == before
    code = "import sys, kdtl_jax.run.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_charts_of_unequal_axes_say_so() -> None:
    with pytest.raises(ValueError, match="equally long axes, got lengths"):
        plots.parallel([AXES[0], plots.PlotAxis("x", [1.0])], best=0)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.spans([], unit="ms", axis="ms")
