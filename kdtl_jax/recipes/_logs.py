"""`metrics.jsonl` for other tools: a CSV table, and TensorBoard's event files by tensorboardX.

Both are rewritten from the run's own file at its end, so that a resumed run has every line once;
TensorBoard shows a method as soon as it is finished. Values by seed are averaged.
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
from kdtl_jax.recipes.settings import names, setting
from kdtl_jax.run import checkpoint, loop

KINDS = ("tensorboard", "csv")
KEYS = ("method", "step")

Lines = dict[str, list[dict[str, Any]]]  # of a metrics file, by method


def kinds(value: Any) -> tuple[str, ...]:
    """`parse=` of a setting: some of `tensorboard,csv`; TensorBoard needs its extra."""
    if value in (None, "", [], ()):
        return ()
    found = names(value)
    unknown = [name for name in found if name not in KINDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r:.60} is not one of {', '.join(KINDS)}")
    if "tensorboard" in found and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("tensorboard: pip install 'kdtl_jax[tensorboard]'")
    return found


@dataclass(frozen=True)
class Logged:
    """A setting of commands that train."""

    log: tuple[str, ...] = setting(
        (), "also write the metrics for other tools: tensorboard, csv", metavar="NAME,...",
        parse=kinds,
    )  # fmt: skip


def write(folder: Path, chosen: Sequence[str]) -> None:
    """Writes `metrics.csv` and `tensorboard/` of a run folder from its `metrics.jsonl`."""
    if not chosen:
        return
    lines = [_averaged(line) for line in of_methods(folder)]
    if "csv" in chosen:
        columns = dict.fromkeys([*KEYS, *(name for line in lines for name in line)])
        text = io.StringIO()
        table = csv.DictWriter(text, [*columns], lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        _files.write_atomic(folder / "metrics.csv", text.getvalue().encode())
    if "tensorboard" in chosen:
        _write_events(folder / "tensorboard", lines)


def show(folder: Path, own: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> None:
    """A finished method's lines in `tensorboard/`: those that follow may take hours."""
    if "tensorboard" in chosen:
        _write_events(folder / "tensorboard", [_averaged(line) for line in own])


def write_curves(
    folder: Path, learning: Mapping[str, Mapping[str, Sequence[float]]], chosen: Sequence[str]
) -> None:
    """`metrics.jsonl` of methods that train in whole programs, their scores and losses by epoch.

    Lines of other methods stay. Then calls `write`.
    """
    file = folder / "metrics.jsonl"
    known = loop.read_metrics(file) if file.exists() else []
    lines = [line for line in known if line.get("method") not in learning]
    for method, curve in learning.items():
        for name, values in curve.items():
            if name == "epoch":
                continue
            is_loss = name == "loss"  # one per epoch; scores are for those in "epoch"
            epochs = range(1, len(values) + 1) if is_loss else curve["epoch"]
            key = name if is_loss else f"eval/{name}"
            lines += [
                _files.as_json({"step": int(epoch), "method": method, key: value})
                for epoch, value in zip(epochs, values, strict=True)
            ]
    _files.write_atomic(file, "".join(f"{json.dumps(x)}\n" for x in lines).encode())
    write(folder, chosen)


def _averaged(line: Mapping[str, Any]) -> dict[str, Any]:
    def value(x: Any) -> Any:
        numbers = np.asarray([np.nan if part is None else part for part in x], float)
        return float(numbers.mean())

    return {name: value(x) if isinstance(x, list) else x for name, x in line.items()}


def _write_events(home: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """One run per method, which TensorBoard shows side by side."""
    from tensorboardX import SummaryWriter  # an extra

    for method in dict.fromkeys(line["method"] for line in lines):
        shutil.rmtree(home / method, ignore_errors=True)
        own = [line for line in lines if line["method"] == method]
        with SummaryWriter(str(home / method), write_to_disk=True) as writer:
            for line in own:
                known = {name: x for name, x in line.items() if name not in KEYS}
                numbers = {name: x for name, x in known.items() if isinstance(x, (int, float))}
                for name, value in numbers.items():
                    writer.add_scalar(name, value, int(line["step"]))


def of_methods(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's file that have a method and a step; others are not for this."""
    return [
        line
        for line in loop.read_metrics(folder / "metrics.jsonl")
        if isinstance(line.get("method"), str) and isinstance(line.get("step"), int)
    ]


def begun(folder: Path) -> Lines:
    """The lines that a run's file has already; `of_method` adds those of the methods that follow.

    The file is read once here, not once per method. Lines that cannot be read are dropped from it;
    if it is missing or holds none although a method has saved steps, a warning says that the
    metrics are lost.
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
    for line in of_methods(folder):
        lines.setdefault(line["method"], []).append(line)
    if saved and not lines and file.exists():
        warnings.warn(f"{file} holds no metrics: those of the saved steps are lost.", stacklevel=2)
    return lines


@contextlib.contextmanager
def of_method(
    folder: Path, lines: Lines, name: str, stays: Callable[[dict[str, Any]], bool]
) -> Iterator[loop.Log]:
    """Opens a run's file for one method, without those of its lines that do not stay."""
    own = lines.setdefault(name, [])
    before, own[:] = len(own), [line for line in own if stays(line)]

    def kept(line: dict[str, Any]) -> bool:
        return line.get("method") != name or stays(line)

    # The file is read again only where some of its lines do not stay.
    asked = kept if len(own) < before else None
    with loop.metrics_file(folder / "metrics.jsonl", resume_at=None, stays=asked) as log:

        def write(line: dict[str, Any]) -> None:
            whole = _files.as_json({"method": name, **line})
            own.append(whole)
            log(whole)

        yield write


def curves(own: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """A method's mean loss over seeds and its learning rate, by epoch, from its lines."""
    own = [_averaged(line) for line in own if "loss" in line]
    found = {name: [float(x[name]) for x in own if name in x] for name in ("loss", "learning_rate")}
    return {name: values for name, values in found.items() if len(values) == len(own)}
