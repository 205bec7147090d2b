"""How a run moves: which program, how many steps per call, and how far the host runs ahead."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from kdtl_jax import train
from kdtl_jax.run import data
from kdtl_jax.run.loop import _metrics, _programs
from kdtl_jax.run.loop._programs import Carry
from kdtl_jax.run.loop._signals import Signals
from kdtl_jax.train import Step, TrainState

# (carry, its step, most steps to make) -> (carry, the step it reaches, steps made)
Move = Callable[[Carry, int, int], tuple[Carry, Array, int]]

CALL_SECONDS = 0.2  # one call stays this short, so that a signal is answered soon
AHEAD_SECONDS = 0.5  # and the host queues no more work than this
AHEAD_CALLS = 32


@contextlib.contextmanager
def opened(
    step: Step,
    state: TrainState,
    teacher: Any,
    source: data.Resident | data.Source,
    meta: Mapping[str, Any],
    check_finite: bool,
    prefetch: int,
    place: Callable[[Any], Any],
) -> Iterator[tuple[Carry, Move, str]]:
    """The first carry, what moves it on, and the path: "scan" or "steps"."""
    at = int(jax.device_get(state.step))
    if isinstance(source, data.Resident):
        rows = jax.jit(lambda epoch: data.epoch_rows(source, epoch))
        batch = _programs.example_batch(source)
        # A resumed run stays on the path it was started on: the two may differ in the last bit.
        path = meta.get("path") or train.step_path(step, state, teacher, batch)
        make = _many if path == "scan" else _one_by_one
        move = make(step, source, teacher, rows, check_finite, batch)
        yield _carry(step, state, teacher, batch, meta), _paced(move), path
        return
    with contextlib.closing(data.prefetch(source(at), prefetch, place)) as batches:
        first = next(batches, None)
        if first is None:
            raise ValueError(f"the source has no batch from step {at} on.")
        move = _from_stream(step, teacher, first, batches, check_finite)
        yield _carry(step, state, teacher, first, meta), _paced(move), "steps"


def asked_to_stop(signals: Signals, at: int, every: int) -> bool:
    """Whether a signal came. Several processes agree, at the steps that write a line."""
    asked = signals.number is not None
    if jax.process_count() == 1:
        return asked
    if at % every:
        return False
    from jax.experimental import multihost_utils

    told = multihost_utils.process_allgather(np.int32(signals.number or 0))
    signals.number = int(told.max()) or None
    return signals.number is not None


def _carry(
    step: Step, state: TrainState, teacher: Any, batch: Any, meta: Mapping[str, Any]
) -> Carry:
    metrics = jax.eval_shape(step, state, teacher, batch)[1]
    return _programs.start(state, metrics, _metrics.from_json(meta.get("window"), metrics.names))


def _many(
    step: Step,
    source: data.Resident,
    teacher: Any,
    rows: Callable[[Array], Array],
    check_finite: bool,
    batch: Any,
) -> Move:
    width = _programs.chunk_width(source, batch)
    advance = _programs.resident_many(step, source, check_finite, width)
    held, epochs, length = _programs.holdings(source), _epochs(rows), data.steps_per_epoch(source)

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        made = min(most, width, length - at % length)
        carry, reached = advance(
            carry, teacher, held, epochs(at // length), jax.device_put(np.int32(made))
        )
        return carry, reached, made

    return move


def _one_by_one(
    step: Step,
    source: data.Resident,
    teacher: Any,
    rows: Callable[[Array], Array],
    check_finite: bool,
    batch: Any,
) -> Move:
    advance = _programs.resident_single(step, source, check_finite)
    held, epochs, length = _programs.holdings(source), _epochs(rows), data.steps_per_epoch(source)

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        return *advance(carry, teacher, held, epochs(at // length)), 1

    return move


def _from_stream(
    step: Step, teacher: Any, first: Any, rest: Iterator[Any], check_finite: bool
) -> Move:
    advance = _programs.single(step, check_finite)
    ready = [first]

    def move(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        batch = ready.pop() if ready else next(rest)
        return *advance(carry, teacher, batch), 1

    return move


def _epochs(rows: Callable[[Array], Array]) -> Callable[[int], Array]:
    """The rows of an epoch, computed once per epoch, on the device."""
    known: dict[int, Array] = {}

    def of(epoch: int) -> Array:
        if epoch not in known:
            known.clear()
            known[epoch] = rows(jax.device_put(np.int32(epoch)))
        return known[epoch]

    return of


def _paced(move: Move) -> Move:
    """Chooses the steps per call and waits for old calls, so that little work is ever queued.

    Waiting for a call made long ago leaves the device busy; nothing is transferred.
    """
    queued: collections.deque[tuple[Array, int]] = collections.deque()
    seconds_per_step, last, calls = 0.0, 0.0, 0

    def paced(carry: Carry, at: int, most: int) -> tuple[Carry, Array, int]:
        nonlocal seconds_per_step, last, calls
        if jax.process_count() == 1:  # several processes must make the same calls
            most = min(most, max(1, int(CALL_SECONDS / seconds_per_step))) if calls > 1 else 1
        carry, reached, made = move(carry, at, most)
        queued.append((reached, made))
        calls += 1
        while queued and (
            calls <= 2  # the first compiles, the second is the first to be timed
            or len(queued) > AHEAD_CALLS
            or (len(queued) > 2 and _steps(queued) * seconds_per_step > AHEAD_SECONDS)
        ):
            waited, steps = queued.popleft()
            waited.block_until_ready()
            now = time.perf_counter()
            if calls > 1:
                seconds = max((now - last) / steps, 1e-7)
                weight = 0.3 if seconds_per_step else 1.0
                seconds_per_step += weight * (seconds - seconds_per_step)
            last = now
        return carry, reached, made

    return paced


def _steps(queued: collections.deque[tuple[Array, int]]) -> int:
    return sum(steps for _, steps in queued)
