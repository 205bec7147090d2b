"""`kdtl transfer`: a trained model's weights on a new task, by every method, with intervals."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax import transforms, trees
from kdtl_jax.cli import _config, _output, _sentences, _specs, _training
from kdtl_jax.datasets import Dataset, Splits, Standardizer, only_classes, standardizer
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes import _networks, demo_transfer
from kdtl_jax.recipes import _transfer_methods as ways
from kdtl_jax.recipes import transfer as recipe
from kdtl_jax.run import checkpoint, report

POLICIES = {
    "error": transforms.raise_on_mismatch,
    "keep": transforms.keep_on_mismatch,
    "crop": transforms.crop,
    "pad": transforms.pad,
    "crop_or_pad": transforms.crop_or_pad,
    "uniform": transforms.select_uniform,
    "resize": transforms.resize_linear,
}
BASELINE = "scratch"
EPILOG = """Examples:
  kdtl transfer --out runs/transfer
  kdtl transfer --methods scratch,copied_finetuned,lora --labels-per-class 5 --seeds 16
  kdtl transfer --source-weights runs/demo/student.safetensors --model mlp:16,16 --canvas 0
  kdtl transfer --data images.npz --model cnn:16,32 --source-weights old.safetensors \\
      --rename 'backbone/(.*)=>\\1' --on-mismatch crop
  kdtl transfer --task sentences --encoder all-MiniLM-L6-v2/ --text lines.txt

