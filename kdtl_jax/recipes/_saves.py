"""Checkpoints of one method's training, which also record the time spent."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax.run import checkpoint, loop
from kdtl_jax.train import TrainState


class Saves(NamedTuple):
    """Where a method's checkpoints are, and the state to start from."""

    folder: Path
    owner: dict[str, str]  # the run and the method
    state: TrainState  # of the newest checkpoint, or the initial one
    step: int  # of that checkpoint, or 0
    meta: dict[str, Any]
    earlier_seconds: float  # seconds of training before the resume
    start_time: float  # by `time.perf_counter`


def restore(
    folder: Path, run: str, name: str, state: TrainState, *, resume: bool, start_time: float
) -> Saves:
    """Reads a resumed method's newest complete checkpoint, of the structure of `state`.

    Without one, starts from `state`.
    """
    saves_folder, owner = folder / "checkpoints" / name, {"run": run, "method": name}
    step, meta = 0, {}
    if resume:
        # There may be no checkpoint yet, or only an incomplete one.
        with contextlib.suppress(FileNotFoundError):
            checkpoint_ = checkpoint.restore(saves_folder, state, owner=owner)
            state, step, meta = checkpoint_.state, checkpoint_.step, checkpoint_.meta
    return Saves(
        saves_folder, owner, state, step, meta, float(meta.get("seconds", 0.0)), start_time
    )


def seconds(saves: Saves) -> float:
    """The seconds of training so far, including those before the resume."""
    return saves.earlier_seconds + time.perf_counter() - saves.start_time


@contextlib.contextmanager
def open_saves(saves: Saves, keep: checkpoint.Keep) -> Iterator[loop.Save]:
    """`save(step, state, meta)` for `loop.run`, which also records the time spent."""
    with checkpoint.open_folder(saves.folder, keep=keep, owner=saves.owner) as checkpoints:
        yield lambda step, state, meta: checkpoint.save(
            checkpoints, step, state, {**meta, "seconds": seconds(saves)}
        )
