"""Text cells that represent numbers: amounts with their symbols, and dates.

`1,234.5` is 1234.5, `12.5%` is 12.5, and `$3` is 3. An ISO 8601 date such as `2024-01-31` is the
number of days since 1970-01-01, in UTC unless it has a zone. `1.234,5` and `31/01/2024` are not
read, because conventions differ.
"""

import datetime
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

DAYS = "days since 1970-01-01"
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
SIGNS = "$€£¥₹"
# One separator for all thousands, and a decimal point.
NUMBER = re.compile(
    rf"(?P<minus>[+-]?)(?P<before>[{SIGNS}]?) ?(?P<late_minus>-?)"
    r"(?P<whole>[1-9]\d{0,2}(?P<mark>[,' \u00a0\u202f])\d{3}(?:(?P=mark)\d{3})*|\d+)?"
    rf"(?P<rest>(?:\.\d*)?(?:[eE][+-]?\d+)?)[ \u00a0\u202f]?(?P<after>[%{SIGNS}]?)"
)
ISO = re.compile(r"\d{4}-\d\d-\d\d(?:[T ].*)?")


class Amount(NamedTuple):
    """A number and its unit, "" if the cell has none."""

    value: float
    unit: str


def amount(cell: str, *, decimal_comma: bool = False) -> Amount | None:
    """What a cell represents; None if it is neither an amount nor a date."""
    cell = cell.strip()
    if ISO.fullmatch(cell):
        return _days(cell)
    if decimal_comma and "," in cell:
        if "." in cell:
            return None
        cell = cell.replace(",", ".")
    try:
        return Amount(float(cell), "")
    except ValueError:
        found = NUMBER.fullmatch(cell)
    if found is None or (found["before"] and found["after"]):
        return None
    digits = re.sub(r"\D", "", found["whole"] or "")
    try:
        value = float(f"{found['minus']}{found['late_minus']}{digits}{found['rest']}")
    except ValueError:
        return None
    return Amount(value, found["before"] or found["after"])


def amounts(
    cells: Iterable[str | None], *, decimal_comma: bool = False
) -> tuple[np.ndarray, str] | None:
    """Numbers `[N]` with NaN for None, and their unit; None unless all cells have one unit."""
    cells = list(cells)
    known = {x: amount(x, decimal_comma=decimal_comma) for x in {*cells} if x is not None}
    units = {found and found.unit for found in known.values()}
    if len(units) != 1 or None in units:
        return None
    values = {cell: found.value for cell, found in known.items() if found is not None}
    numbers = [np.nan if cell is None else values[cell] for cell in cells]
    return np.array(numbers), units.pop() or ""


def kind(unit: str) -> str:
    """A cell of this unit, in words."""
    if unit == DAYS:
        return "a date"
    return f"a number with {unit!r}" if unit else "a plain number"


def written(value: float, unit: str) -> str:
    """The amount in a short form: `12.5%`, `$3`, the day of a date."""
    if unit == DAYS:
        return str(np.datetime64(int(np.floor(value + 0.01)), "D"))
    number = f"{value:.5g}"
    return number + unit if unit == "%" else unit + number


def told(cell: str, decimal_comma: bool) -> str:
    """How this cell and others like it are read."""
    found = amount(cell, decimal_comma=decimal_comma)
    assert found is not None
    unit = f" {DAYS}" if found.unit == DAYS else ""
    return f"{cell!r:.40} is read as {found.value:.10g}{unit}, and others like it"


def _days(cell: str) -> Amount | None:
    try:
        when = datetime.datetime.fromisoformat(cell)
    except ValueError:
        return None
    when = when.replace(tzinfo=when.tzinfo or datetime.UTC)
    return Amount((when - EPOCH) / datetime.timedelta(days=1), DAYS)