A WHERE selects target leaves: a regular expression for the whole path, or glob:PATTERN.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `kdtl transfer`."""
    defaults = recipe.Settings()
    _output.add_out(parser, "runs/transfer")
    _specs.add_data_arguments(parser)
    _specs.add_model_arguments(parser, {"model": "mlp:128,64"})
    parser.add_argument("--list", action="store_true", help="print the methods and exit")
    _config.add_quick(
        parser,
        "two seeds, few epochs, one rate; few steps and lines of text",
        **{"seeds": 2, "epochs": 4, "source_epochs": 2, "rates": str(defaults.rates[0])},
        **_sentences.QUICK,
    )

    source = parser.add_argument_group("source")
    source.add_argument(
        "--source-weights",
        metavar="FILE",
        help="safetensors to start from; without it a source is trained on --source-classes",
    )
    source.add_argument(
        "--source-classes", type=_classes, metavar="A-B", help="default: the first half"
    )
    source.add_argument(
        "--target-classes",
        type=_classes,
        metavar="A-B",
        help="default: those after the source's, or all of them with --source-weights",
    )
    source.add_argument(
        "--where", metavar="WHERE", help="which leaves are copied; default: all but the head"
    )
    source.add_argument(
        "--rename",
        action="append",
        metavar="'REGEX=>NAME'",
        help="source path to target path; repeat for more, first match wins; '=>' alone drops",
    )
    source.add_argument(
        "--on-mismatch", choices=sorted(POLICIES), default="error", help="default: error"
    )
    source.add_argument(
        "--source-epochs",
        type=_training.count,
        default=defaults.source_epochs,
        metavar="N",
        help=f"default: {defaults.source_epochs}",
    )
    source.add_argument(
        "--canvas",
        type=int,
        metavar="PIXELS",
        help="put every image at a random place on a blank square this wide; 0: leave them as they "
        "are; default: 12 for the embedded digits without --source-weights, else 0",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--methods",
        type=_methods,
        default=",".join(defaults.methods),
        metavar="NAMES",
        help=f"of: {', '.join(ways.BY_NAME)}; default: {','.join(defaults.methods)}",
    )
    training.add_argument(
        "--labels-per-class",
        type=int,
        default=defaults.labels_per_class,
        metavar="N",
        help=f"drawn anew for every seed; 0: all; default: {defaults.labels_per_class}",
    )
    for name in ("seeds", "epochs", "batch_size"):
        default = getattr(defaults, name)
        training.add_argument(
            f"--{name.replace('_', '-')}",
            type=_training.count,
            default=default,
            metavar="N",
            help=f"default: {default}",
        )
    training.add_argument(
        "--rates",
        type=_positive,
        default=",".join(map(str, defaults.rates)),
        metavar="RATES",
        help="Adam's learning rates to choose from on validation; default: "
        + ",".join(map(str, defaults.rates)),
    )
    training.add_argument(
        "--strengths",
        type=_positive,
        metavar="WEIGHTS",
        help="of each method's own term, to choose from; default: each method's own",
    )
    training.add_argument(
        "--llrd",
        type=_decay,
        default=1.0,
        metavar="DECAY",
        help="layer-wise learning-rate decay, 0.75 for example; default: 1, none",
    )
    parser.add_argument(
        "--task",
        choices=("classes", "sentences"),
        default="classes",
        help="classes: a classifier's weights on other classes (default); sentences: a sentence "
        "encoder's layers as a student",
    )
    _sentences.add_arguments(parser)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    """Runs the comparison and writes its run folder; returns the exit code."""
    if args.list:
        for method in ways.METHODS:
            print(f"{method.name:20s} {method.label:36s} {method.paper}")
        return 0
    if args.task == "sentences":
        return _sentences.run(args)
    settings, surgery = _settings(args), _surgery(args)
    folder = _output.run_folder(args)
    measured, source_part, target = _data(args)
    module = _specs.model(args.model, target.train.classes)
    net = _networks.network(module, target.train.inputs[:1])
    progress = _output.progress()
    if args.source_weights is None:
        progress("source")
        before = _specs.model(args.model, source_part.classes)
        source = recipe.train_sources(
            _networks.network(before, source_part.inputs[:1]), source_part, settings
        )
    else:
        source = recipe.Source(safetensors.load(args.source_weights), False)
    outcome = recipe.run(net, target, source, settings, surgery, progress)
    print(outcome.surgery)
    baselines = {recipe.FAMILY: BASELINE} if BASELINE in settings.methods else {}
    results = report.Results(
        task="kdtl transfer: a trained model's weights on a new task",
        data={
            "name": target.train.name,
            "target_train": len(outcome_examples(target, settings)),
            "validation": len(target.validation.labels),
            "test": len(target.test.labels),
            "source": args.source_weights or f"{len(source_part.labels)} source examples",
            "transferability": {name: score.mean for name, score in outcome.scores.items()},
        },
        rows=report.compared(outcome.rows, baselines),
        learning=outcome.learning,
        alpha={},
        notes=_notes(args, settings, source_part, target, outcome),
    )
    _save_models(folder, args, outcome, measured, target.train.classes)
    _output.write_run(folder, args, results)
    _output.print_table(results)
    print(f"report: {folder / 'report.html'}")
    return 0


def outcome_examples(target: Splits, settings: recipe.Settings) -> np.ndarray:
    """The labels that one seed trains on, for counting."""
    few = settings.labels_per_class * target.train.classes
    return target.train.labels[:few] if few else target.train.labels


def _settings(args: argparse.Namespace) -> recipe.Settings:
    return recipe.Settings(
        methods=tuple(args.methods.split(",")),
        seeds=args.seeds,
        labels_per_class=args.labels_per_class,
        epochs=args.epochs,
        batch_size=args.batch_size,
        rates=_numbers(args.rates),
        strengths=None if args.strengths is None else _numbers(args.strengths),
        llrd=args.llrd,
        source_epochs=args.source_epochs,
    )


def _surgery(args: argparse.Namespace) -> recipe.Surgery:
    rules: list[tuple[str, str | None]] = []
    for text in args.rename or []:
        pattern, arrow, name = text.partition("=>")
        if not arrow:
            raise _config.UsageError(f"--rename {text!r}: expected 'REGEX=>NAME'")
        rules.append((pattern.strip(), name.strip() or None))
    surgery = recipe.Surgery(rename=rules, on_mismatch=POLICIES[args.on_mismatch])
    if args.where is None:
        return surgery
    glob = args.where.startswith("glob:")
    return surgery._replace(where=trees.Glob(args.where[5:]) if glob else args.where)


def _data(args: argparse.Namespace) -> tuple[Standardizer, Dataset, Splits]:
    """The standardizer, the source's training set and the target's splits."""
    raw = _specs.raw_splits(args)
    classes, is_trained = raw.train.classes, args.source_weights is None
    first = _range(args.source_classes) if args.source_classes else range(classes // 2)
    later = range(first.stop, classes) if is_trained else range(classes)
    second = _range(args.target_classes) if args.target_classes else later
    for name, chosen in (("source", first), ("target", second)):
        if not chosen or chosen.stop > classes:
            raise _config.UsageError(
                f"--{name}-classes: the data has classes 0-{classes - 1}, got "
                f"{chosen.start}-{chosen.stop - 1}"
            )
    measured = _standardizer(args, raw.train)
    ready = Splits(*(measured.apply(part) for part in raw))
    sources = only_classes(ready.train, first) if is_trained else ready.train
    target = Splits(*(only_classes(part, second) for part in ready))
    default = demo_transfer.CANVAS if args.data == "digits" and is_trained else 0
    canvas = default if args.canvas is None else args.canvas
    if not canvas:
        return measured, sources, target
    sides = ready.train.inputs.shape[1:3]
    if ready.train.inputs.ndim != 4 or max(sides) > canvas:
        raise _config.UsageError(
            f"--canvas {canvas}: needs images no larger than that, the data is {list(sides)}"
        )
    placed = [
        demo_transfer.placed(part, seed=1 + i, canvas=canvas) for i, part in enumerate(target)
    ]
    moved = demo_transfer.placed(sources, seed=0, copies=8, canvas=canvas)
    return measured, moved, Splits(*placed)


def _standardizer(args: argparse.Namespace, train: Dataset) -> Standardizer:
    """That of the source's weights, if their file says so: inputs must look as they did then."""
    if args.source_weights is None:
        return standardizer(train)
    known = safetensors.index(args.source_weights).metadata
    if not {"input_mean", "input_scale"} <= known.keys():
        return standardizer(train)
    mean, scale = (
        np.asarray(_numbers(known[name].strip("[]")), np.float32)
        for name in ("input_mean", "input_scale")
    )
    return Standardizer(mean, scale)


