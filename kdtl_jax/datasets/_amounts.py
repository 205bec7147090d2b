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
CURRENCIES = "$€£¥₹"
# One separator for all thousands, and a decimal point.
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?P<prefix>[{CURRENCIES}]?) ?(?P<inner_sign>-?)"
    r"(?P<integer>[1-9]\d{0,2}(?P<separator>[,' \u00a0\u202f])\d{3}(?:(?P=separator)\d{3})*|\d+)?"
    rf"(?P<fraction>(?:\.\d*)?(?:[eE][+-]?\d+)?)[ \u00a0\u202f]?(?P<suffix>[%{CURRENCIES}]?)"
)
ISO = re.compile(r"\d{4}-\d\d-\d\d(?:[T ].*)?")


class Amount(NamedTuple):
    """A number and its unit, "" if the cell has none."""

    value: float
    unit: str


def amount(cell: str, *, decimal_comma: bool = False) -> Amount | None:
    """Parses a cell; None if it is neither an amount nor a date."""
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
        match = NUMBER.fullmatch(cell)
    if match is None or (match["prefix"] and match["suffix"]):
        return None
    digits = re.sub(r"\D", "", match["integer"] or "")
    try:
        value = float(f"{match['sign']}{match['inner_sign']}{digits}{match['fraction']}")
    except ValueError:
        return None
    return Amount(value, match["prefix"] or match["suffix"])


def amounts(
    cells: Iterable[str | None], *, decimal_comma: bool = False
) -> tuple[np.ndarray, str] | None:
    """Numbers `[N]` with NaN for None, and their unit; None unless all cells have one unit."""
    cells = list(cells)
    parsed = {x: amount(x, decimal_comma=decimal_comma) for x in {*cells} if x is not None}
    units = {result and result.unit for result in parsed.values()}
    if len(units) != 1 or None in units:
        return None
    values = {cell: result.value for cell, result in parsed.items() if result is not None}
    numbers = [np.nan if cell is None else values[cell] for cell in cells]
    return np.array(numbers), units.pop() or ""


def cell_type(unit: str) -> str:
    """Describes cells of this unit."""
    if unit == DAYS:
        return "a date"
    return f"a number with {unit!r}" if unit else "a plain number"


def format_amount(value: float, unit: str) -> str:
    """Formats an amount briefly: `12.5%`, `$3`, the day of a date."""
    if unit == DAYS:
        return str(np.datetime64(int(np.floor(value + 0.01)), "D"))
    number = f"{value:.5g}"
    return number + unit if unit == "%" else unit + number


def reading_notice(cell: str, decimal_comma: bool) -> str:
    """The notice that tells how a text cell is read as a number."""
    parsed = amount(cell, decimal_comma=decimal_comma)
    assert parsed is not None
    unit = f" {DAYS}" if parsed.unit == DAYS else ""
    return f"{cell!r:.40} is read as {parsed.value:.10g}{unit}, and others like it"


def _days(cell: str) -> Amount | None:
    try:
        date = datetime.datetime.fromisoformat(cell)
    except ValueError:
        return None
    date = date.replace(tzinfo=date.tzinfo or datetime.UTC)
    return Amount((date - EPOCH) / datetime.timedelta(days=1), DAYS)
