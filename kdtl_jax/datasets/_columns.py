"""Encodes the columns of a table as inputs: numbers, or one number per category of text.

The training part determines the encoding of each column, a `Column`, which is stored so that other
parts and later data are encoded in the same way.
"""

import re
from collections.abc import Sequence

import numpy as np

from kdtl_jax.datasets import _amounts
from kdtl_jax.datasets._preprocessing import Column
from kdtl_jax.datasets._tables import (
    ColumnTable,
    Missing,
    check_model_columns,
    is_number,
    missing_mask,
)

MOST_CATEGORIES = 1000
# 31/01/2024, 31-Jan-2024, Jan 31, 2024: dates not in ISO 8601.
DATE = re.compile(
    r"\d{1,4}([./-])\d{1,2}\1\d{1,4}(\s.*)?|\d{1,2}[ .-]+[A-Za-z]{3,9}[ .,-]+\d{2,4}"
    r"|[A-Za-z]{3,9}\.? \d{1,2},? \d{4}"
)


def columns_of(
    table: ColumnTable, rows: np.ndarray, *, missing: Missing | None, one_hot: bool
) -> tuple[Column, ...]:
    """Decides how to encode each column, from the training rows.

    Args:
      table: the inputs.
      rows: the training rows.
      missing: how to fill missing values; None or "drop" fills none.
      one_hot: whether text becomes one input per category.

    Raises:
      ValueError: naming the row and column of text, or of a missing value without a fill.
    """
    missing = None if missing == "drop" else missing
    result = []
    for name, column in table.columns.items():
        part = column[rows]
        present = part[~missing_mask(part)]
        is_missing = missing_mask(column)
        if is_missing.any() and missing is None:
            row = int(np.flatnonzero(is_missing)[0])
            raise ValueError(
                f"{table.name}: {table.at(row)}, column {name!r:.80}: no value "
                f"({int(is_missing.sum())} of {len(column)} are missing). Fill them in (--missing "
                "mean, median, most_frequent) or leave such rows out (--missing drop)."
            )
        if not len(present):
            raise ValueError(
                f"{table.name}: column {name!r:.80} has no value in the training part. Drop it "
                "(--drop-columns)."
            )
        # Text whose cells are all plain numbers is text by its file's type, such as codes.
        if (parsed := _numbers_in(table, column)) is not None and (
            column.dtype == np.float64 or not all(map(is_number, column[~is_missing]))
        ):
            values, unit = parsed
            values = values[rows][~missing_mask(part)]
            result.append(Column(name, (), missing and _fill(values, missing), unit))
        else:
            result.append(_text_column(table, name, column, present, missing, one_hot))
    return tuple(result)


def encode(table: ColumnTable, columns: Sequence[Column]) -> np.ndarray:
    """Inputs `[N, D]`, float64: one number per column, or one per category.

    A category that the training part does not have is encoded as all zeros.

    Raises:
      ValueError: if a column is missing, has text instead of numbers, or has a missing value
        without a fill; row and column are named.
    """
    inputs = np.empty((table.size, sum(len(column.categories) or 1 for column in columns)))
    check_model_columns(table.name, [column.name for column in columns], list(table.columns))
    start = 0
    for column in columns:
        values, is_missing = table.columns[column.name], missing_mask(table.columns[column.name])
        if is_missing.any() and column.fill is None:
            row = int(np.flatnonzero(is_missing)[0])
            raise ValueError(
                f"{table.name}: {table.at(row)}, column {column.name!r:.80}: no value, and the "
                "training data had none missing."
            )
        # Filled last: a column with only missing values may be of either type.
        if column.categories:
            texts = _as_text(values)
            texts[is_missing] = column.fill
            end = start + len(column.categories)
            inputs[:, start:end] = texts[:, None] == np.array(column.categories, object)[None]
            start = end
            continue
        if not is_missing.all():
            parsed = _numbers_in(table, values)
            if parsed is None or parsed[1] != column.unit:
                raise _not_a_number(table, column.name, values, column.unit)
            inputs[:, start] = parsed[0]
        if column.fill is not None:
            inputs[is_missing, start] = column.fill
        start += 1
    return inputs


def cell_of(column: Column, inputs: np.ndarray) -> str:
    """Recovers a column's cell from its inputs `[1]` or `[categories]`, up to rounding."""
    if column.categories:
        return column.categories[int(inputs.argmax())] if inputs.max() > 0.5 else "another"
    return _amounts.format_amount(float(inputs[0]), column.unit)


