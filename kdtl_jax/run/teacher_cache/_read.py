"""Reading a cache: what it holds is checked once, rows are gathered from memory-mapped shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _files, losses
from kdtl_jax.run.teacher_cache import _plan
from kdtl_jax.run.teacher_cache._fingerprint import Fingerprint, differences
from kdtl_jax.run.teacher_cache._plan import Column, Plan

FN = "teacher_cache.open_cache"


class Cache(NamedTuple):
    """An open cache; `parts[i][j]` is the memory-mapped shard j of column i."""

    folder: Path
    plan: Plan
    columns: tuple[Column, ...]  # those of the taps asked for
    parts: tuple[tuple[np.ndarray, ...], ...]


def open_cache(folder: str | Path, *, expect: Fingerprint | None, contents: bool = True) -> Cache:
    """Opens a cache after checking that it is whole, and what it was made from.

    Args:
      folder: what `write` filled.
      expect: the fingerprint of what this run needs (`fingerprint`); its taps are read, others
        stay on disk. None takes the cache as it is, unchecked.
      contents: whether to compare every byte with its SHA-256, or only names and sizes.

    Raises:
      FileNotFoundError: if there is no cache.
      ValueError: if it is not finished, damaged (the file is named), or made from something else
        (every difference is named).
    """
    folder = Path(folder)
    plan, files = _manifest(folder)
    problems = differences(plan.fingerprint, expect) if expect is not None else []
    if problems:
        raise ValueError(
            f"{FN}: {folder} was made from something else: {'; '.join(problems)}. Write a new "
            "cache for this run, or give the run what the cache was made from."
        )
    damage = _plan.files_problem(folder, files, contents=contents)
    if damage is not None:
        raise ValueError(
            f"{FN}: {folder} is damaged: {damage}. Run `write` on it again: it computes damaged "
            "shards alone."
        )
    names = [_plan.file_names(plan, shard) for shard in range(_plan.shard_count(plan))]
    wanted = (expect.taps if expect is not None else None) or plan.fingerprint.taps or ()
    chosen = [i for i, column in enumerate(plan.columns) if column.tap in wanted]
    parts = tuple(
        tuple(_open(folder, plan, j, n[i], i) for j, n in enumerate(names)) for i in chosen
    )
    return Cache(folder, plan, tuple(plan.columns[i] for i in chosen), parts)


def rows(
    cache: Cache, index: Any, epoch: int = 0, *, stored_precision: bool = False
) -> dict[str, Any]:
    """The outputs of examples `index`, as `batch["teacher"]`.

    Args:
      cache: from `open_cache`.
      index: int `[B]`, rows of the data, in any order.
      epoch: augmented data is read from view `epoch % views`.
      stored_precision: keep half-precision outputs as they are stored; else they are float32, as
        a live teacher gives them.

    Returns:
      `{tap: [B, ...]}` host arrays; logits cut to k classes are a `losses.TopK`.

    Raises:
      ValueError: if a row does not exist.
      TypeError: if rows are not integers.
    """
    index = np.asarray(index)
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"rows must be integers, got {index.dtype}.")
    if index.size and not (0 <= index.min() and index.max() < cache.plan.size):
        raise ValueError(
            f"rows must lie in 0..{cache.plan.size - 1} (the cache holds "
            f"{cache.plan.size} examples), got {index.min()}..{index.max()}."
        )
    each = _plan.shards_per_view(cache.plan)
    first = (epoch % (cache.plan.views or 1)) * each
    pieces = _pieces(index, cache.plan.shard_rows)
    found = [
        _decoded(column, _gather(shards[first : first + each], index, pieces), stored_precision)
        for column, shards in zip(cache.columns, cache.parts, strict=True)
    ]
    return _named(cache.columns, found)


def load(cache: Cache, *, stored_precision: bool = False) -> dict[str, Any]:
    """All outputs, for `data.resident(..., teacher=, views=)`.

    Returns:
      `{tap: [N, ...]}`, or `[views, N, ...]` of augmented data.
    """
    plan, found = cache.plan, []
    for column, shards in zip(cache.columns, cache.parts, strict=True):
        whole = np.concatenate(shards)
        if plan.views is not None:
            whole = whole.reshape(plan.views, plan.size, *column.shape)
        found.append(_decoded(column, whole, stored_precision))
    return _named(cache.columns, found)


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a cache's files, every byte compared; nothing if it is whole.

    Raises:
      FileNotFoundError: if there is no cache.
      ValueError: if it is not finished, or its manifest is damaged.
    """
    folder = Path(folder)
    _, files = _manifest(folder)
    found = [_plan.files_problem(folder, {name: files[name]}, contents=True) for name in files]
    return [problem for problem in found if problem is not None]


