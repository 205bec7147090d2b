"""Computing a cache: shard by shard, each whole or absent, taken up where it was killed."""

import collections
import errno
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _files
from kdtl_jax import augment as augmentation
from kdtl_jax._types import ModelFn, PyTree, Variables
from kdtl_jax.run.teacher_cache import _plan
from kdtl_jax.run.teacher_cache._fingerprint import as_numpy, count, differences, fingerprint
from kdtl_jax.run.teacher_cache._plan import Plan

FN = "teacher_cache.write"
Batch = Mapping[str, Any]
Augment = Callable[[Array, Batch], Batch]  # keys [B], batch -> batch
Progress = Callable[[int, int], None]  # rows done, rows in all


def write(
    folder: str | Path,
    teacher: ModelFn,
    variables: PyTree,
    arrays: Batch,
    *,
    batch_size: int,
    preprocessing: Mapping[str, Any] | None = None,
    taps: Sequence[str] = ("logits",),
    top_k: int | None = None,
    temperature: float = 1.0,
    dtype: Any = jnp.float32,
    views: int | None = None,
    view_key: Array | None = None,
    augment: Augment | None = None,
    weights: str | None = None,
    shard_rows: int | None = None,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Progress | None = None,
) -> Plan:
    """Runs the teacher over the data and stores its outputs; call it again to go on.

    Finished shards are kept if their SHA-256 holds, damaged ones are computed again. Nothing
    counts as a cache before every shard is there.

    Args:
      folder: made if it does not exist; holds one cache and nothing else.
      teacher: model function, run in evaluation mode.
      variables: its parameters, or `Variables`.
      arrays: `{"inputs": [N, ...], ...}`, host arrays, memory-mapped or not. The teacher reads
        `"inputs"`; the other entries are there for `augment`.
      batch_size: examples per call of the teacher.
      preprocessing: as in `fingerprint`.
      taps: as in `fingerprint`.
      top_k: as in `fingerprint`.
      temperature: as in `fingerprint`.
      dtype: as in `fingerprint`.
      views: as in `fingerprint`.
      view_key: as in `fingerprint`.
      augment: `(keys, batch) -> batch`, the function that training uses; needs `views`.
      weights: the digest to record, where `variables` are derived from other weights (int8).
      shard_rows: examples per file; None takes at most 8,192 and about 64 MiB.
      place: puts a batch on the device(s), `jax.device_put` or a sharded placement.
      progress: called with rows done and rows in all, views counted.

    Returns:
      The plan; `open_cache` reads the outputs.

    Raises:
      ValueError: if the folder holds a cache of something else (named), or other files; if an
        output does not exist, holds NaN, or overflows float16.
      NotADirectoryError: if the folder's path is that of a file.
      OSError: if the disk is full or read-only; finished shards are intact.
      RuntimeError: if another process is writing there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{FN}: {folder} is a file. Name a new or an empty folder.")
    if batch_size < 1 or (shard_rows is not None and shard_rows < 1):
        raise ValueError(
            f"{FN}: batch_size and shard_rows must be at least 1, got {batch_size}, {shard_rows}."
        )
    if (augment is None) != (views is None):
        raise ValueError(
            f"{FN}: augment= and views= (with view_key=) belong together, got "
            f"{'no ' if augment is None else ''}augment and views={views}."
        )
    made = fingerprint(
        variables if weights is None else weights,
        arrays,
        preprocessing=preprocessing,
        taps=taps,
        top_k=top_k,
        temperature=temperature,
        dtype=dtype,
        views=views,
        view_key=view_key,
    )
    arrays = jax.tree.map(as_numpy, dict(arrays))
    size = count(FN, arrays)
    batch_size = min(batch_size, size)
    given = variables if isinstance(variables, Variables) else Variables(variables)

    def outputs_of(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        if augment is not None:
            batch = augment(augmentation.example_keys(key, view, rows), batch)
        return teacher(variables.params, variables.model_state, batch["inputs"])[0]

    example = _batch(arrays, np.arange(batch_size)), np.zeros(batch_size, np.int32), np.int32(0)
    outputs = jax.eval_shape(outputs_of, given, *example, view_key)
    stored = _plan.columns(FN, outputs, batch_size, made.taps or (), top_k, str(made.dtype))
    rows_each = shard_rows or _plan.shard_rows(stored, size)
    plan = Plan(made, size, views, top_k, float(temperature), rows_each, stored)

    @jax.jit
    def run(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        outputs = outputs_of(variables, batch, rows, view, key)
        columns = _plan.encoded(outputs, plan)
        return columns, [
            _faults(outputs[c.tap], x, c) for c, x in zip(stored, columns, strict=True)
        ]

    def compute(shard: int, tell: Callable[[int], None]) -> list[np.ndarray]:
        """The columns of a shard; the next batch is at work while the last one is copied."""
        view, first, last = _plan.shard_range(plan, shard)
        whole = [np.empty((last - first, *c.shape), _plan.storage_dtype(c)) for c in stored]
        queued: collections.deque[tuple[int, Any]] = collections.deque()

        def fetch() -> None:
            start, (columns, faults) = queued.popleft()
            stop = min(start + batch_size, last)
            _check(plan, faults, view, start, stop)
            for out, x, column in zip(whole, columns, stored, strict=True):
                host = np.asarray(x)[: stop - start]
                out[start - first : stop - first] = host.view(_plan.storage_dtype(column))
            if stop < last:  # the whole shard is told once it is on the disk
                tell(stop - first)

        for start in range(first, last, batch_size):
            # The last batch is filled up with the shard's own first rows.
            rows = first + (np.arange(start, start + batch_size) - first) % (last - first)
            batch = place((_batch(arrays, rows), rows.astype(np.int32)))
            queued.append((start, run(given, *batch, jax.device_put(np.int32(view)), view_key)))
            if len(queued) > 1:
                fetch()
        while queued:
            fetch()
        return whole

    folder.mkdir(parents=True, exist_ok=True)
    with _files.locked(folder):
        plan = _begin(folder, plan, keep_layout=shard_rows is None)
        _compute_missing(folder, plan, compute, progress)
        _finish(folder, plan)
    return plan


def _begin(folder: Path, plan: Plan, *, keep_layout: bool) -> Plan:
    """The plan of a cache begun earlier, if it is the same cache; else this one, written."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    found = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    if not found:
        _files.write_sealed(folder / _plan.PLAN, _plan.to_json(plan))
        return plan
    another = "Choose another folder, or delete this one."
    if _plan.PLAN not in found:
        raise ValueError(f"{FN}: {folder} holds other files: {', '.join(found[:5])}. {another}")
    try:
        begun = _plan.read_plan(_files.read_sealed(folder / _plan.PLAN))
    except ValueError as error:
        raise ValueError(f"{FN}: {folder} cannot be taken up: {error}. {another}") from None
    problems = differences(begun.fingerprint, plan.fingerprint)
    if not problems and begun._replace(shard_rows=plan.shard_rows) != plan:
        problems = [f"outputs differ: {list(begun.columns)} there, {list(plan.columns)} here"]
    if not problems and not keep_layout and begun.shard_rows != plan.shard_rows:
        problems = [f"shard_rows differ: {begun.shard_rows} there, {plan.shard_rows} here"]
    if problems:
        raise ValueError(f"{FN}: {folder} holds another cache: {'; '.join(problems)}. {another}")
    return begun


