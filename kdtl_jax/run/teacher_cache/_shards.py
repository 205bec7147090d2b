"""The layout of a cache on disk, and reading its rows.

A shard is one file of records, one per example, each with all outputs. It is mapped while rows are
read and then closed, so that many shards or outputs do not mean many open files.
"""

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _files, _text, losses
from kdtl_jax.run.teacher_cache._fingerprint import Fingerprint, differences, from_json

FORMAT = 2
PLAN, MANIFEST = "plan.json", "manifest.json"


class StoredColumn(NamedTuple):
    """One stored array `[rows, *shape]`; `field` is a field of `losses.TopK`, or None."""

    tap: str
    field: str | None
    dtype: str
    shape: tuple[int, ...]


class Plan(NamedTuple):
    """The contents of a cache, decided before any computation, so that a killed run can resume."""

    fingerprint: Fingerprint
    size: int  # examples
    views: int | None
    top_k: int | None
    temperature: float  # of the softmax that was cut to top_k
    shard_rows: int  # shards never cross views
    columns: tuple[StoredColumn, ...]


class Cache(NamedTuple):
    """An open cache: its folder, its plan, and the columns of the requested taps."""

    folder: Path
    plan: Plan
    columns: tuple[int, ...]  # positions in `plan.columns`
    stamps: tuple[tuple[int, ...], ...]  # of the shards' files as they were checked


def open_cache(folder: str | Path, *, expect: Fingerprint | None, contents: bool = True) -> Cache:
    """Opens a cache after checking that it is complete and fits its expected fingerprint.

    Args:
      folder: written by `write`.
      expect: the fingerprint of what this run needs (`fingerprint`); its taps are read;
        others stay on disk. None accepts the cache unchecked.
      contents: whether to verify every file's SHA-256, or only names and sizes.

    Raises:
      FileNotFoundError: if there is no cache.
      ValueError: if it is unfinished, damaged (the file is named), or made from something else
        (every difference is named).
    """
    folder = _checks.path(folder=folder)
    if expect is not None:
        _checks.instance(Fingerprint, expect=expect)
    plan, files = _manifest(folder)
    problems = differences(plan.fingerprint, expect) if expect is not None else []
    if problems:
        raise ValueError(
            f"{folder} was made from something else: {'; '.join(problems)}. Write a new "
            "cache for this run, or give the run what the cache was made from."
        )
    stamps = []
    for shard in range(shard_count(plan)):
        name = file_name(shard)
        path, entry = folder / name, files[name]
        stamps.append(_stamp(path.stat()) if path.is_file() else ())
        damage = _files.damage(path, name, entry, contents=contents)
        if damage is not None:
            raise ValueError(
                f"{folder} is damaged: {damage}. Run `write` on it again: it computes damaged "
                "shards alone."
            )
    taps = (expect.taps if expect is not None else None) or plan.fingerprint.taps or ()
    columns = tuple(i for i, column in enumerate(plan.columns) if column.tap in taps)
    return Cache(folder, plan, columns, tuple(stamps))


def begun(folder: str | Path, *, expect: Fingerprint | None = None) -> Plan | None:
    """The plan of a cache that may be unfinished; None if none was started.

    Args:
      folder: as for `write`.
      expect: the fingerprint of what `write` would make.

    Raises:
      ValueError: if the plan cannot be read, or is for something else (every difference is named).
    """
    if expect is not None:
        _checks.instance(Fingerprint, expect=expect)
    file = _checks.path(folder=folder) / PLAN
    if not file.exists():
        return None
    plan = read_plan(_files.read_sealed(file))
    problems = [] if expect is None else differences(plan.fingerprint, expect)
    if problems:
        raise ValueError(f"{folder} was started from something else: {'; '.join(problems)}.")
    return plan


def rows(
    cache: Cache, index: Any, epoch: int = 0, *, stored_precision: bool = False
) -> dict[str, Any]:
    """Reads the outputs of examples `index`, as `batch["teacher"]`.

    Args:
      cache: from `open_cache`.
      index: int `[B]`, rows of the data, in any order.
      epoch: for augmented data, view `epoch % views` is read.
      stored_precision: whether to keep half-precision outputs as stored; otherwise they are
        float32, as from a live teacher.

    Returns:
      `{tap: [B, ...]}` host arrays; logits cut to k classes are a `losses.TopK`.

    Raises:
      OSError: if a shard can no longer be read.
      TypeError: if rows are not integers.
      ValueError: if a row does not exist, or the cache was written again after it was opened.
    """
    _checks.instance(Cache, cache=cache)
    _checks.integer(epoch=epoch)
    index, plan = np.asarray(index), cache.plan
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"rows must be integers, got {index.dtype}.")
    if index.size and not (0 <= index.min() and index.max() < plan.size):
        raise ValueError(
            f"rows must lie in 0..{plan.size - 1} (the cache holds "
            f"{plan.size} examples), got {index.min()}..{index.max()}."
        )
    first_shard = (epoch % (plan.views or 1)) * _shards_per_view(plan)
    arrays, dtype = _empty(cache, len(index)), record(plan)
    for shard, positions, local_rows in _group_by_shard(index, plan.shard_rows):
        records = _map_shard(cache, first_shard + shard, dtype)
        for i, array in arrays.items():
            array[positions] = records[str(i)][local_rows]
    return _collect_taps(plan, arrays, stored_precision)


