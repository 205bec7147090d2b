"""Idx files, the format of the MNIST family, gzipped or not."""

import contextlib
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax import _checks
from kdtl_jax.datasets._arrays import DEFLATE

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
CHUNK_BYTES = 2**20


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder has a file of images named as in MNIST."""
    return any(_files_of(folder, part, "images") for part in ("train", "t10k", "test"))


def _files_of(folder: Path, part: str, kind: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{part}-{kind}*") if path.is_file())


def idx_file(folder: Path, part: str, kind: str) -> Path:
    """The file of a part: `train-images-idx3-ubyte`, `train-images.idx3-ubyte.gz`, …"""
    files = _files_of(folder, part, kind)
    if part == "t10k" and not files:
        files = _files_of(folder, "test", kind)
    if not files:
        entries = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(
            f"{folder}: has no {part}-{kind}-idx file (.gz or not); it has "
            f"{entries or 'nothing'}. Expected MNIST's four files."
        )
    return files[0]


def idx_shape(path: Path) -> tuple[int, ...]:
    """The shape in an idx file's header; nothing else is read."""
    with _open(path) as (file, _):
        _, shape = _header(path, file)
    return tuple(shape)


def read_idx_array(path: str | Path) -> np.ndarray:
    """Reads an idx file as an array in native byte order, up to the size in its header.

    Raises:
      TypeError: if `path` is not a path.
    """
    path = _checks.path(path=path)
    with _open(path) as (file, is_gzipped):
        max_bytes = path.stat().st_size * (DEFLATE if is_gzipped else 1)
        return _idx_array(path, file, max_bytes, is_gzipped=is_gzipped)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, bool]]:
    """The file, unpacked if it is gzipped, and whether it is."""
    with path.open("rb") as file:
        magic = file.read(2)
        if not magic:
            raise ValueError(f"{path}: the file is empty.")
        file.seek(0)
        if magic != b"\x1f\x8b":
            yield file, False
            return
        try:
            with gzip.open(file) as unpacked:
                yield unpacked, True
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}).") from None


def _header(path: Path, file: Any) -> tuple[np.dtype, list[int]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 0 < magic[3] <= 32:
        raise ValueError(
            f"{path}: not an idx file: the first bytes are {magic[:4].hex(' ')}, expected 00 00 "
            "then a type (08 for bytes) and the number of dimensions."
        )
    dimensions = file.read(4 * magic[3])
    if len(dimensions) < 4 * magic[3]:
        raise ValueError(
            f"{path}: holds {4 + len(dimensions)} bytes, which end within its header. Is the "
            "download complete?"
        )
    shape = [int.from_bytes(dimensions[i : i + 4], "big") for i in range(0, len(dimensions), 4)]
    return np.dtype(_TYPES[magic[2]]), shape


def _idx_array(path: Path, file: Any, max_bytes: int, *, is_gzipped: bool) -> np.ndarray:
    """Reads the array in an open file of at most `max_bytes` bytes."""
    dtype, shape = _header(path, file)
    start = 4 + 4 * len(shape)
    expected = start + math.prod(shape) * dtype.itemsize
    content, chunk = bytearray(), b"-"
    while chunk and len(content) + start <= expected <= max_bytes:
        chunk = file.read(min(CHUNK_BYTES, expected - start - len(content) + 1))
        content += chunk
    size = start + len(content)
    if size != expected:
        actual = str(size if is_gzipped else max_bytes)
        if is_gzipped and expected > max_bytes:
            actual = f"at most {max_bytes}"
        elif is_gzipped and size > expected:
            actual = f"at least {size}"
        raise ValueError(
            f"{path}: holds {actual} bytes, but its header {shape} of {dtype} asks for {expected}. "
            "Is the download complete?"
        )
    try:
        array = np.frombuffer(content, dtype).reshape(shape)
    except ValueError as error:
        raise ValueError(f"{path}: its header {shape} makes no array ({error}).") from None
    return array.astype(dtype.newbyteorder("="))
