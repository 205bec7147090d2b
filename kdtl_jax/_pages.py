"""The pages of a parquet file: their headers, and how far texts in them share their bytes.

Source: parquet-format 2.11, parquet.thrift and Encodings.md.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

HEADER = 4096  # bytes within which a page's header usually ends
LONGEST_HEADER = 2**24  # statistics may hold whole cells
NESTED = 32  # structs within a header
CODED, BEGINNINGS = (2, 8), 7  # encodings: by dictionary, by the beginning of the value before
MOST_WALKED = 2**20  # entries of a dictionary that are looked at one by one
LONGEST_BLOCK = 2**16  # integers that are packed together; writers use 128 or 256


class Page(NamedTuple):
    """A page by its header."""

    at: int  # where its bytes begin
    unpacked: int
    packed: int
    values: int  # of a data page
    encoding: int | None  # None: it has no data
    is_dictionary: bool
    levels: int | None  # bytes before the values that are never packed; None in version 1
    is_packed: bool


class Shared(NamedTuple):
    """Texts that may share their bytes with others of a column chunk; upper bounds in bytes."""

    longest: int
    total: int  # of all, written out


def pages(file: BinaryIO, column: Any) -> Iterator[Page]:
    """The pages of a column chunk (pyarrow's metadata of it), in their order.

    Raises:
      ValueError: if the header of a page is damaged.
      OSError: if the file cannot be read.
    """
    at = first = column.data_page_offset
    if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < first:
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    while 0 <= at < end:
        page = _page(file, at)
        yield page
        at = page.at + page.packed


def shared(pa: Any, file: BinaryIO, column: Any, *, in_lists: bool) -> Shared:
    """How long texts of a column chunk are that are stored once for several.

    Args:
      pa: the pyarrow package.
      file: the parquet file.
      column: pyarrow's metadata of the chunk.
      in_lists: whether it holds lists, whose rows have any number of texts; `total` is only exact
        enough for these.

    Raises:
      ValueError: if the header of a page, or the lengths of shared beginnings, are damaged.
      OSError: if the file cannot be read.
    """
    longest = coded = begun = beginnings = 0
    for page in pages(file, column):
        if page.is_dictionary:
            longest = max(longest, _longest(pa, file, page, column.compression))
        elif page.encoding in CODED:
            coded += page.values
        elif page.encoding == BEGINNINGS:
            begun += page.unpacked
            if in_lists:
                beginnings += _beginnings(pa, file, page, column.compression)
    return Shared(max(longest, begun), coded * longest + begun + beginnings)


def _unpacked(pa: Any, file: BinaryIO, page: Page, codec: str) -> bytes:
    """A page's bytes, without levels that stand before them unpacked."""
    file.seek(page.at + (page.levels or 0))
    data = file.read(page.packed - (page.levels or 0))
    if codec == "UNCOMPRESSED" or not page.is_packed:
        return data
    name = {"LZ4": "lz4_raw"}.get(codec, codec.lower())
    try:
        return pa.decompress(data, page.unpacked - (page.levels or 0), codec=name, asbytes=True)
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
        raise ValueError(f"a page cannot be unpacked ({error})") from None


def _longest(pa: Any, file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes of the longest entry in a dictionary page, an upper bound."""
    try:
        data = _unpacked(pa, file, page, codec)
    except ValueError:  # the framing of old LZ4 files, which only pyarrow's reader knows
        return page.unpacked
    at = most = 0
    for _ in range(MOST_WALKED):
        if at + 4 > len(data):
            return min(most, page.unpacked)
        (length,) = struct.unpack_from("<I", data, at)
        at, most = at + 4 + length, max(most, length)
    return min(max(most, len(data) - at), page.unpacked)


def _beginnings(pa: Any, file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes that a page's texts take from the texts before them; of a column of lists."""
    data, at = _unpacked(pa, file, page, codec), 0
    try:
        if page.levels is None:  # two lists of levels, each with its length
            for _ in range(2):
                at += 4 + struct.unpack_from("<I", data, at)[0]
        return _sum(data, at, page.values) if at < len(data) else 0
    except (struct.error, IndexError):
        raise ValueError("the lengths of a page are damaged") from None


def _sum(data: bytes, at: int, most: int) -> int:
    """The sum of at most so many lengths in DELTA_BINARY_PACKED."""
    size, at = _varint(data, at)
    parts, at = _varint(data, at)
    left, at = _varint(data, at)
    value, at = _varint(data, at)
    total = value = _signed(value)
    left = max(0, left - 1)
    if not 0 < parts <= size <= LONGEST_BLOCK or size % (8 * parts) or left >= most or value < 0:
        raise ValueError("the lengths of a page are damaged")
    each = size // parts
    while left > 0:
        low, at = _varint(data, at)
        low, widths, at = _signed(low), data[at : at + parts], at + parts
        if len(widths) < parts or max(widths) > 32 or abs(low) > 2**32:
            raise ValueError("the lengths of a page are damaged")
        for width in widths:
            if not left:
                break
            count, used = min(each, left), each * width // 8
            if width:
                deltas = _bits(data[at : at + used], each, width)[:count] + low
                values = value + np.cumsum(deltas)
                total, value = total + int(values.sum()), int(values[-1])
                ends = int(values.min()), int(values.max())
            else:  # any number of them takes no space, and must take no time
                total += count * value + low * count * (count + 1) // 2
                ends = value + low, value + low * count
                value = ends[1]
            if min(ends) < 0 or max(ends) >= 2**31:
                raise ValueError("the lengths of a page are damaged")
            at, left = at + used, left - count
    return total


def _bits(data: bytes, count: int, width: int) -> np.ndarray:
    """`[count]` integers of so many bits each, the lowest first."""
    if len(data) < count * width // 8:
        raise IndexError
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    return bits.reshape(count, width).astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))


class _Fields(NamedTuple):
    """A struct's integers and booleans, and its structs, by number."""

    numbers: dict[int, int]
    structs: "dict[int, _Fields]"


def _page(file: BinaryIO, at: int) -> Page:
    size = HEADER
    while True:
        file.seek(at)
        data = file.read(size)
        try:
            used, found = _compact(data)
        except IndexError:
            if len(data) < size or size >= LONGEST_HEADER:
                raise ValueError("the header of a page is damaged") from None
            size *= 16
            continue
        unpacked, packed = found.numbers.get(2, -1), found.numbers.get(3, -1)
        if min(unpacked, packed) < 0:
            raise ValueError("the header of a page has no size")
        kinds = {n: found.structs[n].numbers for n in (5, 7, 8) if n in found.structs}
        first, second = kinds.get(5, {}), kinds.get(8, {})  # data pages of version 1, of version 2
        levels = max(0, second.get(5, 0)) + max(0, second.get(6, 0)) if second else None
        return Page(
            at=at + used,
            unpacked=unpacked,
            packed=packed,
            values=max(0, (first or second).get(1, 0)),
            encoding=first.get(2, second.get(4)),
            is_dictionary=7 in kinds,
            levels=levels,
            is_packed=bool(second.get(7, 1)),
        )


def _compact(data: bytes) -> tuple[int, _Fields]:
    """The length of a struct in Thrift's compact protocol, and its fields."""
    found = _Fields({}, {})
    return _struct(data, 0, found, 0), found


def _struct(data: bytes, at: int, found: _Fields, depth: int) -> int:
    """The end of a struct."""
    if depth > NESTED:
        raise ValueError("the header of a page is damaged")
    number = 0
    while True:
        head = data[at]
        at += 1
        kind = head & 15
        if not kind:
            return at
        if head >> 4:
            number += head >> 4
        else:
            value, at = _varint(data, at)
            number = _signed(value)
        if 4 <= kind <= 6:  # i16, i32, i64
            value, at = _varint(data, at)
            found.numbers[number] = _signed(value)
        elif kind == 12:
            inner = found.structs[number] = _Fields({}, {})
            at = _struct(data, at, inner, depth + 1)
        elif kind <= 2:  # true and false are encoded in the kind
            found.numbers[number] = int(kind == 1)
        else:
            at = _skipped(data, at, kind, depth)


def _skipped(data: bytes, at: int, kind: int, depth: int) -> int:
    """The end of a value."""
    if kind in (1, 2, 3):  # a byte; a boolean within a list has one
        return at + 1
    if 4 <= kind <= 6:
        return _varint(data, at)[1]
    if kind == 7:  # a double
        return at + 8
    if kind == 8:  # bytes
        length, at = _varint(data, at)
        if at + length > len(data):
            raise IndexError
        return at + length
    if kind in (9, 10):  # a list or a set
        count, inner = data[at] >> 4, data[at] & 15
        at += 1
        if count == 15:
            count, at = _varint(data, at)
        for _ in range(min(count, len(data))):
            at = _skipped(data, at, inner, depth + 1)
        return at
    if kind == 12:
        return _struct(data, at, _Fields({}, {}), depth + 1)
    raise ValueError("the header of a page is damaged")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("the header of a page is damaged")


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
