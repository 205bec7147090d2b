"""Results: the file's schema, rows against their baseline, a page without a network.

Intervals and verdicts are tested in test_intervals.py.
"""

import importlib.resources
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdtl_jax import _files
from kdtl_jax.run import report
from kdtl_jax.run.report import Results, Row, Section

NASTY = "<script>alert('a')</script> & \"b\""


def row(method: str, values: list[float], **more: Any) -> Row:
    result = report.interval(values, is_share=True)
    base = Row(method, "distillation", method.upper(), 1234, result, result, 1.25, {"rate": 0.1})
    return base._replace(**more)


def against(baseline: list[float], values: list[float]) -> report.Versus:
    rows = [row("alone", baseline), row("kd", values)]
    result = report.compared(rows, {"distillation": "alone"})[1].versus
    assert result is not None
    return result


def results(**more: Any) -> Results:
    rows = [
        row("alone", [0.80, 0.82, 0.81]),
        row("kd", [0.90, 0.91, 0.92], agreement=report.interval([0.9, 0.95, 0.91])),
        row("scratch", [0.5, 0.4, 0.6], family="transfer", label=NASTY),
    ]
    whole = Results(
        task="a task",
        data={"name": "digits", "train": 100},
        rows=report.compared(rows, {"distillation": "alone", "transfer": "scratch"}),
        learning={"kd": {"epoch": [1, 2], "validation_accuracy": [0.5, 0.7]}},
        alpha={
            "kd": {
                "alpha": [0.1, 1.0],
                "validation_accuracy": [0.5, 0.7],
                "test_accuracy": [0.4, 0.6],
                "best": 1.0,
            }
        },
        notes=["a note"],
    )
    return whole._replace(**more)


def test_what_is_not_finite_is_shown_as_such() -> None:
    actual = report.interval([0.9, math.nan, 0.8])
    assert math.isnan(actual.mean) and report.percent(actual) == "nan"
    assert math.isnan(report.interval([math.inf]).mean), "an infinite score is no score"
    assert against([0.8, 0.8, 0.8], [0.9, math.nan, 0.9]).verdict == "not finite"


def test_rows_are_compared_within_their_family() -> None:
    alone, kd, scratch = results().rows
    assert alone.versus is None and scratch.versus is None
    assert kd.versus is not None and kd.versus.verdict == "better"
    other = row("other", [1.0], family="unknown")
    assert report.compared([other], {"distillation": "alone"}) == [other]


def test_the_file_is_as_documented() -> None:
    actual = json.loads(json.dumps(report.to_json(results()), allow_nan=False))
    assert actual.keys() == {
        "schema_version", "task", "data", "rows", "curves", "notes", "run", "environment"
    }  # fmt: skip
    assert actual["schema_version"] == report.SCHEMA_VERSION == 2
    alone, kd, _ = actual["rows"]
    for entry in actual["rows"]:
        assert entry.keys() == {
            "method", "family", "label", "parameters", "seeds", "test_accuracy",
            "validation_accuracy", "agreement", "versus", "seconds", "settings",
        }  # fmt: skip
    assert kd["test_accuracy"]["values"] == [0.90, 0.91, 0.92] and kd["seeds"] == 3
    assert kd["test_accuracy"].keys() == {"mean", "ci95", "values"}
    assert kd["versus"].keys() == {"baseline", "difference", "p_value", "p_adjusted", "verdict"}
    low, high = kd["test_accuracy"]["ci95"]
    assert 0.8 < low < kd["test_accuracy"]["mean"] < high < 1
    assert kd["versus"]["difference"]["mean"] == pytest.approx(0.1)
    assert alone["versus"] is alone["agreement"] is None
    assert actual["curves"] == {
        "learning": dict(results().learning),
        "alpha": dict(results().alpha),
    }
    assert {"python", "jax", "flax", "optax", "backend", "devices"} <= actual["environment"].keys()