def _manifest(folder: Path) -> tuple[Plan, Mapping[str, Any]]:
    if not (folder / _plan.PLAN).exists() and not (folder / _plan.MANIFEST).exists():
        raise FileNotFoundError(f"{FN}: no teacher cache in {folder}. Make one with `write`.")
    if not (folder / _plan.MANIFEST).exists():
        try:
            plan = _plan.read_plan(_files.read_sealed(folder / _plan.PLAN))
        except ValueError as error:
            raise ValueError(f"{FN}: {folder} is not finished, and damaged: {error}.") from None
        count = _plan.shard_count(plan)
        there = sum((folder / _plan.seal_name(i)).exists() for i in range(count))
        raise ValueError(
            f"{FN}: {folder} is not finished: {there} of {count} shards are there. Run `write` "
            "again with the same settings to go on."
        )
    try:
        manifest = _files.read_sealed(folder / _plan.MANIFEST)
        return _plan.read_plan(manifest["plan"]), manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{FN}: {folder} is damaged: {error}. Run `write` on it again: finished shards "
            "are kept."
        ) from None


def _open(folder: Path, plan: Plan, shard: int, name: str, i: int) -> np.ndarray:
    """A shard as a plain array over the mapped file: indexing a memmap object costs more."""
    mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    _, start, stop = _plan.shard_range(plan, shard)
    column = plan.columns[i]
    expected = (stop - start, *column.shape), _plan.storage_dtype(column)
    if (mapped.shape, mapped.dtype) != expected:
        raise ValueError(
            f"{FN}: {folder / name} holds {mapped.dtype}{list(mapped.shape)}, expected "
            f"{expected[1]}{list(expected[0])}. Run `write` on the folder again."
        )
    return mapped


def _pieces(index: np.ndarray, shard_rows: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """`(shard, places in the batch, rows in the shard)`, rows ascending: disks read forward."""
    order = np.argsort(index, kind="stable")
    shards, places = np.divmod(index[order], shard_rows)
    cuts = np.flatnonzero(np.diff(shards)) + 1
    split = zip(np.split(order, cuts), np.split(places, cuts), np.split(shards, cuts), strict=True)
    return [(int(shard[0]), batch, rows) for batch, rows, shard in split if len(shard)]


def _gather(
    shards: Sequence[np.ndarray],
    index: np.ndarray,
    pieces: list[tuple[int, np.ndarray, np.ndarray]],
) -> np.ndarray:
    out = np.empty((len(index), *shards[0].shape[1:]), shards[0].dtype)
    for shard, places, within in pieces:
        out[places] = shards[shard][within]
    return out


def _decoded(column: Column, x: np.ndarray, stored_precision: bool) -> np.ndarray:
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


def _named(columns: Sequence[Column], arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for column, x in zip(columns, arrays, strict=True):
        if column.field is None:
            outputs[column.tap] = x
        else:
            outputs.setdefault(column.tap, {})[column.field] = x
    return {tap: losses.TopK(**x) if isinstance(x, dict) else x for tap, x in outputs.items()}
