"""Tables: columns of numbers and of text, and how they become inputs and targets.

What a column becomes is decided by the training part and kept as a `Column`: other parts, and data
read later, are encoded in the same way.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from kdtl_jax import trees
from kdtl_jax.datasets._preprocessing import Column

# How an empty cell of a column of numbers is filled, or that its row is dropped.
Missing = Literal["mean", "median", "most_frequent", "drop"]
MISSING: tuple[Missing, ...] = get_args(Missing)
MOST_CATEGORIES = 1000
USUAL_LABELS = ("label", "labels", "target", "targets", "class", "y")
FLAGS = {"true": 1.0, "false": 0.0}
# 31/01/2024, 31-Jan-2024, Jan 31, 2024: what ISO 8601 does not write.
DATE = re.compile(
    r"\d{1,4}([./-])\d{1,2}\1\d{1,4}(\s.*)?|\d{1,2}[ .-]+[A-Za-z]{3,9}[ .,-]+\d{2,4}"
    r"|[A-Za-z]{3,9}\.? \d{1,2},? \d{4}"
)
# In one of several columns of labels.
ANSWERS = {**FLAGS, "yes": 1.0, "no": 0.0, "y": 1.0, "n": 0.0, "t": 1.0, "f": 0.0}


class Table(NamedTuple):
    """Columns `[N]`: float64 with NaN for what is missing, or objects, text and None."""

    name: str
    columns: Mapping[str, np.ndarray]
    rows: np.ndarray | None = None  # the line of each row in its file, where it has lines
    notices: tuple[str, ...] = ()

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
    """The columns that `label` names: one, or several between commas.

    The default, "label", also stands for another usual name, if there is one such column.

    Raises:
      ValueError: if there is no such column (the nearest are listed) or two of them.
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
    """Refuses columns to drop that are not there, naming the nearest."""
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
    """The error that names a column which is not there, and the nearest."""
    near = ", ".join(repr(found) for found in trees.nearest(name, columns))
    return ValueError(f"{table}: has no column {name!r:.80}{more}. Nearest: {near:.300}.{repair}")


def complete(table: Table) -> Table:
    """The rows in which nothing is missing."""
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
      may_be_none: whether an empty cell of one column of text is an example without any label.

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
            "an empty one means none, say --target labels."
        )
    columns = [_numbers_or_text(column) for column in found] if len(found) > 1 else found
    if len(columns) > 1 and (text := [i for i, x in enumerate(columns) if x.dtype.kind == "U"]):
        raise ValueError(
            f"{table.name}: the column {names[text[0]]!r:.80} holds text such as "
            f"{columns[text[0]][0]!s:.80}. Several columns of labels need numbers, or 0 and 1 (or "
            "yes and no) in each. Name one column of text with --label."
        )
    stacked = columns[0] if len(columns) == 1 else np.stack(columns, axis=1)
    return dropped(table, names), stacked


def columns_of(
    table: Table, rows: np.ndarray, *, missing: Missing | None, one_hot: bool
) -> tuple[Column, ...]:
    """What each column becomes, by the training rows.

    Args:
      table: of inputs.
      rows: those of the training part.
      missing: what fills a missing value; None or "drop": nothing does.
      one_hot: whether text becomes one input per category.

    Raises:
      ValueError: naming row and column of text or of a missing value that nothing fills.
    """
    made = []
    for name, column in table.columns.items():
        part = column[rows]
        there = part[~empty(part)]
        lacking = empty(column)
        if lacking.any() and missing in (None, "drop"):
            row = int(np.flatnonzero(lacking)[0])
            raise ValueError(
                f"{table.name}: {table.at(row)}, column {name!r:.80}: no value "
                f"({int(lacking.sum())} of {len(column)} are missing). Fill them in (--missing "
                "mean, median, most_frequent) or leave such rows out (--missing drop)."
            )
        if not len(there):
            raise ValueError(
                f"{table.name}: column {name!r:.80} has no value in the training part. Drop it "
                f"(--drop-columns)."
            )
        if column.dtype == np.float64:
            fill = None if missing in (None, "drop") else _fill(there, missing)
            made.append(Column(name, (), fill))
        else:
            made.append(_text_column(table, name, column, there, missing, one_hot))
    return tuple(made)


