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
    """Keeps the last `count` steps.

    Raises:
      ValueError: if count is below 1.
    """
    _checks.count(1, count=count)
    return lambda saved: [one.step for one in saved[-count:]]


def newest_and_every(count: int, interval: int) -> Keep:
    """Keeps the last `count` steps and every multiple of `interval`.

    Raises:
      ValueError: if `count` or `interval` is below 1.
      TypeError: if one is not a whole number.
    """
    last = newest(count)
    _checks.count(1, interval=interval)
    return lambda saved: [*last(saved), *(s.step for s in saved if s.step % interval == 0)]


def newest_and_best(count: int, name: str, *, minimize: bool = True) -> Keep:
    """Keeps the last `count` steps and the best one by an evaluation; see `best`."""
    last = newest(count)

    def keep(saved: Sequence[Saved]) -> list[int]:
        values = [_restore.score(one.meta, one.step, name) for one in saved]
        chosen = scores.best(values, minimize=minimize)
        return [*last(saved), *([] if chosen is None else [saved[chosen].step])]

    return keep


THREE = newest(3)


@contextlib.contextmanager
def open_folder(
    folder: str | Path, *, keep: Keep = THREE, owner: Mapping[str, str] | None = None
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
        identity = processes.decide(lambda: _begin(folder, stack))
        stack.enter_context(_quiet.logs())
        _quiet.late_writes()
        barriers = _barriers.begin()
        options = ocp.AsyncOptions(timeout_secs=_barriers.SECONDS, barrier_sync_fn=barriers.meet)
        writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)
        worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        saved, history = _whole(folder) if jax.process_index() == 0 else ({}, _history.History())
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
      TypeError: if `step` is not an integer, a leaf is not an array or number, or `meta` not JSON.
      ValueError: if `step` is negative.
    """
    _checks.count(0, step=step)
    step, meta = operator.index(step), dict(meta or {})
    lines = meta.pop(_history.KEY, None)
    if isinstance(lines, list):
        meta[_history.KEY] = _of_step(lines, step)
    elif lines is not None:
        raise TypeError(f"meta[{_history.KEY!r}] must be a list, got {type(lines).__name__}.")
    meta = _as_json(meta)
    flat = _restore.flatten(state)
    _check_storable(flat)
    wait(checkpoints)
    leaves = [
        _restore.describe(path, leaf) | {"entry": _entry(i)}
        for i, (path, leaf) in enumerate(flat.items())
    ]
    stored = _stored(list(flat.values()))
    history = processes.decide(lambda: _make_room(checkpoints, step, stored, lines))
    _barriers.next_save(checkpoints.barriers)
    try:
        home = checkpoints.folder / f"{SAVING}{step}" / STATE
        checkpoints.writer.save(home, args=ocp.args.PyTreeSave(stored))
    except Exception as error:
        raise _failed(checkpoints.folder, step, error) from error
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

    Raises:
      TypeError: if `folder` is not a path.
    """
    folder = _checks.path(folder=folder)
    if folder.is_symlink():
        return [folder.name]
    if not folder.exists() or _files.remove(folder, KIND):
        return []
    kept = [path for path in sorted(folder.iterdir()) if not _files.remove(path, KIND)]
    if not kept:
        folder.rmdir()
    return [path.name for path in kept]


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


