"""Matplotlib figures as inline SVG: page colors, hover titles, nothing loaded from outside.

Figures are made without pyplot, so no global state remains. Text stays text, in the page's font.
"""

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:  # imported inside functions: it takes a fifth of a command's start
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH, FONT = 640, 14  # pixels of a drawing, which the page scales
COLORS = 8  # --series-0 ... --series-7
# Placeholders that matplotlib writes unchanged, and the page's variables that replace them.
INK, LABEL, RULE, SURFACE = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {INK: "--ink", LABEL: "--ink-2", RULE: "--rule", SURFACE: "--surface"}
_VARIABLES |= {f"#0102{i:02x}": f"--series-{i}" for i in range(COLORS)}
_TITLE, _HALO = "title:", "halo:"  # prefixes of the group ids of marks, until the SVG is finished
_CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def series(number: int) -> str:
    """The color of a series; after eight they repeat."""
    return f"#0102{number % COLORS:02x}"


def printable(text: str) -> str:
    """Escapes control characters and lone surrogates, which are not allowed in a page."""
    return _CONTROL_CHARACTERS.sub(lambda match: ascii(match[0])[1:-1], text)


def axes(
    height: float,
    *,
    left: float,
    right: float,
    top: float,
    bottom: float,
    grid: Literal["x", "y", "both"] | None = None,
) -> "Axes":
    """Axes of a new figure within margins in pixels, without a frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor="none")
    size = (WIDTH - left - right) / WIDTH, (height - top - bottom) / height
    ax = figure.add_axes((left / WIDTH, bottom / height, *size), facecolor="none")
    ax.set_axisbelow(True)
    for spine in ax.spines.values():
        spine.set_visible(False)
    # Ticks would be drawn by reference (`xlink:href`), clipped marks by `url(#...)`.
    ax.tick_params(which="both", bottom=False, left=False, labelsize=FONT, labelcolor=LABEL)
    ax.margins(0.03)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    if grid is not None:
        ax.grid(axis=grid, color=RULE, linewidth=1, clip_on=False)
    return ax


def logarithmic(ax: "Axes", *, both: bool = False) -> None:
    """Makes the horizontal axis (or both) logarithmic, with a few plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    if both:
        ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis) if both else (ax.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def set_title(artist: "Artist", title: str) -> None:
    """Gives a mark the text that browsers show on hover."""
    artist.set_gid(_TITLE + printable(title))


def line(
    ax: "Axes",
    x: Sequence[float],
    y: Sequence[float],
    color: str,
    title: str | None = None,
    *,
    width: float = 2,
    opacity: float = 1,
) -> None:
    """A polyline."""
    [artist] = ax.plot(
        x, y, color=color, linewidth=width, alpha=opacity, clip_on=False, solid_capstyle="round"
    )
    if title is not None:
        set_title(artist, title)


def dot(
    ax: "Axes",
    x: float,
    y: float,
    color: str,
    title: str,
    *,
    radius: float = 5,
    edge: str = SURFACE,
) -> None:
    """A filled circle."""
    from matplotlib.patches import Circle
    from matplotlib.transforms import ScaledTranslation

    # A circle in pixels around the point; a marker would be drawn by reference.
    circle = Circle(
        (0, 0),
        radius,
        transform=ScaledTranslation(x, y, ax.transData),  # pyright: ignore[reportArgumentType]  # the stub asks for an affine one
        facecolor=color,
        edgecolor=edge,
        linewidth=2,
        clip_on=False,
        zorder=3,
    )
    set_title(ax.add_artist(circle), title)


def box(
    ax: "Axes",
    corner: tuple[float, float],
    size: tuple[float, float],
    color: str,
    title: str,
    *,
    opacity: float,
) -> None:
    """A filled rectangle."""
    from matplotlib.patches import Rectangle

    patch = Rectangle(corner, *size, facecolor=color, alpha=opacity, clip_on=False)
    set_title(ax.add_patch(patch), title)


def text(
    ax: "Axes",
    x: float,
    y: float,
    content: str,
    *,
    offset: tuple[float, float] = (0, 0),
    color: str = LABEL,
    halo: bool = False,
    **options: Any,
) -> None:
    """Text at a point, shifted by pixels; `halo` keeps it readable over lines."""
    annotation = ax.annotate(
        printable(content),
        (x, y),
        xytext=offset,
        textcoords="offset points",
        color=color,
        fontsize=FONT,
        parse_math=False,
        annotation_clip=False,
        **options,
    )
    if halo:
        annotation.set_gid(_HALO)


def label_x(ax: "Axes", words: str) -> None:
    """The name of the horizontal axis."""
    ax.set_xlabel(printable(words), color=LABEL, fontsize=FONT, parse_math=False)


def svg(ax: "Axes", label: str) -> str:
    """The figure of the axes as SVG for a page; screen readers read the label."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    figure = ax.figure
    assert isinstance(figure, Figure)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "kdtl"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing in matplotlib's font but not in the page's
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "defs"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _finish_element(element)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": printable(label)}
    xml = ElementTree.tostring(root, encoding="unicode")
    for placeholder, variable in _VARIABLES.items():
        xml = xml.replace(placeholder, f"var({variable})")
    return xml


def _finish_element(element: ElementTree.Element) -> None:
    """Replaces ids by titles, and matplotlib's font by the page's."""
    name = element.attrib.pop("id", "")
    if name.startswith(_TITLE):
        title = ElementTree.Element("title")
        title.text = name.removeprefix(_TITLE)
        element.insert(0, title)
    if name == _HALO:
        halo = f"stroke: {SURFACE}; stroke-width: 4; stroke-linejoin: round; paint-order: stroke"
        element.attrib["style"] = halo
    if element.tag == "text":
        style = re.sub(r"font(-\w+)?:[^;]*(; *)?", "", element.attrib.get("style", ""))
        element.attrib["style"] = style
        if element.attrib.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