def encoded(table: Table, columns: Sequence[Column]) -> np.ndarray:
    """Inputs `[N, D]`, float64: one number per column, or one per category.

    A category that the training part does not have is 0 everywhere.

    Raises:
      ValueError: if a column is missing, text where numbers are expected, or has a missing value
        that nothing fills; row and column are named.
    """
    out = np.empty((table.size, sum(len(column.categories) or 1 for column in columns)))
    check_read(table.name, [column.name for column in columns], list(table.columns))
    at = 0
    for column in columns:
        values, lacking = table.columns[column.name], empty(table.columns[column.name])
        if lacking.any() and column.fill is None:
            row = int(np.flatnonzero(lacking)[0])
            raise ValueError(
                f"{table.name}: {table.at(row)}, column {column.name!r:.80}: no value, and the "
                "training data had none missing."
            )
        # Filled last: a column in which everything is missing may be of either type.
        if column.categories:
            texts = _as_text(values)
            texts[lacking] = column.fill
            end = at + len(column.categories)
            out[:, at:end] = texts[:, None] == np.array(column.categories, object)[None]
            at = end
            continue
        if values.dtype != np.float64 and not lacking.all():
            raise _not_a_number(table, column.name, values)
        if column.fill is not None:
            values = np.where(lacking, column.fill, values)
        out[:, at] = values
        at += 1
    return out


def unknown_categories(table: Table, columns: Sequence[Column]) -> list[str]:
    """What to tell of categories that the training part does not have."""
    notices = []
    for column in columns:
        if column.categories:
            values = table.columns[column.name]
            texts = _as_text(values[~empty(values)])
            new = sorted(set(texts) - set(column.categories))
            if new:
                notices.append(
                    f"column {column.name!r:.80}: {new[0]!r:.80} does not occur in the training "
                    f"part ({len(new)} such categories): all of its inputs are 0"
                )
    return notices


def empty(column: np.ndarray) -> np.ndarray:
    """Where a value is missing, bool `[N]`."""
    if column.dtype == np.float64:
        return np.isnan(column)
    return np.fromiter((cell is None for cell in column), bool, len(column))


def _text_column(
    table: Table,
    name: str,
    column: np.ndarray,
    there: np.ndarray,
    missing: Missing | None,
    one_hot: bool,
) -> Column:
    if not one_hot:
        raise _not_a_number(table, name, column)
    texts = _as_text(there)
    categories, counts = np.unique(texts.astype(str), return_counts=True)
    if len(categories) > MOST_CATEGORIES or (len(texts) >= 20 and 2 * len(categories) > len(texts)):
        raise ValueError(
            f"{table.name}: column {name!r:.80} has {len(categories)} different texts in "
            f"{len(texts)} rows, too many for one input each: a name or an id? Drop it "
            "(--drop-columns)."
        )
    fill = None
    if missing not in (None, "drop"):  # text has no mean
        fill = str(categories[counts.argmax()])
    return Column(name, tuple(map(str, categories)), fill)


def _not_a_number(table: Table, name: str, column: np.ndarray) -> ValueError:
    there = np.flatnonzero(~empty(column)).tolist()
    row = next((i for i in there if not is_number(column[i])), there[0])
    plain = is_number(column[row])
    what = "is text, not a number" if plain else "is not a number"
    repair = "Make it one input per category (--text-columns one-hot), or drop it (--drop-columns)."
    bare = re.sub(r"[\s,'%$€£¥]", "", str(column[row]))
    if not plain and is_number(bare):
        repair = f"Write plain numbers, here {bare:.40}, or drop it (--drop-columns)."
    elif _is_date(column[row]):
        what = "is a date, not a number"
        repair = (
            f"Make numbers of it, in pandas for example (pd.to_datetime(table[{name!r:.80}]) - "
            "pd.Timestamp('2000-01-01')).dt.days, or drop it (--drop-columns)."
        )
    elif not isinstance(column[row], str):
        repair = "Drop it (--drop-columns)."
    return ValueError(
        f"{table.name}: {table.at(row)}, column {name!r:.80}: {column[row]!r:.80} {what}. {repair}"
    )


def _is_date(cell: Any) -> bool:
    text = str(cell).strip()
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return DATE.fullmatch(text) is not None
    return True


def _fill(values: np.ndarray, missing: Missing | None) -> float:
    if missing == "mean":
        return float(values.mean())
    if missing == "median":
        return float(np.median(values))
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


def _is_index(column: np.ndarray) -> bool:
    if not len(column) or np.isnan(column).any() or (column != np.floor(column)).any():
        return False
    return len(np.unique(column)) == len(column)


def _as_text(column: np.ndarray) -> np.ndarray:
    """A column as text; whole numbers without a fraction."""
    if column.dtype == np.float64:
        column = np.array([int(x) if x.is_integer() else x for x in column.tolist()], object)
    return np.array([str(cell) for cell in column], object)


def _numbers_or_text(column: np.ndarray) -> np.ndarray:
    if column.dtype == np.float64:
        return column
    try:
        return np.array([float(cell) for cell in column])
    except (ValueError, TypeError):
        found = [ANSWERS.get(str(cell).strip().lower()) for cell in column]
        if None in found:
            return np.array([str(cell) for cell in column])
        return np.array(found)


def is_number(cell: Any) -> bool:
    """Whether a cell is a number or reads as one."""
    try:
        float(cell)
    except (ValueError, TypeError):
        return False
    return True
