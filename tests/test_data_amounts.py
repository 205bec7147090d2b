"""Columns whose text stands for numbers: amounts with their marks, and dates."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_files import NAMES, N, Y, columns, table

from kdtl_jax import datasets
from kdtl_jax.datasets import _amounts

TEXT = [NAMES[y] for y in Y]
ROWS = range(1, N + 1)


@pytest.mark.parametrize(
    ("cell", "decimal_comma", "found"),
    [
        ("1,234.5", False, (1234.5, "")),
        ("1,234,567", False, (1234567, "")),
        ("1'234.5", False, (1234.5, "")),
        ("1\u202f234", False, (1234, "")),
        (" 12.5 % ", False, (12.5, "%")),
        ("-$1,234", False, (-1234, "$")),
        ("$-3", False, (-3, "$")),
        ("€ .5", False, (0.5, "€")),
        ("2e3 €", False, (2000, "€")),
        ("12,5%", True, (12.5, "%")),
        ("1 234,5 €", True, (1234.5, "€")),
        ("-0,125", True, (-0.125, "")),
        ("7", False, (7, "")),
        ("1970-01-02", False, (1, _amounts.DAYS)),
        ("1969-12-31 12:00:00", False, (-0.5, _amounts.DAYS)),
        ("1970-01-01T06:00:00+06:00", False, (0, _amounts.DAYS)),
        ("0,125%", False, None),
        ("1,23", False, None),
        ("1.234,5", False, None),
        ("1.234,5", True, None),
        ("1,234'567", False, None),
        ("$5%", False, None),
        ("$", False, None),
        ("$.", False, None),
        ("--5%", False, None),
        ("2024-02-30", False, None),
        ("31/01/2024", False, None),
        ("192.168.0.1", False, None),
        ("", False, None),
    ],
)
def test_cells(cell: str, decimal_comma: bool, found: Any) -> None:
    assert _amounts.amount(cell, decimal_comma=decimal_comma) == found


def test_columns_of_amounts_and_dates(tmp_path: Path) -> None:
    """The values, what is told of them, and the same in other data read by the model's form."""
    days = [f"2024-03-{1 + i % 28:02d}" for i in ROWS]
    cells = {
        "price": [f'"${1000 * i:,}.50"' for i in ROWS],
        "share": [f"{i}%" if i != 3 else "" for i in ROWS],
        "people": [f'"{500 * i:,}"' for i in ROWS],
        "day": days,
        "label": TEXT,
    }
    actual = datasets.read_splits(str(table(tmp_path / "a.csv", cells)), missing="median")
    mean = float(np.median(actual.train.inputs[:, 1]))
    first = {price: row for part in actual for price, *row in part.inputs.tolist()}
    march = (np.datetime64("2024-03-01") - np.datetime64("1970-01-01")).astype(int)
    assert {*first} == {1000 * i + 0.5 for i in ROWS}
    for i in ROWS:
        share = i if i != 3 else pytest.approx(mean, abs=0.5)
        assert first[1000 * i + 0.5] == [share, 500 * i, march + i % 28]
    assert "column 'price': '$1,000.50' is read as 1000.5, and others like it" in (
        actual.train.notices
    )
    form = datasets.preprocessing_from_json(
        datasets.preprocessing_to_json(datasets.prepared(actual)[1])
    )
    assert [column.unit for column in form.columns] == ["$", "%", "", _amounts.DAYS]
    new = {"price": ["$7"], "share": ["0.5%"], "people": [999], "day": ["1970-01-31"]}
    assert datasets.read_inputs(table(tmp_path / "b.csv", new), form).tolist() == [
        [7, 0.5, 999, 30]
    ]
    stored = {**new, "day": np.array(["1970-01-31"], "datetime64[s]"), "people": ["1,999"]}
    pq.write_table(pa.table(stored), tmp_path / "b.parquet")
    again = datasets.read_inputs(tmp_path / "b.parquet", form)
    assert again.tolist() == [[7, 0.5, 1999, 30]]
    for name, cell, says in (
        ("price", "€7", "'€7' is a number with '€', expected a number with '\\$'"),
        ("share", 0.5, "0.5 is a plain number, expected a number with '%'"),
        ("people", "5%", "'5%' is a number with '%', expected a plain number"),
        ("day", 3, "3.0 is a plain number, expected a date"),
        ("day", "low", "'low' is not a number"),
    ):
        with pytest.raises(ValueError, match=f"row 2, column '{name}': {says}"):
            datasets.read_inputs(table(tmp_path / "c.csv", {**new, name: [cell]}), form)


def test_a_column_in_two_units_is_refused(tmp_path: Path) -> None:
    mixed = ["5%", "5", *["7%"] * (N - 2)]
    file = table(tmp_path / "a.csv", columns(d=mixed, label=TEXT))
    with pytest.raises(ValueError, match="row 3, column 'd': '5' is a plain number, expected"):
        datasets.read_splits(str(file))


@pytest.mark.parametrize(
    ("cells", "target", "values"),
    [
        ([f'"${i},250.50"' for i in ROWS], "auto", [1000 * i + 250.5 for i in ROWS]),
        ([f'"{i},250"' for i in ROWS], "numbers", [1000 * i + 250 for i in ROWS]),
        ([f"{i / 4}%" for i in ROWS], "auto", [i / 4 for i in ROWS]),
    ],
)
def test_amounts_as_targets(
    tmp_path: Path, cells: list[str], target: Any, values: list[float]
) -> None:
    file = table(tmp_path / "a.csv", columns(label=cells))
    actual = datasets.read(file, target=target)
    assert actual.kind == "numbers" and actual.labels[:, 0].tolist() == values
    assert any(note.startswith("targets: ") and " is read as " in note for note in actual.notices)
    several = datasets.read(table(tmp_path / "b.csv", columns(u=cells, v=ROWS)), label="u,v",
                            target="numbers")  # fmt: skip
    assert several.labels[:, 0].tolist() == values


def test_targets_with_a_decimal_comma(tmp_path: Path) -> None:
    lines = [f"{i % 7};{i},25" for i in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(["size;label", *lines]))
    actual = datasets.read(tmp_path / "a.csv")
    assert actual.kind == "numbers" and actual.labels[:, 0].tolist() == [i + 0.25 for i in ROWS]


def test_marked_classes_stay_classes(tmp_path: Path) -> None:
    actual = datasets.read(table(tmp_path / "a.csv", columns(label=[f"{5 * y}%" for y in Y])))
    assert actual.names == ("0%", "10%", "5%")
    with pytest.raises(ValueError, match="targets must be numbers, got '2024-01-0"):
        datasets.read(
            table(tmp_path / "b.csv", columns(label=[f"2024-01-0{1 + y}" for y in Y])),
            target="numbers",
        )


def test_amounts_of_nothing() -> None:
    assert _amounts.amounts([None, None]) is None
    values, unit = _amounts.amounts(["5%", None]) or ([], "")
    assert unit == "%" and values[0] == 5 and math.isnan(values[1])
