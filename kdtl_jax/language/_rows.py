"""Rows of tokens on disk, for texts that are larger than memory.

    language.write_rows("rows", language.concatenated(documents, 1024), made_from={"text": "v2"})
    arrays = language.open_rows("rows")  # memory-mapped: pages are read as they are needed

    def read(epoch, rows):
        return {"inputs": data.take_rows(arrays, rows)}

    source = data.stream(read, len(arrays["tokens"]), 16, key=key)

The source's order depends only on key and step, and covers all rows, however many there are.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kdtl_jax import _checks, _files
from kdtl_jax.language._packing import Row, as_batch

FORMAT, RECORD = 1, "rows.json"


def write_rows(folder: str | Path, rows: Iterable[Row], *, made_from: Mapping[str, Any]) -> int:
    """Writes rows, one file per array; the folder is valid only once all are written.

    A complete folder with the same `made_from` is kept, and `rows` is not read.

    Args:
      folder: created if it does not exist; rows in it with another `made_from` are replaced.
      rows: rows of one shape, read as they are needed.
      made_from: JSON that determines the rows: text, tokenizer, lengths.

    Returns:
      The number of rows.

    Raises:
      ValueError: if there are no rows, or their shapes differ.
      OSError: if the disk is full.
    """
    folder = _checks.path(folder=folder)
    _checks.mappings(made_from=made_from)
    record = _read_record(folder)
    if record is not None and record["made_from"] == _files.as_json(made_from):
        return int(record["rows"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    for leftover in folder.glob(f".*.bin.*{_files.TEMPORARY}"):  # of a run that was killed
        leftover.unlink()
    shapes: dict[str, tuple[str, list[int]]] = {}
    count = 0
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for row in rows:
            arrays = _by_path(as_batch(row))
            layout = {n: (x.dtype.str, list(x.shape)) for n, x in arrays.items()}
            if not count:
                shapes = layout
                files = {
                    name: stack.enter_context(_files.atomic_file(folder / _file_name(name)))
                    for name in shapes
                }
            if layout != shapes:
                raise ValueError(f"row {count} has {layout}, the rows before it {shapes}.")
            for name, array in arrays.items():
                files[name].write(array.tobytes())
            count += 1
        if not count:
            raise ValueError("there are no rows: no document has a token to learn.")
    about = {"format": FORMAT, "rows": count, "arrays": shapes}
    _files.write_sealed(folder / RECORD, {**about, "made_from": _files.as_json(made_from)})
    return count


def open_rows(folder: str | Path) -> dict[str, Any]:
    """The arrays `[N, ...]` of a token batch that `write_rows` wrote, memory-mapped.

    Raises:
      ValueError: if the rows are incomplete.
    """
    folder = _checks.path(folder=folder)
    record = _read_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no complete rows. Write them again.")
    arrays: dict[str, Any] = {}
    for path, (dtype, shape) in record["arrays"].items():
        array = np.memmap(folder / _file_name(path), dtype, "r", shape=(record["rows"], *shape))
        *parents, name = path.split("/")
        node = arrays
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return arrays


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete folder, or None."""
    try:
        record = _files.read_sealed(folder / RECORD)
        rows, arrays = record["rows"], record["arrays"]
        if record["format"] != FORMAT or not (isinstance(rows, int) and rows > 0):
            return None
        names = [*arrays]
        if any(other.startswith(f"{name}/") for name in names for other in names):
            return None  # an array cannot hold others
        for path, (dtype, shape) in arrays.items():
            numpy_dtype = np.dtype(dtype)
            if numpy_dtype.kind not in "biuf" or any(type(n) is not int or n < 0 for n in shape):
                return None
            size = rows * math.prod(shape) * numpy_dtype.itemsize
            if not size or (folder / _file_name(path)).stat().st_size != size:
                return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return None
    return record


def _by_path(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A row's arrays by path; `trees.flatten` would take longer than writing them."""
    result: dict[str, np.ndarray] = {}
    for name, entry in batch.items():
        if isinstance(entry, Mapping):
            result |= {f"{name}/{inner}": array for inner, array in entry.items()}
        else:
            result[name] = entry
    return result


def _file_name(path: str) -> str:
    return f"{path.replace('/', '.')}.bin"
