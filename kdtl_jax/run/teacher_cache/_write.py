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
from kdtl_jax.run import data, processes
from kdtl_jax.run.data import Augment, Batch
from kdtl_jax.run.teacher_cache import _shards
from kdtl_jax.run.teacher_cache._fingerprint import as_numpy, differences, fingerprint
from kdtl_jax.run.teacher_cache._shards import Plan, StoredColumn

SHARD_ROWS = 8192  # a kill loses the current shard
SHARD_BYTES = 64 * 2**20
Progress = Callable[[int, int], None]  # rows done, rows in all
OTHER_FOLDER = "Choose another folder, or delete this one."


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
      model, classes, preprocessing, taps, top_k, temperature, dtype, views, view_key: as in
        `fingerprint`.
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
    expected = fingerprint(
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
    size = expected.size or 0  # there is one example at least
    batch_size = min(batch_size, size)
    variables = variables if isinstance(variables, Variables) else Variables(variables)
    local_variables = jax.tree.map(_to_local, variables)

    def outputs_of(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        if augment is not None:
            batch = augment(augmentation.example_keys(key, view, rows), batch)
        return teacher(variables.params, variables.model_state, batch["inputs"])[0]

    rows = np.arange(batch_size, dtype=np.int32)
    example = _take_batch(arrays, rows), rows, np.int32(0), view_key
    outputs = jax.eval_shape(outputs_of, local_variables, *example)
    stored_columns = columns(outputs, batch_size, expected.taps or (), top_k, str(expected.dtype))
    row_bytes = max(1, _shards.row_bytes(stored_columns))
    rows_per_shard = shard_rows or max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes, size))
    plan = Plan(expected, size, views, top_k, float(temperature), rows_per_shard, stored_columns)

    @jax.jit
    def run(variables: Variables, batch: Batch, rows: Array, view: Array, key: Any) -> Any:
        outputs = outputs_of(variables, batch, rows, view, key)
        encoded = _encode(outputs, plan)
        return encoded, [
            _fault_codes(outputs[c.tap], x, c) for c, x in zip(stored_columns, encoded, strict=True)
        ]

    def compute(plan: Plan, shard: int, report: Callable[[int], None]) -> np.ndarray:
        """Computes the records of a shard; the next batch runs while the last one is copied."""
        view, first, last = _shards.shard_range(plan, shard)
        records = np.empty(last - first, _shards.record(plan))
        queue: collections.deque[tuple[int, Any]] = collections.deque()

        def fetch() -> None:
            start, (encoded, faults) = queue.popleft()
            stop = min(start + batch_size, last)
            _check_faults(plan, faults, view, start, stop)
            for i, (x, column) in enumerate(zip(encoded, stored_columns, strict=True)):
                host = np.asarray(x)[: stop - start].view(_shards.storage_dtype(column))
                records[str(i)][start - first : stop - first] = host
            if stop < last:  # a complete shard is reported once it is on disk
                report(stop - first)

        for start in range(first, last, batch_size):
            # The last batch is padded with the shard's own first rows.
            rows = first + (np.arange(start, start + batch_size) - first) % (last - first)
            batch = place((_take_batch(arrays, rows), rows.astype(np.int32)))
            view_index = jax.device_put(np.int32(view))
            queue.append((start, run(local_variables, *batch, view_index, view_key)))
            if len(queue) > 1:
                fetch()
        while queue:
            fetch()
        return records

    def write_here() -> dict[str, Any]:
        with _locks.checked_lock(folder, lambda: _check_folder(folder)):
            final_plan = _resume_or_begin(folder, plan, keep_layout=shard_rows is None)
            _compute_missing(folder, final_plan, compute, progress)
            files = {
                _shards.file_name(shard): _files.read_sealed(folder / _shards.seal_name(shard))
                for shard in range(_shards.shard_count(final_plan))
            }
            manifest = {"plan": _shards.to_json(final_plan), "files": files}
            _files.write_sealed(folder / _shards.MANIFEST, manifest)
        return manifest["plan"]

    return _shards.read_plan(processes.decide(write_here))


def columns(
    outputs: Mapping[str, Any], batch: int, taps: tuple[str, ...], top_k: int | None, dtype: str
) -> tuple[StoredColumn, ...]:
    """Makes columns for the (abstract) outputs `[B, ...]` of a batch."""
    result = []
    for tap in taps:
        if tap not in outputs:
            nearest = ", ".join(map(repr, trees.nearest(tap, list(outputs), n=5)))
            raise ValueError(f"the teacher has no output {tap!r}. Nearest: {nearest}.")
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
            result += [
                StoredColumn(
                    tap, "indices", np.min_scalar_type(shape[-1] - 1).name, (*shape[:-1], top_k)
                ),
                StoredColumn(tap, "log_probs", dtype, (*shape[:-1], top_k)),
                StoredColumn(tap, "log_tail", "float32", shape[:-1]),
            ]
        else:
            floating = jnp.issubdtype(output.dtype, jnp.floating)
            result.append(StoredColumn(tap, None, dtype if floating else output.dtype.name, shape))
    return tuple(result)


