"""Saving: in the background, sealed by a manifest, with retention."""

import contextlib
import json
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kdtl_jax import _checks, _files, _locks
from kdtl_jax._types import PyTree
from kdtl_jax.run import processes, scores
from kdtl_jax.run.checkpoint import _barriers, _history, _quiet, _restore
from kdtl_jax.run.checkpoint._restore import FORMAT, KIND, MANIFEST, STATE

STORABLE = (np.number, np.bool_, jax.dtypes.prng_key)
SAVING, DROPPED = ".saving-", ".dropped-"  # a step that is being written, or deleted


class Saved(NamedTuple):
    """A whole step in a folder, with its `meta`, whose evaluations are only those of this step."""

    step: int
    meta: Mapping[str, Any]


Keep = Callable[[Sequence[Saved]], Sequence[int]]  # oldest first -> the steps to keep


class Checkpoints(NamedTuple):
    """A folder open for saving. `pending` holds at most one save in progress."""

    folder: Path
    identity: str  # in the folder's mark
    owner: dict[str, str]
    writer: ocp.AsyncCheckpointer
    barriers: _barriers.Barriers
    worker: ThreadPoolExecutor
    pending: list[Future[None]]
    keep: Keep
    saved: dict[int, Saved]  # the whole steps, in process 0
    history: _history.History  # the evaluations, in process 0


def newest(count: int) -> Keep:
    """Keeps the last `count` steps."""
    _checks.count(1, count=count)
    return lambda saved: [entry.step for entry in saved[-count:]]


def newest_and_every(count: int, interval: int) -> Keep:
    """Keeps the last `count` steps and every multiple of `interval`."""
    keep_newest = newest(count)
    _checks.count(1, interval=interval)
    return lambda saved: [
        *keep_newest(saved),
        *(entry.step for entry in saved if entry.step % interval == 0),
    ]


def newest_and_best(count: int, name: str, *, minimize: bool = True) -> Keep:
    """Keeps the last `count` steps and the best one by an evaluation; see `best`."""
    keep_newest = newest(count)

    def keep(saved: Sequence[Saved]) -> list[int]:
        values = [_restore.score(entry.meta, entry.step, name) for entry in saved]
        best = scores.best(values, minimize=minimize)
        return [*keep_newest(saved), *([] if best is None else [saved[best].step])]

    return keep


_NEWEST_THREE = newest(3)


@contextlib.contextmanager
def open_folder(
    folder: str | Path, *, keep: Keep = _NEWEST_THREE, owner: Mapping[str, str] | None = None
) -> Iterator[Checkpoints]:
    """Opens a folder for saving and locks it; leaving the block waits for the last save.

    Args:
      folder: a new or empty folder, or one made here. Processes of one `jax.distributed` run share
        it.
      keep: which whole steps to keep after each save; a step is deleted only once a newer one is
        whole.
      owner: what the states belong to, such as `{"run": id, "method": "kd"}`; `restore` refuses
        steps of any other owner.

    Raises:
      RuntimeError: if another run has the folder open.
      ValueError: if it holds foreign files.
      PermissionError: (or another OSError) if the folder cannot be written.
    """
    folder = _checks.path(folder=folder).absolute()
    with contextlib.ExitStack() as stack:
        identity = processes.decide(lambda: _claim_folder(folder, stack))
        stack.enter_context(_quiet.logs())
        _quiet.late_writes()
        barriers = _barriers.begin()
        options = ocp.AsyncOptions(timeout_secs=_barriers.SECONDS, barrier_sync_fn=barriers.meet)
        writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        saved, history = (
            _whole_steps(folder) if jax.process_index() == 0 else ({}, _history.History())
        )
        checkpoints = Checkpoints(
            folder, identity, dict(owner or {}), writer, barriers, worker, [], keep, saved, history
        )
        try:
            yield checkpoints
            wait(checkpoints)
        finally:
            worker.shutdown()
            with contextlib.suppress(Exception):  # a failed save was raised above
                writer.close()


