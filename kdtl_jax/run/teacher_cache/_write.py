"""Computing a cache: shard by shard, each complete or absent, resumable at any point."""

import collections
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _files, _locks, _text, losses, trees
from kdtl_jax import augment as augmentation
from kdtl_jax._types import ModelFn, Outputs, PyTree, Variables
from kdtl_jax.run import processes
from kdtl_jax.run.teacher_cache import _shards
from kdtl_jax.run.teacher_cache._fingerprint import as_numpy, count, differences, fingerprint
from kdtl_jax.run.teacher_cache._shards import Column, Plan

SHARD_ROWS = 8192  # a kill loses the current shard
SHARD_BYTES = 64 * 2**20
Batch = Mapping[str, Any]
Augment = Callable[[Array, Batch], Batch]  # keys [B], batch -> batch
Progress = Callable[[int, int], None]  # rows done, rows in all
ANOTHER = "Choose another folder, or delete this one."


def write(
    folder: str | Path,
    teacher: ModelFn,
    variables: PyTree,
    arrays: Batch,
    *,
    batch_size: int,
    model: str | None = None,
    classes: Sequence[str] | None = None,
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
    """Runs the teacher over the data and stores its outputs; call it again to resume.

    Finished shards are kept if their SHA-256 matches; damaged ones are computed again. The folder
    does not count as a cache until every shard is present. With more than one process, the first
    one writes and the others wait for it.

    Args:
      folder: created if it does not exist; it holds one cache and nothing else.
      teacher: model function, run in evaluation mode.
      variables: its parameters, or `Variables`.
      arrays: `{"inputs": [N, ...], ...}`, host arrays, memory-mapped or not. The teacher reads
        `"inputs"`; the other entries are for `augment`.
      batch_size: examples per call of the teacher.
      model: as in `fingerprint`.
      classes: as in `fingerprint`.
      preprocessing: as in `fingerprint`.
      taps: as in `fingerprint`.
      top_k: as in `fingerprint`.
      temperature: as in `fingerprint`.
      dtype: as in `fingerprint`.
      views: as in `fingerprint`.
      view_key: as in `fingerprint`.
      augment: `(keys, batch) -> batch`, the function that training uses; needs `views`.
      weights: the digest to record, if `variables` are derived from other weights (int8).
      shard_rows: examples per file; None means at most 8,192 and about 64 MiB.
      place: puts a batch on the device(s), `jax.device_put` or a sharded placement.
      progress: called with the rows done and the total, over all views.

    Returns:
      The plan; `open_cache` reads the outputs.

    Raises:
      ValueError: if the folder holds another cache (differences are named) or other files; if an
        output does not exist, has NaN or infinity, or overflows float16.
      NotADirectoryError: if the folder is a file.
      OSError: if the disk is full or read-only; finished shards stay intact.
      RuntimeError: if another process is writing there.
    """
    folder = _checks.path(folder=folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Name a new or an empty folder.")
    _checks.count(1, batch_size=batch_size)
    if shard_rows is not None:
        _checks.count(1, shard_rows=shard_rows)
    if (augment is None) != (views is None):
        raise ValueError(
            f"augment= and views= (with view_key=) belong together, got "
            f"{'no ' if augment is None else ''}augment and views={views}."
        )
    made = fingerprint(
        variables if weights is None else weights,
        arrays,
        model=model,
        classes=classes,
        preprocessing=preprocessing,
        taps=taps,
        top_k=top_k,
        temperature=temperature,
        dtype=dtype,
        views=views,
        view_key=view_key,
    )
    arrays = jax.tree.map(as_numpy, dict(arrays))
    size = count(arrays)
    batch_size = min(batch_size, size)
    given = variables if isinstance(variables, Variables) else Variables(variables)
    given = jax.tree.map(_local, given)

    def outputs_of(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        if augment is not None:
            batch = augment(augmentation.example_keys(key, view, rows), batch)
        return teacher(variables.params, variables.model_state, batch["inputs"])[0]

    example = _batch(arrays, np.arange(batch_size)), np.zeros(batch_size, np.int32), np.int32(0)
    outputs = jax.eval_shape(outputs_of, given, *example, view_key)
    stored = columns(outputs, batch_size, made.taps or (), top_k, str(made.dtype))
    rows_each = shard_rows or _rows_per_shard(stored, size)
    plan = Plan(made, size, views, top_k, float(temperature), rows_each, stored)

    @jax.jit
    def run(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        outputs = outputs_of(variables, batch, rows, view, key)
        encoded = _encoded(outputs, plan)
        return encoded, [
            _faults(outputs[c.tap], x, c) for c, x in zip(stored, encoded, strict=True)
        ]

    def compute(plan: Plan, shard: int, report: Callable[[int], None]) -> np.ndarray:
        """The records of a shard; the next batch is computed while the last one is copied."""
        view, first, last = _shards.shard_range(plan, shard)
        records = np.empty(last - first, _shards.record(plan))
        queued: collections.deque[tuple[int, Any]] = collections.deque()

        def fetch() -> None:
            start, (encoded, faults) = queued.popleft()
            stop = min(start + batch_size, last)
            _check(plan, faults, view, start, stop)
            for i, (x, column) in enumerate(zip(encoded, stored, strict=True)):
                host = np.asarray(x)[: stop - start].view(_shards.storage_dtype(column))
                records[str(i)][start - first : stop - first] = host
            if stop < last:  # a complete shard is reported once it is on disk
                report(stop - first)

        for start in range(first, last, batch_size):
            # The last batch is padded with the shard's own first rows.
            rows = first + (np.arange(start, start + batch_size) - first) % (last - first)
            batch = place((_batch(arrays, rows), rows.astype(np.int32)))
            queued.append((start, run(given, *batch, jax.device_put(np.int32(view)), view_key)))
            if len(queued) > 1:
                fetch()
        while queued:
            fetch()
        return records

    def write_here() -> dict[str, Any]:
        with _locks.taken(folder, lambda: _check_folder(folder)):
            agreed = _begin(folder, plan, keep_layout=shard_rows is None)
            _compute_missing(folder, agreed, compute, progress)
            _finish(folder, agreed)
        return _shards.to_json(agreed)

    return _shards.read_plan(processes.decide(write_here))


def columns(
    outputs: Mapping[str, Any], batch: int, taps: tuple[str, ...], top_k: int | None, dtype: str
) -> tuple[Column, ...]:
    """Columns for the (abstract) outputs `[B, ...]` of a batch.

    Raises:
      ValueError: if an output does not exist (the nearest are listed) or has no row per example.
    """
    found = []
    for tap in taps:
        if tap not in outputs:
            near = ", ".join(map(repr, trees.nearest(tap, list(outputs), n=5)))
            raise ValueError(f"the teacher has no output {tap!r}. Nearest: {near}.")
        output = outputs[tap]
        if output.shape[:1] != (batch,):
            raise ValueError(
                f"output {tap!r} must have one row per example, got {list(output.shape)} for "
                f"a batch of {batch}."
            )
        shape = tuple(map(int, output.shape[1:]))
        if tap == "logits" and top_k is not None:
            if not shape or top_k > shape[-1]:
                raise ValueError(
                    f"top_k={top_k} needs logits [B, ..., num_classes] with at least so many "
                    f"classes, got {list(output.shape)}."
                )
            found += [
                Column(tap, "indices", _smallest_unsigned(shape[-1]), (*shape[:-1], top_k)),
                Column(tap, "log_probs", dtype, (*shape[:-1], top_k)),
                Column(tap, "log_tail", "float32", shape[:-1]),
            ]
        else:
            floating = jnp.issubdtype(output.dtype, jnp.floating)
            found.append(Column(tap, None, dtype if floating else output.dtype.name, shape))
    return tuple(found)


def _encoded(outputs: Outputs, plan: Plan) -> list[jax.Array]:
    """Inside `jit`: the columns for a batch of outputs, in the stored precision."""
    arrays = []
    for column in plan.columns:
        x = outputs[column.tap]
        if column.field is not None and plan.top_k is not None:
            cut = losses.top_k_targets(x, k=plan.top_k, temperature=plan.temperature)
            x = getattr(cut, column.field)
        arrays.append(x.astype(column.dtype))
    return arrays


def _rows_per_shard(columns: tuple[Column, ...], size: int) -> int:
    """Rows of a shard: at most 8,192, at most about 64 MiB."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, _shards.row_bytes(columns)), size))


def _check_folder(folder: Path) -> None:
    """Refuses a folder with files that are not a cache's, before changing anything in it."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = [name for name in names if name != ".lock" and not name.endswith(_files.TEMPORARY)]
    if others and _shards.PLAN not in others:
        listed = ", ".join(_text.shown(name) for name in sorted(others)[:5])
        raise ValueError(f"{folder} holds other files: {listed}. {ANOTHER}")


def _begin(folder: Path, plan: Plan, *, keep_layout: bool) -> Plan:
    """The plan of a cache started earlier, if it is the same cache; otherwise writes this one."""
    try:
        begun = _shards.begun(folder)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be resumed: {error}. {ANOTHER}") from None
    if begun is None:
        _files.write_sealed(folder / _shards.PLAN, _shards.to_json(plan))
        return plan
    problems = differences(begun.fingerprint, plan.fingerprint)
    if not problems and begun._replace(shard_rows=plan.shard_rows) != plan:
        there, here = (_text.shown([*each.columns], 200) for each in (begun, plan))
        problems = [f"outputs differ: {there} there, {here} here"]
    if not problems and not keep_layout and begun.shard_rows != plan.shard_rows:
        problems = [f"shard_rows differ: {begun.shard_rows} there, {plan.shard_rows} here"]
    if problems:
        raise ValueError(f"{folder} holds another cache: {'; '.join(problems)}. {ANOTHER}")
    for leftover in folder.glob(f".*{_files.TEMPORARY}"):
        leftover.unlink()
    return begun


def _compute_missing(
    folder: Path,
    plan: Plan,
    compute: Callable[[Plan, int, Callable[[int], None]], np.ndarray],
    progress: Progress | None,
) -> None:
    shards, total = _shards.shard_count(plan), plan.size * (plan.views or 1)
    sizes = [
        stop - start for _, start, stop in (_shards.shard_range(plan, i) for i in range(shards))
    ]
    missing = [i for i in range(shards) if _shards.seal_problem(folder, plan, i) is not None]
    done = total - sum(sizes[i] for i in missing)
    repair = "Make room, store top_k classes or a smaller dtype, or choose another folder"
    _files.check_space(folder, (total - done) * _shards.row_bytes(plan.columns), repair)

    def report(rows: int) -> None:
        if progress is not None:
            progress(done + rows, total)

    report(0)
    for made, shard in enumerate(missing):
        records = compute(plan, shard, report)
        try:
            _write_shard(folder, shard, records)
        except OSError as error:
            raise _failed(folder, shards - len(missing) + made, shards, error) from error
        done += sizes[shard]
        report(0)


def _write_shard(folder: Path, shard: int, records: np.ndarray) -> None:
    """The records, then their seal, without which the shard does not count."""
    (folder / _shards.seal_name(shard)).unlink(missing_ok=True)
    content = records.view(np.uint8).data
    _files.write_atomic(folder / _shards.file_name(shard), content)
    seal = {"bytes": records.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    _files.write_sealed(folder / _shards.seal_name(shard), seal)


def _finish(folder: Path, plan: Plan) -> None:
    files = {
        _shards.file_name(shard): _files.read_sealed(folder / _shards.seal_name(shard))
        for shard in range(_shards.shard_count(plan))
    }
    manifest = {"plan": _shards.to_json(plan), "files": files}
    _files.write_sealed(folder / _shards.MANIFEST, manifest)


def _local(leaf: Any) -> Any:
    """An array that other processes also hold, on this one only, as only the first process runs."""
    shared = isinstance(leaf, Array) and not leaf.is_fully_addressable
    return np.asarray(leaf) if shared else leaf


def _batch(arrays: Batch, rows: np.ndarray) -> Any:
    """Rows of every array, in the 32-bit dtypes that JAX gives host arrays."""

    def take(x: Any) -> np.ndarray:
        part = x[rows]
        return part.astype(jax.dtypes.canonicalize_dtype(part.dtype), copy=False)

    return jax.tree.map(take, dict(arrays))


def _faults(output: Array, stored: Array, column: Column) -> Array:
    """uint8 `[B]`: 1 where a row holds NaN or infinity, 2 where the stored precision overflows.

    -inf marks a masked class.
    """
    axes = tuple(range(1, stored.ndim))
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return jnp.zeros(stored.shape[:1], jnp.uint8)
    code = jnp.any(jnp.isnan(stored) | (stored == jnp.inf), axis=axes).astype(jnp.uint8)
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
            raise ValueError(f"{where} is NaN or infinite. Check the teacher's weights and inputs.")
        raise ValueError(
            f"{where} is finite but too large for {column.dtype}. Use bfloat16 or float32."
        )


def _failed(folder: Path, whole: int, shards: int, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"a shard could not be written in {folder} ({error.strerror or error}). {whole} of "
        f"{shards} shards are finished and intact; run it again to continue",
    )


def _smallest_unsigned(classes: int) -> str:
    return next(t for t in ("uint8", "uint16", "uint32") if classes - 1 <= np.iinfo(t).max)
