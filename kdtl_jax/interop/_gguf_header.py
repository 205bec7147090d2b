"""The header of a GGUF file, checked before the package gguf reads it.

The package counts up to whatever a header announces, even far past the end of the file.
"""

import mmap
import struct
from pathlib import Path

from kdtl_jax import _files

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number
_STRING, _ARRAY = 8, 9
# Limits: axes of a tensor; entries and tensors of a file, which the package reads slowly; strings
# in all lists (the largest vocabularies and merges have half as many).
_DIMENSIONS = 4
_ENTRIES, _TENSORS = 10_000, 100_000
_TEXTS = 2**21


def check(path: Path) -> None:
    """Refuses a header that announces more than the file holds, or a value of an unknown kind."""
    with _files.regular(path).open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != b"GGUF":
            raise ValueError("it does not begin like a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _walk(content)


def _walk(content: mmap.mmap) -> None:
    order = "<" if int.from_bytes(content[4:8], "little") & 0xFFFF else ">"
    position, size, texts = 8, len(content), 0

    def number(form: str) -> int:
        return struct.unpack_from(order + form, content, skip(struct.calcsize(form)))[0]

    def skip(count: int) -> int:
        """Skips the next `count` bytes; returns where they start."""
        nonlocal position
        if count > size - position:
            raise ValueError(
                f"its header asks for {count:,} bytes at {position:,}; it has {size:,}"
            )
        position += count
        return position - count

    def value(kind: int) -> None:
        if kind in _SIZES:
            skip(_SIZES[kind])
        elif kind == _STRING:
            skip(number("Q"))
        else:
            raise ValueError(f"its header has a value of kind {kind}, which GGUF does not have")

    try:
        tensors, entries = number("Q"), number("Q")
        if tensors > _TENSORS or entries > _ENTRIES:
            raise ValueError(f"its header announces {tensors:,} tensors and {entries:,} entries")
        for _ in range(entries):
            skip(number("Q"))
            kind = number("I")
            if kind != _ARRAY:
                value(kind)
                continue
            kind, count = number("I"), number("Q")
            if kind in _SIZES:
                skip(count * _SIZES[kind])
                continue
            texts += count
            if texts > _TEXTS:
                raise ValueError(f"its header has lists of {texts:,} texts")
            for _ in range(count):
                value(kind)
        for _ in range(tensors):
            skip(number("Q"))
            dimensions = number("I")
            if dimensions > _DIMENSIONS:
                raise ValueError(f"its header has a tensor of {dimensions} dimensions")
            skip(8 * dimensions + 12)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"its header cannot be read ({error})") from None