def _begin(folder: Path, stack: contextlib.ExitStack) -> str:
    """Locks and marks the folder, clears what a killed run left; returns its identity."""
    try:
        stack.enter_context(_locks.taken(folder, lambda: _files.check_free(folder, KIND)))
        identity = _files.claim(folder, KIND)
    except OSError as error:
        reason = f"{folder} cannot be written ({error.strerror}). Choose another folder"
        raise type(error)(error.errno, reason) from None
    for leftover in [*folder.glob(f"{SAVING}*"), *folder.glob(f"{DROPPED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return identity


def _whole(folder: Path) -> tuple[dict[int, Saved], _history.History]:
    """In process 0: the whole steps, and the newest one's evaluations; other ones are deleted."""
    found, histories = {}, []
    for step in _restore.steps(folder):
        with contextlib.suppress(ValueError):
            manifest = _restore.read_manifest(folder / str(step))
            found[step] = Saved(step, manifest.meta)
            if manifest.history is not None:
                histories.append(manifest.history)
    named = {history["file"] for history in histories}
    for path in folder.glob(_history.PATTERN):
        if path.name not in named:
            path.unlink()
    with contextlib.suppress(ValueError):  # it was altered: the next save starts another
        return found, _history.open_history(folder, histories[-1] if histories else None)
    return found, _history.History()


def _of_step(lines: Sequence[Any], step: int) -> list[Any]:
    """The last lines, those of this step; keep functions need only these."""
    first = len(lines)
    while first and isinstance(lines[first - 1], Mapping) and lines[first - 1].get("step") == step:
        first -= 1
    return list(lines[first:])


def _make_room(
    checkpoints: Checkpoints, step: int, stored: Mapping[str, Any], lines: list[Any] | None
) -> dict[str, Any] | None:
    """In process 0: moves aside what the step replaces; makes its evaluations and folder."""
    folder = checkpoints.folder
    try:
        needed = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in stored.values())
        _files.check_space(folder, needed)
        for newer in [s for s in _restore.steps(folder) if s >= step]:
            aside = folder / ".aside" / str(newer)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (folder / str(newer)).rename(aside)
            checkpoints.saved.pop(newer, None)
        part = folder / f"{SAVING}{step}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        if lines is None:
            return None
        return _history.append(checkpoints.history, folder, step, lines)
    except OSError as error:
        raise _failed(folder, step, error) from error


def _finish(checkpoints: Checkpoints, step: int, manifest: dict[str, Any]) -> None:
    """In the background: waits for Orbax, adds the manifest, renames, drops old steps."""
    folder = checkpoints.folder
    part, home = folder / f"{SAVING}{step}", folder / str(step)
    try:
        checkpoints.writer.wait_until_finished()
        if jax.process_index() != 0:
            return
        files = {}
        for path in sorted(path for path in part.rglob("*") if path.is_file()):
            _files.sync(path)
            known = {"bytes": path.stat().st_size, "sha256": _files.sha256(path)}
            files[path.relative_to(part).as_posix()] = known
        _files.write_sealed(part / MANIFEST, manifest | {"files": files})
        part.rename(home)
        _files.sync_folder(folder)
    except Exception as error:
        checkpoints.barriers.fail()
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
        raise _failed(folder, step, error) from error
    checkpoints.saved[step] = Saved(step, manifest["meta"])
    saved = [checkpoints.saved[s] for s in sorted(checkpoints.saved)]
    for old in {one.step for one in saved} - set(checkpoints.keep(saved)) - {step}:
        del checkpoints.saved[old]
        with contextlib.suppress(FileNotFoundError):  # someone else deleted it
            dropped = (folder / str(old)).rename(folder / f"{DROPPED}{old}")
            shutil.rmtree(dropped, ignore_errors=True)


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as it will be restored."""
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


def _entry(i: int) -> str:
    """The name of leaf i in the file: paths may hold anything and are only in the manifest."""
    return f"leaf{i:05d}"


@jax.jit
def _copied(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def _stored(leaves: list[Any]) -> dict[str, Any]:
    """What Orbax writes: arrays by entry, key data for keys, nothing for empty arrays."""
    raw = [jax.random.key_data(leaf) if _checks.is_key(leaf) else leaf for leaf in leaves]
    device = [i for i, leaf in enumerate(raw) if isinstance(leaf, jax.Array) and leaf.size]
    if jax.default_backend() == "cpu":
        # There a host array may share the device's memory, which the next step reuses.
        for i, copy in zip(device, _copied([raw[i] for i in device]), strict=True):
            raw[i] = copy
    host = [np.array(x) if not isinstance(x, jax.Array) else x for x in raw]
    return {_entry(i): leaf for i, leaf in enumerate(host) if leaf.size}


def _failed(folder: Path, step: int, error: Exception) -> OSError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    whole = [s for s in _restore.steps(folder) if s != step]
    message = (
        f"step {step} could not be saved in {folder} ({reason}). "
        f"Steps already there are intact: {whole or 'none'}."
    )
    number = getattr(error, "errno", None)
    return OSError(number, message) if number else OSError(message)
