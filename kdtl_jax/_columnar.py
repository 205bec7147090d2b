"""The unpacked size of parquet and Arrow files, read from their headers before unpacking.

Both formats hold compressed buffers, and parquet may store a text once for a million cells. Every
buffer and page states its unpacked length; only these lengths are read here.

Raises ValueError if a message or the header of a page is damaged, and OSError if a file cannot be
read.

Source: Arrow Columnar Format 1.5, "Serialization and Interprocess Communication".
"""

import importlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax import _pages

# A nearly constant column takes hardly any bytes; a table of such columns is a decompression bomb.
LARGE_BYTES, MAX_COMPRESSION_RATIO = 2**28, 1000  # bytes; unpacked bytes per byte of a file
MAGIC = b"ARROW1"  # of the file format; a stream begins with its first message
DICTIONARY, RECORD_BATCH = 2, 3  # kinds of messages that have buffers
# Encodings that pyarrow decodes into dictionaries.
PLAIN = {"PLAIN", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "RLE", "BIT_PACKED"}
MAX_SHARED_BYTES = 2**28  # bytes of text that are decoded before counting
MAX_DICTIONARY_BYTES = 2**30  # bytes of distinct text that pyarrow can hold in one dictionary


def pyarrow(path: Path) -> Any:
    """Imports pyarrow, to read the file.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        pa = importlib.import_module("pyarrow")
        for module in ("compute", "parquet"):  # attributes of `pa` once they are imported
            importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise ImportError(
            f"{path}: parquet and Arrow files are read by pyarrow: pip install 'kdtl_jax[data]'."
        ) from None
    return pa


def check_unpacked(path: Path, unpacked: int, description: str = "") -> None:
    """Refuses data that unpacks to thousands of times its stored size.

    Raises:
      ValueError: with both sizes and the description.
    """
    size = path.stat().st_size
    if unpacked > max(LARGE_BYTES, MAX_COMPRESSION_RATIO * size):
        raise ValueError(f"{description or f'{unpacked:,} bytes, unpacked,'} in {size:,} bytes")


def arrow_bytes(path: Path, pa: Any) -> int:
    """Sums the unpacked bytes that the buffers of an Arrow file or stream declare.

    Raises:
      ArrowException: if a message is damaged, from pyarrow.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return sum(map(_declared_bytes, _messages(pa, source)))
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"a message of the file is damaged ({error})") from None


class _Message(NamedTuple):
    """A message's metadata (a flat buffer) and the body that it describes."""

    metadata: memoryview
    body: memoryview


