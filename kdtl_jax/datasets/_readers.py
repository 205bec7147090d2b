"""Labelled data from files: idx (the MNIST family), npz, and CSV with a label column.

Nothing is ever unpickled. Every message names the file and what is wrong with it.
"""

import csv
import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdtl_jax import trees
from kdtl_jax.datasets._dataset import Dataset, checked

_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


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
      classes: number of classes; None takes the largest label plus one.

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


def read_idx(images: str | Path, labels: str | Path, *, classes: int | None = None) -> Dataset:
    """A pair of idx files, gzipped or not; gray images get a channel axis.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if a file is empty, no idx file, or truncated; or counts or labels are wrong.
    """
    inputs = read_idx_array(images)
    if inputs.ndim == 3:
        inputs = inputs[..., None]
    return checked(str(images), inputs, read_idx_array(labels), classes)


def read_idx_array(path: str | Path) -> np.ndarray:
    """One idx file as an array in native byte order."""
    raw = _bytes(Path(path))
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or raw[3] == 0:
        raise ValueError(
            f"{path}: not an idx file: the first bytes are {raw[:4].hex(' ')}, expected 00 00 "
            "then a type (08 for bytes) and the number of dimensions."
        )
    dtype, start = np.dtype(_IDX_TYPES[raw[2]]), 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        raise ValueError(
            f"{path}: holds {len(raw)} bytes, its header {shape} of {dtype} asks for {expected}. "
            "Is the download complete?"
        )
    array = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def read_npz(
    path: str | Path,
    *,
    inputs: str = "x_train",
    labels: str = "y_train",
    classes: int | None = None,
) -> Dataset:
    """Two arrays of an npz; images `[N, H, W]` get a channel axis.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is no npz, holds pickled objects, or lacks an array (its arrays are listed).
    """
    path = Path(path)
    if not _bytes_at_start(path):
        raise ValueError(f"{path}: the file is empty.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: a single array, not an npz. Use np.savez(path, x=, y=).")
        with loaded as stored:
            missing = [name for name in (inputs, labels) if name not in stored.files]
            if missing:
                raise ValueError(
                    f"{path}: has no array {missing[0]!r}; it has {sorted(stored.files)}. Name the "
                    "arrays of inputs and labels."
                )
            x, y = stored[inputs], stored[labels]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a readable npz ({error}).") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: not a readable npz ({error}).") from None
    return checked(str(path), x[..., None] if x.ndim == 3 else x, y, classes)


def read_csv(path: str | Path, *, label: str = "label", classes: int | None = None) -> Dataset:
    """Numbers under a header line; one column holds the labels, all others are inputs.

    Labels that are not numbers are numbered in sorted order.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is empty, has no such column (the nearest are listed), or a cell is no
        number (row and column are named).
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file ({error}).") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: needs a header line and at least one row, got {len(rows)} line.")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    if label not in header:
        near = ", ".join(repr(name) for name in trees.nearest(label, header))
        raise ValueError(f"{path}: has no column {label!r}. Nearest: {near}.")
    column = header.index(label)
    names = [row[column].strip() if column < len(row) else "" for row in body]
    inputs = _numbers(path, header, body, skip=column)
    return checked(str(path), inputs, _numbered(path, names), classes)


def _numbers(
    path: Path, header: Sequence[str], body: Sequence[Sequence[str]], *, skip: int
) -> np.ndarray:
    kept = [i for i in range(len(header)) if i != skip]
    out = np.empty((len(body), len(kept)), np.float32)
    for r, row in enumerate(body):
        if len(row) != len(header):
            raise ValueError(
                f"{path}: row {r + 2} has {len(row)} cells, the header has {len(header)}."
            )
        for c, i in enumerate(kept):
            try:
                out[r, c] = float(row[i])
            except ValueError:
                raise ValueError(
                    f"{path}: row {r + 2}, column {header[i]!r}: {row[i]!r} is not a number."
                ) from None
    return out


def _numbered(path: Path, names: Sequence[str]) -> np.ndarray:
    if not all(names):
        raise ValueError(f"{path}: row {names.index('') + 2} has no label.")
    try:
        return np.array([float(name) for name in names])
    except ValueError:
        return np.searchsorted(np.array(sorted(set(names))), np.array(names))


def _bytes_at_start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(2)


def _bytes(path: Path) -> bytes:
    """The whole file, unpacked if it is gzipped, whatever its name says."""
    start = _bytes_at_start(path)
    if not start:
        raise ValueError(f"{path}: the file is empty.")
    if start != b"\x1f\x8b":
        return path.read_bytes()
    try:
        with gzip.open(path) as stream:
            return stream.read()
    except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{path}: a damaged gzip file ({error}).") from None
