"""The saves of one method's training: taken up where the run resumes, with the time it took."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax.run import checkpoint, loop
from kdtl_jax.train import TrainState


class Saves(NamedTuple):
    """Where a method's saves lie, and what a training starts from."""

    home: Path
    owner: dict[str, str]  # what the saves belong to
    state: TrainState  # of the newest save, or the one given
    step: int  # of that save, or 0
    meta: dict[str, Any]
    before: float  # seconds that earlier parts of the training took
    begun: float  # when this one began, by `time.perf_counter`


def taken_up(
    folder: Path, run: str, name: str, state: TrainState, *, resume: bool, begun: float
) -> Saves:
    """The newest whole save of a method; `state` where none is, or the run does not resume.

    Args:
      folder: of the run.
      run: its identity.
      name: of the method, under `checkpoints/`.
      state: to start from; a template of what is read.
      resume: whether saves count.
      begun: when the training began, by `time.perf_counter`.
    """
    home, owner = folder / "checkpoints" / name, {"run": run, "method": name}
    step, meta = 0, {}
    if resume:
        # Nothing may be there yet, or the first save was cut short.
        with contextlib.suppress(FileNotFoundError):
            found = checkpoint.restore(home, state, owner=owner)
            state, step, meta = found.state, found.step, found.meta
    return Saves(home, owner, state, step, meta, float(meta.get("seconds", 0.0)), begun)


def seconds(saves: Saves) -> float:
    """What the training has taken so far, earlier parts of the run included."""
    return saves.before + time.perf_counter() - saves.begun


@contextlib.contextmanager
def opened(saves: Saves, keep: checkpoint.Keep) -> Iterator[loop.Save]:
    """`save(step, state, meta)` for `loop.run`, which notes the time taken."""
    with checkpoint.open_folder(saves.home, keep=keep, owner=saves.owner) as checkpoints:
        yield lambda step, state, meta: checkpoint.save(
            checkpoints, step, state, {**meta, "seconds": seconds(saves)}
        )