def save(
    checkpoints: Checkpoints, step: int, state: PyTree, meta: Mapping[str, Any] | None = None
) -> None:
    """Saves in the background; the state may be donated as soon as this returns.

    Waits for an earlier save first. Steps in the folder that are not older than `step` belong to an
    abandoned history (they were corrupt, or the run was rewound); they are moved to `.aside`.

    Args:
      checkpoints: from `open_folder`.
      step: the step's number, from 0; also its name in the folder.
      state: any pytree of arrays (typed PRNG keys, 0-d, bfloat16 and sharded ones included).
      meta: JSON data that is restored with the state. A list `meta["evaluations"]` that grows from
        save to save is written once, not with every step.

    Raises:
      OSError: if this or the previous save failed (disk full, read-only); older steps stay intact.
      TypeError: if a leaf is not an array or number, or `meta` not JSON.
    """
    _checks.count(0, step=step)
    step, meta = operator.index(step), dict(meta or {})
    lines = meta.pop(_history.KEY, None)
    if isinstance(lines, list):
        meta[_history.KEY] = _step_lines(lines, step)
    elif lines is not None:
        raise TypeError(f"meta[{_history.KEY!r}] must be a list, got {type(lines).__name__}.")
    meta = _as_json(meta)
    flat = _restore.flatten(state)
    _check_storable(flat)
    wait(checkpoints)
    leaves = [
        _restore.describe(path, leaf) | {"entry": _entry_name(i)}
        for i, (path, leaf) in enumerate(flat.items())
    ]
    arrays = _to_storage(list(flat.values()))
    history = processes.decide(lambda: _prepare_folder(checkpoints, step, arrays, lines))
    _barriers.next_save(checkpoints.barriers)
    try:
        target = checkpoints.folder / f"{SAVING}{step}" / STATE
        checkpoints.writer.save(target, args=ocp.args.PyTreeSave(arrays))
    except Exception as error:
        raise _save_error(checkpoints.folder, step, error) from error
    manifest = {
        "format": FORMAT,
        "step": step,
        "folder": checkpoints.identity,
        "owner": checkpoints.owner,
        "meta": meta,
        "history": history,
        "leaves": leaves,
    }
    checkpoints.pending.append(checkpoints.worker.submit(_finish, checkpoints, step, manifest))


