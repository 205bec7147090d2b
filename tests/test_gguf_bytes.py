"""GGUF files of any bytes are read or refused in one line, at a small cost."""

import struct
from pathlib import Path

import pytest
from bounds import bounded, is_plain, lines_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import LLAMA, _source, _write

from kdtl_jax.interop import _gguf_header, gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return _write(folder / "whole.gguf", "LLAMA", LLAMA, _source(LLAMA)[1])


# What a header counts in, and what it may hold instead.
counts = st.sampled_from([0, 1, 9, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
puts = st.binary(max_size=6) | counts.map(lambda n: struct.pack("<Q", n))


@settings(max_examples=30)
@given(place=st.integers(0, 2700), put=puts, cut=st.sampled_from([0, 1, 4, 8, 500]))
def test_any_bytes(whole: Path, place: int, put: bytes, cut: int) -> None:
    path, content = whole.with_name("a.gguf"), whole.read_bytes()
    path.write_bytes(content[:place] + put + content[place + cut :])
    for read in (gguf.tokenizer, gguf.load):
        with bounded():
            try:
                read(path)
            except ValueError as error:
                assert is_plain(str(error), lines_of(str(error))), str(error)[:2000]


@pytest.mark.parametrize("place", [8, 16, "array"])
def test_counts_past_the_end_of_the_file(whole: Path, place: int | str) -> None:
    """Numbers of tensors, of entries, and of an array's entries that no file could hold."""
    content = whole.read_bytes()
    if isinstance(place, str):
        place = content.index(b"tokenizer.ggml.token_type") + 25 + 8
    path = whole.with_name("a.gguf")
    path.write_bytes(content[:place] + struct.pack("<Q", 2**60) + content[place + 8 :])
    with bounded(), pytest.raises(ValueError, match="cannot be read as GGUF"):
        gguf.load(path)


@pytest.mark.parametrize(
    ("tensors", "entries", "texts"), [(10**5 + 1, 0, 0), (0, 10**4 + 1, 0), (0, 1, 3)]
)
def test_counts_that_no_model_has(
    tmp_path: Path, tensors: int, entries: int, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They fit into the file, and would take the package minutes."""
    monkeypatch.setattr(_gguf_header, "_TEXTS", 2)
    array = struct.pack("<QIIQ", 0, 9, 8, texts) + bytes(8 * texts)
    content = b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + array
    (tmp_path / "a.gguf").write_bytes(content)
    with bounded(), pytest.raises(ValueError, match="announces|lists of 3 texts"):
        gguf.load(tmp_path / "a.gguf")
