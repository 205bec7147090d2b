"""The pages of a parquet file: their headers, and the sizes of texts that share bytes.

Raises ValueError if the header of a page, or the lengths of shared prefixes, are damaged, and
OSError if the file cannot be read.

Source: parquet-format 2.11, parquet.thrift and Encodings.md.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

HEADER_BYTES = 4096  # bytes within which a page's header usually ends
MAX_HEADER_BYTES = 2**24  # statistics may hold whole cells
MAX_DEPTH = 32  # of nested structs in a header
DICTIONARY_ENCODINGS, PREFIX_ENCODING = (2, 8), 7  # RLE_DICTIONARY and such; DELTA_BYTE_ARRAY
MAX_ENTRIES = 2**20  # entries of a dictionary that are read one by one
MAX_BLOCK = 2**16  # integers that are packed together; writers use 128 or 256


class Page(NamedTuple):
    """A page by its header."""

    start: int  # position of its bytes
    unpacked: int
    packed: int
    values: int  # of a data page
    encoding: int | None  # None: it has no data
    is_dictionary: bool
    levels: int | None  # bytes before the values that are never packed; None in version 1
    is_packed: bool


class SharedTexts(NamedTuple):
    """Texts that may share bytes with others of a column chunk; upper bounds in bytes."""

    longest: int
    total: int  # of all texts, each with its own bytes


def pages(file: BinaryIO, column: Any) -> Iterator[Page]:
    """Reads the page headers of a column chunk (pyarrow's metadata of it), in order."""
    pos = data_start = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < data_start:
        pos = column.dictionary_page_offset
    end = pos + column.total_compressed_size
    while 0 <= pos < end:
        page = _read_page(file, pos)
        yield page
        pos = page.start + page.packed


def shared_texts(pa: Any, file: BinaryIO, column: Any, *, in_lists: bool) -> SharedTexts:
    """Bounds the sizes of a column chunk's texts that are stored once for several cells.

    Args:
      pa: the pyarrow package.
      file: the parquet file.
      column: pyarrow's metadata of the chunk.
      in_lists: whether it holds lists, whose rows have any number of texts; only then is `total`
        an upper bound.
    """
    longest = dictionary_values = page_bytes = prefixes = 0
    for page in pages(file, column):
        if page.is_dictionary:
            longest = max(longest, _longest_entry(pa, file, page, column.compression))
        elif page.encoding in DICTIONARY_ENCODINGS:
            dictionary_values += page.values
        elif page.encoding == PREFIX_ENCODING:
            page_bytes += page.unpacked
            if in_lists:
                prefixes += _prefix_bytes(pa, file, page, column.compression)
    return SharedTexts(
        max(longest, page_bytes), dictionary_values * longest + page_bytes + prefixes
    )


def _unpack(pa: Any, file: BinaryIO, page: Page, codec: str) -> bytes:
    """Unpacks a page's bytes, without the levels in front, which are never packed."""
    levels = page.levels or 0
    file.seek(page.start + levels)
    data = file.read(page.packed - levels)
    if codec == "UNCOMPRESSED" or not page.is_packed:
        return data
    codec_name = {"LZ4": "lz4_raw"}.get(codec, codec.lower())
    try:
        return pa.decompress(data, page.unpacked - levels, codec=codec_name, asbytes=True)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"a page cannot be unpacked ({error})") from None


def _longest_entry(pa: Any, file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes of the longest entry in a dictionary page, an upper bound."""
    try:
        data = _unpack(pa, file, page, codec)
    except ValueError:  # the framing of old LZ4 files, which only pyarrow's reader knows
        return page.unpacked
    pos = longest = 0
    for _ in range(MAX_ENTRIES):
        if pos + 4 > len(data):
            return min(longest, page.unpacked)
        (length,) = struct.unpack_from("<I", data, pos)
        pos, longest = pos + 4 + length, max(longest, length)
    return min(max(longest, len(data) - pos), page.unpacked)


def _prefix_bytes(pa: Any, file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes that a page's texts share with the previous texts, in a column of lists."""
    data, pos = _unpack(pa, file, page, codec), 0
    try:
        if page.levels is None:  # two lists of levels, each with its length
            for _ in range(2):
                pos += 4 + struct.unpack_from("<I", data, pos)[0]
        return _sum_lengths(data, pos, page.values) if pos < len(data) else 0
    except (struct.error, IndexError):
        raise ValueError("the lengths of a page are damaged") from None


def _sum_lengths(data: bytes, pos: int, max_values: int) -> int:
    """Sums at most `max_values` lengths in DELTA_BINARY_PACKED."""
    block_size, pos = _read_varint(data, pos)
    blocks, pos = _read_varint(data, pos)
    remaining, pos = _read_varint(data, pos)
    value, pos = _read_varint(data, pos)
    total = value = _zigzag(value)
    remaining = max(0, remaining - 1)
    if (
        not 0 < blocks <= block_size <= MAX_BLOCK
        or block_size % (8 * blocks)
        or remaining >= max_values
        or value < 0
    ):
        raise ValueError("the lengths of a page are damaged")
    per_block = block_size // blocks
    while remaining > 0:
        min_delta, pos = _read_varint(data, pos)
        min_delta, widths = _zigzag(min_delta), data[pos : pos + blocks]
        pos += blocks
        if len(widths) < blocks or max(widths) > 32 or abs(min_delta) > 2**32:
            raise ValueError("the lengths of a page are damaged")
        for width in widths:
            if not remaining:
                break
            count, size = min(per_block, remaining), per_block * width // 8
            if width:
                packed = data[pos : pos + size]
                deltas = _unpack_bits(packed, per_block, width)[:count] + min_delta
                values = value + np.cumsum(deltas)
                total, value = total + int(values.sum()), int(values[-1])
                ends = int(values.min()), int(values.max())
            else:  # any number of them takes no space, and must not take time
                total += count * value + min_delta * count * (count + 1) // 2
                ends = value + min_delta, value + min_delta * count
                value = ends[1]
            if min(ends) < 0 or max(ends) >= 2**31:
                raise ValueError("the lengths of a page are damaged")
            pos, remaining = pos + size, remaining - count
    return total


def _unpack_bits(data: bytes, count: int, width: int) -> np.ndarray:
    """Unpacks `[count]` integers of `width` bits each, lowest bit first."""
    if len(data) < count * width // 8:
        raise IndexError
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return bits.reshape(count, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))


