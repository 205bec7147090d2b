"""Batches on the host: read by rows, drawn from any iterable, padded, prefetched."""

import itertools
import queue
import threading
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from kdtl_jax import _checks
from kdtl_jax.run.data._resident import Batch, canonical, length, order_rows, typed_key

Source = Callable[[int], Iterator[Batch]]  # step -> the batches from that step on
Reader = Callable[[int, np.ndarray], Batch]  # epoch, rows [B] -> batch of host arrays


def stream(
    read: Reader,
    size: int,
    batch_size: int,
    *,
    key: Array | None,
    drop_remainder: bool = True,
) -> Source:
    """Makes batches from rows that `read(epoch, rows)` fetches, for data larger than memory.

    The order matches `resident` with the same key. If shuffled reading is slow, sort the rows of
    a batch inside `read` (`take_rows` does).

    Args:
      read: `(epoch, rows) -> {"inputs": [B, ...], ...}`, host arrays.
      size: number of examples.
      batch_size: examples per batch.
      key: shuffling key; None keeps the order.
      drop_remainder: as in `resident`.

    Raises:
      ValueError: if the batch is too large.
    """
    _checks.count(1, batch_size=batch_size, size=size)
    if batch_size > size:
        raise ValueError(f"batch_size must lie in 1..{size}, got {batch_size}.")
    steps = size // batch_size if drop_remainder else -(-size // batch_size)
    order = None if key is None else jax.random.split(typed_key(key))[0]

    def batches(step: int) -> Iterator[Batch]:
        for epoch in itertools.count(step // steps):
            epoch_index = jax.device_put(np.int32(epoch))
            rows = np.asarray(order_rows(order, epoch_index, size, batch_size, drop_remainder))
            for i in range(step % steps if epoch == step // steps else 0, steps):
                batch = dict(read(epoch, rows[i]))
                if not drop_remainder:
                    is_real = np.arange(batch_size) + i * batch_size < size
                    batch["weights"] = np.float32(is_real) * batch.get("weights", np.float32(1))
                yield batch

    return batches


def iterate(
    batches: Iterable[Any],
    batch_size: int | None = None,
    *,
    names: Sequence[str] = ("inputs", "labels"),
    rename: Mapping[str, str] | None = None,
) -> Source:
    """Makes a `Source` of any iterable of batches, which is restarted at its end.

    Short batches are padded with weight 0; for a model with batch statistics, `loop.run` gives them
    their own shape instead. A resumed run draws and discards the batches that it has already seen,
    so resuming is exact if the iterable is deterministic; give loaders their own seed. If an
    iterable can start anywhere, wrap it by hand: a `Source` is only a function `step -> iterator`.

    Args:
      batches: yields dicts of arrays (NumPy, JAX, torch tensors, lists of numbers), or tuples.
      batch_size: shorter batches are padded to it; None uses the first batch's length.
      names: names for the entries of tuples.
      rename: `{name in the batch: name here}` for dicts, for example
        `{"image": "inputs", "label": "labels"}`; entries that it does not list are dropped.

    Raises:
      ValueError: while batches are drawn, if the iterable yields none.
    """

    def endless() -> Iterator[Batch]:
        for epoch in itertools.count():
            has_batches = False
            for batch in batches:
                has_batches = True
                yield _as_batch(batch, names, rename)
            if not has_batches or isinstance(batches, Iterator):
                if epoch == 0 and not has_batches:
                    raise ValueError("the iterable yields no batch.")
                return

    def source(step: int) -> Iterator[Batch]:
        width = batch_size
        for i, batch in enumerate(endless()):
            width = width or length(batch)
            if i >= step:
                yield pad(batch, width)

    return source


def pad(batch: Batch, batch_size: int) -> dict[str, Any]:
    """Pads a batch of host arrays to `batch_size` rows; `"weights"` is 0 for the padding.

    The padding repeats the batch's own rows, so that batch statistics stay close to the data's.

    Raises:
      ValueError: if the batch is empty or longer than `batch_size`.
    """
    size = length(batch)
    if not 0 < size <= batch_size:
        raise ValueError(f"a batch must have 1..{batch_size} rows, got {size}.")
    rows = np.arange(batch_size) % size
    weights = np.asarray(batch.get("weights", np.ones(size, np.float32)), np.float32)
    padded = (
        batch if size == batch_size else jax.tree.map(lambda x: np.asarray(x)[rows], dict(batch))
    )
    real_weights = (np.arange(batch_size) < size).astype(np.float32)
    return dict(padded) | {"weights": weights[rows] * real_weights}


def unpad(batch: Batch) -> dict[str, Any]:
    """Undoes `pad`: the real rows of a batch, without `"weights"`.

    A batch with weights other than 0 and 1, or only zeros, is returned unchanged.
    """
    _checks.mappings(batch=batch)
    weights = np.asarray(batch["weights"]) if "weights" in batch else np.ones(0)
    is_padding = weights.ndim == 1 and np.isin(weights, (0, 1)).all()
    if not is_padding or (weights.size and not weights.any()):
        return dict(batch)
    arrays = {name: x for name, x in batch.items() if name != "weights"}
    if weights.all():
        return arrays
    rows = np.flatnonzero(weights)
    return jax.tree.map(lambda x: np.asarray(x)[rows], arrays)


def in_order(arrays: Batch, batch_size: int) -> Iterator[dict[str, Any]]:
    """One pass over host arrays for evaluation: every row once, with the last batch padded."""
    size = length(arrays)
    for start in range(0, size, batch_size):
        rows = np.arange(start, min(start + batch_size, size))
        yield pad(take_rows(arrays, rows), batch_size)


def open_arrays(files: Mapping[str, str | Path]) -> dict[str, np.ndarray]:
    """Memory-maps `.npy` files, `{"inputs": path, "labels": path}`; nothing is unpickled.

    Raises:
      OSError: if a file does not exist or cannot be read.
      ValueError: if lengths differ, or a file is not a complete .npy or holds Python objects.
    """
    _checks.mappings(files=files)
    arrays = {}
    for name, path in files.items():
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a plain .npy array ({error}).") from None
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError(
                f"{path} is an npz, which cannot be memory-mapped. Save each array with np.save."
            )
        arrays[name] = array
    length(arrays)
    return arrays


def take_rows(arrays: Batch, rows: np.ndarray) -> dict[str, Any]:
    """Takes rows of (memory-mapped) host arrays, read in ascending order for speed."""
    ascending = np.argsort(rows, kind="stable")
    inverse = np.empty_like(ascending)
    inverse[ascending] = np.arange(len(rows))
    return jax.tree.map(lambda x: np.asarray(x[rows[ascending]])[inverse], dict(arrays))


def prefetch(
    batches: Iterator[Batch], depth: int = 2, place: Callable[[Any], Any] = jax.device_put
) -> Generator[Any, None, None]:
    """Draws batches in a thread and puts them on the device, `depth` batches ahead of their use.

    Args:
      batches: any iterator; an error in it is raised here, after the batches before it. It may
        yield the same host arrays again with other values.
      depth: number of batches waiting on the device.
      place: puts one batch on the device(s), `jax.device_put` or a sharded placement.

    Raises:
      Exception: what the iterator or `place` raised.
    """
    ready: queue.Queue[Any] = queue.Queue(max(depth, 1))
    stopped = threading.Event()

    def offer(item: tuple[str, Any]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def draw() -> None:
        try:
            for batch in batches:
                offer(("batch", place(jax.tree.map(_copied, batch))))
                if stopped.is_set():
                    return
            offer(("end", None))
        except BaseException as error:  # handed to the consumer, whatever it is
            offer(("error", error))

    thread = threading.Thread(target=draw, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stopped.set()
        thread.join(timeout=1)


def _copied(x: Any) -> Any:
    """Copies a host array: `device_put` may share its memory, which a loader may fill again."""
    array = canonical(x)
    return array if isinstance(array, jax.Array) else np.array(array)


def _as_batch(batch: Any, names: Sequence[str], rename: Mapping[str, str] | None) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        arrays = dict(batch)
        if rename is not None:
            missing = sorted(set(rename) - set(arrays))
            if missing:
                raise ValueError(f"batches lack {missing}; they have {sorted(arrays)}.")
            arrays = {new: arrays[old] for old, new in rename.items()}
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) != len(names):
            raise ValueError(
                f"batches are tuples of {len(batch)}, but names= has {len(names)}: {names}."
            )
        arrays = dict(zip(names, batch, strict=True))
    else:
        raise ValueError(
            f"a batch must be a dict or a tuple of arrays, got {type(batch).__name__}."
        )
    # A list is an array of numbers here (datasets yield them), not a tree.
    arrays = jax.tree.map(np.asarray, arrays, is_leaf=lambda x: isinstance(x, list))
    objects = [name for name, x in arrays.items() if getattr(x, "dtype", None) == np.dtype(object)]
    if objects:
        raise ValueError(
            f"{objects} are not arrays of numbers (rows of different lengths?). Pad or drop "
            "them before batching."
        )
    return arrays
