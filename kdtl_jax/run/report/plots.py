"""Charts of sweeps and measurements: parallel coordinates, heat map, roofline, spans.

Inline SVG in the manner of `_svg`: no script, no network, colors from the page's variables, a
`<title>` on every mark. A measure grows in one color's strength, so that it reads in both schemes
and in print.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from kdtl_jax.run.report import _html, _svg
from kdtl_jax.run.report._svg import Line as Line
from kdtl_jax.run.report._svg import lines as lines

_WIDTH = 640
_ABSENT = 20  # below an axis: lines without a value on it
_FAINT, _STRONG = 0.06, 0.62  # text stays readable on the strongest cell


class Axis(NamedTuple):
    """A vertical line of the parallel plot: one value per row of the sweep."""

    label: str
    values: Sequence[float]
    names: Sequence[str] = ()  # of a choice: value i stands at names[i]


class Span(NamedTuple):
    """A value between a low and a high one."""

    label: str
    low: float
    middle: float
    high: float


class Worked(NamedTuple):
    """A program under the roofline."""

    label: str
    intensity: float  # FLOPs per byte
    rate: float  # FLOPs per second, achieved


def page(title: str, sections: Sequence[str]) -> str:
    """A self-contained HTML page in the style of every report.

    Args:
      title: plain text.
      sections: HTML, in order.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_html._STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, narrow: int = 99) -> str:
    """An HTML table of plain text; columns from `narrow` on are left out on a phone."""

    def cells(tag: str, row: Sequence[str]) -> str:
        parts = []
        for i, text in enumerate(row):
            wide = " class='wide'" if i >= narrow else ""
            parts.append(f"<{tag}{wide}>{html.escape(text)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return (
        f"<div class='scroll'><table><thead>{cells('th', header)}</thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def key(labels: Sequence[str]) -> str:
    """The legend of `lines`: labels with their series' colors."""
    items = "".join(
        f'<li><i style="background:var(--series-{i % 8})"></i>{html.escape(label)}</li>'
        for i, label in enumerate(labels)
    )
    return f'<ul class="key">{items}</ul>'


def parallel(axes: Sequence[Axis], *, best: int) -> str:
    """Parallel coordinates: one line per row of a sweep, one axis per setting, the score last.

    Lines grow stronger with the score; the best one is drawn last, in another color. An axis of
    positive values that span a factor of eight or more is logarithmic; what has no value (NaN) on
    an axis passes below it. Where many lines meet in one
    value of a choice or a grid, they are drawn a little apart, in order of their scores.

    Args:
      axes: equally long; the last one is the score, where more is better.
      best: the row to bring out.

    Raises:
      ValueError: if there are fewer than two axes, or their lengths differ.
    """
    lengths = {axis.label: len(axis.values) for axis in axes}
    if len(axes) < 2 or len(set(lengths.values())) != 1:
        raise ValueError(f"needs two or more equally long axes, got lengths {lengths}.")
    height, top, bottom, apart = 352, 54, 34, 16
    staggered = len(axes) > 4
    xs = [60 + i * (_WIDTH - 120) / (len(axes) - 1) for i in range(len(axes))]
    scales = [_AxisScale.of(axis, height - bottom, top) for axis in axes]
    parts = []
    scores = [_finite(v) for v in axes[-1].values]
    known = [v for v in scores if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    order = sorted(range(len(scores)), key=lambda r: (r == best, _order(scores[r])))
    by_score = sorted(range(len(scores)), key=lambda r: _order(scores[r]), reverse=True)
    place = {row: i / max(len(scores) - 1, 1) - 0.5 for i, row in enumerate(by_score)}
    for row in order:
        points = [
            f"{x:.1f},{scale.at(axis.values[row]) + apart * place[row] * scale.is_choice:.1f}"
            for x, axis, scale in zip(xs, axes, scales, strict=True)
        ]
        score = scores[row]
        share = 0.0 if score is None or high == low else (score - low) / (high - low)
        color, width, opacity = "var(--series-0)", 1.5, 0.12 + 0.7 * share**2
        if row == best:
            color, width, opacity = "var(--series-7)", 3.5, 1.0
        words = ", ".join(f"{axis.label} {_value(axis, axis.values[row])}" for axis in axes)
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" '
            f'stroke-width="{width}" stroke-opacity="{opacity:.2f}" stroke-linejoin="round">'
            f"<title>{html.escape(words)}</title></polyline>"
        )
    for i, (x, axis, scale) in enumerate(zip(xs, axes, scales, strict=True)):
        parts.append(
            f'<line x1="{x:.1f}" y1="{top - 8}" x2="{x:.1f}" y2="{height - bottom + 8}" '
            'stroke="var(--ink-2)" stroke-width="1.5"/>'
        )
        lift = 20 if staggered and i % 2 else 0
        side = "end" if i == len(axes) - 1 else "start" if i == 0 else "middle"
        shift = {"end": 56, "start": -56, "middle": 0}[side]
        parts.append(_svg._text(x + shift, top - 18 - lift, axis.label, anchor=side))
        for value in scale.labels:
            y = scale.at(value)
            parts.append(_halo(x + 6 if i == 0 else x - 6, y + 5, _value(axis, value), i == 0))
        if not all(map(math.isfinite, axis.values)):
            parts.append(_halo(x + 6 if i == 0 else x - 6, height - 5, "none", i == 0))
    return _svg._svg(height, parts, "parallel coordinates of the sweep")


def heat_map(
    cells: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_axis: str,
    column_axis: str,
    percent: bool = True,
) -> str:
    """A grid of numbers, stronger where they are larger; NaN cells are left empty.

    Args:
      cells: `[rows][columns]`.
      rows: their labels, top to bottom.
      columns: their labels, left to right.
      row_axis: what the rows are.
      column_axis: what the columns are.
      percent: numbers are shares, written in percent.

    Raises:
      ValueError: if the labels do not fit the cells, or there are no cells.
    """
    if not cells or len(rows) != len(cells) or any(len(columns) != len(line) for line in cells):
        raise ValueError(
            f"{len(rows)} row and {len(columns)} column labels do not fit cells of "
            f"{[len(line) for line in cells]}."
        )
    left = 26 + 9 * max(len(label) for label in rows)
    wide, tall, top = (_WIDTH - left - 6) / len(columns), 40, 30
    known = [v for line in cells for v in line if math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    parts = [_svg._text(4, 18, row_axis), _svg._text(_WIDTH - 6, 18, column_axis, anchor="end")]
    for i, line in enumerate(cells):
        y = top + i * tall
        parts.append(_svg._text(left - 10, y + tall / 2 + 5, rows[i], anchor="end"))
        for j, value in enumerate(line):
            if not math.isfinite(value):
                continue
            share = 1.0 if high == low else (value - low) / (high - low)
            opacity, x = _FAINT + (_STRONG - _FAINT) * share, left + j * wide
            text = f"{100 * value:.1f}" if percent else f"{value:.3g}"
            words = f"{row_axis} {rows[i]}, {column_axis} {columns[j]}: {text}"
            parts.append(
                f'<g><title>{html.escape(words)}</title><rect x="{x + 1:.1f}" y="{y + 1}" '
                f'width="{wide - 2:.1f}" height="{tall - 2}" rx="3" fill="var(--series-0)" '
                f'fill-opacity="{opacity:.2f}"/><text x="{x + wide / 2:.1f}" '
                f'y="{y + tall / 2 + 5:.1f}" text-anchor="middle" fill="var(--ink)">{text}'
                "</text></g>"
            )
    for j, label in enumerate(columns):
        x, y = left + (j + 0.5) * wide, top + len(cells) * tall + 20
        parts.append(_svg._text(x, y, label, anchor="middle"))
    height = top + len(cells) * tall + 30
    return _svg._svg(height, parts, f"{row_axis} against {column_axis}")


def spans(found: Sequence[Span], *, unit: str, axis: str) -> str:
    """One row per program: a dot at the middle, a whisker from low to high, on a log axis."""
    if not found:
        raise ValueError("there is nothing to draw.")
    step, bottom = 38, 46
    height = step * len(found) + bottom
    scale = _Log.of([v for s in found for v in (s.low, s.high)], 14, _WIDTH - 92)
    parts = []
    for tick in scale.ticks():
        x = scale.at(tick)
        parts.append(_svg._rule(x, 4, x, height - bottom + 2))
        parts.append(_svg._text(x, height - bottom + 18, f"{tick:g}", anchor="middle"))
    for i, span in enumerate(found):
        y = step * i + 30
        words = f"{span.label}: {span.middle:.3g} {unit} ({span.low:.3g} to {span.high:.3g})"
        parts.append(
            f"<g><title>{html.escape(words)}</title>"
            f'<line x1="{scale.at(span.low):.1f}" y1="{y}" x2="{scale.at(span.high):.1f}" '
            f'y2="{y}" stroke="var(--series-0)" stroke-width="3" stroke-linecap="round"/>'
            f'<circle cx="{scale.at(span.middle):.1f}" cy="{y}" r="5" fill="var(--series-0)" '
            'stroke="var(--surface)" stroke-width="2"/></g>'
        )
        parts.append(_svg._text(14, y - 11, span.label))
        parts.append(_svg._text(_WIDTH - 8, y + 5, f"{span.middle:.3g}", anchor="end"))
    parts.append(_svg._text((_WIDTH - 78) / 2, height - 6, axis, anchor="middle"))
    return _svg._svg(height, parts, axis)


def roofline(programs: Sequence[Worked], *, flops: float, bytes: float) -> str:
    """Achieved FLOPs per second against FLOPs per byte, under both measured ceilings.

    Args:
      programs: what ran.
      flops: the matmul ceiling, per second.
      bytes: the copy ceiling, per second.
    """
    height, left, top, bottom = 340, 64, 16, 46
    ridge = flops / bytes
    across = _Log.of([p.intensity for p in programs] + [ridge / 8, ridge * 4], left, _WIDTH - 14)
    rates = [p.rate for p in programs] + [flops * 1.3, bytes * across.low / 1.3]
    up = _Log.of(rates, height - bottom, top)
    parts = []
    for tick in across.ticks():
        x = across.at(tick)
        parts.append(_svg._rule(x, top, x, height - bottom))
        parts.append(_svg._text(x, height - bottom + 18, f"{tick:g}", anchor="middle"))
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(_svg._rule(left, y, _WIDTH - 14, y))
        parts.append(_svg._text(left - 6, y + 5, _si(tick), anchor="end"))
    roof = [(across.low, bytes * across.low), (ridge, flops), (across.high, flops)]
    points = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in roof)
    parts.append(
        f'<polyline points="{points}" fill="none" stroke="var(--ink-2)" stroke-width="2">'
        f"<title>{_si(flops)}FLOP/s, {_si(bytes)}B/s</title></polyline>"
    )
    for i, program in enumerate(programs):
        x, y = across.at(program.intensity), up.at(program.rate)
        words = f"{program.label}: {_si(program.rate)}FLOP/s at {program.intensity:.3g} FLOP/B"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="var(--series-{i % 8})" '
            f'stroke="var(--surface)" stroke-width="2"><title>{html.escape(words)}</title></circle>'
        )
        near_edge = x > _WIDTH - 150
        label_x = x - 10 if near_edge else x + 10
        parts.append(_halo(label_x, y + 18, program.label, not near_edge))
    middle = (left + _WIDTH) / 2
    parts.append(_svg._text(middle, height - 6, "FLOPs per byte", anchor="middle"))
    return _svg._svg(height, parts, "achieved FLOP/s against FLOPs per byte")


