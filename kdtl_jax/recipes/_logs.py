"""Exporting `metrics.jsonl` to CSV and, with tensorboardX, to TensorBoard's event files.

Both are rewritten from the run's file at its end, so a resumed run has every line once. TensorBoard
shows a method as soon as it finishes. Values by seed are averaged.
"""

import contextlib
import csv
import importlib.util
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax import _files
from kdtl_jax.recipes.settings import setting, some_names
from kdtl_jax.run import checkpoint, loop

KINDS = ("tensorboard", "csv")
KEYS = ("method", "step")

Lines = dict[str, list[dict[str, Any]]]  # lines of a metrics file, by method


def kinds(value: Any) -> tuple[str, ...]:
    """`parse=` of a setting: some of `tensorboard,csv`; TensorBoard needs its extra."""
    chosen = some_names(() if value is None else value)
    unknown = [name for name in chosen if name not in KINDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r:.60} is not one of {', '.join(KINDS)}")
    if "tensorboard" in chosen and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("tensorboard: pip install 'kdtl_jax[tensorboard]'")
    return chosen


@dataclass(frozen=True)
class LogSettings:
    """A setting of commands that train."""

    log: tuple[str, ...] = setting(
        (), "also write the metrics for other tools: tensorboard, csv", metavar="NAME,...",
        parse=kinds,
    )  # fmt: skip


def write(folder: Path, chosen: Sequence[str]) -> None:
    """Writes `metrics.csv` and `tensorboard/` of a run folder from its `metrics.jsonl`."""
    if not chosen:
        return
    lines = [_averaged(line) for line in method_lines(folder)]
    if "csv" in chosen:
        columns = dict.fromkeys([*KEYS, *(name for line in lines for name in line)])
        text = io.StringIO()
        table = csv.DictWriter(text, [*columns], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        _files.write_atomic(folder / "metrics.csv", text.getvalue().encode())
    if "tensorboard" in chosen:
        _write_events(folder / "tensorboard", lines)


def write_method_events(
    folder: Path, lines: Sequence[Mapping[str, Any]], chosen: Sequence[str]
) -> None:
    """Writes a finished method's lines to `tensorboard/`, since later methods may take hours."""
    if "tensorboard" in chosen:
        _write_events(folder / "tensorboard", [_averaged(line) for line in lines])


def write_curves(
    folder: Path, learning: Mapping[str, Mapping[str, Sequence[float]]], chosen: Sequence[str]
) -> None:
    """Adds the scores and losses by epoch of methods that train in one program, then calls `write`.

    Lines of other methods stay in `metrics.jsonl`.
    """
    file = folder / "metrics.jsonl"
    existing = loop.read_metrics(file) if file.exists() else []
    lines = [line for line in existing if line.get("method") not in learning]
    for method, curve in learning.items():
        for name, values in curve.items():
            if name == "epoch":
                continue
            is_loss = name == "loss"  # one per epoch; scores are at the epochs in "epoch"
            epochs = range(1, len(values) + 1) if is_loss else curve["epoch"]
            key = name if is_loss else f"eval/{name}"
            lines += [
                _files.as_json({"step": int(epoch), "method": method, key: value})
                for epoch, value in zip(epochs, values, strict=True)
            ]
    _files.write_atomic(file, "".join(f"{json.dumps(x)}\n" for x in lines).encode())
    write(folder, chosen)


def _averaged(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line with means of values by seed; None, how JSON writes NaN, makes the mean NaN."""
    return {
        name: float(np.asarray(x, float).mean()) if isinstance(x, list) else x
        for name, x in line.items()
    }


def _write_events(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one TensorBoard run per method, to show them side by side."""
    from tensorboardX import SummaryWriter  # an extra

    for method in dict.fromkeys(line["method"] for line in lines):
        shutil.rmtree(folder / method, ignore_errors=True)
        with SummaryWriter(str(folder / method), write_to_disk=True) as writer:
            for line in (line for line in lines if line["method"] == method):
                for name, value in line.items():
                    if name not in KEYS and isinstance(value, (int, float)):
                        writer.add_scalar(name, value, int(line["step"]))


def method_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's file that have a method and a step."""
    return [
        line
        for line in loop.read_metrics(folder / "metrics.jsonl")
        if isinstance(line.get("method"), str) and isinstance(line.get("step"), int)
    ]


def read_lines(folder: Path) -> Lines:
    """Reads a run's file once for all methods; `method_log` adds the lines of later methods.

    Removes unreadable lines from the file. Warns of lost metrics if the file is missing or has no
    line although a method has saved steps.
    """
    file, lines = folder / "metrics.jsonl", Lines()
    if jax.process_index() != 0:  # one process writes it
        return lines
    saved = any(map(checkpoint.steps, folder.glob("checkpoints/*")))
    if file.exists():
        with loop.metrics_file(file, stays=lambda line: True):
            pass
    elif not saved:  # nothing has been logged
        return lines
    for line in method_lines(folder):
        lines.setdefault(line["method"], []).append(line)
    if saved and not lines and file.exists():
        warnings.warn(f"{file} holds no metrics: those of the saved steps are lost.", stacklevel=2)
    return lines


@contextlib.contextmanager
def method_log(
    folder: Path, lines: Lines, name: str, keep: Callable[[dict[str, Any]], bool]
) -> Iterator[loop.Log]:
    """Opens a run's file for one method, after removing those of its lines not to `keep`."""
    lines_ = lines.setdefault(name, [])
    count, lines_[:] = len(lines_), [line for line in lines_ if keep(line)]

    def keep_line(line: dict[str, Any]) -> bool:
        return line.get("method") != name or keep(line)

    # The file is read again only if lines must be removed.
    filter_lines = keep_line if len(lines_) < count else None
    with loop.metrics_file(folder / "metrics.jsonl", resume_at=None, stays=filter_lines) as log:

        def write(line: dict[str, Any]) -> None:
            record = _files.as_json({"method": name, **line})
            lines_.append(record)
            log(record)

        yield write


def curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A method's mean loss over seeds and its learning rate, by epoch, from its lines."""
    lines = [_averaged(line) for line in lines if "loss" in line]
    values_by_name = {
        name: [float(x[name]) for x in lines if name in x] for name in ("loss", "learning_rate")
    }
    return {name: values for name, values in values_by_name.items() if len(values) == len(lines)}
