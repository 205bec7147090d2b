"""Text whose rows or lines are longer than any in a table: refused by name, early, in few bytes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bounds import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax import datasets, language, trees
from kdtl_jax.datasets import _csv
from kdtl_jax.language import _records
from kdtl_jax.recipes import sentences

MANY = 10_000_000  # characters


def rows(mark: str, count: int = 2) -> str:
    return f"a{mark}label\n" + f"1{mark}0\n2{mark}1\n" * (count // 2)


TABLES: dict[str, Callable[[str], str]] = {
    "a name": lambda mark: "a" * MANY,
    "names": lambda mark: f"a{mark}" * (MANY // 2),
    "cells": lambda mark: rows(mark) + f"1{mark}" * (MANY // 2),
    "cells that hold lines": lambda mark: rows(mark) + f'"1\n"{mark}' * (MANY // 5),
    "an open quotation": lambda mark: rows(mark) + f'1{mark}"0\n' + f"3{mark}4\n" * (MANY // 4),
    "no line end": lambda mark: rows(mark) + "x" * MANY,
    "nothing": lambda mark: " " * MANY,
}


@pytest.mark.parametrize(
    ("name", "end", "mark"),
    [*((name, "csv", ",") for name in TABLES), ("names", "csv", ";"), ("cells", "tsv", "\t")],
)
def test_rows_of_tables(
    tmp_path: Path, name: str, end: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_csv, "MAX_ROW_LENGTH", 2**18)  # sixteen times less, in as much less time
    path = tmp_path / f"a.{end}"
    path.write_text(TABLES[name](mark))
    message = "a row has more than 262,144 characters|field larger than field limit"
    with bounded(0.5, megabytes=12), pytest.raises(ValueError, match=message) as raised:
        datasets.read(path)
    assert str(raised.value).startswith(str(path)) and len(str(raised.value)) < 400


@pytest.mark.parametrize("mark", [",", ";"])
def test_wide_tables_are_no_long_rows(tmp_path: Path, mark: str) -> None:
    """A header of more characters than a field may have, and rows of any number."""
    names = [f"the gene of number {i:06}" for i in range(6_000)]
    x = np.arange(12_000).reshape(2, -1) % 7
    lines = [[*names, "label"], *([*map(str, row), str(i % 2)] for i, row in enumerate(x))]
    path = tmp_path / "wide.csv"
    path.write_text("\n".join(map(mark.join, lines)))
    with bounded(2.0):  # linear in the columns
        np.testing.assert_array_equal(datasets.read(path).inputs, x)
    path.write_text(f"a{mark}b{mark}label\n" + f'"one\ntwo"{mark}1{mark}x\n3{mark}1{mark}y\n' * 4)
    assert datasets.read(path, drop=["a"]).inputs.shape == (8, 1)


@pytest.mark.parametrize("text", ["text", "messages"])
def test_lines_of_json(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "MAX_BYTES", 2**20)
    path, value = tmp_path / "a.jsonl", '"' + "x" * MANY + '"'
    if text == "messages":
        value = "[" + '{"role":"user","content":"x"},' * (MANY // 30) + "{}]"
    path.write_text('{"text": "a"}\n{"' + text + '": ' + value + "}\n")
    with bounded(1.0, megabytes=12), pytest.raises(ValueError, match="line 2 has more than 1,048,"):
        list(language.records(path))


def test_lines_of_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one sentence\x0cand another \n\r\nshort\nthis is the last one", newline="")
    assert sentences.read_lines(path, at_least=10) == [
        "one sentence",
        "and another",
        "this is the last one",
    ]
    path.write_text("a sentence of some words\n" + "x " * (MANY // 2))
    with bounded(1.0, megabytes=30), pytest.raises(ValueError, match="more than 1,048,576 char"):
        sentences.read_lines(path)


@given(st.text(st.sampled_from(',;\t|"\n\r 1a\0é'), max_size=200), st.booleans())
@settings(max_examples=25)
def test_any_text_is_a_table_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, text: str, headed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes((f"a,label\n1,x\n2,y\n{text}" if headed else text).encode())
    with bounded(1.0, megabytes=30):
        try:
            datasets.read(path, one_hot=True)
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1000


def test_the_nearest_of_many_long_names_is_told_at_once() -> None:
    with bounded(1.0, megabytes=30):
        assert trees.nearest("label", ["x" * 100_000, "labels", *["a" * 150] * 100_000])[0] == (
            "labels"
        )
        trees.nearest("x" * 10**6, ["y" * 200] * 10**5)
