"""Arrow and parquet files that unpack to thousands of times their size are refused by headers."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounds import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax import _columnar, _pages, datasets, language
from kdtl_jax.language import _records

SIZE = 32_000_000  # bytes of which hardly any are in the file
LONG = "x" * 100_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused at 256 MB is refused at 4 MB."""
    monkeypatch.setattr(_columnar, "LARGE_BYTES", 2**22)
    monkeypatch.setattr(_columnar, "MAX_COMPRESSION_RATIO", 10)
    monkeypatch.setattr(_columnar, "MAX_SHARED_BYTES", 2**22)
    monkeypatch.setattr(_records, "MAX_BYTES", 2**22)


@contextlib.contextmanager
def refused(match: str) -> Iterator[None]:
    with bounded(1.0, megabytes=25), pytest.raises(ValueError, match=match) as raised:
        yield
    assert len(str(raised.value)) < 500


def ipc(path: Path, table: pa.Table, kind: str, codec: str | None) -> Path:
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_arrow_buffers_are_counted_before_they_are_unpacked(
    tmp_path: Path, kind: str, codec: str
) -> None:
    zeros = np.zeros(SIZE // 8)
    table = pa.table({"a": zeros, "label": np.zeros(len(zeros), np.int8)})
    path = ipc(tmp_path / "a.arrow", table, kind, codec)
    del table, zeros
    with refused(r"[\d,]+ bytes, unpacked, in [\d,]+ bytes"):
        datasets.read(path)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_dictionaries_are_buffers_too(tmp_path: Path, kind: str) -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["x" * SIZE, "y"])
    path = ipc(tmp_path / "a.arrow", pa.table({"a": [1.0, 2.0], "label": names}), kind, "zstd")
    del names
    with refused("bytes, unpacked, in"):
        datasets.read(path)


def test_rows_of_nothing_are_counted(tmp_path: Path) -> None:
    table = pa.table({"a": pa.nulls(10**7), "label": pa.nulls(10**7)})
    with refused("10,000,000 rows of 2 columns"):
        datasets.read(ipc(tmp_path / "a.arrow", table, "file", None))


def views() -> dict[str, Any]:
    """Columns whose few bytes are many when every cell is written out."""
    places = np.zeros(2000, np.int32)
    shared = pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), [LONG])
    sizes = pa.array(places + len(LONG), pa.int32())
    numbers = pa.array(np.zeros(len(LONG), np.int8))
    return {
        "dictionary": shared,
        "lists of a dictionary": pa.ListArray.from_arrays(np.arange(2001, dtype=np.int32), shared),
        "list views": pa.ListViewArray.from_arrays(pa.array(places), sizes, numbers),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([2000], pa.int32()), [LONG]),
        "numbers of a dictionary": pa.DictionaryArray.from_arrays(
            pa.array(places, pa.int32()), pa.array([[0.0] * 12_500])
        ),
    }


@pytest.mark.parametrize("name", views())
def test_cells_that_share_their_bytes_are_counted(tmp_path: Path, name: str) -> None:
    table = pa.table({"a": views()[name], "label": np.arange(2000) % 2})
    with refused("bytes, unpacked, in|not a readable"):
        datasets.read(ipc(tmp_path / "a.arrow", table, "file", "zstd"))


LABEL = np.arange(300) % 2
CASES = ("texts", "messages", "lists", "pictures", "pages", "beginnings")


def parquet(path: Path, name: str) -> Path:
    """Texts that are stored once, or page by page as hardly anything; all are many megabytes."""
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
    make: dict[str, Callable[[], Any]] = {
        "texts": lambda: [LONG] * 300,
        "messages": lambda: [turns] * 300,
        "lists": lambda: [[LONG]] * 300,
        "pictures": lambda: [{"bytes": b"\x89PNG" + LONG.encode()}] * 300,
        "pages": lambda: ["x" * SIZE] + [""] * 299,
        "beginnings": lambda: [LONG + str(i) for i in range(300)],
    }
    options: dict[str, Any] = {"use_dictionary": name not in ("pages", "beginnings")}
    if name == "beginnings":
        options["column_encoding"] = {"text": "DELTA_BYTE_ARRAY"}
    table = pa.table({"messages" if name == "messages" else "text": make[name](), "label": LABEL})
    pq.write_table(table, path, compression="zstd", **options)
    return path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", [True, False])