class _Log(NamedTuple):
    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def of(cls, values: Sequence[float], start: float, stop: float) -> "_Log":
        low, high = min(values), max(values)
        return cls(low / 1.15, max(high, low * 1.01) * 1.15, start, stop)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """1, 2, 5 of every decade within, thinned to at most six."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        inside = [t for t in found if self.low <= t <= self.high]
        tens = [t for t in inside if math.log10(t) == round(math.log10(t))]
        chosen = tens if len(inside) > 6 and len(tens) > 1 else inside
        return chosen[:: -(-len(chosen) // 6)] if chosen else []


class _AxisScale(NamedTuple):
    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    is_choice: bool  # few values, at each of which several lines meet
    labels: tuple[float, ...]

    @classmethod
    def of(cls, axis: Axis, start: float, stop: float) -> "_AxisScale":
        known = sorted({v for v in axis.values if math.isfinite(v)}) or [0.0]
        low, high = known[0], known[-1]
        if axis.names:
            low, high = 0.0, float(len(axis.names) - 1)
            known = [float(i) for i in range(len(axis.names))]
        is_log = low > 0 and high / low >= 8 and not axis.names
        labels = tuple(known) if len(known) <= 6 else (low, high)
        is_choice = len(known) <= 6 and len(axis.values) > len(known)
        if low == high:
            low, high = low - 0.5, high + 0.5
            is_log = False
        return cls(low, high, start, stop, is_log, is_choice, labels)

    def at(self, value: float) -> float:
        if not math.isfinite(value):
            return self.start + _ABSENT
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)


def _halo(x: float, y: float, text: str, after: bool) -> str:
    """Text that stays readable over lines."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{"start" if after else "end"}" '
        'fill="var(--ink)" stroke="var(--surface)" stroke-width="4" paint-order="stroke" '
        f'stroke-linejoin="round">{html.escape(text)}</text>'
    )


def _value(axis: Axis, value: float) -> str:
    if axis.names:
        return axis.names[int(value)]
    if not math.isfinite(value):
        return "none"
    return f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _order(score: float | None) -> float:
    return -math.inf if score is None else score


def _si(value: float) -> str:
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "
