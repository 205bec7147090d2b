"""The metrics of a run: lines of metrics.jsonl, evaluations, and early stopping."""

import collections
import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from kdtl_jax import _checks, _files, train
from kdtl_jax.objective import Metrics
from kdtl_jax.run import data, scores
from kdtl_jax.train import Batch, TrainState

Log = Callable[[dict[str, Any]], None]  # takes one line of metrics
Evaluate = Callable[[TrainState], Mapping[str, Any]]  # metrics by name, of a state
Stop = Callable[[list[dict[str, Any]]], bool]  # all evaluations so far -> whether to end


@contextlib.contextmanager
def metrics_file(
    path: str | Path,
    *,
    resume_at: int | None = 0,
    stays: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[Log]:
    """Opens a `.jsonl` file for `run(log=...)`; a missing one is created.

    Args:
      path: appended to; a link is replaced by a file, and its target is unchanged. Lines of steps
        after `resume_at` are dropped first, as they will be written again. Lines that cannot be
        read (truncated by a kill or a full disk) are dropped with a warning.
      resume_at: the step that the run starts from; None keeps all lines, without reading them.
      stays: which lines of an older run to keep, if runs share the file; by default those up to
        `resume_at`.

    Yields:
      `log(line)`, which takes any value and writes what JSON lacks as null or text. Every line is
      flushed to the system at once, so that a killed process loses none.
    """
    path = _checks.path(path=path)
    if path.is_symlink() and not path.exists():
        path.unlink()
    if path.exists() and (resume_at is not None or stays is not None or path.is_symlink()):
        keep = stays or (lambda line: resume_at is None or line["step"] <= resume_at)
        content = _files.regular(path).read_bytes()
        kept_lines = b"".join(
            text + b"\n" for text, line in _lines(path, content) if _passes(line, keep)
        )
        if kept_lines != content or path.is_symlink():
            _files.write_atomic(path, kept_lines)
    with path.open("a") as file:
        last_sync = [time.monotonic()]

        def log(line: dict[str, Any]) -> None:
            file.write(json.dumps(_files.as_json(line)) + "\n")
            file.flush()
            if time.monotonic() - last_sync[0] > 1:
                os.fsync(file.fileno())
                last_sync[0] = time.monotonic()

        yield log


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, except unreadable ones, with a warning.

    That is the last line if a kill or a full disk truncated it, or all of a missing file.
    """
    path = _checks.path(path=path)
    if not path.exists():
        warnings.warn(f"{path} is missing: its metrics are lost.", stacklevel=2)
        return []
    return [line for _, line in _lines(path, _files.regular(path).read_bytes())]


def _lines(path: Path, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """`(text, line)` of every readable line."""
    result, unreadable = [], []
    for number, text in enumerate(content.split(b"\n"), 1):
        try:
            line = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError):
            line = text
        if isinstance(line, dict):
            result.append((text, line))
        elif line is not None:
            unreadable.append(number)
    if unreadable:
        line_list = f"line {unreadable[0]}" + (
            f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        )
        warnings.warn(
            f"{path}: {line_list} cannot be read (cut short?) and is left out.", stacklevel=3
        )
    return result


def _passes(line: dict[str, Any], keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return keep(line)
    except (ValueError, KeyError, TypeError):
        return False


def no_improvement(name: str, patience: int, *, minimize: bool = True) -> Stop:
    """Early stopping, once `patience` evaluations in a row have not improved on the best.

    A value that is not finite is never an improvement, nor is an evaluation without a value.

    Args:
      name: an entry of what `evaluate` returns.
      patience: how many evaluations without a new best are allowed.
      minimize: whether smaller is better.

    Raises:
      ValueError: (the returned function) if evaluations lack the entry.
    """

    _checks.count(1, patience=patience)
    # Evaluations seen so far, their best and its value: each is examined only once.
    seen, best_index, best_value = [], -1, np.nan

    def stop(evaluations: list[dict[str, Any]]) -> bool:
        nonlocal seen, best_index, best_value
        if evaluations and f"eval/{name}" not in evaluations[-1]:
            names = [entry.removeprefix("eval/") for entry in evaluations[-1] if entry != "step"]
            raise ValueError(
                f"evaluate() returned no {name!r}, which early stopping needs: {names}."
            )
        if seen and (len(seen) > len(evaluations) or seen[-1] is not evaluations[len(seen) - 1]):
            seen, best_index, best_value = [], -1, np.nan  # those of another run
        for line in evaluations[len(seen) :]:
            # In a resumed run, earlier evaluations may lack a new entry.
            value = line.get(f"eval/{name}", np.nan)
            if scores.best([best_value, value], minimize=minimize) == 1:
                best_index, best_value = len(seen), value
            seen.append(line)
        return len(evaluations) - 1 - best_index >= patience

    return stop


def evaluation(
    eval_step: Callable[[Any, Batch], Metrics],
    batches: Callable[[], Iterator[Batch]],
    *,
    variables: Callable[[TrainState], Any],
    prefetch: int = 2,
    place: Callable[[Any], Any] = jax.device_put,
) -> Evaluate:
    """Makes `evaluate(state)` over padded batches: exact means, one synchronization at the end.

    Args:
      eval_step: from `train.make_eval_step`, not jitted.
      batches: starts a pass over the evaluation data, for example
        `lambda: data.in_order(arrays, 256)`.
      variables: returns the model's variables from the state:
        `lambda s: Variables(s.params, s.model_state)`.

    Raises:
      ValueError: from the returned function, if `batches()` yields nothing.
    """
    jitted = jax.jit(eval_step)
    add = jax.jit(train.add_metrics)

    def evaluate(state: TrainState) -> dict[str, Any]:
        inputs = variables(state)
        total: Metrics | None = None
        for batch in data.prefetch(batches(), prefetch, place):
            metrics = jitted(inputs, batch)
            total = metrics if total is None else add(total, metrics)
        if total is None:
            raise ValueError("batches() yielded nothing.")
        return means_of(total)

    return evaluate


class Pending(NamedTuple):
    """Windows on their way to the host, oldest first: (step, sums, the step actually reached)."""

    log: Log | None
    windows: collections.deque[tuple[int, Metrics, Array]]


def push(pending: Pending, step: int, window: Metrics, reached: Array) -> bool:
    """Starts a window's transfer and writes the ones before it; returns like `drain`."""
    window.sums.copy_to_host_async()
    reached.copy_to_host_async()
    pending.windows.append((step, window, reached))
    return drain(pending, leave=1)


def drain(pending: Pending, leave: int = 0) -> bool:
    """Writes all but `leave` windows; true if a non-finite update stopped the state's progress."""
    while len(pending.windows) > leave:
        step, window, reached = pending.windows.popleft()
        if int(jax.device_get(reached)) < step:
            pending.windows.clear()
            return True
        write(pending, {"step": step} | means_of(window))
    return False


def write(pending: Pending, line: dict[str, Any]) -> None:
    """Passes a line to the log, if there is one."""
    if pending.log is not None:
        pending.log(line)


def evaluation_line(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`{"step": ..., "eval/name": number}`."""
    numbers = {name: np.asarray(jax.device_get(value)).tolist() for name, value in metrics.items()}
    return {"step": step} | {f"eval/{name}": value for name, value in numbers.items()}


def means_of(window: Metrics) -> dict[str, Any]:
    """`{name: mean}` of a window on its way to the host."""
    sums = np.asarray(jax.device_get(window.sums), np.float64)
    means = {}
    for i, name in enumerate(window.names):
        total, weight = sums[..., i, 0], sums[..., i, 1]
        mean = np.where(weight != 0, total / np.where(weight != 0, weight, 1), np.nan)
        means[name] = mean.tolist()
    return means


def to_json(window: Metrics) -> dict[str, Any]:
    """A window as JSON, exact to the bit."""
    return {"names": list(window.names), "sums": jax.device_get(window.sums).tolist()}


def from_json(saved: Mapping[str, Any] | None, names: tuple[str, ...]) -> Any:
    """The sums of `to_json`, or None if there are none or the metrics have other names."""
    return saved["sums"] if saved and tuple(saved["names"]) == names else None
