"""How the columns of a table become inputs: numbers, or one number per category of text.

The training part determines what a column becomes, which is kept as a `Column`, so that other parts
and data read later are encoded in the same way.
"""

import re
from collections.abc import Sequence

import numpy as np

from kdtl_jax.datasets import _amounts
from kdtl_jax.datasets._preprocessing import Column
from kdtl_jax.datasets._tables import Missing, Table, check_read, empty, is_number

MOST_CATEGORIES = 1000
# 31/01/2024, 31-Jan-2024, Jan 31, 2024: dates not in ISO 8601.
DATE = re.compile(
    r"\d{1,4}([./-])\d{1,2}\1\d{1,4}(\s.*)?|\d{1,2}[ .-]+[A-Za-z]{3,9}[ .,-]+\d{2,4}"
    r"|[A-Za-z]{3,9}\.? \d{1,2},? \d{4}"
)


def columns_of(
    table: Table, rows: np.ndarray, *, missing: Missing | None, one_hot: bool
) -> tuple[Column, ...]:
    """What each column becomes, determined by the training rows.

    Args:
      table: the inputs.
      rows: those of the training part.
      missing: what fills a missing value; None or "drop" fills nothing.
      one_hot: whether text becomes one input per category.

    Raises:
      ValueError: naming the row and column of text, or of a missing value that nothing fills.
    """
    made = []
    for name, column in table.columns.items():
        part = column[rows]
        there = part[~empty(part)]
        lacking = empty(column)
        fills = missing not in (None, "drop")
        if lacking.any() and not fills:
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
        # Text whose cells are all plain numbers is text by its file's type, such as codes.
        if (read := _numbers_in(table, column)) is not None and (
            column.dtype == np.float64 or not all(map(is_number, column[~lacking]))
        ):
            values, unit = read
            values = values[rows][~empty(part)]
            made.append(Column(name, (), _fill(values, missing) if fills else None, unit))
        else:
            made.append(_text_column(table, name, column, there, missing, one_hot))
    return tuple(made)


def encoded(table: Table, columns: Sequence[Column]) -> np.ndarray:
    """Inputs `[N, D]`, float64: one number per column, or one per category.

    A category that the training part does not have is encoded as all zeros.

    Raises:
      ValueError: if a column is missing, has text instead of numbers, or has a missing value that
        nothing fills; row and column are named.
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
        # Filled last: a column with only missing values may be of either type.
        if column.categories:
            texts = _as_text(values)
            texts[lacking] = column.fill
            end = at + len(column.categories)
            out[:, at:end] = texts[:, None] == np.array(column.categories, object)[None]
            at = end
            continue
        read = (np.full(len(values), np.nan), column.unit)
        if not lacking.all():
            read = _numbers_in(table, values)
        if read is None or read[1] != column.unit:
            raise _not_a_number(table, column.name, values, column.unit)
        values = read[0]
        if column.fill is not None:
            values = np.where(lacking, column.fill, values)
        out[:, at] = values
        at += 1
    return out


def cell_of(column: Column, inputs: np.ndarray) -> str:
    """A cell of this column, recovered from its inputs `[1]` or `[categories]`, up to rounding."""
    if column.categories:
        return column.categories[int(inputs.argmax())] if inputs.max() > 0.5 else "another"
    return _amounts.written(float(inputs[0]), column.unit)


def unknown_categories(table: Table, columns: Sequence[Column]) -> list[str]:
    """Notices about categories that the training part does not have."""
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


def amounts_read(table: Table, columns: Sequence[Column]) -> list[str]:
    """Notices about text columns that are read as numbers."""
    notices = []
    for column in columns:
        cells = table.columns[column.name]
        if cells.dtype == object and not column.categories and not empty(cells).all():
            cell = next(cell for cell in cells if cell is not None and not is_number(cell))
            notices.append(
                f"column {column.name!r:.80}: {_amounts.told(cell, table.decimal_comma)}"
            )
    return notices


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


def _numbers_in(table: Table, column: np.ndarray) -> tuple[np.ndarray, str] | None:
    """A column as numbers, with NaN for missing ones, and their unit; None if it is text."""
    if column.dtype == np.float64:
        return column, ""
    if not all(isinstance(cell, (str, type(None))) for cell in column):
        return None
    return _amounts.amounts(column.tolist(), decimal_comma=table.decimal_comma)


def _not_a_number(
    table: Table, name: str, column: np.ndarray, unit: str | None = None
) -> ValueError:
    """The error naming the first cell that is not a number in this unit, or in the first cell's."""
    there = np.flatnonzero(~empty(column)).tolist()
    read = [_amounts.amount(str(column[i]), decimal_comma=table.decimal_comma) for i in there]
    if unit is None:
        unit = next((found.unit for found in read if found), "")
    found = zip(there, read, strict=True)
    wrong = ((i, x) for i, x in found if x is None or x.unit != unit)
    row, amount = next(wrong, (there[0], read[0]))
    cell, what = column.tolist()[row], "is not a number"
    repair = "Make it one input per category (--text-columns one-hot), or drop it (--drop-columns)."
    if not isinstance(cell, (str, float)):
        repair = "Drop it (--drop-columns)."
    elif amount is not None and amount.unit != unit:
        what = f"is {_amounts.kind(amount.unit)}, expected {_amounts.kind(unit)}"
        repair = "Write the whole column in one form, or drop it (--drop-columns)."
    elif amount is not None:
        what = "is text, not a number"
    elif DATE.fullmatch(str(cell)):
        what = "is a date in an ambiguous form"
        repair = "Write it as in 2024-01-31, or drop it (--drop-columns)."
    elif is_number(re.sub(r"[\s,'%$€£¥]", "", str(cell))):
        repair = "Write plain numbers, such as 1234.5, or drop it (--drop-columns)."
    return ValueError(
        f"{table.name}: {table.at(row)}, column {name!r:.80}: {cell!r:.80} {what}. {repair}"
    )


def _fill(values: np.ndarray, missing: Missing | None) -> float:
    if missing == "mean":
        return float(values.mean())
    if missing == "median":
        return float(np.median(values))
    found, counts = np.unique(values, return_counts=True)
    return float(found[counts.argmax()])


def _as_text(column: np.ndarray) -> np.ndarray:
    """A column as text, with whole numbers without a fraction."""
    if column.dtype == np.float64:
        column = np.array([int(x) if x.is_integer() else x for x in column.tolist()], object)
    return np.array([str(cell) for cell in column], object)
