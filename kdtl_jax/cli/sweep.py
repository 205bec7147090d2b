"""`kdtl sweep`: settings x seeds of several methods, as few programs as possible."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from kdtl_jax import methods, trees
from kdtl_jax.cli import _config, _output, _specs, _sweep_report, _training
from kdtl_jax.cli._config import UsageError
from kdtl_jax.datasets import Splits, standardizer
from kdtl_jax.methods import Entry
from kdtl_jax.recipes import sweep
from kdtl_jax.recipes._training import Schedule
from kdtl_jax.train import sweep as sweeps

BY_NAME = {entry.name: entry for entry in methods.table()}
DEFAULT_GRID = ["temperature=1,2,4,8"]
PATHS = {
    "together": sweeps.vectorized,
    "mapped": sweeps.mapped,
    "one-by-one": sweeps.sequential,
}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
POSITIVE = ("temperature", "rate", "alpha")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl sweep`."""
    parser.add_argument(
        "--methods",
        type=_training.names,
        default=["kd"],
        metavar="NAME,...",
        help="that train nothing but the student (kdtl distill --list); default: kd",
    )
    axes = parser.add_argument_group(
        "axes",
        "temperature, rate, weight_decay, alpha (start from alpha times the teacher's selected "
        "weights), weight (multiplies a method's own weights of its terms), or a term's own name: "
        "task, kd, …",
    )
    axes.add_argument(
        "--grid",
        nargs="+",
        type=_values_text,
        default=[],
        metavar="AXIS=X,...",
        help=f"every combination of these values; default: {DEFAULT_GRID[0]}",
    )
    axes.add_argument(
        "--sample",
        type=_training.count,
        metavar="N",
        help="N settings that fill the ranges of --range evenly, instead of a grid",
    )
    axes.add_argument(
        "--range",
        nargs="+",
        type=_range_text,
        default=[],
        metavar="AXIS=LOW..HIGH[:log]",
        help="for --sample, e.g. temperature=1..20:log",
    )
    parser.add_argument("--seeds", type=_training.count, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--epochs", type=_training.count, default=30, metavar="N", help="of a student; default: 30"
    )
    parser.add_argument(
        "--teacher-epochs", type=_training.count, default=30, metavar="N", help="default: 30"
    )
    _config.add_quick(parser, "two seeds, four epochs", seeds=2, epochs=4, teacher_epochs=4)
    _specs.add_data_arguments(parser)
    _specs.add_model_arguments(parser, {"teacher": "mlp:128,64", "student": "mlp:16,16"})
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="a safetensors file instead of training a teacher"
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch-size", type=_training.count, default=64, metavar="N", help="default: 64"
    )
    group.add_argument(
        "--optimizer", choices=tuple(_training.RATES), default="adam", help="default: adam"
    )
    group.add_argument(
        "--rate", type=_training.positive, metavar="X", help="where no axis says otherwise"
    )
    group.add_argument(
        "--weight-decay", type=_training.not_negative, default=0.0, metavar="X", help="default: 0"
    )
    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--halving",
        type=_training.count,
        default=1,
        metavar="RUNGS",
        help="stop early: after each RUNGS-th part of the epochs the better half of the settings "
        "goes on; default: 1, everything to the end",
    )
    how.add_argument(
        "--memory", type=_bytes_text, metavar="BYTES", help="of one call, e.g. 2GB; default: any"
    )
    how.add_argument(
        "--devices",
        type=_training.count,
        metavar="N",
        help="spread students over N devices; on a CPU, N virtual ones",
    )
    how.add_argument(
        "--path",
        choices=("fastest", *PATHS),
        default="fastest",
        help="together: one program for all students; default: the fastest here, measured first",
    )
    _output.add_out(parser, "runs/sweep")
    parser.epilog = (
        "Examples:\n"
        "  kdtl sweep --grid temperature=1,2,4,8 rate=1e-3,3e-3,1e-2 --seeds 5\n"
        "  kdtl sweep --methods kd,dkd,dist --grid temperature=1,4 task=0.1,0.5,1\n"
        "  kdtl sweep --sample 64 --range temperature=1..20:log kd=0.1..2 --halving 3"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the sweep, prints the best settings, writes the run folder; returns the exit code."""
    methods = _methods(args.methods)
    devices = _devices(args)  # before anything touches one
    columns = settings_of(args)
    raw = _specs.raw_splits(args)
    measured = standardizer(raw.train)
    splits = Splits(*(measured.apply(part) for part in raw))
    classes = raw.train.classes
    teacher, student = (_specs.model(text, classes) for text in (args.teacher, args.student))
    if args.teacher_weights is not None and not Path(args.teacher_weights).exists():
        raise ValueError(f"--teacher-weights {args.teacher_weights}: no such file.")
    folder = _output.run_folder(args)
    _output.write_settings(folder, args)
    rate = _training.RATES[args.optimizer] if args.rate is None else args.rate
    of_student = optimizer(args.optimizer)
    schedule = Schedule(
        epochs=args.teacher_epochs,
        batch_size=args.batch_size,
        optimizer=lambda steps: of_student(rate, args.weight_decay, steps),
    )
    settings = sweep.Settings(
        seeds=args.seeds,
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=of_student,
        fixed={"rate": rate, "weight_decay": args.weight_decay},
        teachers=schedule,
        teacher_weights=None if args.teacher_weights is None else Path(args.teacher_weights),
        memory=None if args.memory is None else _bytes(args.memory),
        devices=devices,
        rungs=args.halving,
        runner=PATHS.get(args.path),
    )
    say = _output.progress()
    outcome = sweep.run(splits, teacher, student, methods, columns, settings, folder, say)
    _sweep_report.write(folder, args, splits, outcome, settings)
    _sweep_report.print_table(outcome)
    print(f"report: {folder / 'report.html'}")
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The settings as columns, `{axis: [K]}`.

    Raises:
      UsageError: if grid and sample are mixed, or an axis is named twice or out of its range.
    """
    if args.sample is None and args.range:
        raise UsageError("--range is for --sample N: say how many settings to draw.")
    if args.sample is not None and (args.grid or not args.range):
        raise UsageError(
            "--sample needs --range, and no --grid. Write one value as a range of two."
        )
    texts = args.range if args.sample is not None else args.grid or DEFAULT_GRID
    names = [text.partition("=")[0].strip() for text in texts]
    twice = [name for name in names if names.count(name) > 1]
    if twice or "seed" in names:
        what = f"axis {twice[0]!r} is given twice" if twice else "seeds are given by --seeds N"
        raise UsageError(f"--grid: {what}.")
    if args.sample is None:
        points = sweeps.grid(**{n: _values(t) for n, t in zip(names, texts, strict=True)})
    else:
        try:
            ranges = {n: _range(t) for n, t in zip(names, texts, strict=True)}
            points = sweeps.sample(args.sample, **ranges)
        except ValueError as error:
            raise UsageError(f"--range: {error}") from None
    columns = {name: np.asarray(column, np.float32) for name, column in points.items()}
    for name, column in columns.items():
        if (column < 0).any() or (name in POSITIVE and (column == 0).any()):
            least = "above 0" if name in POSITIVE else "0 or more"
            raise UsageError(f"--grid: {name} must be {least}, got {column.min():g}.")
    return columns


def optimizer(name: str) -> Any:
    """`optimizer(rate, weight_decay, steps)` of `kdtl distill`, both numbers traced."""

    def of(rate: Any, decay: Any, steps: int) -> optax.GradientTransformation:
        # The schedule is of 1, as optax compares its numbers in Python; the rate multiplies it.
        fall = optax.cosine_decay_schedule(1.0, max(steps, 1))

        def schedule(count: Any) -> Any:
            return rate * fall(count)

        if name == "adamw":
            return optax.adamw(schedule, weight_decay=decay)
        if name == "adam":
            return optax.chain(optax.add_decayed_weights(decay), optax.adam(schedule))
        sgd = optax.sgd(schedule, momentum=0.9, nesterov=True)
        return optax.chain(optax.add_decayed_weights(decay), sgd)

    return of


def _methods(asked: Sequence[str]) -> list[Entry]:
    unknown = [name for name in asked if name not in BY_NAME]
    if unknown or not asked:
        name = unknown[0] if unknown else ""
        near = ", ".join(trees.nearest(name, list(BY_NAME), n=4))
        raise UsageError(
            f"--methods: {name!r} is no method. Nearest: {near}. kdtl distill --list shows all."
        )
    return [BY_NAME[name] for name in dict.fromkeys(asked)]


def _devices(args: argparse.Namespace) -> list[Any] | None:
    if args.devices is None or args.devices == 1:
        return None
    try:
        jax.config.update("jax_num_cpu_devices", args.devices)
    except RuntimeError:
        pass  # the back end is up already, with as many devices as it has
    if args.devices > jax.device_count():
        raise UsageError(f"--devices {args.devices}: there are {jax.device_count()} devices here.")
    if args.path in ("mapped", "one-by-one"):
        raise UsageError(f"--devices spreads students that run together, not --path {args.path}.")
    return jax.devices()[: args.devices]


def _values(text: str) -> list[float]:
    _, _, values = text.partition("=")
    found = [float(part) for part in values.split(",")]
    if not all(map(math.isfinite, found)):
        raise ValueError
    return found


def _values_text(text: str) -> str:
    name, equals, _ = text.partition("=")
    try:
        found = _values(text)
    except ValueError:
        found = []
    if not name.strip() or not equals or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not axis=number,… as in temperature=1,2,4")
    return text


def _range(text: str) -> sweeps.Range:
    found = re.fullmatch(r"[^=]+=\s*([^:]+?)\.\.([^:]+?)(:log)?", text)
    if found is None:
        raise ValueError
    return sweeps.Range(float(found[1]), float(found[2]), found[3] is not None)


def _range_text(text: str) -> str:
    try:
        _range(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not axis=low..high or axis=low..high:log, as in temperature=1..20:log"
        ) from None
    return text


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)i?b?", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise ValueError
    return int(float(found[1]) * UNITS[found[2]])


def _bytes_text(text: str) -> str:
    try:
        _bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount as 500MB or 2GB") from None
    return text
