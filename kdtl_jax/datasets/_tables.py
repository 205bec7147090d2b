"""Tables: columns of numbers and text, which are targets, and rows with missing values."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kdtl_jax import trees
from kdtl_jax.datasets import _amounts

# How an empty cell of a number column is filled; or its row is dropped.
Missing = Literal["mean", "median", "most_frequent", "drop"]
MISSING: tuple[Missing, ...] = get_args(Missing)
USUAL_LABELS = ("label", "labels", "target", "targets", "class", "y")
FLAGS = {"true": 1.0, "false": 0.0}
# In one of several columns of labels.
ANSWERS = {**FLAGS, "yes": 1.0, "no": 0.0, "y": 1.0, "n": 0.0, "t": 1.0, "f": 0.0}


class Table(NamedTuple):
    """Columns `[N]`: float64 with NaN for missing values, or objects: text and None."""

    name: str
    columns: Mapping[str, np.ndarray]
    rows: np.ndarray | None = None  # the line of each row in its file, if it has lines
    notices: tuple[str, ...] = ()
    decimal_comma: bool = False  # in text

    @property
    def size(self) -> int:
        """How many rows."""
        return len(next(iter(self.columns.values()), ()))

    def at(self, row: int) -> str:
        """A row as messages name it."""
        return f"row {row if self.rows is None else self.rows[row]}"

    def take(self, rows: np.ndarray) -> "Table":
        """The rows `rows`."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return self._replace(columns=columns, rows=None if self.rows is None else self.rows[rows])


def label_columns(table_name: str, header: Sequence[str], label: str) -> tuple[str, ...]:
    """The columns that `label` names: one, or several separated by commas.

    The default, "label", also stands for another usual name, if there is one such column.

    Raises:
      ValueError: if there is no such column (the nearest are listed) or more than one.
    """
    asked = (label,) if label in header else tuple(filter(None, map(str.strip, label.split(","))))
    if asked == ("label",) and "label" not in header:
        usual = [name for name in header if name.strip().lower() in USUAL_LABELS]
        asked = tuple(usual) if len(usual) == 1 else asked
    for name in asked:
        if name not in header:
            repair = " Name the column of labels (--label)."
            if any(map(is_number, header)):
                repair = " Its first line has numbers: is the line with the columns' names missing?"
            raise _no_column(table_name, name, header, repair=repair)
        if header.count(name) > 1:
            raise ValueError(
                f"{table_name}: has {header.count(name)} columns called {name!r:.80}: as inputs "
                "the others would give the answer away. Rename or drop them."
            )
    if not asked or len(asked) == len(header):
        raise ValueError(
            f"{table_name}: needs columns of labels and of inputs, got {len(asked)} and "
            f"{len(header) - len(asked)}."
        )
    return asked


def without_index(table: Table, targets: Sequence[str]) -> Table:
    """The table without unnamed columns that count its rows."""
    columns, notices = dict(table.columns), list(table.notices)
    for name, column in table.columns.items():
        unnamed = not name or name.startswith("Unnamed: ") or name == "__index_level_0__"
        if unnamed and name not in targets and len(columns) > len(targets) + 1:
            shown = repr(name) if name else "without a name"
            if column.dtype == np.float64 and _is_index(column):
                del columns[name]
                notices.append(f"the column {shown} counts the rows: left out")
    return table._replace(columns=columns, notices=tuple(notices))


def dropped(table: Table, names: Sequence[str]) -> Table:
    """The table without some columns.

    Raises:
      ValueError: if it has no such column.
    """
    check_there(table.name, names, list(table.columns))
    kept = {name: column for name, column in table.columns.items() if name not in names}
    return table._replace(columns=kept)


def check_there(table_name: str, names: Sequence[str], header: Sequence[str]) -> None:
    """Refuses columns to drop that do not exist, naming the nearest."""
    for name in names:
        if name not in header:
            raise _no_column(table_name, name, header)


def check_read(table_name: str, names: Sequence[str], header: Sequence[str]) -> None:
    """Raises ValueError naming the first of the columns that a model reads and a table lacks."""
    there = {*header}
    for name in names:
        if name not in there:
            raise _no_column(table_name, name, header, ", which the model reads")


def _no_column(
    table: str, name: str, columns: Sequence[str], more: str = "", repair: str = ""
) -> ValueError:
    """The error naming a column that does not exist, and the nearest."""
    near = ", ".join(repr(found) for found in trees.nearest(name, columns))
    return ValueError(f"{table}: has no column {name!r:.80}{more}. Nearest: {near:.300}.{repair}")


def complete(table: Table) -> Table:
    """The rows without missing values."""
    lacking = np.any([empty(column) for column in table.columns.values()], axis=0)
    if not lacking.any():
        return table
    note = f"{int(lacking.sum())} of {len(lacking)} rows have missing values: left out"
    return table.take(~lacking)._replace(notices=(*table.notices, note))


def targets_of(
    table: Table, names: Sequence[str], *, may_be_none: bool = False
) -> tuple[Table, np.ndarray]:
    """The table of inputs, and targets `[N]` or `[N, K]`.

    Args:
      table: with the columns of targets.
      names: those columns.
      may_be_none: whether an empty cell in a single text column is an example without labels.

    Raises:
      ValueError: naming the first row without a target.
    """
    found = [table.columns[name] for name in names]
    if may_be_none and len(found) == 1 and found[0].dtype == object:
        found = [np.array(["" if cell is None else cell for cell in found[0]], object)]
    lacking = np.any([empty(column) for column in found], axis=0)
    if lacking.any():
        row = int(np.flatnonzero(lacking)[0])
        raise ValueError(
            f"{table.name}: {table.at(row)} has no label ({int(lacking.sum())} such rows). Fill "
            "it in, leave such rows out (--missing drop), or, if a cell lists several labels and "
            "an empty one means none, use --target labels."
        )
    if len(found) > 1:
        columns = [_numbers_or_text(column, table.decimal_comma) for column in found]
    else:
        columns = found
    if len(columns) > 1 and (text := [i for i, x in enumerate(columns) if x.dtype.kind == "U"]):
        raise ValueError(
            f"{table.name}: the column {names[text[0]]!r:.80} holds text such as "
            f"{columns[text[0]][0]!s:.80}. Several columns of labels need numbers, or 0 and 1 (or "
            "yes and no) in each. Name one column of text with --label."
        )
    stacked = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    return dropped(table, names), stacked


def empty(column: np.ndarray) -> np.ndarray:
    """Where a value is missing, bool `[N]`."""
    if column.dtype == np.float64:
        return np.isnan(column)
    return np.fromiter((cell is None for cell in column), bool, len(column))


def _is_index(column: np.ndarray) -> bool:
    if not len(column) or np.isnan(column).any() or (column != np.floor(column)).any():
        return False
    return len(np.unique(column)) == len(column)


def _numbers_or_text(column: np.ndarray, decimal_comma: bool) -> np.ndarray:
    if column.dtype == np.float64:
        return column
    read = _amounts.amounts(map(str, column), decimal_comma=decimal_comma)
    if read is not None and read[1] != _amounts.DAYS:
        return read[0]
    try:
        return np.array([float(cell) for cell in column])
    except (ValueError, TypeError):
        found = [ANSWERS.get(str(cell).strip().lower()) for cell in column]
        if None in found:
            return np.array([str(cell) for cell in column])
        return np.array(found)


def is_number(cell: Any) -> bool:
    """Whether a cell is a number or can be read as one."""
    try:
        float(cell)
    except (ValueError, TypeError):
        return False
    return True
