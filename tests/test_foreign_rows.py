"""Rows, caches and records in folders, lines of sentences: whole, or one clear error in bounds."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import values
from hypothesis import example, given, settings
from hypothesis import strategies as st
from teacher_caches import LIVE, ROWS, expected, write
from test_foreign_files import edited, edits, read_or_refused

from kdtl_jax import _files, language
from kdtl_jax.recipes import sentences
from kdtl_jax.run import record
from kdtl_jax.run import teacher_cache as tc


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    rows = language.concatenated([language.document(np.arange(60))], 8)
    language.write_rows(folder, rows, made_from={"text": "v1"})
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write(folder)
    return folder


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a JSON value."""
    if at:
        yield at
    inner: Iterable[Any] = enumerate(value) if isinstance(value, list) else ()
    for key, each in value.items() if isinstance(value, dict) else inner:
        yield from places(each, (*at, key))


def put(path: Path, number: int, new: Any, name: str | None) -> None:
    """Puts a value, or a name, somewhere into a sealed record, and seals it again."""
    result = json.loads(path.read_bytes())
    del result["digest"]
    *before, last = sorted(places(result), key=repr)[number % len([*places(result)])]
    inside = result
    for key in before:
        inside = inside[key]
    if name is None or isinstance(inside, list):
        inside[last] = new
    else:
        inside[name] = inside.pop(last)
    _files.write_sealed(path, json.loads(json.dumps(result)))


HOSTILE_NAMES = st.none() | st.sampled_from(
    ["../../x", "a/b/c", "tokens/x", "\x1b[2J", "", "x" * 9999]
)
DTYPES = st.sampled_from(["|O", "O8", "<f8", "|V0", "S1000000000", "i4,i4", "M8[s]", "zz"])
PLACE = st.integers(0, 300)


@settings(max_examples=25)
@given(number=PLACE, new=values | DTYPES, name=HOSTILE_NAMES, edit=st.none() | edits)
def test_any_rows_of_tokens(
    tokens: Path, number: int, new: Any, name: str | None, edit: Any
) -> None:
    paths = sorted(path for path in tokens.iterdir() if path.name[0] != ".")
    path = tokens / "rows.json" if edit is None else paths[number % len(paths)]
    whole = path.read_bytes()
    if edit is None:
        put(path, number, new, name)
    else:
        path.write_bytes(edited(whole, edit))
    try:
        with read_or_refused():
            arrays = language.open_rows(tokens)
            assert isinstance(np.asarray(arrays["tokens"]).sum().item(), int)
    finally:
        path.write_bytes(whole)


@settings(max_examples=25)
@example(file="manifest.json", number=1, new="a\nb\x1b[2J", name=None)  # a shard's bytes
@given(file=st.sampled_from(["plan.json", "manifest.json", "00001.json"]), number=PLACE,
       new=values | DTYPES, name=HOSTILE_NAMES)  # fmt: skip
def test_any_sealed_cache(cache: Path, file: str, number: int, new: Any, name: str | None) -> None:
    whole = (cache / file).read_bytes()
    put(cache / file, number, new, name)
    try:
        with read_or_refused():
            actual = tc.open_cache(cache, expect=expected())
            np.testing.assert_allclose(
                tc.rows(actual, ROWS)["logits"], LIVE["logits"][ROWS], atol=1e-5
            )
    finally:
        (cache / file).write_bytes(whole)


@settings(max_examples=25)
@given(number=PLACE, new=values, name=HOSTILE_NAMES, edit=st.none() | edits)
def test_any_record_of_what_a_run_read(
    tmp_path_factory: pytest.TempPathFactory, number: int, new: Any, name: str | None, edit: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "record"
    folder.mkdir(exist_ok=True)
    made = record.made_from({"data": __file__, "teacher": "named"})
    record.keep(folder, made)
    path = folder / record.FILE
    if edit is None:
        put(path, number, new, name)
    else:
        path.write_bytes(edited(path.read_bytes(), edit))
    with read_or_refused():
        notices = record.compare(folder, made)
        assert all(len(notice) < 1000 for notice in notices)


@settings(max_examples=25)
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), edit=edits)
def test_any_text_of_sentences(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, edit: tuple[int, bytes, int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "sentences.txt"
    whole = b"one sentence of words\r\nanother \x0c sentence\x85\n" * 3
    path.write_bytes(edited(whole + text, edit))
    with read_or_refused():
        actual = sentences.read_lines(path)
        assert len({*actual}) == len(actual) and all(len(line) >= 15 for line in actual)
        assert not any("\n" in line or "\r" in line for line in actual)
