"""Charts as inline SVG, drawn by matplotlib: no script, no network, both color schemes.

Colors are CSS variables of the page (`--ink`, `--rule`, `--series-0` ...), so that a chart follows
the reader's light or dark setting. Every mark has a `<title>`, which browsers show on hover.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kdtl_jax.run.report import _drawing
from kdtl_jax.run.report._drawing import INK, SURFACE, dot, line, series, svg, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTER_WIDTH, _LABEL_LENGTH = 7.4, 30  # in pixels; letters per line of a row's label
_LABEL_STYLES: tuple[dict[str, Any], ...] = (
    {"ha": "center"},
    {"ha": "right", "va": "top", "rotation": 35, "rotation_mode": "anchor"},
)
_LOW_SHARE, _HIGH_SHARE = 0.06, 0.62  # of a heat map's color: text stays readable on the strongest


class Chart(NamedTuple):
    """A drawing, and the labels of its series for the legend that the page writes."""

    svg: str  # well formed and escaped: the page inserts it unchanged
    key: tuple[str, ...] = ()


class Bar(NamedTuple):
    """A labeled share and its interval, if it has one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    series: int = 0


class Curve(NamedTuple):
    """A named curve of shares."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: float | None = None  # the x to highlight


class PlotAxis(NamedTuple):
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


MAX_RINGS = 30  # lines with at most this many points have a ring at each one
MAX_POINTS = 200  # of a line, with hover text
_MAX_DRAWN, _MIN_DRAWN = 1e30, 1e-30  # matplotlib finds no ticks beyond these


def dots(bars: Sequence[Bar], *, axis: str, percent: bool = True) -> Chart:
    """One row per method: a dot with its interval; the full label is beside it."""
    ax = _rows([bar.label for bar in bars], axis)
    number = _percent if percent else "{:.3f}".format
    factor, unit = (100, "%") if percent else (1, "")
    for i, bar in enumerate(bars):
        if _is_drawable(factor * bar.value):
            value = _flush_tiny(factor * bar.value)
            title, whisker = f"{bar.label}: {number(bar.value)}{unit}", [value] * 2
            if bar.low is not None and bar.high is not None and _is_drawable(bar.low, bar.high):
                whisker = [_flush_tiny(factor * bar.low), _flush_tiny(factor * bar.high)]
                title += f" ({number(bar.low)} to {number(bar.high)})"
            line(ax, whisker, [i, i], series(bar.series), width=3)
            dot(ax, value, i, series(bar.series), title)
        _row_labels(ax, i, bar.label, number(bar.value))
    return Chart(svg(ax, axis))


def spans(programs: Sequence[Span], *, unit: str, axis: str) -> Chart:
    """One row per program: a dot at the middle, a whisker from low to high, on a log axis.

    Raises:
      ValueError: if there are none.
    """
    if not programs:
        raise ValueError("there is nothing to draw.")
    ax = _rows([span.label for span in programs], axis)
    _drawing.logarithmic(ax)
    if not any(_are_positive(span.low, span.middle, span.high) for span in programs):
        ax.set_xlim(1, 10)
    for i, span in enumerate(programs):
        title = f"{span.label}: {span.middle:.3g} {unit} ({span.low:.3g} to {span.high:.3g})"
        if _are_positive(span.low, span.middle, span.high):
            line(ax, [span.low, span.high], [i, i], series(0), width=3)
            dot(ax, span.middle, i, series(0), title)
        _row_labels(ax, i, span.label, f"{span.middle:.3g}")
    return Chart(svg(ax, axis))


def _rows(labels: Sequence[str], axis: str) -> "Axes":
    """Axes with a row at every integer, the first on top, and room for labels on the left."""
    longest = max((len(line) for label in labels for line in _wrap_label(label)), default=0)
    row_height = 46 if any(len(_wrap_label(label)) > 1 for label in labels) else 30
    left = 24 + _LETTER_WIDTH * longest
    height = row_height * len(labels) + 56
    ax = _drawing.axes(height, left=left, right=64, top=4, bottom=44, grid="x")
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_yticks([])
    _drawing.label_x(ax, axis)
    return ax


def _wrap_label(label: str) -> list[str]:
    """Wraps a label to lines that leave room for the drawing."""
    return textwrap.wrap(_shorten(label), _LABEL_LENGTH, break_on_hyphens=False) or [""]


def _row_labels(ax: "Axes", row: int, label: str, value: str) -> None:
    transform, lines = ax.get_yaxis_transform(), _wrap_label(label)  # x in fractions of the axes
    for i, content in enumerate(lines):
        offset = 8 * (len(lines) - 1) - 16 * i
        text(ax, 0, row, content, offset=(-14, offset), xycoords=transform, ha="right", va="center")
    text(ax, 1.02, row, value, xycoords=transform, va="center")


def lines(curves: Sequence[Curve], *, x_axis: str, y_axis: str, percent: bool = True) -> Chart:
    """Curves over a common axis; a chosen x is ringed."""
    label, factor = f"{y_axis} against {x_axis}", 100 if percent else 1
    ax = _drawing.axes(320, left=52, right=14, top=12, bottom=44, grid="y")
    for i, curve in enumerate(curves):
        points = [
            (_flush_tiny(x), _flush_tiny(factor * y))
            for x, y in zip(curve.x, curve.y, strict=True)
            if _is_drawable(x, factor * y)
        ]
        if not points:
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        line(ax, xs, ys, series(i), title=curve.label)
        if all(map(float.is_integer, map(float, xs))):
            ax.locator_params("x", integer=True)
        every = -(-len(xs) // MAX_POINTS)
        for index, (x, y) in enumerate(points):
            is_chosen = curve.marked is not None and math.isclose(x, curve.marked)
            if index % every and not is_chosen:
                continue
            value = f"{y:.1f}%" if percent else f"{y:.3g}"
            title = f"{curve.label}: {x:g} gives {value}"
            is_dense = len(xs) > MAX_RINGS  # rings around so many would hide the line
            edge = INK if is_chosen else series(i) if is_dense else SURFACE
            radius = 6 if is_chosen else 2 if is_dense else 4
            dot(ax, x, y, series(i), title, radius=radius, edge=edge)
    _drawing.label_x(ax, x_axis)
    return Chart(svg(ax, label), tuple(curve.label for curve in curves))


def parallel(axes: Sequence[PlotAxis], *, best: int) -> Chart:
    """Parallel coordinates: one line per row of a sweep, one axis per setting, the score last.

    Lines grow stronger with the score; the best is drawn last, in another color. Axes of positive
    values that span a factor of eight or more are logarithmic; NaN passes below its axis. Lines
    that share one value of a choice or a grid are drawn slightly apart, in order of score.

    Args:
      axes: of equal length; the last one is the score, for which more is better.
      best: the row to highlight.

    Raises:
      ValueError: if there are fewer than two axes, or their lengths differ.
    """
    lengths = {axis.label: len(axis.values) for axis in axes}
    if len(axes) < 2 or len(set(lengths.values())) != 1:
        raise ValueError(f"needs two or more equally long axes, got lengths {lengths}.")
    label = "parallel coordinates of the sweep"
    ax = _drawing.axes(352, left=60, right=60, top=60, bottom=30)
    ax.set_axis_off()
    ax.set_xlim(0, len(axes) - 1)
    ax.set_ylim(-0.1, 1)
    axes = [
        axis._replace(values=[v if _is_drawable(v) else math.nan for v in axis.values])
        for axis in axes
    ]
    scores = [v if math.isfinite(v) else -math.inf for v in axes[-1].values]
    shares = _normalize(scores)
    scales = [_Scale.of(axis) for axis in axes]
    by_score = sorted(range(len(scores)), key=lambda row: scores[row])
    offsets = {row: i / max(len(scores) - 1, 1) - 0.5 for i, row in enumerate(by_score)}
    for row in sorted(by_score, key=lambda row: row == best):
        ys = [
            scale.at(axis.values[row]) + 0.06 * offsets[row] * scale.is_choice
            for axis, scale in zip(axes, scales, strict=True)
        ]
        title = ", ".join(f"{axis.label} {_value(axis, axis.values[row])}" for axis in axes)
        color, width, opacity = series(0), 1.5, 0.12 + 0.7 * shares[row] ** 2
        if row == best:
            color, width, opacity = series(7), 3.5, 1.0
        line(ax, list(range(len(axes))), ys, color, title, width=width, opacity=opacity)
    for i, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
        line(ax, [i, i], [-0.02, 1.02], INK, width=1.5)
        side = "right" if i == len(axes) - 1 else "left" if i == 0 else "center"
        shift = {"right": 56, "left": -56, "center": 0}[side]
        stagger = 20 if len(axes) > 4 and i % 2 else 0
        text(ax, i, 1.0, axis.label, offset=(shift, 18 + stagger), ha=side)
        placement = {"offset": (6 if i == 0 else -6, 0), "ha": "left" if i == 0 else "right"}
        for value in scale.labels:
            text(ax, i, scale.at(value), _value(axis, value), va="center", halo=True, **placement)
        if not all(map(math.isfinite, axis.values)):
            text(ax, i, scale.at(math.nan), "none", va="center", halo=True, **placement)
    return Chart(svg(ax, label))


def heat_map(
    cells: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_axis: str,
    column_axis: str,
    percent: bool = True,
) -> Chart:
    """A grid of numbers, with stronger colors for larger ones; NaN cells are left empty.

    Args:
      cells: `[rows][columns]`.
      rows: their labels, top to bottom.
      columns: their labels, left to right.
      row_axis, column_axis: names of the axes.
      percent: whether numbers are shares, written in percent.

    Raises:
      ValueError: if the labels do not fit the cells, or there are no cells.
    """
    if not cells or len(rows) != len(cells) or any(len(columns) != len(line) for line in cells):
        raise ValueError(
            f"{len(rows)} row and {len(columns)} column labels do not fit cells of "
            f"{[len(line) for line in cells]}."
        )
    rows, columns = [[_shorten(name) for name in names] for names in (rows, columns)]
    left = 26 + 9 * max(len(label) for label in rows)
    label_width = _LETTER_WIDTH * max(len(label) for label in columns)
    is_rotated = label_width > (_drawing.WIDTH - left - 6) / len(columns)  # wider than a column
    bottom = 30 + 0.6 * label_width * is_rotated
    ax = _drawing.axes(40 * len(cells) + 30 + bottom, left=left, right=6, top=30, bottom=bottom)
    ax.set_axis_off()
    ax.set_xlim(0, len(columns))
    ax.set_ylim(len(cells), 0)
    shares = iter(_normalize([value for cell_row in cells for value in cell_row]))
    for i, cell_row in enumerate(cells):
        text(ax, 0, i + 0.5, rows[i], offset=(-10, 0), ha="right", va="center")
        for j, value in enumerate(cell_row):
            share = next(shares)
            if not _is_drawable(value):
                continue
            number = _percent(value) if percent else f"{value:.3g}"
            title = f"{row_axis} {rows[i]}, {column_axis} {columns[j]}: {number}"
            opacity = _LOW_SHARE + (_HIGH_SHARE - _LOW_SHARE) * share
            _drawing.box(ax, (j + 0.01, i + 0.03), (0.98, 0.94), series(0), title, opacity=opacity)
            text(ax, j + 0.5, i + 0.5, number, color=INK, ha="center", va="center")
    for j, label in enumerate(columns):
        x, y = (0.6, -6) if is_rotated else (0.5, -18)
        text(ax, j + x, len(cells), label, offset=(0, y), **_LABEL_STYLES[is_rotated])
    text(ax, 0, 0, row_axis, offset=(4 - left, 12))
    text(ax, len(columns), 0, column_axis, offset=(0, 12), ha="right")
    return Chart(svg(ax, f"{row_axis} against {column_axis}"))


def roofline(programs: Sequence[Worked], *, flops: float, bytes: float) -> Chart:
    """Achieved FLOPs per second against FLOPs per byte, under both measured ceilings.

    Args:
      programs: the measured programs.
      flops: the matmul ceiling, per second.
      bytes: the copy ceiling, per second.
    """
    label = "achieved FLOP/s against FLOPs per byte"
    ax = _drawing.axes(340, left=70, right=14, top=16, bottom=46, grid="both")
    _drawing.logarithmic(ax, both=True)
    ridge = flops / bytes
    programs = [p for p in programs if _are_positive(p.intensity, p.rate)]
    low = min([p.intensity for p in programs] + [ridge / 8]) / 1.15
    high = max([p.intensity for p in programs] + [ridge * 4]) * 1.15
    ceilings = f"{_si(flops)}FLOP/s, {_si(bytes)}B/s"
    line(ax, [low, ridge, high], [bytes * low, flops, flops], INK, ceilings, width=2)
    for i, program in enumerate(programs):
        title = f"{program.label}: {_si(program.rate)}FLOP/s at {program.intensity:.3g} FLOP/B"
        dot(ax, program.intensity, program.rate, series(i), title, radius=6)
        # A label in the right half would extend past the edge.
        is_right = program.intensity > math.sqrt(low * high)
        offset, side = ((-10, -14), "right") if is_right else ((10, -14), "left")
        text(ax, program.intensity, program.rate, program.label, offset=offset, ha=side, halo=True)
    rates = [p.rate for p in programs]
    ax.set_xlim(low, high)
    ax.set_ylim(min([*rates, bytes * low]) / 1.5, flops * 1.5)
    _drawing.label_x(ax, "FLOPs per byte")
    ax.yaxis.set_major_formatter(lambda value, position: _si(value).strip())
    return Chart(svg(ax, label))


class _Scale(NamedTuple):
    """Positions of values on an axis of the parallel plot, from 0 at the bottom to 1."""

    low: float
    high: float
    is_log: bool
    is_choice: bool  # few values, at each of which many lines meet
    labels: tuple[float, ...]

    @classmethod
    def of(cls, axis: PlotAxis) -> "_Scale":
        values = sorted({v for v in axis.values if math.isfinite(v)}) or [0.0]
        if axis.names:
            values = [float(i) for i in range(len(axis.names))]
        low, high = values[0], values[-1]
        is_log = low > 0 and high / low >= 8 and not axis.names
        labels = tuple(values) if len(values) <= 6 else (low, high)
        is_choice = len(values) <= 6 and len(axis.values) > len(values)
        if low == high:
            margin = max(0.5, abs(low) / 2)
            low, high, is_log = low - margin, high + margin, False
        return cls(low, high, is_log, is_choice, labels)

    def at(self, value: float) -> float:
        if not math.isfinite(value):
            return -0.08
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)


def _normalize(values: Sequence[float]) -> list[float]:
    """Scales values to 0..1 between the smallest and the largest drawn one; 0 if not drawn."""
    drawn = [v for v in values if _is_drawable(v)]
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    if low == high:
        return [float(_is_drawable(v)) for v in values]
    return [(v - low) / (high - low) if _is_drawable(v) else 0.0 for v in values]


def _value(axis: PlotAxis, value: float) -> str:
    if axis.names:
        return axis.names[int(value)]
    return f"{value:.3g}" if math.isfinite(value) else "none"


def _is_drawable(*values: float) -> bool:
    return all(abs(value) < _MAX_DRAWN for value in values)  # neither is NaN


def _are_positive(*values: float) -> bool:
    return all(_MIN_DRAWN < value < _MAX_DRAWN for value in values)


def _flush_tiny(value: float) -> float:
    """Replaces tiny values by 0: matplotlib finds no ticks between numbers like 1e-320."""
    return value if abs(value) > _MIN_DRAWN else 0.0


def _shorten(label: str) -> str:
    """Shortens a label to at most two lines, to leave room for the drawing."""
    max_length = 2 * _LABEL_LENGTH
    return label if len(label) <= max_length else f"{label[: max_length - 1]}…"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _si(value: float) -> str:
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "
