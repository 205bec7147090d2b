"""The pages of a parquet file: their headers, and how far texts in them share their bytes.

Source: parquet-format 2.11, parquet.thrift and Encodings.md.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

HEADER = 4096  # bytes within which a page's header usually ends
LONGEST_HEADER = 2**24  # statistics may hold whole cells
NESTED = 32  # structs within a header
CODED, BEGINNINGS = (2, 8), 7  # encodings: by dictionary, by the beginning of the value before
MOST_WALKED = 2**20  # entries of a dictionary that are looked at one by one


class Page(NamedTuple):
    """A page by its header."""

    at: int  # where its bytes begin
    unpacked: int
    packed: int
    values: int  # of a data page
    encoding: int | None  # None: it has no data
    is_dictionary: bool


class Shared(NamedTuple):
    """Texts that may share their bytes with others of a column."""

    count: int
    longest: int  # bytes, an upper bound
    advice: str  # where that is far above what they have


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


def shared(pa: Any, file: BinaryIO, column: Any) -> Shared:
    """How many texts of a column chunk are stored once for several, and how long they may be.

    Raises:
      ValueError, OSError: as `pages`.
    """
    count = longest = begun = 0
    for page in pages(file, column):
        if page.is_dictionary:
            longest = max(longest, _longest(pa, file, page, column.compression))
        elif page.encoding in CODED:
            count += page.values
        elif page.encoding == BEGINNINGS:
            count, begun = count + page.values, begun + page.unpacked
    advice = ", which are counted exactly if they are written without DELTA_BYTE_ARRAY,"
    return Shared(count, max(longest, begun), advice if begun else "")


def _longest(pa: Any, file: BinaryIO, page: Page, codec: str) -> int:
    """The bytes of the longest entry in a dictionary page, an upper bound."""
    file.seek(page.at)
    data = file.read(page.packed)
    if codec != "UNCOMPRESSED":
        name = {"LZ4": "lz4_raw"}.get(codec, codec.lower())
        try:
            data = pa.decompress(data, page.unpacked, codec=name, asbytes=True)
        except (pa.ArrowException, ValueError, OSError):
            return page.unpacked
    at = most = 0
    for _ in range(MOST_WALKED):
        if at + 4 > len(data):
            return min(most, page.unpacked)
        (length,) = struct.unpack_from("<I", data, at)
        at, most = at + 4 + length, max(most, length)
    return min(max(most, len(data) - at), page.unpacked)


class _Fields(NamedTuple):
    """A struct's integers and structs, by number."""

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
        # Data pages of version 1 and 2 say their encoding in another place.
        said = [(found.structs[n].numbers, m) for n, m in ((5, 2), (8, 4)) if n in found.structs]
        numbers, place = said[0] if said else ({}, 0)
        values, encoding = numbers.get(1, 0), numbers.get(place)
        return Page(at + used, unpacked, packed, max(0, values), encoding, 7 in found.structs)


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
        elif kind > 2:  # true and false are encoded in the kind
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