def wait(checkpoints: Checkpoints) -> None:
    """Returns once the save in progress, if any, is whole; all processes must call.

    Raises:
      OSError: if that save failed, in this process or another.
    """
    while checkpoints.pending:
        error = checkpoints.pending.pop().exception()
        failed = processes.largest(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise OSError(f"another process could not save in {checkpoints.folder}.")


def remove(folder: str | Path) -> list[str]:
    """Deletes a folder of checkpoints, or all such folders in a folder; nothing else.

    Returns:
      The names of foreign files, which are kept.
    """
    folder = _checks.path(folder=folder)
    if folder.is_symlink():
        return [folder.name]
    if not folder.exists() or _files.remove(folder, KIND):
        return []
    foreign = [path for path in sorted(folder.iterdir()) if not _files.remove(path, KIND)]
    if not foreign:
        folder.rmdir()
    return [path.name for path in foreign]


def check_removable(folder: str | Path) -> None:
    """Refuses a folder that `open_folder` would refuse even after `remove`; changes nothing.

    For callers that save only at the end of long work.

    Raises:
      ValueError: if it holds foreign files.
      OSError: if it is not a folder.
    """
    folder = _checks.path(folder=folder)
    if folder.is_symlink() or not folder.is_dir() or (folder / _files.MARK).exists():
        _files.check_free(folder, KIND)
        return
    _files.refuse(folder, (path for path in folder.iterdir() if not _files.is_ours(path, KIND)))


def _claim_folder(folder: Path, stack: contextlib.ExitStack) -> str:
    """Locks and marks the folder, deletes the leftovers of a killed run; returns its identity."""
    try:
        stack.enter_context(_locks.checked_lock(folder, lambda: _files.check_free(folder, KIND)))
        identity = _files.claim(folder, KIND)
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}). Choose another folder"
        raise type(error)(error.errno, reason) from None
    for leftover in [*folder.glob(f"{SAVING}*"), *folder.glob(f"{DROPPED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return identity


def _whole_steps(folder: Path) -> tuple[dict[int, Saved], _history.History]:
    """In process 0: the whole steps, and the newest one's history; other histories are deleted."""
    saved, histories = {}, []
    for step in _restore.steps(folder):
        with contextlib.suppress(ValueError):
            manifest = _restore.read_manifest(folder / str(step))
            saved[step] = Saved(step, manifest.meta)
            if manifest.history is not None:
                histories.append(manifest.history)
    files = {history["file"] for history in histories}
    for path in folder.glob(_history.PATTERN):
        if path.name not in files:
            path.unlink()
    with contextlib.suppress(ValueError):  # an altered history: the next save starts another
        return saved, _history.open_history(folder, histories[-1] if histories else None)
    return saved, _history.History()


def _step_lines(lines: Sequence[Any], step: int) -> list[Any]:
    """The last lines, which belong to this step; `keep` functions need only these."""
    start = len(lines)
    while start and isinstance(lines[start - 1], Mapping) and lines[start - 1].get("step") == step:
        start -= 1
    return list(lines[start:])


def _prepare_folder(
    checkpoints: Checkpoints, step: int, arrays: Mapping[str, Any], lines: list[Any] | None
) -> dict[str, Any] | None:
    """In process 0: moves replaced steps aside, makes the step's folder and appends evaluations."""
    folder = checkpoints.folder
    try:
        needed = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in arrays.values())
        _files.check_space(folder, needed)
        for old_step in [s for s in _restore.steps(folder) if s >= step]:
            aside = folder / ".aside" / str(old_step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (folder / str(old_step)).rename(aside)
            checkpoints.saved.pop(old_step, None)
        temporary = folder / f"{SAVING}{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if lines is None:
            return None
        return _history.append(checkpoints.history, folder, step, lines)
    except OSError as error:
        raise _save_error(folder, step, error) from error


def _finish(checkpoints: Checkpoints, step: int, manifest: dict[str, Any]) -> None:
    """In the background: waits for Orbax, adds the manifest, renames, drops old steps."""
    folder = checkpoints.folder
    temporary, final = folder / f"{SAVING}{step}", folder / str(step)
    try:
        checkpoints.writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            _files.sync(path)
            entry = {"bytes": path.stat().st_size, "sha256": _files.sha256(path)}
            files[path.relative_to(temporary).as_posix()] = entry
        _files.write_sealed(temporary / MANIFEST, manifest | {"files": files})
        temporary.rename(final)
        _files.sync_folder(folder)
    except Exception as error:
        checkpoints.barriers.fail()
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the space
        raise _save_error(folder, step, error) from error
    checkpoints.saved[step] = Saved(step, manifest["meta"])
    saved = [checkpoints.saved[s] for s in sorted(checkpoints.saved)]
    for old_step in {one.step for one in saved} - set(checkpoints.keep(saved)) - {step}:
        del checkpoints.saved[old_step]
        with contextlib.suppress(FileNotFoundError):  # someone else deleted it
            dropped = (folder / str(old_step)).rename(folder / f"{DROPPED}{old_step}")
            shutil.rmtree(dropped, ignore_errors=True)


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Converts `meta` as a restore will return it."""
    try:
        return json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta must be JSON: {error}. Convert arrays and NumPy numbers first, "
            "e.g. float(x) or x.tolist(), or keep them in the state."
        ) from None


def _check_storable(flat: Mapping[str, Any]) -> None:
    """Raises TypeError unless every leaf is an array of numbers, bools or PRNG keys."""
    for path, leaf in flat.items():
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in STORABLE):
            raise TypeError(
                f"{path!r} must be an array or a number, got {type(leaf).__name__} "
                f"({dtype}). Keep strings and settings in `meta`."
            )


def _entry_name(i: int) -> str:
    """The name of leaf i in the file: paths may hold anything and are only in the manifest."""
    return f"leaf{i:05d}"


@jax.jit
def _copy(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def _to_storage(leaves: list[Any]) -> dict[str, Any]:
    """The arrays that Orbax writes, by entry: key data for keys, nothing for empty arrays."""
    arrays = [jax.random.key_data(leaf) if _checks.is_key(leaf) else leaf for leaf in leaves]
    on_device = [i for i, leaf in enumerate(arrays) if isinstance(leaf, jax.Array) and leaf.size]
    if jax.default_backend() == "cpu":
        # There a host array may share the device's memory, which the next step reuses.
        for i, copy in zip(on_device, _copy([arrays[i] for i in on_device]), strict=True):
            arrays[i] = copy
    host_arrays = [np.array(x) if not isinstance(x, jax.Array) else x for x in arrays]
    return {_entry_name(i): leaf for i, leaf in enumerate(host_arrays) if leaf.size}


def _save_error(folder: Path, step: int, error: Exception) -> OSError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    intact = [s for s in _restore.steps(folder) if s != step]
    message = (
        f"step {step} could not be saved in {folder} ({reason}). "
        f"Steps already there are intact: {intact or 'none'}."
    )
    errno = getattr(error, "errno", None)
    return OSError(errno, message) if errno else OSError(message)