def test_texts_that_parquet_stores_once_are_counted(
    tmp_path: Path, name: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:  # as if the distinct texts were more than a dictionary holds
        monkeypatch.setattr(_columnar, "MAX_DICTIONARY_BYTES", 0)
    path = parquet(tmp_path / "a.parquet", name)
    with refused("in [0-9,]+ bytes|not a readable"):
        datasets.read(path)


def test_columns_can_be_dropped_from_texts_that_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_columnar, "MAX_SHARED_BYTES", 2**8)  # so that rows come in batches
    texts = [f"word {i % 7} and more" for i in range(300)]
    table = pa.table({"text": texts, "id": np.arange(300), "label": LABEL})
    encoding = {"text": "DELTA_BYTE_ARRAY", "id": "PLAIN", "label": "PLAIN"}
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, column_encoding=encoding)
    data = datasets.read(tmp_path / "a.parquet", drop=["id"], one_hot=True)
    np.testing.assert_array_equal(data.inputs.argmax(axis=1), np.arange(300) % 7)


@pytest.mark.parametrize("name", ["texts", "messages", "pages", "beginnings"])
def test_records_of_text_come_row_by_row_where_they_share(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path / "a.parquet", name)
    if name == "pages":
        with refused("bytes, unpacked, in"):
            list(language.records(path))
        return
    with bounded(2.0, megabytes=25):
        assert sum(1 for _ in language.records(path)) == 300


@pytest.mark.parametrize("how", ["dictionary", "beginnings"])
def test_a_list_of_one_row_is_counted_before_it_is_decoded(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, options = [LONG] * 1000, dict[str, Any]()
    if how == "beginnings":
        many = [LONG + str(i) for i in range(1000)]
        encoding = {"text.list.element": "DELTA_BYTE_ARRAY"}
        options = {"use_dictionary": False, "column_encoding": encoding}
    else:  # as if the distinct texts were more than a dictionary holds
        monkeypatch.setattr(_columnar, "MAX_DICTIONARY_BYTES", 0)
    table = pa.table({"text": [many, *[["a"]] * 299], "label": LABEL})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", **options)
    del table, many
    for read in (datasets.read, lambda path: list(language.records(path))):
        with refused(
            r"lists of texts that share their bytes, 1\d\d,\d{3},\d{3} written out, in [\d,]+ b"
        ):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_that_share_are_counted_by_their_pages(
    tmp_path: Path, codec: str, version: str
) -> None:
    texts = [["x" * 5, "y" * 700]] * 20 + [[str(i) * 9] for i in range(1000, 4000)] + [[], None]
    path, ways = tmp_path / "a.parquet", {"a.list.element": "DELTA_BYTE_ARRAY"}
    common: dict[str, Any] = {"compression": codec, "data_page_version": version}
    small: dict[str, Any] = {"dictionary_pagesize_limit": 2000, "write_batch_size": 100}
    actual = []
    for options in (small, {"use_dictionary": False, "column_encoding": ways}):
        pq.write_table(pa.table({"a": texts}), path, data_page_size=1000, **common, **options)
        [column] = _columnar.chunks(pq.ParquetFile(path).metadata, ["a"])
        with path.open("rb") as file:
            actual.append(_pages.shared_texts(pa, file, column, in_lists=True))
            stored = sum(page.unpacked for page in _pages.pages(file, column))
            assert sum(page.values for page in _pages.pages(file, column)) == 3042
    # What did not fit the dictionary is stored as it is, and shares nothing.
    assert actual[0].longest == 700 and 40 * 700 < actual[0].total < 1000 * 700
    # Every page begins anew.
    assert actual[1].total - stored == pytest.approx(sum(_shared_by(texts)), rel=0.02)
    assert actual[1].longest == stored


def test_a_dictionary_that_cannot_be_unpacked_alone_counts_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [["x" * 5, "y" * 700]] * 20}), tmp_path / "a.parquet")
    [column] = _columnar.chunks(pq.ParquetFile(tmp_path / "a.parquet").metadata, ["a"])

    def decompress(*args: Any, **options: Any) -> bytes:
        raise OSError("Corrupt Lz4 compressed data")

    old = SimpleNamespace(decompress=decompress, ArrowException=pa.ArrowException)
    with (tmp_path / "a.parquet").open("rb") as file:
        whole = 4 + 5 + 4 + 700
        assert _pages.shared_texts(old, file, column, in_lists=True) == (whole, 40 * whole)


