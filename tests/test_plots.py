"""Charts of sweeps and measurements: valid XML, nothing from outside, every point drawn."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from kdtl_jax.run.report import plots

AXES = [
    plots.Axis("method", [0.0, 1.0, 0.0, 1.0], ["kd & co", "dkd"]),
    plots.Axis("rate", [1e-4, 1e-3, 1e-2, 1e-1]),
    plots.Axis("validation %", [50.0, 90.0, 70.0, math.nan]),
]
CELLS = [[0.5, 0.9, math.nan], [0.6, 0.7, 0.8]]


def svg(text: str) -> ET.Element:
    return ET.fromstring(text)


def of(root: ET.Element, tag: str) -> list[ET.Element]:
    return [e for e in root.iter() if e.tag.rpartition("}")[2] == tag]


def titles(root: ET.Element) -> list[str]:
    return [e.text or "" for e in of(root, "title")]


def test_parallel_coordinates_draw_every_row_and_bring_out_the_best() -> None:
    drawn = of(svg(plots.parallel(AXES, best=1)), "polyline")
    words = [e[0].text or "" for e in drawn]
    assert len(words) == 4 and words[-1] == "method dkd, rate 0.001, validation % 90"
    assert drawn[-1].attrib["stroke"] != drawn[0].attrib["stroke"]
    # Logarithmic: equal factors are equal distances on the second axis.
    at = {w.split(",")[1]: e.attrib["points"].split()[1] for w, e in zip(words, drawn, strict=True)}
    heights = [float(at[f" rate {r}"].split(",")[1]) for r in ("0.0001", "0.001", "0.01", "0.1")]
    steps = [a - b for a, b in zip(heights, heights[1:], strict=False)]
    assert steps[0] > 50 and max(steps) - min(steps) < 0.3
    # What has no score passes below the lowest one.
    ends = [float(e.attrib["points"].split()[-1].split(",")[1]) for e in drawn]
    assert words[0].endswith("validation % none") and ends[0] > max(ends[1:]) + 10


def test_lines_that_meet_in_a_choice_stay_apart() -> None:
    drawn = of(svg(plots.parallel(AXES, best=1)), "polyline")
    first = {e.attrib["points"].split()[0] for e in drawn}
    assert len(first) == 4, "two methods, four rows, four places"


def test_a_heat_map_holds_every_known_cell_stronger_where_larger() -> None:
    text = plots.heat_map(
        CELLS, rows=["1", "4"], columns=["a", "b", "<c>"], row_axis="T", column_axis="rate"
    )
    root = svg(text)
    strength = {
        (e[0].text or ""): float(of(e, "rect")[0].attrib["fill-opacity"]) for e in of(root, "g")
    }
    assert len(strength) == 5
    assert strength["T 1, rate b: 90.0"] == max(strength.values())
    assert strength["T 1, rate a: 50.0"] == min(strength.values())
    assert "T 4, rate <c>: 80.0" in strength
    with pytest.raises(ValueError, match="do not fit"):
        plots.heat_map(CELLS, rows=["1"], columns=["a"], row_axis="T", column_axis="rate")


def test_spans_and_roofline_show_every_program() -> None:
    spans = [plots.Span("mlp", 1.0, 2.0, 3.0), plots.Span("vit", 20.0, 25.0, 90.0)]
    assert titles(svg(plots.spans(spans, unit="ms", axis="ms"))) == [
        "mlp: 2 ms (1 to 3)",
        "vit: 25 ms (20 to 90)",
    ]
    worked = [plots.Worked("mlp", 2.0, 1e9), plots.Worked("vit", 64.0, 9e10)]
    root = svg(plots.roofline(worked, flops=1e11, bytes=1e10))
    roof, *points = titles(root)
    assert roof == "100 GFLOP/s, 10 GB/s"
    assert points == ["mlp: 1 GFLOP/s at 2 FLOP/B", "vit: 90 GFLOP/s at 64 FLOP/B"]
    corner = of(root, "polyline")[0].attrib["points"].split()[1].split(",")
    dots = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in of(root, "circle")]
    assert dots[0][0] < float(corner[0]) < dots[1][0], "the ridge is at 10 FLOP/B"
    assert all(y > float(corner[1]) for _, y in dots), "both below the roof"


def test_a_page_refers_to_nothing_outside_and_escapes_text() -> None:
    table = plots.table(("a<b", "c"), [["1 & 2", "3"]], narrow=1)
    page = plots.page("<sweep>", [table, plots.parallel(AXES, best=0), plots.key(["x"])])
    assert not re.search(r"(src|href|url|@import|<script)", page)
    assert "<title>&lt;sweep&gt;</title>" in page and "1 &amp; 2" in page
    body = page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', "")
    body = re.sub(r"<meta [^>]*>", "", body)
    assert len(of(svg(body), "td")) == 2


def test_charts_of_unequal_axes_say_so() -> None:
    with pytest.raises(ValueError, match="equally long axes, got lengths"):
        plots.parallel([AXES[0], plots.Axis("x", [1.0])], best=0)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.spans([], unit="ms", axis="ms")
