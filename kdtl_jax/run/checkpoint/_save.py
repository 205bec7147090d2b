"""Saving: in the background, sealed by a manifest, with retention."""

import contextlib
import json
import logging
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from kdtl_jax import _checks, _files
from kdtl_jax._types import PyTree
from kdtl_jax.run.checkpoint import _leaves
from kdtl_jax.run.checkpoint._restore import FORMAT, MANIFEST, steps

Keep = Callable[[Sequence[int]], Sequence[int]]  # sorted steps -> those that stay


class Checkpoints(NamedTuple):
    """A folder open for saving. `pending` holds at most one save in progress."""

    folder: Path
    manager: ocp.CheckpointManager
    worker: ThreadPoolExecutor
    pending: list[Future[None]]
    keep: Keep


def newest(count: int) -> Keep:
    """Retention: the last `count` steps stay."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}.")
    return lambda steps: steps[-count:]


def newest_and_every(count: int, interval: int) -> Keep:
    """Retention: the last `count` steps and every multiple of `interval` stay."""
    last = newest(count)
    return lambda steps: [s for s in steps if s % interval == 0 or s in last(steps)]


THREE = newest(3)


@contextlib.contextmanager
def open_folder(folder: str | Path, *, keep: Keep = THREE) -> Iterator[Checkpoints]:
    """Opens a folder for saving and locks it; leaving the block waits for the last save.

    Args:
      folder: made if it does not exist. Several processes of one `jax.distributed` run share it.
      keep: which whole steps stay after each save; a step goes only once a newer one is whole.

    Raises:
      RuntimeError: if another run has the folder open.
      PermissionError: (or another OSError) if the folder cannot be written.
    """
    folder = Path(folder).absolute()
    _make_folder(folder)
    primary = jax.process_index() == 0
    with _files.locked(folder, "checkpoint") if primary else contextlib.nullcontext():
        if primary:
            for leftover in [*folder.glob("*.orbax-checkpoint-tmp*"), *folder.glob(".gone-*")]:
                shutil.rmtree(leftover, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=None, save_root_metadata=False)
        manager = ocp.CheckpointManager(folder, options=options)
        worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        checkpoints = Checkpoints(folder, manager, worker, [], keep)
        try:
            yield checkpoints
            wait(checkpoints)
        finally:
            worker.shutdown()
            with contextlib.suppress(Exception), _told_once():  # a failed save was raised above
                manager.close()


def save(
    checkpoints: Checkpoints, step: int, state: PyTree, meta: Mapping[str, Any] | None = None
) -> None:
    """Saves in the background; the state may be donated as soon as this returns.

    Waits for an earlier save first. Steps in the folder that are not older than `step` belong to
    a history that was left (they were corrupt, or the run was rewound); they move to `.aside`.

    Args:
      checkpoints: from `open_folder`.
      step: the step's number from 0 on, its name in the folder.
      state: any pytree of arrays (typed PRNG keys, 0-d, bfloat16 and sharded ones included).
      meta: JSON data that comes back with the state.

    Raises:
      OSError: if this or the previous save failed (disk full, read-only); older steps are intact.
      TypeError: if `step` is not an integer, a leaf not an array or a number, or `meta` not JSON.
      ValueError: if `step` is negative.
    """
    _checks.count(0, step=step)
    step, meta = operator.index(step), _as_json(meta or {})
    flat = _leaves.flatten(state)
    _leaves.check_storable("checkpoint.save", flat)
    wait(checkpoints)
    leaves = [_leaves.describe(path, leaf) for path, leaf in flat.items()]
    stored = _leaves.stored(list(flat.values()))
    _check_space(checkpoints.folder, step, stored)
    if jax.process_index() == 0:
        _move_aside(checkpoints.folder, step)
    manager = checkpoints.manager
    manager.reload()  # steps were moved or dropped behind the manager's back
    try:
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(stored))
        manager.save(step, args=arguments, force=True)
    except Exception as error:
        raise _failed(checkpoints.folder, step, error) from error
    manifest = {"format": FORMAT, "step": step, "meta": meta, "leaves": leaves}
    checkpoints.pending.append(checkpoints.worker.submit(_finish, checkpoints, step, manifest))


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as it will come back."""
    try:
        return json.loads(json.dumps(dict(meta)))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"meta must be JSON: {error}. Convert arrays and NumPy numbers first, "
            "e.g. float(x) or x.tolist(), or keep them in the state."
        ) from None


def wait(checkpoints: Checkpoints) -> None:
    """Returns once the save in progress, if any, is whole.

    Raises:
      OSError: if that save failed.
    """
    while checkpoints.pending:
        checkpoints.pending.pop().result()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"checkpoint: {folder} cannot be written ({error.strerror}). Choose another folder",
        ) from None


def _finish(checkpoints: Checkpoints, step: int, manifest: dict[str, Any]) -> None:
    """In the background: waits for Orbax, then writes the manifest, then drops old steps."""
    folder = checkpoints.folder
    try:
        with _told_once():
            checkpoints.manager.wait_until_finished()
        if jax.process_index() != 0:
            return
        home = folder / str(step)
        if not home.is_dir():
            raise OSError("it was not committed")
        files = {}
        for path in sorted(path for path in home.rglob("*") if path.is_file()):
            _files.sync(path)
            known = {"bytes": path.stat().st_size, "sha256": _files.sha256(path)}
            files[path.relative_to(home).as_posix()] = known
        _files.write_sealed(home / MANIFEST, manifest | {"files": files})
    except Exception as error:
        for part in folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)  # a full disk needs the room
        raise _failed(folder, step, error) from error
    present = [s for s in steps(folder) if (folder / str(s) / MANIFEST).is_file()]
    for old in sorted(set(present) - set(checkpoints.keep(present)) - {step}):
        gone = (folder / str(old)).rename(folder / f".gone-{old}")
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Drops Orbax's log of an error that is raised anyway: pages of traceback say no more."""

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(foreign)
    try:
        yield
    finally:
        logger.removeFilter(foreign)


def _failed(folder: Path, step: int, error: Exception) -> OSError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    whole = [s for s in steps(folder) if s != step and (folder / str(s) / MANIFEST).is_file()]
    message = (
        f"checkpoint: step {step} could not be saved in {folder} ({reason}). "
        f"Steps already there are intact: {whole or 'none'}."
    )
    number = getattr(error, "errno", None)
    return OSError(number, message) if number else OSError(message)


def _check_space(folder: Path, step: int, stored: Mapping[str, Any]) -> None:
    """Refuses before writing what cannot fit: a full disk found half-way helps nobody."""
    needed = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in stored.values())
    free = shutil.disk_usage(folder).free
    if jax.process_count() == 1 and needed > free:
        error = OSError(28, f"no space left: {needed:,} bytes of arrays, {free:,} bytes free")
        raise _failed(folder, step, error)


def _move_aside(folder: Path, step: int) -> None:
    for newer in [s for s in steps(folder) if s >= step]:
        aside = folder / ".aside" / str(newer)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (folder / str(newer)).rename(aside)
