"""`kdtl distill`: one teacher, a student by every method asked for, on the user's data."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from kdtl_jax import _files, methods, trees
from kdtl_jax.cli import _config, _output, _specs, _training
from kdtl_jax.datasets import Splits, Standardizer, standardizer
from kdtl_jax.interop import safetensors
from kdtl_jax.methods import Entry
from kdtl_jax.recipes import _networks, distill
from kdtl_jax.recipes._options import Options
from kdtl_jax.recipes._training import Place, Schedule
from kdtl_jax.run import report

DEFAULT = ["kd", "dkd"]
ALL = "all"
COLUMNS = ("method", "title", "paper", "needs", "connector")
BY_NAME = {entry.name: entry for entry in methods.table()}
# Settings that may differ between a run and its continuation.
FREE = ("resume", "force", "out", "process", "coordinator")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl distill`."""
    parser.add_argument(
        "--methods",
        type=_training.names,
        default=DEFAULT,
        metavar="NAME,...",
        help=f"what to compare, or {ALL}; --list shows them; default: {','.join(DEFAULT)}",
    )
    parser.add_argument("--list", action="store_true", help="print the table of methods and exit")
    parser.add_argument("--seeds", type=_training.count, default=5, metavar="N", help="default: 5")
    parser.add_argument(
        "--epochs", type=_training.count, default=60, metavar="N", help="of a student; default: 60"
    )
    parser.add_argument(
        "--teacher-epochs", type=_training.count, default=30, metavar="N", help="default: 30"
    )
    _config.add_quick(parser, "two seeds, ten epochs", seeds=2, epochs=10, teacher_epochs=10)
    _specs.add_data_arguments(parser)
    parser.add_argument(
        "--per-class",
        type=_training.count,
        metavar="N",
        help="students see so many examples per class, drawn anew for every seed; default: all",
    )
    _specs.add_model_arguments(parser, {"teacher": "mlp:128,64", "student": "mlp:16"})
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="a safetensors file instead of training a teacher"
    )
    parser.add_argument(
        "--teacher-cache",
        metavar="FOLDER",
        help="keep the teacher's outputs there, and use those that are there already; default: "
        "up to 512 MB of them are held in memory, without --augment, else the teacher runs along",
    )
    parser.add_argument(
        "--temperature",
        type=_training.positive,
        metavar="T",
        help="of every method that has one; default: each method's own",
    )
    parser.add_argument(
        "--weights",
        type=_training.numbers,
        default={},
        metavar="TERM=X,...",
        help="kd=0.9,task=0.1, or kd.task=0.1 for one method; default: each method's own",
    )
    parser.add_argument(
        "--layers",
        type=_training.layer_pairs,
        default=[],
        metavar="STUDENT:TEACHER,...",
        help="taps to match; default: the last ones of both, then those before them",
    )
    _training.add_arguments(parser)
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="train seed after seed; default: all at once, but convolutions on a CPU one by one",
    )
    _training.add_device_arguments(parser)
    parser.add_argument(
        "--save-every", type=_training.count, metavar="N", help="epochs; default: at the end"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, from its last save"
    )
    _output.add_out(parser, "runs/distill")
    parser.epilog = (
        "Examples:\n"
        "  kdtl distill --methods kd,dkd,hint --seeds 5\n"
        "  kdtl distill --data mnist/ --teacher cnn:32,64,128 --student cnn:8,16 --methods all\n"
        "  kdtl distill --methods kd --weights kd=0.9,task=0.1 --temperature 4 --out runs/kd\n"
        "  kdtl distill --config runs/kd/config.yaml --resume"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the comparison and writes its run folder; returns the exit code."""
    if args.list:
        _print_methods()
        return 0
    methods = _methods(args.methods)
    mesh = _training.mesh(args)
    raw = _specs.raw_splits(args)
    measured = standardizer(raw.train)
    splits = Splits(*(measured.apply(part) for part in raw))
    classes = raw.train.classes
    teacher, student = (_specs.model(text, classes) for text in (args.teacher, args.student))
    if args.teacher_weights is not None and not Path(args.teacher_weights).exists():
        raise ValueError(f"--teacher-weights {args.teacher_weights}: no such file.")
    settings = _settings(args, splits, mesh)
    say = _output.progress()
    with _folder(args) as folder:
        try:
            outcome = distill.run(
                splits,
                teacher,
                student,
                methods,
                settings,
                Place(folder, args.resume, []),
                say,
                _output.seldom(say),
            )
        except SystemExit:
            print(
                f"kdtl distill: stopped and saved. Go on with: kdtl distill --config "
                f"{folder / 'config.yaml'} --resume --out {folder}",
                file=sys.stderr,
            )
            raise
        if jax.process_index() != 0:
            return 0
        results = _results(args, splits, outcome)
        _save_models(folder, args, outcome, measured, classes)
        _output.write_results(folder, results)
    _output.print_table(results)
    print(f"report: {folder / 'report.html'}")
    if outcome.failed:
        print(f"kdtl distill: failed: {', '.join(outcome.failed)}", file=sys.stderr)
        return 1
    return 0


def _methods(asked: Sequence[str]) -> list[Entry]:
    if list(asked) == [ALL]:
        return list(BY_NAME.values())
    unknown = [name for name in asked if name not in BY_NAME]
    if unknown or not asked:
        name = unknown[0] if unknown else ""
        near = ", ".join(trees.nearest(name, list(BY_NAME), n=4))
        raise _config.UsageError(
            f"--methods: {name!r} is no method. Nearest: {near}. kdtl distill --list shows all."
        )
    return [BY_NAME[name] for name in dict.fromkeys(asked)]


def _settings(args: argparse.Namespace, splits: Splits, mesh: Any) -> distill.Settings:
    shape = splits.train.inputs.shape
    if args.augment and args.teacher_cache is not None:
        raise _config.UsageError(
            "--teacher-cache holds outputs for the images as they are, not for --augment's views. "
            "Give one or the other."
        )
    if args.augment and len(shape) != 4:
        raise _config.UsageError(f"--augment needs images [N, H, W, C], the data is {list(shape)}.")
    students = Schedule(
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=_training.optimizer(args),
        microbatches=args.microbatches,
        views=_training.views(args.augment, splits.train.classes, shape[1]),
        mesh=mesh,
        take_turns=args.one_by_one,
        save_every=args.save_every,
    )
    return distill.Settings(
        seeds=args.seeds,
        students=students,
        teachers=students._replace(epochs=args.teacher_epochs),
        options=Options(args.temperature, args.weights),
        layers=tuple(_split(text) for text in args.layers),
        dtype=_training.PRECISIONS[args.precision],
        per_class=args.per_class,
        teacher_weights=None if args.teacher_weights is None else Path(args.teacher_weights),
        teacher_cache=None if args.teacher_cache is None else Path(args.teacher_cache),
    )


def _split(text: str) -> tuple[str, str]:
    student, _, teacher = text.partition(":")
    return student, teacher


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """The run folder, locked: a new one, or with `--resume` one of the same settings."""
    folder = Path(args.out)
    if jax.process_index() != 0:
        yield folder
        return
    taken_up = args.resume and (folder / "config.yaml").exists()
    if taken_up:
        _same_settings(folder, args)
    else:
        folder = _output.run_folder(args)
    with _files.locked(folder):
        if not taken_up:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # an earlier run's
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            _output.write_settings(folder, args)
        yield folder


def _same_settings(folder: Path, args: argparse.Namespace) -> None:
    file = folder / "config.yaml"
    try:
        before = yaml.safe_load(file.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read ({error}).") from None
    now = _config.settings(args)
    other = sorted(
        name
        for name in before.keys() | now.keys()
        if name not in FREE and before.get(name) != now.get(name)
    )
    if other:
        listed = ", ".join(
            f"{name} ({before.get(name)!r}, now {now.get(name)!r})" for name in other
        )
        raise _config.UsageError(
            f"--resume: {folder} was run with other settings: {listed}. Go on with: kdtl distill "
            f"--config {file} --resume --out {folder}"
        )


def _results(args: argparse.Namespace, splits: Splits, outcome: distill.Outcome) -> report.Results:
    seen = f"{args.per_class} per class, drawn anew for every seed" if args.per_class else "all"
    data = {
        "name": splits.train.name,
        "classes": splits.train.classes,
        "train": len(splits.train.labels),
        "validation": len(splits.validation.labels),
        "test": len(splits.test.labels),
        "student_examples": seen,
    }
    notes = [
        f"Data: {splits.train.name}, {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test examples. The teacher ({args.teacher}) sees all training examples, "
        f"students ({args.student}) {seen}. A seed has the same start and the same batches under "
        "every method. Nothing was chosen on the test split.",
        *_many(len([row for row in outcome.rows if row.versus is not None])),
        *outcome.notes,
    ]
    return report.Results(
        "kdtl distill: one teacher, students by several methods",
        data,
        outcome.rows,
        outcome.learning,
        {},
        notes,
    )


def _many(comparisons: int) -> list[str]:
    """What many intervals beside each other mean."""
    if comparisons < 10:
        return []
    return [
        f"Each of the {comparisons} comparisons stands by itself at 95 %: about "
        f"{round(comparisons / 20)} would look clear by chance alone."
    ]


def _save_models(
    folder: Path,
    args: argparse.Namespace,
    outcome: distill.Outcome,
    measured: Standardizer,
    classes: int,
) -> None:
    """`teacher.safetensors`, and `student.safetensors` of the best method's first seed."""
    shared = {
        "classes": str(classes),
        "input_mean": repr(measured.mean.tolist()),
        "input_scale": repr(measured.scale.tolist()),
    }
    kept = {
        "teacher": (outcome.teacher, {"model": args.teacher}),
        "student": (outcome.student, {"model": args.student, "method": outcome.best, "seed": "0"}),
    }
    for name, (variables, more) in kept.items():
        tree = jax.tree.map(np.asarray, _networks.tree(variables))
        safetensors.save(folder / f"{name}.safetensors", tree, metadata={**more, **shared})


def _print_methods() -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in (COLUMNS, *_rows()):
            print("\t".join(row))
        return
    table = Table()
    for name in COLUMNS:
        table.add_column(name)
    for row in _rows():
        table.add_row(*row)
    console.print(table)


def _rows() -> list[tuple[str, str, str, str, str]]:
    return [
        (e.name, e.title, e.paper, e.needs, "yes" if e.connector else "no")
        for e in BY_NAME.values()
    ]