def test_the_file_is_written_whatever_the_scores_and_names(tmp_path: Path) -> None:
    name = b"caf\xe9.npz".decode("utf-8", "surrogateescape")
    rows = [
        row("alone", [0.8, 0.8]),
        row("kd", [math.nan, 0.9], settings={"data": name, "rate": np.float32(math.inf)}),
    ]
    whole = results(rows=report.compared(rows, {"distillation": "alone"}), data={"name": name})
    _files.write_json(tmp_path / "results.json", report.to_json(whole))
    kd = json.loads((tmp_path / "results.json").read_bytes())["rows"][1]
    assert kd["test_accuracy"] == {"mean": None, "ci95": None, "values": [None, 0.9]}
    assert kd["versus"]["verdict"] == "not finite" and kd["versus"]["difference"]["mean"] is None
    assert kd["settings"] == {"data": name, "rate": None}
    page = report.html_page(whole)
    Page(page)
    assert "caf\\udce9.npz" in page and "nan" in page and page.encode()


class Page(HTMLParser):
    """Tags that close as they should, text, and everything that could load something."""

    VOID = {"meta", "br", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        for name, value in attrs:
            if name == "src" and (value or "").startswith("data:image/png;base64,"):
                continue
            assert name not in ("src", "href", "srcset", "data", "action", "xlink:href"), (
                tag,
                name,
            )
            assert not name.startswith("on") and "url(" not in (value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_self_contained_and_escaped() -> None:
    whole = results(task=NASTY, notes=[NASTY])
    text = report.html_page(whole)
    page = Page(text)
    assert not page.seen & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not re.search(r"@import|url\(|https?://", text)
    assert "<script>" not in text and "".join(page.text).count("<script>alert('a')</script>") >= 3
    shown = " ".join(page.text)
    for words in (
        "91.0 (88.2–93.2)",
        "+10.0 (7.5 to 12.5)",
        "better, p = 0.003",
        "1,234",
        "rate: 0.1",
        "KD",
    ):
        assert words in shown, words
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text


def test_every_part_of_a_page_is_escaped() -> None:
    parts = [
        report.table((NASTY, "b"), [[NASTY, (NASTY, NASTY)]]),
        report.Definitions([(NASTY, NASTY)]),
    ]
    text = report.page(NASTY, [Section(NASTY, [NASTY], parts)], notes=[NASTY])
    page = Page(text)
    assert "<script>" not in text and "script" not in page.seen
    assert "".join(page.text).count("<script>alert('a')</script>") == 11


def test_text_that_no_page_may_hold_is_written_as_escapes() -> None:
    text = report.page("bell \a", [Section("escape \x1b[31m", ["nul \x00, half \ud800"])])
    Page(text)
    assert "bell \\x07" in text and "escape \\x1b[31m" in text
    assert "nul \\x00, half \\ud800" in text and text.encode()


def test_of_many_methods_the_baseline_and_the_best_have_curves() -> None:
    rows = [row(f"m{i:02}", [0.5 + i / 100, math.nan if i == 20 else 0.5]) for i in range(21)]
    curve = {"epoch": [1, 2], "validation_accuracy": [0.1, 0.2]}
    text = report.html_page(results(rows=rows, learning={r.method: curve for r in rows}, alpha={}))
    keys = re.findall(r"<li><i[^>]*></i>(M\d+)</li>", text)
    assert keys == ["M00", *(f"M{i}" for i in range(13, 20))]


def test_the_learning_rate_is_drawn_where_it_changes() -> None:
    rates = [0.002, 0.004] + [0.001] * 29
    curve = {"epoch": [1, 31], "validation_accuracy": [0.5, 0.7], "learning_rate": rates}
    text = report.html_page(results(learning={"kd": curve}))
    assert "As a percentage of its peak, 0.004." in text and "all methods: 1 gives 50.0%" in text
    text = report.html_page(results(learning={"kd": {**curve, "learning_rate": [0.1] * 31}}))
    assert "Learning rate" not in text


def test_the_template_is_part_of_the_package() -> None:
    files = importlib.resources.files("kdtl_jax.run.report")
    assert files.joinpath("page.html.jinja").is_file()


def test_what_was_not_measured_is_left_out() -> None:
    rows = [row("alone", [0.5])]
    text = report.html_page(results(rows=rows, learning={}, alpha={}))
    Page(text)
    for title in ("α-curve", "Learning curves", "agreement"):
        assert title not in text
    assert "α-curve" in report.html_page(results()) and "Teacher–student" in report.html_page(
        results()
    )