def _encode(outputs: Outputs, plan: Plan) -> list[jax.Array]:
    """Inside `jit`: the columns for a batch of outputs, in the stored precision."""
    arrays = []
    for column in plan.columns:
        x = outputs[column.tap]
        if column.field is not None and plan.top_k is not None:
            top_k = losses.top_k_targets(x, k=plan.top_k, temperature=plan.temperature)
            x = getattr(top_k, column.field)
        arrays.append(x.astype(column.dtype))
    return arrays


def _check_folder(folder: Path) -> None:
    """Refuses a folder with files that are not a cache's, before changing anything in it."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    foreign = [name for name in names if name != ".lock" and not name.endswith(_files.TEMPORARY)]
    if foreign and _shards.PLAN not in foreign:
        name_list = ", ".join(_text.shown(name) for name in sorted(foreign)[:5])
        raise ValueError(f"{folder} holds other files: {name_list}. {OTHER_FOLDER}")


def _resume_or_begin(folder: Path, plan: Plan, *, keep_layout: bool) -> Plan:
    """Returns the plan of a cache started earlier, if it is the same cache, or writes this one."""
    try:
        previous = _shards.begun(folder)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be resumed: {error}. {OTHER_FOLDER}") from None
    if previous is None:
        _files.write_sealed(folder / _shards.PLAN, _shards.to_json(plan))
        return plan
    problems = differences(previous.fingerprint, plan.fingerprint)
    if not problems and previous._replace(shard_rows=plan.shard_rows) != plan:
        old_columns, new_columns = (_text.shown([*x.columns], 200) for x in (previous, plan))
        problems = [f"outputs differ: {old_columns} there, {new_columns} here"]
    if not problems and not keep_layout and previous.shard_rows != plan.shard_rows:
        problems = [f"shard_rows differ: {previous.shard_rows} there, {plan.shard_rows} here"]
    if problems:
        raise ValueError(f"{folder} holds another cache: {'; '.join(problems)}. {OTHER_FOLDER}")
    _files.remove_unfinished(folder)
    return previous


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
    for written, shard in enumerate(missing):
        records = compute(plan, shard, report)
        try:
            _write_shard(folder, shard, records)
        except OSError as error:
            finished = shards - len(missing) + written
            raise OSError(
                error.errno,
                f"a shard could not be written in {folder} ({error.strerror or error}). {finished} "
                f"of {shards} shards are finished and intact; run it again to continue",
            ) from error
        done += sizes[shard]
        report(0)


def _write_shard(folder: Path, shard: int, records: np.ndarray) -> None:
    """Writes the records, then their seal, without which the shard does not count."""
    (folder / _shards.seal_name(shard)).unlink(missing_ok=True)
    content = records.view(np.uint8).data
    _files.write_atomic(folder / _shards.file_name(shard), content)
    seal = {"bytes": records.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    _files.write_sealed(folder / _shards.seal_name(shard), seal)


def _to_local(leaf: Any) -> Any:
    """Copies an array shared with other processes to the host, as only the first process runs."""
    is_shared = isinstance(leaf, Array) and not leaf.is_fully_addressable
    return np.asarray(leaf) if is_shared else leaf


def _take_batch(arrays: Batch, rows: np.ndarray) -> Any:
    """Takes rows of every array, in the 32-bit dtypes that JAX gives host arrays."""
    return jax.tree.map(data.canonical, data.take_rows(arrays, rows))


def _fault_codes(output: Array, stored: Array, column: StoredColumn) -> Array:
    """uint8 `[B]`: 1 where a row holds NaN or infinity, 2 where the stored precision overflows.

    -inf marks a masked class.
    """
    axes = tuple(range(1, stored.ndim))
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return jnp.zeros(stored.shape[:1], jnp.uint8)
    code = jnp.any(jnp.isnan(stored) | (stored == jnp.inf), axis=axes).astype(jnp.uint8)
    if column.field is not None:
        return code
    overflows = jnp.any(jnp.isinf(stored) & jnp.isfinite(output), axis=axes)
    return jnp.where(overflows, jnp.full_like(code, 2), code)


def _check_faults(plan: Plan, faults: list[Array], view: int, start: int, stop: int) -> None:
    for column, codes in zip(plan.columns, faults, strict=True):
        codes = np.asarray(codes)[: stop - start]
        if not codes.any():
            continue
        row = int(np.flatnonzero(codes)[0])
        output = f"output {column.tap!r} of row {start + row}" + (f", view {view}," * bool(view))
        if codes[row] == 1:
            raise ValueError(
                f"{output} is NaN or infinite. Check the teacher's weights and inputs."
            )
        raise ValueError(
            f"{output} is finite but too large for {column.dtype}. Use bfloat16 or float32."
        )
