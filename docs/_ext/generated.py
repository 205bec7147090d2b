"""Writes the generated pages before a build, and links names in code spans to the reference."""

import functools
import re
from pathlib import Path
from typing import Any

import pages
import reference
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

ARXIV = re.compile(r"\b((?:0[7-9]|1\d|2\d)(?:0[1-9]|1[0-2])\.\d{4,5})\b")
DOCS = Path(__file__).parent.parent


@functools.cache
def known() -> dict[str, str]:
    """Public names by what stands for them in a code span: `losses.mse`."""
    return {name.removeprefix("kdtl_jax."): name for name in reference.public()}


class Names(SphinxTransform):
    """`losses.mse` in a code span becomes a link to its entry."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        page = self.env.docname
        prefix = "losses." if page == "losses" else f"{page.removeprefix('api/')}."
        for literal in list(self.document.findall(nodes.literal)):
            text = literal.astext().removesuffix("()")
            target = known().get(text if "." in text else prefix + text)
            parent = literal.parent
            if target is None or isinstance(parent, (nodes.reference, addnodes.pending_xref)):
                continue
            link = addnodes.pending_xref(
                "", reftype="obj", refdomain="py", reftarget=target, refexplicit=True,
                refwarn=False, refdoc=page,
            )  # fmt: skip
            literal.replace_self(link)
            link += literal
        for text in list(self.document.findall(nodes.Text)):
            if not isinstance(text.parent, (nodes.literal, nodes.literal_block, nodes.reference)):
                _link_papers(text)


def _link_papers(text: nodes.Text) -> None:
    """arXiv numbers become links."""
    parts = ARXIV.split(text.astext())
    if len(parts) > 1:
        text.parent.replace(
            text,
            [
                nodes.reference("", part, refuri=f"https://arxiv.org/abs/{part}")
                if number % 2
                else nodes.Text(part)
                for number, part in enumerate(parts)
            ],
        )


def setup(app: Any) -> dict[str, bool]:
    """Registers the transform."""
    pages.write(DOCS, pages.everything(DOCS.parent))
    app.add_transform(Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