class _Fields(NamedTuple):
    """A struct's integers and booleans, and its nested structs, by field number."""

    numbers: dict[int, int]
    structs: "dict[int, _Fields]"


def _read_page(file: BinaryIO, pos: int) -> Page:
    size = HEADER_BYTES
    while True:
        file.seek(pos)
        data = file.read(size)
        fields = _Fields({}, {})
        try:
            header_size = _read_fields(data, 0, fields, 0)
        except IndexError:
            if len(data) < size or size >= MAX_HEADER_BYTES:
                raise ValueError("the header of a page is damaged") from None
            size *= 16
            continue
        unpacked, packed = fields.numbers.get(2, -1), fields.numbers.get(3, -1)
        if min(unpacked, packed) < 0:
            raise ValueError("the header of a page has no size")
        headers = {n: fields.structs[n].numbers for n in (5, 7, 8) if n in fields.structs}
        version_1, version_2 = headers.get(5, {}), headers.get(8, {})  # of data pages
        levels = max(0, version_2.get(5, 0)) + max(0, version_2.get(6, 0)) if version_2 else None
        return Page(
            start=pos + header_size,
            unpacked=unpacked,
            packed=packed,
            values=max(0, (version_1 or version_2).get(1, 0)),
            encoding=version_1.get(2, version_2.get(4)),
            is_dictionary=7 in headers,
            levels=levels,
            is_packed=bool(version_2.get(7, 1)),
        )


def _read_fields(data: bytes, pos: int, fields: _Fields, depth: int) -> int:
    """Reads the fields of a struct in Thrift's compact protocol; returns its end."""
    if depth > MAX_DEPTH:
        raise ValueError("the header of a page is damaged")
    number = 0
    while True:
        byte = data[pos]
        pos += 1
        field_type = byte & 15
        if not field_type:
            return pos
        if byte >> 4:
            number += byte >> 4
        else:
            value, pos = _read_varint(data, pos)
            number = _zigzag(value)
        if 4 <= field_type <= 6:  # i16, i32, i64
            value, pos = _read_varint(data, pos)
            fields.numbers[number] = _zigzag(value)
        elif field_type == 12:
            nested = fields.structs[number] = _Fields({}, {})
            pos = _read_fields(data, pos, nested, depth + 1)
        elif field_type <= 2:  # true and false are encoded in the kind
            fields.numbers[number] = int(field_type == 1)
        else:
            pos = _skip_value(data, pos, field_type, depth)


def _skip_value(data: bytes, pos: int, field_type: int, depth: int) -> int:
    """Skips a value; returns its end."""
    if field_type in (1, 2, 3):  # a byte; a boolean within a list has one
        return pos + 1
    if 4 <= field_type <= 6:
        return _read_varint(data, pos)[1]
    if field_type == 7:  # a double
        return pos + 8
    if field_type == 8:  # bytes
        length, pos = _read_varint(data, pos)
        if pos + length > len(data):
            raise IndexError
        return pos + length
    if field_type in (9, 10):  # a list or a set
        count, element_type = data[pos] >> 4, data[pos] & 15
        pos += 1
        if count == 15:
            count, pos = _read_varint(data, pos)
        for _ in range(min(count, len(data))):
            pos = _skip_value(data, pos, element_type, depth + 1)
        return pos
    if field_type == 12:
        return _read_fields(data, pos, _Fields({}, {}), depth + 1)
    raise ValueError("the header of a page is damaged")


def _read_varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[pos]
        pos += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, pos
        if shift > 63:
            raise ValueError("the header of a page is damaged")


def _zigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
