"""Tables: columns of numbers and text, target columns, and rows with missing values."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kdtl_jax import trees
from kdtl_jax.datasets import _amounts

# How to fill an empty cell of a number column; "drop" leaves its row out.
Missing = Literal["mean", "median", "most_frequent", "drop"]
MISSING: tuple[Missing, ...] = get_args(Missing)
USUAL_LABEL_COLUMNS = ("label", "labels", "target", "targets", "class", "y")
BOOLEANS = {"true": 1.0, "false": 0.0}
# The values of a label column that is one of several.
YES_NO = {**BOOLEANS, "yes": 1.0, "no": 0.0, "y": 1.0, "n": 0.0, "t": 1.0, "f": 0.0}


class ColumnTable(NamedTuple):
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
        """The name of a row in messages."""
        return f"row {row if self.rows is None else self.rows[row]}"

    def take(self, rows: np.ndarray) -> "ColumnTable":
        """The rows `rows`."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return self._replace(columns=columns, rows=None if self.rows is None else self.rows[rows])


def label_columns(table_name: str, header: Sequence[str], label: str) -> tuple[str, ...]:
    """The columns that `label` names: one, or several separated by commas.

    The default, "label", also stands for another usual name, if there is one such column.

    Raises:
      ValueError: if there is no such column (the nearest are listed) or more than one.
    """
    columns = (label,) if label in header else tuple(filter(None, map(str.strip, label.split(","))))
    if columns == ("label",) and "label" not in header:
        matches = [name for name in header if name.strip().lower() in USUAL_LABEL_COLUMNS]
        columns = tuple(matches) if len(matches) == 1 else columns
    for name in columns:
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
    if not columns or len(columns) == len(header):
        raise ValueError(
            f"{table_name}: needs columns of labels and of inputs, got {len(columns)} and "
            f"{len(header) - len(columns)}."
        )
    return columns


def without_index(table: ColumnTable, targets: Sequence[str]) -> ColumnTable:
    """The table without unnamed columns that count its rows."""
    columns, notices = dict(table.columns), list(table.notices)
    for name, column in table.columns.items():
        is_unnamed = not name or name.startswith("Unnamed: ") or name == "__index_level_0__"
        if is_unnamed and name not in targets and len(columns) > len(targets) + 1:
            shown = repr(name) if name else "without a name"
            if column.dtype == np.float64 and _is_index(column):
                del columns[name]
                notices.append(f"the column {shown} counts the rows: left out")
    return table._replace(columns=columns, notices=tuple(notices))


def without_columns(table: ColumnTable, names: Sequence[str]) -> ColumnTable:
    """The table without some columns.

    Raises:
      ValueError: if it has no such column.
    """
    check_columns_exist(table.name, names, list(table.columns))
    columns = {name: column for name, column in table.columns.items() if name not in names}
    return table._replace(columns=columns)


def check_columns_exist(table_name: str, names: Sequence[str], header: Sequence[str]) -> None:
    """Raises ValueError for a column that does not exist, naming the nearest."""
    for name in names:
        if name not in header:
            raise _no_column(table_name, name, header)


def check_model_columns(table_name: str, names: Sequence[str], header: Sequence[str]) -> None:
    """Raises ValueError for the first column that a model reads and a table lacks."""
    existing = {*header}
    for name in names:
        if name not in existing:
            raise _no_column(table_name, name, header, ", which the model reads")


def _no_column(
    table_name: str, name: str, header: Sequence[str], reason: str = "", repair: str = ""
) -> ValueError:
    """The error for a column that does not exist; names the nearest."""
    nearest = ", ".join(repr(column) for column in trees.nearest(name, header))
    return ValueError(
        f"{table_name}: has no column {name!r:.80}{reason}. Nearest: {nearest:.300}.{repair}"
    )


def without_missing(table: ColumnTable) -> ColumnTable:
    """The rows of a table that have no missing values."""
    has_missing = np.any([missing_mask(column) for column in table.columns.values()], axis=0)
    if not has_missing.any():
        return table
    notice = f"{int(has_missing.sum())} of {len(has_missing)} rows have missing values: left out"
    return table.take(~has_missing)._replace(notices=(*table.notices, notice))


def split_targets(
    table: ColumnTable, names: Sequence[str], *, allow_unlabeled: bool = False
) -> tuple[ColumnTable, np.ndarray]:
    """Splits a table into inputs, and targets `[N]` or `[N, K]`.

    Args:
      table: inputs and targets.
      names: the columns of targets.
      allow_unlabeled: whether an empty cell in a single text column means no labels.

    Raises:
      ValueError: naming the first row without a target.
    """
    columns = [table.columns[name] for name in names]
    if allow_unlabeled and len(columns) == 1 and columns[0].dtype == object:
        columns = [np.array(["" if cell is None else cell for cell in columns[0]], object)]
    incomplete = np.any([missing_mask(column) for column in columns], axis=0)
    if incomplete.any():
        row = int(np.flatnonzero(incomplete)[0])
        raise ValueError(
            f"{table.name}: {table.at(row)} has no label ({int(incomplete.sum())} such rows). Fill "
            "it in, leave such rows out (--missing drop), or, if a cell lists several labels and "
            "an empty one means none, use --target labels."
        )
    if len(columns) > 1:
        columns = [_numbers_or_text(column, table.decimal_comma) for column in columns]
    if len(columns) > 1 and (text := [i for i, x in enumerate(columns) if x.dtype.kind == "U"]):
        raise ValueError(
            f"{table.name}: the column {names[text[0]]!r:.80} holds text such as "
            f"{columns[text[0]][0]!s:.80}. Several columns of labels need numbers, or 0 and 1 (or "
            "yes and no) in each. Name one column of text with --label."
        )
    stacked = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    return without_columns(table, names), stacked


def missing_mask(column: np.ndarray) -> np.ndarray:
    """Whether each value is missing, bool `[N]`."""
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
    amounts = _amounts.amounts(map(str, column), decimal_comma=decimal_comma)
    if amounts is not None and amounts[1] != _amounts.DAYS:
        return amounts[0]
    try:
        return np.array([float(cell) for cell in column])
    except (ValueError, TypeError):
        values = [YES_NO.get(str(cell).strip().lower()) for cell in column]
        if None in values:
            return np.array([str(cell) for cell in column])
        return np.array(values)


def is_number(cell: Any) -> bool:
    """Whether a cell is a number or can be read as one."""
    try:
        float(cell)
    except (ValueError, TypeError):
        return False
    return True