def _save_models(
    folder: Path,
    args: argparse.Namespace,
    outcome: recipe.Outcome,
    measured: Standardizer,
    classes: int,
) -> None:
    """`checkpoints/` with every method's models, `student.safetensors` with the best one."""
    with checkpoint.open_folder(folder / "checkpoints") as checkpoints:
        models = {name: model._asdict() for name, model in outcome.models.items()}
        checkpoint.save(checkpoints, args.epochs, models, {"methods": list(models)})
    best = max(outcome.rows, key=lambda row: row.validation.mean).method
    first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), outcome.models[best])
    safetensors.save(
        folder / "student.safetensors",
        _networks.tree(first),
        metadata={
            "model": args.model,
            "classes": str(classes),
            "method": best,
            "seed": "0",
            "input_mean": repr(measured.mean.tolist()),
            "input_scale": repr(measured.scale.tolist()),
        },
    )


def _notes(
    args: argparse.Namespace,
    settings: recipe.Settings,
    source_part: Dataset,
    target: Splits,
    outcome: recipe.Outcome,
) -> list[str]:
    where = args.source_weights or (
        f"one source model per seed, trained on {len(source_part.labels)} examples of "
        f"{source_part.classes} classes"
    )
    few = settings.labels_per_class
    scores = ", ".join(f"{name} {score.mean:.2f}" for name, score in outcome.scores.items())
    return [
        f"Source: {where}; {100 * outcome.surgery.fraction:.1f} % of the target's parameters are "
        "its own.",
        f"Target: {target.train.classes} classes with {few or 'all'} labels each, drawn anew for "
        f"every seed; {len(target.validation.labels)} validation and {len(target.test.labels)} "
        "test examples. Learning rate and strength are chosen on validation; the test split is "
        "only read off.",
        f"Transferability before any training: {scores or 'no features to score'}. Higher is "
        "better, between sources for this target.",
    ]


def _checked(check: Callable[[Any], bool], kind: Callable[[str], Any], says: str) -> Any:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {says}, got {text!r}") from None
        if not check(value):
            raise argparse.ArgumentTypeError(f"expected {says}, got {text!r}")
        return value

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(item) for item in text.split(","))


_decay = _checked(lambda x: 0 < x <= 1, float, "a number above 0 and up to 1")


def _positive(text: str) -> str:
    """Numbers above zero, kept as text so that the run's config reads them back."""
    _checked(lambda xs: all(x > 0 for x in xs), _numbers, "numbers above 0 with commas")(text)
    return text


def _methods(text: str) -> str:
    unknown = [name for name in text.split(",") if name not in ways.BY_NAME]
    if unknown or not text:
        raise argparse.ArgumentTypeError(
            f"unknown method {', '.join(unknown)}; see kdtl transfer --list"
        )
    return text


def _range(text: str) -> range:
    first, dash, last = text.partition("-")
    return range(int(first), int(last if dash else first) + 1)


def _classes(text: str) -> str:
    try:
        _range(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected A-B as in 0-4, got {text!r}") from None
    return text
