"""The loop around the step: logging, evaluation, saving, signals, and non-finite updates."""

import collections
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _donation, train, trees
from kdtl_jax._types import ModelFn, Params, PyTree
from kdtl_jax.objective import Metrics, TermsFn, Weights
from kdtl_jax.run import data, processes
from kdtl_jax.run.loop import _metrics, _programs
from kdtl_jax.run.loop._metrics import Evaluate, Log, Stop
from kdtl_jax.train import Batch, Step, TrainState

Save = Callable[[int, TrainState, dict[str, Any]], None]  # (step, state, meta)
Reached = Callable[[int], None]


class Result(NamedTuple):
    """The result of a run: `stopped` is why it ended, `path` how it ran ("scan" or "steps")."""

    state: TrainState
    step: int
    stopped: str
    path: str
    evaluations: list[dict[str, Any]]


class Nonfinite(NamedTuple):
    """An update that was not applied: its step, and the leaves it would have made non-finite."""

    step: int
    leaves: list[str]

    def __str__(self) -> str:
        names = ", ".join(repr(leaf) for leaf in self.leaves[:4])
        rest = f" and {len(self.leaves) - 4} more" if len(self.leaves) > 4 else ""
        return f"step {self.step} gave values that are not finite in {names}{rest}"


def raise_nonfinite(event: Nonfinite) -> None:
    """The default: raises FloatingPointError once the state of the last good step is saved."""
    # Too large a step ruins the parameters, too; a label without a class has no gradient.
    repair = (
        "Its gradient is finite: look for labels outside 0..classes-1 in the batch and for "
        "values of its terms that are not finite,"
        if event.leaves == ["loss"]
        else "Lower the learning rate, clip gradients,"
    )
    raise FloatingPointError(
        f"{event}. The state before it is kept. {repair} or pass skip_nonfinite(step) to leave "
        "such updates out."
    )


def stop_nonfinite(event: Nonfinite) -> None:
    """Ends the run without an error; `Result.stopped` says why."""


def skip_nonfinite(step: Step) -> Step:
    """A step that skips a non-finite update and continues with the next batch.

    An update is non-finite if a parameter, the loss or the model's state is. An optimizer's moments
    may overflow when none of these does; `run` warns about that.

    Parameters, optimizer, model state and memory stay as they were; the step number advances, so
    the batch order is unchanged. The metric `"skipped"` is the share of skipped steps; the other
    metrics exclude them.
    """

    def skipping_step(
        state: TrainState, batch: Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Metrics]:
        new_state, metrics = step(state, batch, teacher_params)
        good = ~jnp.any(_programs.nonfinite_leaves(new_state, metrics, state))
        selected = _programs.choose(good, new_state, state)._replace(step=new_state.step)
        sums = jnp.where(good, metrics.sums, jnp.zeros((), metrics.sums.dtype))
        skipped = jnp.stack([~good, jnp.ones_like(good)]).astype(sums.dtype)
        names = (*metrics.names, "skipped")
        return selected, Metrics(names, jnp.concatenate([sums, skipped[None]]))

    return skipping_step


