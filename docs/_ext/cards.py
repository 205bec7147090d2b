"""Tables of three or more columns: on a phone each row is a card, its cells labeled."""

from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform


class Cards(SphinxTransform):
    """Labels the cells with their columns' names, which site.css shows only on narrow screens."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        for table in self.document.findall(nodes.table):
            heads = [entry.astext() for head in table.findall(nodes.thead) for entry in head[0]]
            if len(heads) < 3:
                continue
            table["classes"].append("cards")
            rows = [row for body in table.findall(nodes.tbody) for row in body]
            for row in rows:
                for name, entry in zip(heads[1:], row[1:], strict=True):
                    if entry.astext().strip() in ("", "—", "–"):
                        entry["classes"].append("nothing")
                    elif isinstance(entry[0], nodes.paragraph):
                        entry[0].insert(0, nodes.inline("", f"{name}: ", classes=["label"]))


def setup(app: Any) -> dict[str, bool]:
    """Registers the transform."""
    app.add_transform(Cards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