def load(cache: Cache, *, stored_precision: bool = False) -> dict[str, Any]:
    """Reads all outputs, for `data.resident(..., teacher=, views=)`.

    Returns:
      `{tap: [N, ...]}`, or `[views, N, ...]` for augmented data.

    Raises:
      ValueError: if the cache was written again after it was opened.
    """
    _checks.instance(Cache, cache=cache)
    plan = cache.plan
    leading_shape = (plan.size,) if plan.views is None else (plan.views, plan.size)
    arrays, dtype = _empty(cache, *leading_shape), record(plan)
    for shard in range(shard_count(plan)):
        view, start, stop = shard_range(plan, shard)
        records = _map_shard(cache, shard, dtype)
        for i, array in arrays.items():
            (array if plan.views is None else array[view])[start:stop] = records[str(i)]
    return _collect_taps(plan, arrays, stored_precision)


def verify(folder: str | Path) -> list[str]:
    """Checks every byte of a cache's files; lists all damage.

    Raises:
      FileNotFoundError: if there is no cache.
      ValueError: if it is unfinished, or its manifest is damaged.
    """
    folder = _checks.path(folder=folder)
    _, files = _manifest(folder)
    problems = (_files.damage(folder / name, name, entry) for name, entry in files.items())
    return [problem for problem in problems if problem is not None]


def row_bytes(columns: tuple[StoredColumn, ...]) -> int:
    """Bytes of one example on disk."""
    return sum(math.prod(c.shape) * jnp.dtype(c.dtype).itemsize for c in columns)


def shard_count(plan: Plan) -> int:
    """The number of shards of all views."""
    return _shards_per_view(plan) * (plan.views or 1)


def shard_range(plan: Plan, shard: int) -> tuple[int, int, int]:
    """View, first row, and row after the last, of a shard."""
    view, index = divmod(shard, _shards_per_view(plan))
    start = index * plan.shard_rows
    return view, start, min(start + plan.shard_rows, plan.size)


def file_name(shard: int) -> str:
    """The file of a shard's records."""
    return f"{shard:05d}.bin"


def seal_name(shard: int) -> str:
    """The file of a shard's record, without which the shard does not count."""
    return f"{shard:05d}.json"


def storage_dtype(column: StoredColumn) -> np.dtype:
    """The dtype on disk: NumPy has no bfloat16, so its bits are stored as uint16."""
    return np.dtype(np.uint16 if column.dtype == "bfloat16" else column.dtype).newbyteorder("<")


def record(plan: Plan) -> np.dtype:
    """The dtype of one example: all columns, packed, named by their positions."""
    return np.dtype([(str(i), storage_dtype(c), c.shape) for i, c in enumerate(plan.columns)])


def to_json(plan: Plan) -> dict[str, Any]:
    """The content of `plan.json`."""
    value = plan._asdict() | {"format": FORMAT, "fingerprint": plan.fingerprint._asdict()}
    return value | {"columns": [column._asdict() for column in plan.columns]}


def read_plan(value: Mapping[str, Any]) -> Plan:
    """Inverse of `to_json`."""
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        version = value.get("format") if isinstance(value, Mapping) else None
        raise ValueError(f"format {_text.shown(version, 40)}, this version reads {FORMAT}")
    try:
        columns = tuple(
            StoredColumn(**c)._replace(shape=tuple(map(int, c["shape"]))) for c in value["columns"]
        )
        fields = {name: value[name] for name in Plan._fields}
        plan = Plan(**fields | {"fingerprint": from_json(value["fingerprint"]), "columns": columns})
        lengths = [n for column in columns for n in column.shape]
        sizes = (plan.size, plan.shard_rows, plan.views or 1, *lengths)
        if not all(type(n) is int and 0 <= n < 2**48 for n in sizes) or not all(sizes[:3]):
            raise ValueError(f"its sizes {_text.shown(sizes[:3], 100)} make no sense")
        if {column.tap for column in columns} != {*(plan.fingerprint.taps or ())}:
            raise ValueError("its columns are not those of its taps")
        if any(column.field not in {None, *losses.TopK._fields} for column in columns):
            raise ValueError("its columns are not those of logits")
        is_valid_top_k = plan.top_k is None or type(plan.top_k) is int
        if not is_valid_top_k or type(plan.temperature) not in (int, float):
            raise ValueError("its top_k or its temperature is not a number")
        record(plan)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is not a cache's plan ({_text.shown(str(error), 200)})") from None
    return plan