def _compute_missing(
    folder: Path,
    plan: Plan,
    compute: Callable[[int, Callable[[int], None]], list[np.ndarray]],
    progress: Progress | None,
) -> None:
    shards, total = _plan.shard_count(plan), plan.size * (plan.views or 1)
    sizes = [last - first for _, first, last in (_plan.shard_range(plan, i) for i in range(shards))]
    missing = [i for i in range(shards) if _plan.seal_problem(folder, plan, i) is not None]
    done = total - sum(sizes[i] for i in missing)
    _check_space(folder, plan, total - done)

    def tell(rows: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    tell(0)
    for made, shard in enumerate(missing):
        columns = compute(shard, tell)
        try:
            _write_shard(folder, plan, shard, columns)
        except OSError as error:
            raise _failed(folder, shards - len(missing) + made, shards, error) from error
        done += sizes[shard]
        tell(0)


def _write_shard(folder: Path, plan: Plan, shard: int, columns: list[np.ndarray]) -> None:
    """The arrays, then their seal: without it the shard does not count."""
    (folder / _plan.seal_name(shard)).unlink(missing_ok=True)
    files = {}
    for name, column in zip(_plan.file_names(plan, shard), columns, strict=True):
        content = io.BytesIO()
        np.lib.format.write_array(content, column, allow_pickle=False)
        _files.write_atomic(folder / name, content.getvalue())
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "sha256": _files.sha256(folder / name)}
    _files.write_sealed(folder / _plan.seal_name(shard), {"files": files})


def _finish(folder: Path, plan: Plan) -> None:
    files = {}
    for shard in range(_plan.shard_count(plan)):
        files |= _files.read_sealed(folder / _plan.seal_name(shard))["files"]
    manifest = {"plan": _plan.to_json(plan), "files": files}
    _files.write_sealed(folder / _plan.MANIFEST, manifest)


def _batch(arrays: Batch, rows: np.ndarray) -> Any:
    """Rows of every array, in the 32-bit dtypes that JAX gives host arrays."""

    def take(x: Any) -> np.ndarray:
        taken = x[rows]
        return taken.astype(jax.dtypes.canonicalize_dtype(taken.dtype), copy=False)

    return jax.tree.map(take, dict(arrays))


def _faults(output: Array, stored: Array, column: _plan.Column) -> Array:
    """uint8 `[B]`: 1 where a row holds NaN, 2 where the stored precision overflows."""
    axes = tuple(range(1, stored.ndim))
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return jnp.zeros(stored.shape[:1], jnp.uint8)
    code = jnp.any(jnp.isnan(stored), axis=axes).astype(jnp.uint8)
    if column.field is not None:
        return code
    over = jnp.any(jnp.isinf(stored) & jnp.isfinite(output), axis=axes)
    return jnp.where(over, jnp.full_like(code, 2), code)


def _check(plan: Plan, faults: list[Array], view: int, start: int, stop: int) -> None:
    for column, codes in zip(plan.columns, faults, strict=True):
        codes = np.asarray(codes)[: stop - start]
        if not codes.any():
            continue
        row = int(np.flatnonzero(codes)[0])
        where = f"output {column.tap!r} of row {start + row}" + (f", view {view}," * bool(view))
        if codes[row] == 1:
            raise ValueError(f"{FN}: {where} is NaN. Check the teacher's weights and inputs.")
        raise ValueError(
            f"{FN}: {where} is finite but too large for {column.dtype}. Use bfloat16 or float32."
        )


def _check_space(folder: Path, plan: Plan, rows: int) -> None:
    """Refuses before computing what cannot fit."""
    needed, free = rows * _plan.row_bytes(plan.columns), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{FN}: {needed:,} bytes are needed in {folder}, {free:,} are free. Make room, store "
            "top_k classes or a smaller dtype, or choose another folder",
        )


def _failed(folder: Path, whole: int, shards: int, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{FN}: a shard could not be written in {folder} ({error.strerror or error}). {whole} of "
        f"{shards} shards are finished and intact; run it again to go on",
    )
