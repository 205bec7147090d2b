"""Charts as inline SVG text: no library, no script, no network, both color schemes.

Colors are CSS variables of the page (`--ink`, `--rule`, `--series-0` …), so that a chart follows
the reader's light or dark setting. Every mark has a `<title>`, which browsers show on hover.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 52, 14, 12, 40


class Bar(NamedTuple):
    """A labelled value with the half-width of its interval."""

    label: str
    value: float
    half: float | None
    series: int = 0


class Line(NamedTuple):
    """A named curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: float | None = None  # the x that was chosen


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def dots(bars: Sequence[Bar], *, axis: str) -> str:
    """One row per method: a dot with its 95 % whisker; the label stands above, in full."""
    low, high = _extent(
        [b.value - (b.half or 0) for b in bars] + [b.value + (b.half or 0) for b in bars]
    )
    step, height = 34, 34 * len(bars) + _BOTTOM
    scale = _Scale(low, high, 14, _WIDTH - 64)
    parts = []
    for tick in _ticks(low, high):
        x = scale.at(tick)
        parts.append(_rule(x, 4, x, height - _BOTTOM + 2))
        parts.append(_text(x, height - _BOTTOM + 18, _number(tick), anchor="middle"))
    for i, bar in enumerate(bars):
        y, color = step * i + 26, f"var(--series-{bar.series})"
        half = bar.half or 0.0
        value = f"{100 * bar.value:.1f}" + (f" ± {100 * half:.1f}" if bar.half is not None else "")
        title = html.escape(f"{bar.label}: {value} %")
        left, right = scale.at(bar.value - half), scale.at(bar.value + half)
        parts.append(f"<g><title>{title}</title>")
        parts.append(
            f'<line x1="{left:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}" stroke="{color}" '
            'stroke-width="3" stroke-linecap="round"/>'
        )
        parts.append(
            f'<circle cx="{scale.at(bar.value):.1f}" cy="{y}" r="5" fill="{color}" '
            'stroke="var(--surface)" stroke-width="2"/></g>'
        )
        parts.append(_text(14, y - 9, bar.label))
        parts.append(_text(_WIDTH - 8, y + 4, f"{100 * bar.value:.1f}", anchor="end"))
    parts.append(_text((14 + _WIDTH - 64) / 2, height - 6, axis, anchor="middle"))
    return _svg(height, parts, axis)


def lines(curves: Sequence[Line], *, x_axis: str, y_axis: str) -> str:
    """Curves over a common axis; a chosen x is ringed. The legend is for the page to write."""
    height = 320
    xs = [x for curve in curves for x in curve.x]
    low, high = _extent([y for curve in curves for y in curve.y])
    across = _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, _WIDTH - _RIGHT)
    up = _Scale(low, high, height - _BOTTOM, _TOP)
    parts = []
    for tick in _ticks(low, high):
        parts.append(_rule(_LEFT, up.at(tick), _WIDTH - _RIGHT, up.at(tick)))
        parts.append(_text(_LEFT - 8, up.at(tick) + 4, _number(tick), anchor="end"))
    for tick in _ticks(across.low, across.high):
        label = f"{tick:g}"
        parts.append(_text(across.at(tick), height - _BOTTOM + 18, label, anchor="middle"))
    for i, curve in enumerate(curves):
        color = f"var(--series-{i % 8})"
        points = [(across.at(x), up.at(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        name = html.escape(curve.label)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-linejoin="round"><title>{name}</title></polyline>'
        )
        for (px, py), x, y in zip(points, curve.x, curve.y, strict=True):
            chosen = curve.marked is not None and math.isclose(x, curve.marked)
            ring = "var(--ink)" if chosen else "var(--surface)"
            title = f"{name}: {x:g} gives {100 * y:.1f} %"
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{6 if chosen else 4}" fill="{color}" '
                f'stroke="{ring}" stroke-width="2"><title>{title}</title></circle>'
            )
    parts.append(_text((_LEFT + _WIDTH) / 2, height - 6, x_axis, anchor="middle"))
    return _svg(height, parts, f"{y_axis} against {x_axis}")


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="var(--ink-2)">'
        f"{html.escape(text)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        'stroke="var(--rule)" stroke-width="1"/>'
    )


def _extent(values: Sequence[float]) -> tuple[float, float]:
    """Whole ticks around the values; never an empty range."""
    low, high = min(values), max(values)
    step = _step(low, high)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return low, high if high > low else low + step


def _step(low: float, high: float) -> float:
    span = max(high - low, 1e-3)
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _number(tick: float) -> str:
    return f"{100 * tick:g}"
