"""Labeled data from files: idx (the MNIST family), npz, and CSV with a label column.

Nothing is ever unpickled, and nothing is unpacked that was not asked for or that its own header
does not announce. Every message names the file and what is wrong with it.
"""

import array
import csv
import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdtl_jax import trees
from kdtl_jax.datasets._dataset import Dataset, checked

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
DEFLATE = 1032  # no stream of zlib unpacks to more bytes per byte than this
PIECE = 2**20


def read(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    inputs_name: str = "x_train",
    labels_name: str = "y_train",
    label_column: str = "label",
    classes: int | None = None,
) -> Dataset:
    """Reads a data set by its file name: `.npz`, `.csv`, otherwise idx (`.gz` too).

    Args:
      path: the data file; for idx the images.
      labels: the idx file of labels; needed for idx alone.
      inputs_name: the array of inputs in an npz.
      labels_name: the array of labels in an npz.
      label_column: the column of labels in a CSV.
      classes: number of classes, as in `checked`; None numbers the labels that occur.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if its contents are not what they should be.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return read_npz(path, inputs=inputs_name, labels=labels_name, classes=classes)
    if path.suffix == ".csv":
        return read_csv(path, label=label_column, classes=classes)
    if labels is None:
        raise ValueError(
            f"{path}: an idx file of images needs a second one with labels, as in "
            "train-labels-idx1-ubyte.gz. Other formats are recognized by .npz and .csv."
        )
    return read_idx(path, labels, classes=classes)


def read_idx(
    images: str | Path,
    labels: str | Path,
    *,
    classes: int | None = None,
    like: Dataset | None = None,
) -> Dataset:
    """A pair of idx files, gzipped or not; gray images get a channel axis.

    Args:
      images: the file of inputs.
      labels: the file of labels.
      classes: as in `checked`.
      like: as in `checked`.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if a file is empty, no idx file, or truncated; or counts or labels are wrong.
    """
    inputs = read_idx_array(images)
    if inputs.ndim == 3:
        inputs = inputs[..., None]
    return checked(str(images), inputs, read_idx_array(labels), classes, like=like)


def read_idx_array(path: str | Path) -> np.ndarray:
    """One idx file as an array in native byte order; no more is unpacked than its header says."""
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(2)
        if not start:
            raise ValueError(f"{path}: the file is empty.")
        file.seek(0)
        if start != b"\x1f\x8b":
            return _idx_array(path, file, path.stat().st_size, packed=False)
        try:
            with gzip.open(file) as unpacked:
                return _idx_array(path, unpacked, DEFLATE * path.stat().st_size, packed=True)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}).") from None


def _idx_array(path: Path, file: Any, most: int, *, packed: bool) -> np.ndarray:
    """The array in an opened file that holds at most `most` bytes."""
    raw = file.read(4)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or not 0 < raw[3] <= 32:
        raise ValueError(
            f"{path}: not an idx file: the first bytes are {raw[:4].hex(' ')}, expected 00 00 "
            "then a type (08 for bytes) and the number of dimensions."
        )
    dtype, head = np.dtype(_IDX_TYPES[raw[2]]), file.read(4 * raw[3])
    shape = [int.from_bytes(head[i : i + 4], "big") for i in range(0, len(head), 4)]
    start = 4 + 4 * raw[3]
    expected = start + math.prod(shape) * dtype.itemsize
    content, more = bytearray(), b"-"
    while more and len(content) + start <= min(expected, most):
        more = file.read(min(PIECE, expected - start - len(content) + 1))
        content += more
    size = 4 + len(head) + len(content)
    if len(head) < 4 * raw[3] or size != expected:
        there = (f"at least {size}" if size > expected else f"{size}") if packed else f"{most}"
        raise ValueError(
            f"{path}: holds {there} bytes, its header {shape} of {dtype} asks for {expected}. "
            "Is the download complete?"
        )
    try:
        found = np.frombuffer(content, dtype).reshape(shape)
    except ValueError as error:
        raise ValueError(f"{path}: its header {shape} makes no array ({error}).") from None
    return found.astype(dtype.newbyteorder("="))


def read_npz(
    path: str | Path,
    *,
    inputs: str = "x_train",
    labels: str = "y_train",
    classes: int | None = None,
    like: Dataset | None = None,
) -> Dataset:
    """Two arrays of an npz; images `[N, H, W]` get a channel axis.

    Args:
      path: the file; only the two arrays are unpacked.
      inputs: the name of the array of inputs.
      labels: the name of the array of labels.
      classes: as in `checked`.
      like: as in `checked`.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is no npz, holds pickled objects, or lacks an array (its arrays are listed).
    """
    path = Path(path)
    there = npz_names(path)
    missing = [name for name in (inputs, labels) if name not in there]
    if missing:
        raise ValueError(
            f"{path}: has no array {missing[0]!r}; it has {there}. Name the arrays of inputs and "
            "labels."
        )
    x, y = (_npz_array(path, name) for name in (inputs, labels))
    return checked(str(path), x[..., None] if x.ndim == 3 else x, y, classes, like=like)


def npz_names(path: Path) -> list[str]:
    """The names of an npz's arrays; none is unpacked.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is no npz.
    """
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        raise ValueError(f"{path}: the file is empty.")
    if start == b"\x93NUMPY":
        raise ValueError(f"{path}: a single array, not an npz. Use np.savez(path, x=, y=).")
    try:
        with zipfile.ZipFile(path) as stored:
            names = [name for name in stored.namelist() if name.endswith(".npy")]
    except _BROKEN as error:  # an OSError here is a seek to where a broken file points
        raise ValueError(f"{path}: not a readable npz ({error}).") from None
    return sorted(name.removesuffix(".npy") for name in names)


# What zipfile and NumPy raise on broken or foreign files; NotImplementedError is zipfile's for a
# compression that it does not know.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, RuntimeError),
    *(NotImplementedError, OverflowError, MemoryError, SyntaxError, UnicodeError, OSError),
)


def _npz_array(path: Path, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as stored:
            member = stored.getinfo(f"{name}.npy")
            with stored.open(member) as file:
                _check_announced(file, member)
            with stored.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    except _BROKEN as error:  # an OSError here is a seek to where a broken file points
        raise ValueError(f"{path}: not a readable npz ({error}).") from None


def _check_announced(file: Any, member: zipfile.ZipInfo) -> None:
    """Refuses an array that is announced larger than its bytes can hold, before memory is taken."""
    read_header = _NPY_HEADERS.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise ValueError("an unknown version of the array format")
    shape, _, dtype = read_header(file)
    asked = math.prod(shape) * dtype.itemsize
    most = min(member.file_size, DEFLATE * (member.compress_size + 1))
    if asked > most and not dtype.hasobject:
        raise ValueError(f"{member.filename} asks for {asked} bytes, at most {most} are there")


def read_csv(path: str | Path, *, label: str = "label", classes: int | None = None) -> Dataset:
    """Numbers under a header line; one column holds the labels, all others are inputs.

    Args:
      path: the file, UTF-8.
      label: the column of labels, numbers or text; see `checked`.
      classes: as in `checked`.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is empty, has no such column (the nearest are listed) or two of them, or a
        cell is no number (row and column are named).
    """
    path = Path(path)
    header: list[str] = []
    names: list[str] = []
    numbers = array.array("d")
    column = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            for row in filter(None, reader):
                if not header:
                    header = [name.strip() for name in row]
                    continue
                if not names:  # a file without rows is told so, not that it lacks a column
                    column = _label_column(path, header, label)
                names.append(_label(path, header, row, column, reader.line_num))
                numbers.extend(_cells(path, header, row, column, reader.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    if not names:
        raise ValueError(
            f"{path}: needs a header line and at least one row, got {int(bool(header))} line."
        )
    inputs = np.frombuffer(numbers, np.float64).reshape(len(names), len(header) - 1)
    return checked(str(path), inputs, np.array(names), classes)


def _label_column(path: Path, header: Sequence[str], label: str) -> int:
    if label not in header:
        near = ", ".join(repr(name) for name in trees.nearest(label, header))
        raise ValueError(f"{path}: has no column {label!r}. Nearest: {near}.")
    if header.count(label) > 1:
        raise ValueError(
            f"{path}: has {header.count(label)} columns called {label!r}: as inputs the others "
            "would give the answer away. Rename or drop them."
        )
    return header.index(label)


def _label(path: Path, header: Sequence[str], row: Sequence[str], column: int, line: int) -> str:
    if len(row) != len(header):
        raise ValueError(f"{path}: row {line} has {len(row)} cells, the header has {len(header)}.")
    found = row[column].strip()
    if not found:
        raise ValueError(f"{path}: row {line} has no label.")
    return found


def _cells(
    path: Path, header: Sequence[str], row: Sequence[str], column: int, line: int
) -> list[float]:
    found = []
    for i, cell in enumerate(row):
        if i == column:
            continue
        try:
            found.append(float(cell))
        except ValueError:
            raise ValueError(
                f"{path}: row {line}, column {header[i]!r}: {cell!r} is not a number."
            ) from None
    return found