def unknown_categories(table: ColumnTable, columns: Sequence[Column]) -> list[str]:
    """Notices about categories that the training part does not have."""
    notices = []
    for column in columns:
        values = table.columns[column.name]
        texts = _as_text(values[~missing_mask(values)]) if column.categories else ()
        if unknown := sorted({*texts} - {*column.categories}):
            notices.append(
                f"column {column.name!r:.80}: {unknown[0]!r:.80} does not occur in the training "
                f"part ({len(unknown)} such categories): all of its inputs are 0"
            )
    return notices


def amounts_read(table: ColumnTable, columns: Sequence[Column]) -> list[str]:
    """Notices about text columns that are read as numbers."""
    notices = []
    for column in columns:
        cells = table.columns[column.name]
        if cells.dtype == object and not column.categories and not missing_mask(cells).all():
            cell = next(cell for cell in cells if cell is not None and not is_number(cell))
            notices.append(
                f"column {column.name!r:.80}: {_amounts.reading_notice(cell, table.decimal_comma)}"
            )
    return notices


def _text_column(
    table: ColumnTable,
    name: str,
    column: np.ndarray,
    present: np.ndarray,
    missing: Missing | None,
    one_hot: bool,
) -> Column:
    if not one_hot:
        raise _not_a_number(table, name, column)
    texts = _as_text(present)
    categories, counts = np.unique(texts.astype(str), return_counts=True)
    if len(categories) > MOST_CATEGORIES or (len(texts) >= 20 and 2 * len(categories) > len(texts)):
        raise ValueError(
            f"{table.name}: column {name!r:.80} has {len(categories)} different texts in "
            f"{len(texts)} rows, too many for one input each: a name or an id? Drop it "
            "(--drop-columns)."
        )
    fill = missing and str(categories[counts.argmax()])  # text has no mean
    return Column(name, tuple(map(str, categories)), fill)


def _numbers_in(table: ColumnTable, column: np.ndarray) -> tuple[np.ndarray, str] | None:
    """A column as numbers, with NaN for missing ones, and their unit; None if it is text."""
    if column.dtype == np.float64:
        return column, ""
    if not all(isinstance(cell, (str, type(None))) for cell in column):
        return None
    return _amounts.amounts(column.tolist(), decimal_comma=table.decimal_comma)


def _not_a_number(
    table: ColumnTable, name: str, column: np.ndarray, unit: str | None = None
) -> ValueError:
    """The error for the first cell that is not a number in `unit` (default: the first cell's)."""
    rows = np.flatnonzero(~missing_mask(column)).tolist()
    amounts = [_amounts.amount(str(column[i]), decimal_comma=table.decimal_comma) for i in rows]
    if unit is None:
        unit = next((amount.unit for amount in amounts if amount), "")
    pairs = zip(rows, amounts, strict=True)
    mismatches = ((i, amount) for i, amount in pairs if amount is None or amount.unit != unit)
    row, amount = next(mismatches, (rows[0], amounts[0]))
    cell, problem = column.tolist()[row], "is not a number"
    repair = "Make it one input per category (--text-columns one-hot), or drop it (--drop-columns)."
    if not isinstance(cell, (str, float)):
        repair = "Drop it (--drop-columns)."
    elif amount is not None and amount.unit != unit:
        problem = f"is {_amounts.cell_type(amount.unit)}, expected {_amounts.cell_type(unit)}"
        repair = "Write the whole column in one form, or drop it (--drop-columns)."
    elif amount is not None:
        problem = "is text, not a number"
    elif DATE.fullmatch(str(cell)):
        problem = "is a date in an ambiguous form"
        repair = "Write it as in 2024-01-31, or drop it (--drop-columns)."
    elif is_number(re.sub(r"[\s,'%$€£¥]", "", str(cell))):
        repair = "Write plain numbers, such as 1234.5, or drop it (--drop-columns)."
    return ValueError(
        f"{table.name}: {table.at(row)}, column {name!r:.80}: {cell!r:.80} {problem}. {repair}"
    )


def _fill(values: np.ndarray, missing: Missing) -> float:
    if missing == "mean":
        return float(values.mean())
    if missing == "median":
        return float(np.median(values))
    distinct, counts = np.unique(values, return_counts=True)
    return float(distinct[counts.argmax()])


def _as_text(column: np.ndarray) -> np.ndarray:
    """A column as text; whole numbers have no fraction."""
    if column.dtype == np.float64:
        column = np.array([int(x) if x.is_integer() else x for x in column.tolist()], object)
    return np.array([str(cell) for cell in column], object)
