"""metrics.jsonl: one line per window or evaluation, without gaps or duplicates after a resume."""

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from kdtl_jax import _files
from kdtl_jax.objective import Metrics

Log = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def metrics_file(
    path: str | Path,
    *,
    resume_at: int = 0,
    stays: Callable[[dict[str, Any]], bool] | None = None,
) -> Iterator[Log]:
    """Opens a `.jsonl` file for `run(log=...)`.

    Args:
      path: appended to. Lines of steps after `resume_at` are dropped first: they will be written
        again; a line cut short by a kill is dropped too.
      resume_at: the step that the run starts from.
      stays: which lines of an older run stay, where one file serves several runs; by default those
        up to `resume_at`.

    Yields:
      `log(line)`; every line is handed to the system at once, so that a killed process loses none.
    """
    path = Path(path)
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        keep = stays or (lambda line: line["step"] <= resume_at)
        kept = [line for line in lines if _stays(line, keep)]
        if len(kept) != len(lines):
            _files.write_atomic(path, b"".join(kept))
    with path.open("a") as file:
        synced = [time.monotonic()]

        def log(line: dict[str, Any]) -> None:
            file.write(json.dumps({k: _json_value(v) for k, v in line.items()}) + "\n")
            file.flush()
            if time.monotonic() - synced[0] > 1:
                os.fsync(file.fileno())
                synced[0] = time.monotonic()

        yield log


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class Pending(NamedTuple):
    """Windows on their way to the host, oldest first: (step, sums, the step really reached)."""

    log: Log | None
    windows: collections.deque[tuple[int, Metrics, Array]]


def push(pending: Pending, step: int, window: Metrics, reached: Array) -> bool:
    """Starts a window's transfer and writes the ones before it; true as `drain` is."""
    window.sums.copy_to_host_async()
    reached.copy_to_host_async()
    pending.windows.append((step, window, reached))
    return drain(pending, leave=1)


def drain(pending: Pending, leave: int = 0) -> bool:
    """Writes all but `leave` windows; true if the state was held back by a non-finite update."""
    while len(pending.windows) > leave:
        step, window, reached = pending.windows.popleft()
        if int(jax.device_get(reached)) < step:
            pending.windows.clear()
            return True
        write(pending, line_of(step, window))
    return False


def write(pending: Pending, line: dict[str, Any]) -> None:
    """Hands a line to the log, if there is one."""
    if pending.log is not None:
        pending.log(line)


def evaluation_line(step: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """`{"step": ..., "eval/name": number}`."""
    numbers = {name: np.asarray(jax.device_get(value)).tolist() for name, value in found.items()}
    return {"step": step} | {f"eval/{name}": value for name, value in numbers.items()}


def line_of(step: int, window: Metrics) -> dict[str, Any]:
    """`{"step": ..., name: mean}` of a window on its way to the host."""
    sums = np.asarray(jax.device_get(window.sums), np.float64)
    means = {}
    for i, name in enumerate(window.names):
        total, weight = sums[..., i, 0], sums[..., i, 1]
        mean = np.where(weight != 0, total / np.where(weight != 0, weight, 1), np.nan)
        means[name] = mean.tolist()
    return {"step": step} | means


def to_json(window: Metrics) -> dict[str, Any]:
    """A window as JSON that gives back every bit."""
    return {"names": list(window.names), "sums": jax.device_get(window.sums).tolist()}


def from_json(saved: Mapping[str, Any] | None, names: tuple[str, ...]) -> Any:
    """The sums of `to_json`, or None if there are none or the metrics have other names."""
    return saved["sums"] if saved and tuple(saved["names"]) == names else None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN; a mean over nothing is none
    return value


def _stays(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return line.endswith(b"\n") and keep(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False