def run(
    step: Step,
    state: TrainState,
    source: data.Resident | data.Source,
    teacher_params: Any = None,
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
    on_nonfinite: Callable[[Nonfinite], None] | None = raise_nonfinite,
    prefetch: int = 2,
    place: Callable[[Any], Any] = jax.device_put,
    reached: Reached | None = None,
) -> Result:
    """Trains up to step `steps`, never waiting for a single step's result.

    With data on the device, it runs many steps per call if that is faster (`Result.path` is
    "scan"), and single steps if XLA's CPU back end would lose its threaded convolutions
    ("steps"); the result does not depend on how steps are grouped into calls. Within a step, the
    order is: a line of the log, an evaluation, a save. On SIGTERM or SIGINT the state is saved and
    `SystemExit(143)` or `(130)` is raised; a second signal ends the process at once. Multiple
    processes stop together, at the next line of the log.

    Args:
      step: the step, not jitted.
      state: the initial state, which is donated. For a resumed run, its `step` is where it stopped.
      source: `data.resident(...)`, or `source(step) -> iterator of batches`, as returned by
        `data.stream` and `data.iterate`.
      teacher_params: passed to the step.
      steps: the step number at which the run is complete.
      log: `log(line)` with `{"step": n, name: mean over the last log_every steps}`, and for
        evaluations `{"step": n, "eval/name": value}`; `metrics_file` makes one.
      log_every: steps per line.
      evaluate: `evaluate(state) -> {name: number}`; `evaluation` makes one. It must not change
        anything: a signal may interrupt it, and a resumed run starts it again.
      evaluate_every: steps between evaluations; there is always one at the end.
      stop: called with all evaluations after each one; true ends the run. See `no_improvement`.
      save: `save(step, state, meta)`, for example `partial(checkpoint.save, checkpoints)`; it must
        have copied the state by the time it returns. There is always a save at the end.
      save_every: steps between saves.
      meta: the `meta` saved with the state that this run starts from; None starts afresh.
      on_nonfinite: called when a parameter, the loss, or a number of the model's state is no longer
        finite. That update is not applied, and the state before it is saved; then `raise_nonfinite`
        raises, or `stop_nonfinite` ends the run. None disables the check, which saves a copy of
        the state.
      prefetch: number of batches of a `Source` waiting on the device.
      place: puts a batch of a `Source` on the device(s).
      reached: `reached(step)` after every call dispatched to the device, which has at most half a
        second of work before it gets there; for a progress bar. Nothing waits for it.

    Returns:
      The final state and why the run ended.

    Warns at saves and at the end if an array of the optimizer's state is not finite: squares
    of gradients above 1e19 overflow float32, and Adam never moves such a weight again.

    Raises:
      FloatingPointError: from `raise_nonfinite`.
      RuntimeError: if the state was already donated, or shares arrays with the teacher.
      SystemExit: after a signal.
      ValueError: if the step numbers are inconsistent.
    """
    _checks.count(0, steps=steps)
    intervals = {"evaluate_every": evaluate_every, "save_every": save_every}
    given = {name: interval for name, interval in intervals.items() if interval is not None}
    _checks.count(1, log_every=log_every, **given)
    if not isinstance(state, TrainState):
        raise TypeError(
            f"state must be a TrainState, got {type(state).__name__}. Write "
            "train.init_state(params, tx, key=key)."
        )
    _donation.check_alive(state, teacher_params=teacher_params)
    meta = dict(meta or {})
    current = start = int(jax.device_get(state.step))
    saved_step = current if meta else -1
    evaluations: list[dict[str, Any]] = list(meta.get("evaluations", []))
    pending = _metrics.Pending(log if jax.process_index() == 0 else None, collections.deque())

    with (
        processes.signals() as signals,
        signals.polled(),
        _programs.open_program(
            step, state, teacher_params, source, meta, on_nonfinite is not None, prefetch, place
        ) as (carry, move, path),
    ):
        sums = carry.window.sums
        sharding = sums.sharding if sums.committed else None  # as in a call's result: one program
        zeros = jax.jit(jnp.zeros_like, out_shardings=sharding)

        def save_state() -> None:
            nonlocal saved_step
            if on_nonfinite is not None and not overflowed:
                overflowed.extend(_programs.overflowed(carry.state))
                _warn_of_overflow(current, overflowed)
            if save is not None and saved_step != current:
                window = _metrics.to_json(carry.window)
                meta = {"window": window, "evaluations": evaluations, "path": path}
                save(current, carry.state, meta)
                saved_step = current

        overflowed: list[str] = []  # non-finite arrays of the optimizer's state
        stopped, reason, evaluation_count = "", "finished", 0
        while not stopped:
            # 1. The rest of this step, whose line is already written: an evaluation, then a save.
            is_due = current > 0 and _is_due(current, evaluate_every, steps)
            is_due = is_due and not (evaluations and evaluations[-1]["step"] == current)
            if evaluate is not None and is_due:
                if _metrics.drain(pending):
                    break
                try:
                    with signals.interruptible():
                        metrics = evaluate(carry.state)
                except processes.Interrupted:
                    break
                if not isinstance(metrics, Mapping):
                    raise TypeError(f"evaluate must return {{name: value}}, got {metrics!r}.")
                evaluations.append(_metrics.evaluation_line(current, metrics))
                _metrics.write(pending, evaluations[-1])
            if current >= steps:
                stopped = reason
            elif stop is not None and evaluation_count < len(evaluations):
                evaluation_count = len(evaluations)
                stopped = "early stopping" if stop(evaluations) else ""
            # More than one process ask together, when all write a line.
            may_ask = jax.process_count() == 1 or current % log_every == 0
            if stopped or (may_ask and signals.asked()):
                break
            if _is_due(current, save_every, None) and current > start:
                if _metrics.drain(pending):
                    break
                save_state()
            # 2. Train up to the next step at which something is due.
            next_due = ((current // n + 1) * n for n in (log_every, *given.values()))
            max_steps = min(steps, *next_due) - current
            try:
                with _donation.explained(carry.state, teacher_params=teacher_params):
                    carry, step_reached, count = move(carry, current, max_steps)
            except StopIteration:
                steps, reason = current, "data ended"
                continue
            current += count
            if reached is not None:
                reached(current)
            # 3. Log the window, whose sums are fetched while later steps run.
            if current % log_every == 0:
                window = carry.window
                carry = carry._replace(window=Metrics(window.names, zeros(window.sums)))
                if _metrics.push(pending, current, window, step_reached):
                    break
        _metrics.drain(pending)
        event = _nonfinite_event(carry)
        if event is not None:
            current, stopped = event.step, f"not finite: {event}"
        save_state()
        if event is not None and on_nonfinite is not None:
            on_nonfinite(event)
        if signals.number is not None and (not stopped or jax.process_count() == 1):
            raise SystemExit(128 + signals.number)
    return Result(carry.state, current, stopped, path, evaluations)


def _warn_of_overflow(step: int, arrays: Sequence[str]) -> None:
    if not arrays:
        return
    rest = f" and {len(arrays) - 1} more" if arrays[1:] else ""
    warnings.warn(
        f"step {step}: {arrays[0]!r}{rest} of the optimizer is not finite, and its weights no "
        "longer move: the square of a gradient overflowed. Clip gradients or scale the loss down.",
        stacklevel=3,
    )


def fit(
    model: ModelFn,
    params: Params,
    tx: optax.GradientTransformation,
    *,
    terms: TermsFn,
    weights: Weights,
    source: data.Resident | data.Source,
    steps: int,
    trainable: trees.Selector = trees.everything,
    model_state: PyTree = None,
    teacher_params: Any = None,
    key: Array | None = None,
) -> train.TrainState:
    """Minimizes the loss from `params`, by `train.make_step`, `train.init_state` and `run`.

    For logging, evaluation, saving, and resuming, call these three yourself.

    Args:
      model, tx, terms, weights, trainable: as for `train.make_step`; terms such as
        `objective.classification`.
      params, model_state: the initial ones; they are copied, not donated.
      source: the batches, `data.resident(...)` or a `data.Source`.
      steps: the number of updates.
      teacher_params: frozen parameters that penalties such as L2-SP read.
      key: for dropout and other randomness; None means `jax.random.key(0)`.

    Returns:
      The last state: `.params`, `.model_state`.

    Raises:
      FloatingPointError: if a parameter or the loss is no longer finite.
      ValueError: as `train.make_step`.
    """
    step = train.make_step(model, terms, weights, tx, trainable=trainable)
    key = jax.random.key(0) if key is None else key
    state = train.init_state(params, tx, key=key, model_state=model_state, trainable=trainable)
    return run(step, state, source, teacher_params, steps=steps).state


def _nonfinite_event(carry: _programs.Carry) -> Nonfinite | None:
    """The update at which a carry stopped, or None."""
    flags = jax.device_get(carry.bad)
    if not flags.any():
        return None
    parameters, model_state = _programs.checked_paths(carry.state)
    nonfinite = [
        path for path, flag in zip([*parameters, *model_state], flags, strict=True) if flag
    ]
    # If parameters are non-finite, so are their moments.
    leaves = [path for path in nonfinite if path in {*parameters}] or nonfinite
    return Nonfinite(int(jax.device_get(carry.state.step)), leaves)


def _is_due(step: int, interval: int | None, end: int | None) -> bool:
    return step == end or (interval is not None and step % interval == 0)