def test_lengths_that_take_no_space_take_no_time() -> None:
    head = (
        b"\x80\x80\x04\x01\xff\xff\xff\xff\x07\x0a"  # blocks of 2**16, 2**31 - 1 values from 5 on
    )
    with bounded(0.5):
        assert _pages._sum_lengths(head + b"\0\0" * 2**15, 0, 2**31) == 5 * (2**31 - 1)
    with pytest.raises(ValueError, match="lengths of a page are damaged"):
        _pages._sum_lengths(head + b"\1\0", 0, 2**31)  # each is 1 less than the one before
    with pytest.raises(IndexError):  # which its caller names, as above
        _pages._sum_lengths(head + b"\0\0", 0, 2**31)


def _shared_by(texts: list[list[str] | None]) -> Iterator[int]:
    """How much each text begins like the one before."""
    flat = [text for row in texts for text in row or ()]
    for before, text in itertools.pairwise(flat):
        yield len(os.path.commonprefix([before, text]))


def test_a_record_that_is_too_long_is_refused(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": LONG}] * 100] * 3
    pq.write_table(pa.table({"messages": turns}), tmp_path / "a.parquet")
    with refused(r"row 1: it has 10,\d+,\d+ bytes, at most 4,194,304 are read"):
        list(language.records(tmp_path / "a.parquet"))


def test_what_is_counted_is_what_is_unpacked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = pa.array(rng.choice(["red", "green"], 5000)).dictionary_encode()
    table = pa.table({"a": rng.normal(size=5000), "b": names, "label": rng.integers(0, 2, 5000)})
    for kind in ("stream", "file"):
        for codec in (None, "zstd", "lz4"):
            path = ipc(tmp_path / "a.arrow", table, kind, codec)
            assert _columnar.arrow_bytes(path, pa) == pytest.approx(table.nbytes, rel=0.01)
    for version in ("1.0", "2.0"):
        path = tmp_path / "a.parquet"
        pq.write_table(table, path, data_page_version=version, data_page_size=1000)
        about = pq.ParquetFile(path).metadata
        stored = list(_columnar.chunks(about, table.column_names))
        total = sum(column.total_uncompressed_size for column in stored)
        assert 0.8 * total < _columnar.parquet_bytes(path, stored) <= total
    read = datasets.read(path, one_hot=True)
    assert read.inputs.shape == (5000, 3)


@given(st.data())
@settings(max_examples=25)
def test_damaged_messages_and_pages_are_counted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "packed.bin"
    table = pa.table({"a": [1.0, 2.0], "b": [["x"], ["xy", "xyz"]]})
    kind = data.draw(st.sampled_from(("stream", "file", "dictionary", "beginnings")))
    options: dict[str, Any] = {}
    is_parquet = kind in ("dictionary", "beginnings")
    if kind == "beginnings":
        options = {
            "use_dictionary": False,
            "compression": data.draw(st.sampled_from((None, "gzip"))),
        }
        options["column_encoding"] = {"b.list.element": "DELTA_BYTE_ARRAY"}
        options["data_page_version"] = data.draw(st.sampled_from(("1.0", "2.0")))
    if is_parquet:
        pq.write_table(table, path, **options)
    else:
        ipc(path, table, kind, "zstd")
    about = pq.ParquetFile(path).metadata if is_parquet else None
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        word = data.draw(st.sampled_from((b"\xff", b"\0", b"\xff\xff\xff\x7f", b"\x80" * 9)))
        content[at : at + len(word)] = word
    path.write_bytes(content)
    with bounded(1.0, megabytes=50):
        try:
            if is_parquet:
                stored = [*_columnar.chunks(about, ["a", "b"])]
                _columnar.check_unpacked(path, _columnar.parquet_bytes(path, stored))
                with path.open("rb") as file:
                    for column in stored:
                        assert _pages.shared_texts(pa, file, column, in_lists=True).total >= 0
            else:
                _columnar.arrow_bytes(path, pa)
        except (ValueError, pa.ArrowException, OSError) as error:
            assert str(error)