def _messages(pa: Any, source: Any) -> Iterator[_Message]:
    data = memoryview(source.read_buffer())
    if bytes(data[:6]) != MAGIC:
        reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(pa.py_buffer(data)))
        for message in reader:
            yield _Message(memoryview(message.metadata), memoryview(message.body or b""))
        return
    (length,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = data[max(0, len(data) - 10 - length) : len(data) - 10]
    root = _Table(footer, _follow(footer, 0))
    for slot in (2, 3):  # dictionaries, then record batches
        for position in root.structs(slot, 24):
            start, size, _, body_size = struct.unpack_from("<qiiq", footer, position)
            if min(start, size, body_size) < 0:
                raise ValueError("a block of the file lies outside it")
            prefix = 8 if bytes(data[start : start + 4]) == b"\xff\xff\xff\xff" else 4
            body = start + size
            yield _Message(data[start + prefix : body], data[body : body + body_size])


class _Table(NamedTuple):
    """A table in a flat buffer; its fields are looked up by number."""

    data: memoryview
    position: int

    def field(self, slot: int) -> int | None:
        """The position of a field; None if it is omitted."""
        (vtable_distance,) = struct.unpack_from("<i", self.data, self.position)
        vtable = self.position - vtable_distance
        if vtable < 0:
            raise ValueError("a table of the file lies outside it")
        (size,) = struct.unpack_from("<H", self.data, vtable)
        if 4 + 2 * slot + 2 > size:
            return None
        (offset,) = struct.unpack_from("<H", self.data, vtable + 4 + 2 * slot)
        return self.position + offset if offset else None

    def table(self, slot: int) -> "_Table | None":
        """A field that is a table."""
        position = self.field(slot)
        return None if position is None else _Table(self.data, _follow(self.data, position))

    def structs(self, slot: int, size: int) -> range:
        """The positions of a vector's structs."""
        position = self.field(slot)
        if position is None:
            return range(0)
        start = _follow(self.data, position)
        (count,) = struct.unpack_from("<I", self.data, start)
        if start + 4 + count * size > len(self.data):
            raise ValueError("a list of the file is longer than the file")
        return range(start + 4, start + 4 + count * size, size)


def _follow(data: memoryview, position: int) -> int:
    return position + struct.unpack_from("<I", data, position)[0]


def _declared_bytes(message: _Message) -> int:
    """The unpacked bytes of a message's buffers."""
    root = _Table(message.metadata, _follow(message.metadata, 0))
    kind, header = root.field(1), root.table(2)
    if kind is None or header is None or message.metadata[kind] not in (DICTIONARY, RECORD_BATCH):
        return 0
    records = header.table(1) if message.metadata[kind] == DICTIONARY else header
    if records is None:
        return 0
    total, is_compressed = 0, records.field(3) is not None
    for position in records.structs(2, 16):
        offset, stored_bytes = struct.unpack_from("<qq", message.metadata, position)
        unpacked_bytes = stored_bytes
        if is_compressed and stored_bytes > 0:
            (unpacked_bytes,) = struct.unpack_from("<q", message.body, offset)
        total += stored_bytes if unpacked_bytes == -1 else unpacked_bytes  # -1: not compressed
    return total


def chunks(metadata: Any, columns: Iterable[str]) -> Iterator[Any]:
    """The column chunks of these columns, nested ones included, in a parquet FileMetaData."""
    roots = tuple(f"{name}." for name in columns)
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if f"{column.path_in_schema}.".startswith(roots):
                yield column


def parquet_bytes(path: Path, columns: Iterable[Any]) -> int:
    """Sums the unpacked bytes that the pages of a parquet file's `chunks` declare."""
    with path.open("rb") as file:
        return sum(page.unpacked for column in columns for page in _pages.pages(file, column))


def _dictionary_columns(columns: Sequence[Any]) -> list[str]:
    """The columns of `chunks` to read as dictionaries, which hold a text of many cells once."""
    sizes: dict[str, int] = {}
    excluded: set[str] = set()
    for column in columns:
        if column.physical_type == "BYTE_ARRAY":
            name = column.path_in_schema
            sizes[name] = sizes.get(name, 0) + column.total_uncompressed_size
        if not PLAIN.issuperset(column.encodings):
            excluded.add(column.path_in_schema)
    fits = (name for name, size in sizes.items() if size <= MAX_DICTIONARY_BYTES)
    return [name for name in fits if name not in excluded]


def rows_per_read(
    path: Path, metadata: Any, columns: Iterable[str], max_rows: int
) -> tuple[int, list[str]]:
    """How many rows of these columns to decode at once, and which columns as dictionaries.

    Decoded texts may be much larger than stored ones: one text may stand for many cells, or share a
    prefix with the previous one. `metadata`, the file's FileMetaData, only says which columns hold
    lists; sizes come from the pages themselves.

    Raises:
      ValueError: if the columns unpack to thousands of times their stored size, or a row's list may
        hold too many texts.
    """
    column_chunks, pa = list(chunks(metadata, columns)), pyarrow(path)
    check_unpacked(path, parquet_bytes(path, column_chunks))
    dictionaries = _dictionary_columns(column_chunks)
    leaves = map(metadata.schema.column, range(metadata.num_columns))
    lists = {leaf.path for leaf in leaves if leaf.max_repetition_level}
    with path.open("rb") as file:
        for column in column_chunks:
            name = column.path_in_schema
            if column.physical_type != "BYTE_ARRAY" or name in dictionaries:
                continue
            texts = _pages.shared_texts(pa, file, column, in_lists=name in lists)
            max_rows = min(max_rows, max(1, MAX_SHARED_BYTES // max(1, texts.longest)))
            if name in lists:  # one row may hold all of them
                description = f"lists of texts that share their bytes, {texts.total:,} written out,"
                check_unpacked(path, texts.total, description)
    return max_rows, dictionaries


def expanded_bytes(pa: Any, column: Any) -> int:
    """The bytes of an array, or of chunks, with every cell stored; an upper bound for views."""
    chunks: Iterable[Any] = getattr(column, "chunks", [column])
    return sum(_expanded_bytes(pa, chunk) for chunk in chunks)


def _expanded_bytes(pa: Any, array: Any) -> int:
    types, dtype, length = pa.types, array.type, len(array)
    if isinstance(dtype, pa.BaseExtensionType):
        return _expanded_bytes(pa, array.storage)
    if types.is_dictionary(dtype):
        cell_lengths = _lengths(pa, array.dictionary)
        if cell_lengths is None:
            return length * _expanded_bytes(pa, array.dictionary)
        return pa.compute.sum(cell_lengths.take(array.indices)).as_py() or 0
    if types.is_run_end_encoded(dtype):
        return length * _expanded_bytes(pa, array.values)
    if types.is_struct(dtype):
        return sum(_expanded_bytes(pa, array.field(i)) for i in range(dtype.num_fields))
    if types.is_map(dtype):
        return _expanded_bytes(pa, array.keys) + _expanded_bytes(pa, array.items)
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return _expanded_bytes(pa, array.flatten())
    if types.is_string_view(dtype) or types.is_binary_view(dtype):
        return pa.compute.sum(_lengths(pa, array)).as_py() or 0
    is_view = types.is_list_view(dtype) or types.is_large_list_view(dtype)
    return length * _expanded_bytes(pa, array.values) if is_view else array.nbytes


def _lengths(pa: Any, array: Any) -> Any:
    """The bytes of every cell of text or numbers; None for other types."""
    types, dtype = pa.types, array.type
    if types.is_string_view(dtype) or types.is_binary_view(dtype):
        return pa.compute.binary_length(array.cast(pa.large_binary()))
    if types.is_primitive(dtype):
        return pa.array([8] * len(array), pa.int64())
    text_types = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
    if any(is_type(dtype) for is_type in text_types):
        return pa.compute.cast(pa.compute.binary_length(array), pa.int64())
    return None
