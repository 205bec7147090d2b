"""Tables: by rich on a terminal, plain lines elsewhere."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from kdtl_jax import _text

LONGEST = 1000  # characters of a table's cell


def show(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str] | None = None,
    *,
    title: str | None = None,
    bold: Sequence[int] = (),
    left: int = 1,
) -> None:
    """A table on a terminal; elsewhere lines, by default each cell after its column's name."""
    # Names from other sources must not control the terminal.
    header, *rows = ([_text.shown(cell, LONGEST) for cell in row] for row in (header, *rows))
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(table(header, rows, title=title, bold=bold, left=left))
        return
    if lines is None:
        lines = ["  ".join(f"{n} {c}" for n, c in zip(header, row, strict=True)) for row in rows]
    for line in lines:
        print("\t".join(map(_text.escaped, line.split("\t"))))


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    bold: Sequence[int] = (),
    left: int = 1,
) -> Table:
    """A table for the terminal: the first `left` columns left-aligned, rows in `bold` in bold."""
    out = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i < left else "right")
    for i, row in enumerate(rows):
        out.add_row(*row, style="bold" if i in bold else "")
    return out


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as text, the first column left-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def list_methods(header: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Prints `--list`, separated by tabs if there is no terminal; returns exit code 0."""
    show(header, rows, ["\t".join(row) for row in (header, *rows)], left=len(header))
    return 0
