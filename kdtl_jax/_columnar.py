"""The unpacked size of parquet and Arrow files, read from their headers before unpacking.

Both formats hold compressed buffers, and parquet may store a text once for a million cells. Every
buffer and page states its unpacked length; only these numbers are read here.

Source: Arrow Columnar Format 1.5, "Serialization and Interprocess Communication".
"""

import importlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _pages

# A nearly constant column takes hardly any bytes; a whole table like that is a decompression bomb.
LARGE, MOST_PACKED = 2**28, 1000  # bytes; unpacked bytes per byte of a file
MAGIC = b"ARROW1"  # of the file format; a stream begins with its first message
DICTIONARY, RECORDS = 2, 3  # kinds of messages that have buffers
# Encodings that pyarrow decodes into dictionaries.
PLAIN = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}
SHARED = 2**28  # bytes of text that are decoded before counting
MOST_TEXT = 2**30  # bytes of distinct text that pyarrow can hold in one dictionary


def pyarrow(path: Path) -> Any:
    """The pyarrow package, for reading the file.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        pa = importlib.import_module("pyarrow")
        for part in ("compute", "parquet"):  # attributes of `pa` once they are imported
            importlib.import_module(f"pyarrow.{part}")
    except ImportError:
        raise ImportError(
            f"{path}: parquet and Arrow files are read by pyarrow: pip install 'kdtl_jax[data]'."
        ) from None
    return pa


def check_unpacked(path: Path, asked: int, what: str = "") -> None:
    """Refuses data that unpacks to thousands of times its stored size.

    Raises:
      ValueError: with both sizes and a description.
    """
    size = path.stat().st_size
    if asked > max(LARGE, MOST_PACKED * size):
        raise ValueError(f"{what or f'{asked:,} bytes, unpacked,'} in {size:,} bytes")


def arrow_bytes(path: Path, pa: Any) -> int:
    """The unpacked bytes that the buffers of an Arrow file or stream declare.

    Raises:
      ValueError: if a message is damaged.
      ArrowException: from pyarrow, likewise.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return sum(map(_announced, _messages(pa, source)))
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"a message of the file is damaged ({error})") from None


class _Message(NamedTuple):
    """A message's description (a flat buffer) and the bytes that it describes."""

    about: memoryview
    body: memoryview


def _messages(pa: Any, source: Any) -> Iterator[_Message]:
    whole = memoryview(source.read_buffer())
    if bytes(whole[:6]) != MAGIC:
        reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(pa.py_buffer(whole)))
        for message in iter(lambda: _next(reader), None):
            body = message.body
            empty = memoryview(b"")
            yield _Message(
                memoryview(message.metadata), empty if body is None else memoryview(body)
            )
        return
    (length,) = struct.unpack_from("<i", whole, len(whole) - 10)
    footer = whole[max(0, len(whole) - 10 - length) : len(whole) - 10]
    root = _Table(footer, _follow(footer, 0))
    for slot in (2, 3):  # dictionaries, then record batches
        for at in root.structs(slot, 24):
            place, size, _, stored = struct.unpack_from("<qiiq", footer, at)
            if min(place, size, stored) < 0:
                raise ValueError("a block of the file lies outside it")
            start = 8 if bytes(whole[place : place + 4]) == b"\xff\xff\xff\xff" else 4
            body = place + size
            yield _Message(whole[place + start : body], whole[body : body + stored])


def _next(reader: Any) -> Any:
    try:
        return reader.read_next_message()
    except StopIteration:
        return None


class _Table(NamedTuple):
    """A table in a flat buffer; its fields are looked up by number."""

    data: memoryview
    at: int

    def field(self, slot: int) -> int | None:
        """The position of a field; None if it is omitted."""
        (back,) = struct.unpack_from("<i", self.data, self.at)
        names = self.at - back
        if names < 0:
            raise ValueError("a table of the file lies outside it")
        (size,) = struct.unpack_from("<H", self.data, names)
        if 4 + 2 * slot + 2 > size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, names + 4 + 2 * slot)
        return self.at + offset if offset else None

    def table(self, slot: int) -> "_Table | None":
        """A field that is a table."""
        at = self.field(slot)
        return None if at is None else _Table(self.data, _follow(self.data, at))

    def structs(self, slot: int, size: int) -> range:
        """The positions of a vector's structs."""
        at = self.field(slot)
        if at is None:
            return range(0)
        start = _follow(self.data, at)
        (count,) = struct.unpack_from("<I", self.data, start)
        if start + 4 + count * size > len(self.data):
            raise ValueError("a list of the file is longer than the file")
        return range(start + 4, start + 4 + count * size, size)


