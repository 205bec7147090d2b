r"""Equations as MathML, at build time: browsers draw them without a script or a network.

Browsers place superscripts by a table in the font, and many systems have no font with one. The site
therefore carries STIX Two Math (SIL Open Font License), which comes with the package ziamath.

`$...$` is LaTeX. The role `formula` takes the plain notation of docstrings and tables, such as
{formula}`T^2 KL(p_T‖p_S)` or {formula}`mean (r(f_S) - f_T)^2`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from notation import mathml


def formula(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None,
    content: Any = (),
) -> tuple[list[nodes.Node], list[Any]]:  # fmt: skip
    """The role `formula`."""
    return [nodes.raw("", mathml(text), format="html")], []


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.math_block) -> None:
    self.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def _copy_font(app: Any, error: Exception | None) -> None:
    static = Path(app.outdir) / "_static"
    package = importlib.util.find_spec("ziamath")
    if error is None and static.is_dir() and package is not None and package.origin is not None:
        font = Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
        (static / font.name).write_bytes(font.read_bytes())


def setup(app: Any) -> dict[str, bool]:
    """Registers the role and the renderer."""
    app.add_role("formula", formula)
    app.connect("build-finished", _copy_font)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
