"""The saves of one method's training, read when the run resumes, with the time spent."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdtl_jax.run import checkpoint, loop
from kdtl_jax.train import TrainState


class Saves(NamedTuple):
    """Where a method's saves are, and what its training starts from."""

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
    """The newest complete save of a method; `state` if there is none or the run does not resume.

    Args:
      folder: of the run.
      run: its identity.
      name: of the method, under `checkpoints/`.
      state: to start from; also the template for reading.
      resume: whether to use saves.
      begun: when the training began, by `time.perf_counter`.
    """
    home, owner = folder / "checkpoints" / name, {"run": run, "method": name}
    step, meta = 0, {}
    if resume:
        # There may be no save yet, or only an unfinished one.
        with contextlib.suppress(FileNotFoundError):
            found = checkpoint.restore(home, state, owner=owner)
            state, step, meta = found.state, found.step, found.meta
    return Saves(home, owner, state, step, meta, float(meta.get("seconds", 0.0)), begun)


def seconds(saves: Saves) -> float:
    """The seconds of training so far, including earlier parts of the run."""
    return saves.before + time.perf_counter() - saves.begun


@contextlib.contextmanager
def opened(saves: Saves, keep: checkpoint.Keep) -> Iterator[loop.Save]:
    """`save(step, state, meta)` for `loop.run`, which also records the time spent."""
    with checkpoint.open_folder(saves.home, keep=keep, owner=saves.owner) as checkpoints:
        yield lambda step, state, meta: checkpoint.save(
            checkpoints, step, state, {**meta, "seconds": seconds(saves)}
        )