def _follow(data: memoryview, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def _announced(message: _Message) -> int:
    """The unpacked bytes of a message's buffers."""
    root = _Table(message.about, _follow(message.about, 0))
    kind, header = root.field(1), root.table(2)
    if kind is None or header is None or message.about[kind] not in (DICTIONARY, RECORDS):
        return 0
    records = header.table(1) if message.about[kind] == DICTIONARY else header
    if records is None:
        return 0
    total, packed = 0, records.field(3) is not None
    for at in records.structs(2, 16):
        place, stored = struct.unpack_from("<qq", message.about, at)
        length = stored
        if packed and stored > 0:
            (length,) = struct.unpack_from("<q", message.body, place)
        total += stored if length == -1 else length  # -1: this one is not packed
    return total


def chunks(metadata: Any, columns: Iterable[str]) -> Iterator[Any]:
    """The entries for these columns, and for their parts, in a parquet file's FileMetaData."""
    roots = tuple(f"{name}." for name in columns)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if f"{column.path_in_schema}.".startswith(roots):
                yield column


def parquet_bytes(path: Path, stored: Iterable[Any]) -> int:
    """The unpacked bytes that the pages of a parquet file's `chunks` declare.

    Raises:
      ValueError: if the header of a page is damaged.
      OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        return sum(page.unpacked for column in stored for page in _pages.pages(file, column))


def texts_of(stored: Sequence[Any]) -> list[str]:
    """The columns of `chunks` for `read_dictionary`, so a text of many cells is held only once."""
    found: dict[str, int] = {}
    for column in stored:
        if column.physical_type == "BYTE_ARRAY":
            name = column.path_in_schema
            found[name] = found.get(name, 0) + column.total_uncompressed_size
    others = {column.path_in_schema for column in stored if not PLAIN.issuperset(column.encodings)}
    return [name for name, size in found.items() if size <= MOST_TEXT and name not in others]


def rows_at_once(path: Path, about: Any, columns: Iterable[str], most: int) -> int:
    """How many rows of these columns may be decoded at once: stored texts may take little space.

    One text may stand for many cells, or share its beginning with the previous one. The file's
    FileMetaData, `about`, only says which columns hold lists; the pages are counted themselves.

    Raises:
      ValueError: if a row's list may hold too many of them, or as `parquet_bytes`.
      OSError: as `parquet_bytes`.
    """
    stored, pa = list(chunks(about, columns)), pyarrow(path)
    once, parts = {*texts_of(stored)}, map(about.schema.column, range(about.num_columns))
    lists = {part.path for part in parts if part.max_repetition_level}
    with path.open("rb") as file:
        for column in stored:
            name = column.path_in_schema
            if column.physical_type != "BYTE_ARRAY" or name in once:
                continue
            shared = _pages.shared(pa, file, column, in_lists=name in lists)
            most = min(most, max(1, SHARED // max(1, shared.longest)))
            if name in lists:  # one row may hold all of them
                what = f"lists of texts that share their bytes, {shared.total:,} written out,"
                check_unpacked(path, shared.total, what)
    return most


def written_out(pa: Any, column: Any) -> int:
    """The bytes of an array or its chunks with every cell written out; an upper bound for views."""
    chunks: Iterable[Any] = getattr(column, "chunks", [column])
    return sum(_written_out(pa, chunk) for chunk in chunks)


def _written_out(pa: Any, array: Any) -> int:
    types, kind, count = pa.types, array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return _written_out(pa, array.storage)
    if types.is_dictionary(kind):
        each = _lengths(pa, array.dictionary)
        if each is None:
            return count * _written_out(pa, array.dictionary)
        return pa.compute.sum(each.take(array.indices)).as_py() or 0
    if types.is_run_end_encoded(kind):
        return count * _written_out(pa, array.values)
    if types.is_struct(kind):
        return sum(_written_out(pa, array.field(i)) for i in range(kind.num_fields))
    if types.is_map(kind):
        return _written_out(pa, array.keys) + _written_out(pa, array.items)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _written_out(pa, array.flatten())
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.compute.sum(_lengths(pa, array)).as_py() or 0
    is_view = types.is_list_view(kind) or types.is_large_list_view(kind)
    return count * _written_out(pa, array.values) if is_view else array.nbytes


def _lengths(pa: Any, array: Any) -> Any:
    """The bytes of every cell of text or numbers; None for anything else."""
    types, kind = pa.types, array.type
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.compute.binary_length(array.cast(pa.large_binary()))
    if types.is_primitive(kind):
        return pa.array([8] * len(array), pa.int64())
    is_text = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
    if any(is_so(kind) for is_so in is_text):
        return pa.compute.cast(pa.compute.binary_length(array), pa.int64())
    return None