def seal_problem(folder: Path, plan: Plan, shard: int) -> str | None:
    """Why a shard is unfinished or damaged, or None; reads all its bytes."""
    try:
        entry = _files.read_sealed(folder / seal_name(shard))
    except ValueError as error:
        return str(error)
    name = file_name(shard)
    return _size_problem(plan, shard, entry) or _files.damage(folder / name, name, entry)


def _size_problem(plan: Plan, shard: int, entry: Any) -> str | None:
    """The problem with a shard's record, or None if its size is the plan's."""
    if not isinstance(entry, Mapping) or not {"bytes", "sha256"} <= entry.keys():
        return f"the record of {file_name(shard)} is missing or odd"
    _, start, stop = shard_range(plan, shard)
    expected = (stop - start) * record(plan).itemsize
    if entry["bytes"] == expected:
        return None
    size = _text.shown(entry["bytes"], 40)
    return f"{file_name(shard)} has {size} bytes, its plan asks for {expected}"


def _manifest(folder: Path) -> tuple[Plan, Mapping[str, Any]]:
    if not (folder / PLAN).exists() and not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"no teacher cache in {folder}. Make one with `write`.")
    if not (folder / MANIFEST).exists():
        try:
            plan = read_plan(_files.read_sealed(folder / PLAN))
        except ValueError as error:
            raise ValueError(f"{folder} is not finished, and damaged: {error}.") from None
        sealed = sum(path.stem.isdecimal() for path in folder.glob("*.json"))
        raise ValueError(
            f"{folder} is not finished: {sealed} of {shard_count(plan)} shards are there. Run "
            "`write` again with the same settings to continue."
        )
    try:
        manifest = _files.read_sealed(folder / MANIFEST)
        plan, files = read_plan(manifest.get("plan", {})), manifest.get("files")
        if not isinstance(files, dict) or len(files) != shard_count(plan):
            raise ValueError("its list of files is missing or odd")
        for shard in range(shard_count(plan)):
            problem = _size_problem(plan, shard, files.get(file_name(shard)))
            if problem is not None:
                raise ValueError(problem)
        return plan, files
    except ValueError as error:
        raise ValueError(
            f"{folder} is damaged: {error}. Run `write` on it again: finished shards are kept."
        ) from None


def _empty(cache: Cache, *leading_shape: int) -> dict[int, np.ndarray]:
    """An array for each of the columns, as stored."""
    columns = ((i, cache.plan.columns[i]) for i in cache.columns)
    return {i: np.empty((*leading_shape, *c.shape), storage_dtype(c)) for i, c in columns}


def _map_shard(cache: Cache, shard: int, dtype: np.dtype) -> np.ndarray:
    """The records of a shard, mapped for the lifetime of the array."""
    with open(os.path.join(cache.folder, file_name(shard)), "rb") as file:
        if _stamp(os.fstat(file.fileno())) != cache.stamps[shard]:
            raise ValueError(
                f"{cache.folder} was written again after it was opened: {file_name(shard)} is "
                "another file. Open the cache again."
            )
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _group_by_shard(index: np.ndarray, shard_rows: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """`(shard, positions in the batch, rows in the shard)`, ascending for sequential reads."""
    order = np.argsort(index, kind="stable")
    shards, local_rows = np.divmod(index[order], shard_rows)
    boundaries = np.flatnonzero(np.diff(shards)) + 1
    groups = zip(
        np.split(order, boundaries),
        np.split(local_rows, boundaries),
        np.split(shards, boundaries),
        strict=True,
    )
    return [(int(shard[0]), positions, rows) for positions, rows, shard in groups if len(shard)]


def _decode(column: StoredColumn, x: np.ndarray, stored_precision: bool) -> np.ndarray:
    if column.field == "indices":
        return x.astype(np.int32)
    if column.dtype == "bfloat16":
        if stored_precision:
            return x.view(jnp.bfloat16)
        # The upper half of a float32's bits.
        return np.left_shift(x, np.uint32(16), dtype=np.uint32).view(np.float32)
    if column.dtype == "float16" and not stored_precision:
        return x.astype(np.float32)
    return x


def _collect_taps(
    plan: Plan, arrays: Mapping[int, np.ndarray], stored_precision: bool
) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for i, stored in arrays.items():
        column, x = plan.columns[i], _decode(plan.columns[i], stored, stored_precision)
        if column.field is None:
            outputs[column.tap] = x
        else:
            outputs.setdefault(column.tap, {})[column.field] = x
    return {tap: losses.TopK(**x) if isinstance(x, dict) else x for tap, x in outputs.items()}


def _shards_per_view(plan: Plan) -> int:
    return -(-plan.size // plan.shard_rows)
