"""The loop around the step: logging, evaluation, saving, signals."""

import collections
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax.objective import Metrics
from kdtl_jax.run import data
from kdtl_jax.run.loop import _metrics, _moves, _nonfinite, _signals
from kdtl_jax.run.loop._evaluation import Evaluate, Stop
from kdtl_jax.run.loop._metrics import Log
from kdtl_jax.run.loop._nonfinite import Nonfinite
from kdtl_jax.train import Step, TrainState

Save = Callable[[int, TrainState, dict[str, Any]], None]


class Result(NamedTuple):
    """The end of a run. `stopped` says why it ended, `path` how it ran: "scan" or "steps"."""

    state: TrainState
    step: int
    stopped: str
    path: str
    evaluations: list[dict[str, Any]]


def run(
    step: Step,
    state: TrainState,
    teacher_params: Any,
    source: data.Resident | data.Source,
    *,
    steps: int,
    log: Log | None = None,
    log_every: int = 50,
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
    stop: Stop | None = None,
    save: Save | None = None,
    save_every: int | None = None,
    meta: Mapping[str, Any] | None = None,
    on_nonfinite: Callable[[Nonfinite], None] | None = _nonfinite.raise_nonfinite,
    prefetch: int = 2,
    place: Callable[[Any], Any] = jax.device_put,
) -> Result:
    """Trains up to step `steps`, never waiting for a single step's result.

    Data on the device runs many steps per call where that is faster (`Result.path` is "scan"),
    step by step where XLA's CPU back end would lose its threaded convolutions ("steps"), and the
    result does not depend on where calls are cut. What happens at one step happens in this order:
    a line of the log, an evaluation, a save. On SIGTERM or SIGINT the state is saved and
    `SystemExit(143)` or `(130)` is raised; a second signal ends the process at once.

    Args:
      step: the un-jitted step.
      state: where to start; it is donated. Its `step` is a restored run's.
      teacher_params: the step's second argument.
      source: `data.resident(...)`, or `source(step) -> iterator of batches` as `data.stream` and
        `data.iterate` make.
      steps: the step number at which the run is complete.
      log: `log(line)` with `{"step": n, name: mean over the last log_every steps}`, and for
        evaluations `{"step": n, "eval/name": value}`; `metrics_file` gives one.
      log_every: steps per line.
      evaluate: `evaluate(state) -> {name: number}`; `evaluation` makes one. It must not change
        anything: a signal may break it off, and a resumed run starts it again.
      evaluate_every: steps between evaluations; there is always one at the end.
      stop: looks at all evaluations so far and ends the run early; see `no_improvement`.
      save: `save(step, state, meta)`, for example `partial(checkpoint.save, checkpoints)`; it must
        have copied the state when it returns. There is always a save at the end.
      save_every: steps between saves.
      meta: what `save` was given for the state that this run starts from; None starts afresh.
      on_nonfinite: called when a parameter or the loss is no longer finite. That update is not
        applied, the state before it is saved; then `raise_nonfinite` raises, `stop_nonfinite` ends
        the run. None does not check, which saves a copy of the state.
      prefetch: batches of a `Source` waiting on the device.
      place: puts a batch of a `Source` on the device(s).

    Returns:
      The final state and why the run ended.

    Raises:
      FloatingPointError: from `raise_nonfinite`.
      SystemExit: after a signal.
      ValueError: if the step numbers make no sense.
    """
    _check(steps, log_every, evaluate_every, save_every)
    meta = dict(meta or {})
    at = start = int(jax.device_get(state.step))
    saved = at if meta else -1
    evaluations: list[dict[str, Any]] = list(meta.get("evaluations", []))
    pending = _metrics.Pending(log if jax.process_index() == 0 else None, collections.deque())

    with (
        _signals.caught() as signals,
        _moves.opened(
            step, state, teacher_params, source, meta, on_nonfinite is not None, prefetch, place
        ) as (carry, move, path),
    ):
        sums = carry.window.sums
        empty = jax.jit(partial(jnp.zeros_like, sums), out_shardings=sums.sharding)

        def store() -> None:
            nonlocal saved
            if save is not None and saved != at:
                window = _metrics.to_json(carry.window)
                save(at, carry.state, {"window": window, "evaluations": evaluations, "path": path})
                saved = at

        stopped, why = "", "finished"
        while not stopped:
            # 1. What is due at this step: its line is out already, now evaluation, then a save.
            if _is_due(at, evaluate_every, steps) and not _has(evaluations, at):
                if evaluate is not None and at > 0:
                    if _metrics.drain(pending):
                        break
                    try:
                        with signals.interruptible():
                            found = dict(evaluate(carry.state))
                    except _signals.Interrupted:
                        break
                    evaluations.append(_metrics.evaluation_line(at, found))
                    _metrics.write(pending, evaluations[-1])
            if at >= steps:
                stopped = why
            elif stop is not None and evaluations and stop(evaluations):
                stopped = "early stopping"
            if stopped or _moves.asked_to_stop(signals, at, log_every):
                break
            if _is_due(at, save_every, None) and at > start:
                if _metrics.drain(pending):
                    break
                store()
            # 2. Up to the next step at which something is due.
            most = min(_next(at, log_every, evaluate_every, save_every), steps) - at
            try:
                carry, reached, made = move(carry, at, most)
            except StopIteration:
                steps, why = at, "data ended"
                continue
            at += made
            # 3. The window's line, fetched while later steps run.
            if at % log_every == 0:
                window = carry.window
                carry = carry._replace(window=Metrics(window.names, empty()))
                if _metrics.push(pending, at, window, reached):
                    break
        _metrics.drain(pending)
        event = _nonfinite.found_in(carry)
        if event is not None:
            at, stopped = event.step, f"not finite: {event}"
        store()
        if event is not None and on_nonfinite is not None:
            on_nonfinite(event)
    if not stopped and signals.number is not None:
        raise SystemExit(128 + signals.number)
    return Result(carry.state, at, stopped, path, evaluations)


def _is_due(at: int, every: int | None, end: int | None) -> bool:
    return at == end or (every is not None and at % every == 0)


def _next(at: int, *intervals: int | None) -> int:
    """The next multiple of any of the intervals."""
    return min((at // every + 1) * every for every in intervals if every is not None)


def _has(evaluations: list[dict[str, Any]], at: int) -> bool:
    return bool(evaluations) and evaluations[-1]["step"] == at


def _check(steps: int, log_every: int, evaluate_every: int | None, save_every: int | None) -> None:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}.")
    given = {"log_every": log_every, "evaluate_every": evaluate_every, "save_every": save_every}
    for name, every in given.items():
        if every is not None and every < 1:
            raise ValueError(f"{name} must be at least 1, got {every}.")
