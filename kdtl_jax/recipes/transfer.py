"""Reuses a trained model's weights on a new task with few labels, by several methods.

Without `--source-weights` one source model per seed is trained on the source classes first. Every
method starts from the same copies, sees the same few examples per seed, and chooses its learning
rate (and the strength of its own term, where it has one) by mean validation accuracy over seeds;
the test split is used only for the final numbers. All seeds and settings of a method run as one
compiled program.

    kdtl transfer --methods scratch,copied_finetuned,lora --labels-per-class 5 --seeds 16
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import datasets
from kdtl_jax._types import Variables
from kdtl_jax.datasets import Dataset, Kind, Preprocessing, Splits, only_classes
from kdtl_jax.interop import model_files, networks, sources
from kdtl_jax.interop.model_files import About
from kdtl_jax.recipes import (
    _data,
    _folders,
    _logs,
    _measures,
    _models,
    _optimizers,
    _output,
    _progress,
    _stored_results,
    _students,
    _tables,
    _targets,
    _transfer_report,
    _user_code,
)
from kdtl_jax.recipes import _transfer_methods as transfer_methods
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes._measures import Measure
from kdtl_jax.recipes._targets import StartingWeights, Surgery
from kdtl_jax.recipes._training import Fitted
from kdtl_jax.recipes.settings import UsageError, setting
from kdtl_jax.run import checkpoint, record

CANVAS = 12  # pixels, for the built-in digits, which otherwise are too easy to need a source
EXAMPLES = """
  kdtl transfer --out runs/transfer
  kdtl transfer --methods scratch,copied_finetuned,lora --labels-per-class 5 --seeds 16
  kdtl transfer --source-weights runs/demo/students/kd.safetensors --model mlp:16,16 --canvas 0
  kdtl transfer --source-weights vit/ --data flowers/ --image-size 224 --methods lora,lp_ft
  kdtl transfer --data images.npz --model cnn:16,32 --source-weights old.safetensors \\
      --rename 'backbone/(.*)=>\\1' --on-mismatch crop

A WHERE selects target leaves: a regular expression for the whole path, or glob:PATTERN.
"""


@dataclass(frozen=True)
class Settings(
    _optimizers.OptimizerSettings,
    _optimizers.SelectionSettings,
    _logs.LogSettings,
    types.Data,
    types.Resumable,
):
    """Settings of `kdtl transfer`."""

    out: str = setting("runs/transfer", "the run folder", metavar="FOLDER")
    list: bool = setting(False, "print the methods and exit")
    model: str | None = setting(
        None, f"{types.MODEL}; default: the model in --source-weights, or mlp:128,64",
        metavar="MODEL", parse=_models.text_of,
    )  # fmt: skip
    source_weights: str | None = setting(
        None, "weights to start from: a safetensors file, an Orbax folder or an image classifier's "
        "Hugging Face folder; without it a source is trained on --source-classes",
        metavar="FILE", group="source",
    )  # fmt: skip
    source_classes: str | None = setting(
        None,
        "classes of the source; default: the first half",
        metavar="A-B",
        parse=types.class_range,
        group="source",
    )
    target_classes: str | None = setting(
        None, "classes of the target; default: those after the source's, all with --source-weights",
        metavar="A-B", parse=types.class_range, group="source",
    )  # fmt: skip
    where: str | None = setting(
        None, "leaves to copy; default: all but the head", metavar="WHERE", group="source"
    )
    rename: tuple[str, ...] = setting(
        (), "source path to target path; repeat for more, first match wins; '=>' alone drops",
        metavar="'REGEX=>NAME'", repeat=True, group="source",
    )  # fmt: skip
    on_mismatch: Literal["error", "keep", "crop", "pad", "crop_or_pad", "uniform", "resize"] = (
        setting("error", "what to do with leaves of another shape", group="source")
    )
    source_epochs: int = setting(
        20, "epochs of a source trained here", metavar="N", least=1, quick=2, group="source"
    )
    canvas: int | None = setting(
        None, "place every image at random on a blank square this wide; 0: leave images as they "
        "are; default: 12 for the built-in digits without --source-weights, else 0",
        metavar="PIXELS", least=0, most=4096, group="source",
    )  # fmt: skip
    methods: tuple[str, ...] = setting(
        transfer_methods.DEFAULT, f"any of {', '.join(transfer_methods.BY_NAME)}, or all",
        metavar="NAME,...", parse=types.method_names, group="training",
    )  # fmt: skip
    labels_per_class: int | None = setting(
        None, "training examples per class, redrawn for every seed; 0: all; default: 10 of the "
        "built-in digits, all of other data", metavar="N", least=0, group="training",
    )  # fmt: skip
    seeds: int = setting(
        8, "students per setting", metavar="N", least=1, most=10_000, quick=2, group="training"
    )
    epochs: int = setting(60, "epochs per target", metavar="N", least=1, quick=4, group="training")
    batch_size: int = setting(25, "examples per step", metavar="N", least=1, group="training")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "constant", "how the learning rate decays to 0; constant: not at all", group="training"
    )
    learning_rates: tuple[float, ...] | None = setting(
        None, "learning rates to choose from by validation; default: 0.001, 0.003, 0.01 for Adam, "
        "scaled for other optimizers", metavar="X,...",
        parse=types.positive_numbers, quick=(1e-3,), group="training", short="--lr",
    )  # fmt: skip
    strengths: tuple[float, ...] | None = setting(
        None, "weights of each method's own term to choose from; default: each method's own",
        metavar="X,...", parse=types.positive_numbers, group="training",
    )  # fmt: skip
    llrd: float = setting(
        1.0, "layer-wise learning-rate decay, e.g. 0.75; 1: none", metavar="DECAY",
        above=0, most=1, group="training",
    )  # fmt: skip


def run(settings: Settings) -> int | None:
    """Copies a source into targets, trains them by every method, and writes the run folder."""
    if settings.list:
        rows = [(m.name, m.label, m.paper) for m in transfer_methods.METHODS]
        return _tables.list_methods(("method", "label", "paper"), rows)
    chosen = types.select(settings.methods, transfer_methods.BY_NAME, "kdtl transfer")
    path, policy = settings.source_weights, types.POLICIES[settings.on_mismatch]
    surgery = Surgery(rename=types.renames(settings.rename), on_mismatch=policy)
    if settings.where is not None:
        surgery = surgery._replace(where=types.selector(settings.where))
    _folders.check_out(settings, "transfer")
    check(settings)
    start = _models.open_source(path, settings.model, "mlp:128,64")
    source_tree = None if path is None else start.tree(None)
    form, source_part, target = read_data(settings, start)
    measure = _measures.measure_of_data(form, settings, target.train)
    settings = resolved(settings, measure)
    text, preprocessing = str(start.about.model), start.about.preprocessing
    source_kind = "classes" if preprocessing is None else preprocessing.kind
    chosen = select_methods(chosen, settings, measure, source_kind)
    example = jnp.asarray(target.train.inputs[:1])
    net = _models.make_network(text, target.train.classes, example)
    source_net = net if path else _models.make_network(text, source_part.classes, example)
    source_shapes = source_tree
    if path is None:
        source_shapes = model_files.tree(networks.abstract(source_net, example))
    else:
        record.check_finite(path, source_tree)
    if settings.methods == transfer_methods.DEFAULT:  # those whose head and features there are
        chosen = [method for method in chosen if _targets.has_features(net, method)]
        if jax.eval_shape(_targets.source_head, source_shapes) is None:
            chosen = [method for method in chosen if not method.needs_source_head]
        if not _targets.has_head(net, example):
            chosen = [method for method in chosen if not method.needs_head]
    _targets.check(net, example, source_shapes, chosen, surgery)
    arrays = {"inputs": target.train.inputs, "labels": target.train.labels}
    _user_code.try_model("--model", text, net, measure.task, arrays)
    _user_code.check_logits("--model", text, net, target.train)
    data_files = datasets.files_of(settings.data, label=settings.label, inputs=settings.inputs)
    files: dict[str, record.Paths] = {"data": data_files}
    files |= {} if path is None else {"source_weights": path}
    files |= {"student": files_} if (files_ := _models.files_of(text)) else {}
    with _output.open_run(settings, "transfer", files, saves=["checkpoints"]) as running:
        folder, run, bar, programs = running
        say = _progress.announce_parts(bar, len(chosen) + (source_tree is None))
        store = _stored_results.open_store(
            folder, run, resume=settings.resume, kinds=(Fitted, Variables)
        )
        if source_tree is None:
            say("source")
            source = _targets.start_sources(
                source_net, source_part, seeds=settings.seeds, epochs=settings.source_epochs,
                store=store,
            )()  # fmt: skip
        else:
            source = StartingWeights(source_tree, False, source_kind == "classes")
        comparison = _targets.compare(
            net, target, source, chosen, settings, surgery, say, store, measure
        )
        bar.hide()
        print(comparison.surgery)
        students, rows = _students.select_best(comparison.rows, comparison.models)
        comparison = comparison._replace(rows=rows)
        shape = target.train.inputs.shape[1:]
        classes, names = target.train.classes, target.train.names
        form = form._replace(names=names, outputs=classes, shape=shape)
        about = About(text, classes, form.scaling, names, shape, form)
        _students.write(folder, students, about, settings)
        with checkpoint.open_folder(folder / "checkpoints") as checkpoints:
            models = {name: model._asdict() for name, model in comparison.models.items()}
            checkpoint.save(checkpoints, settings.epochs, models, {"methods": list(models)})
        results = _transfer_report.results(
            settings, measure, target, source, source_part, comparison, programs()
        )
        _logs.write_curves(folder, comparison.learning, settings.log)
        _output.finish(folder, results)
    return 0


def resolved(settings: Settings, measure: Measure) -> Settings:
    """The settings, with defaults filled in.

    Raises:
      UsageError: if a setting does not apply to the targets.
    """
    labels_per_class = types.few_or_all(settings.labels_per_class, settings.data)
    if labels_per_class and measure.kind != "classes":
        raise UsageError(
            f"--labels-per-class {labels_per_class}: the targets are {measure.kind}, not classes."
        )
    rates = settings.learning_rates or _optimizers.default_rates(settings)
    return dataclasses.replace(settings, labels_per_class=labels_per_class, learning_rates=rates)


def check(settings: Settings) -> None:
    """Raises UsageError if settings contradict each other, regardless of the data."""
    _measures.check(settings)
    if settings.source_weights is not None and settings.source_classes is not None:
        raise UsageError(
            "--source-classes is for a source trained here, but --source-weights names one. "
            "Give one of them."
        )
    labels_per_class = types.few_or_all(settings.labels_per_class, settings.data)
    if settings.class_weights != "none" and labels_per_class:
        raise UsageError(
            f"--class-weights: every class has {labels_per_class} labels already. Give "
            "--labels-per-class 0."
        )


def select_methods(
    chosen: Sequence[transfer_methods.TransferMethod],
    settings: Settings,
    measure: Measure,
    source_kind: Kind,
) -> list[transfer_methods.TransferMethod]:
    """The methods that suit the targets and the source.

    Raises:
      UsageError: naming methods that were requested but do not suit them.
    """
    no_classes = [m.name for m in chosen if m.needs_classes and measure.kind != "classes"]
    no_source = [m.name for m in chosen if m.needs_source_head and source_kind != "classes"]
    if no_classes and settings.methods != transfer_methods.DEFAULT:
        raise UsageError(
            f"{', '.join(no_classes)} need classes, but the targets are {measure.kind}."
        )
    if no_source and settings.methods != transfer_methods.DEFAULT:
        raise UsageError(
            f"{', '.join(no_source)} need a source that is a classifier, but "
            f"{settings.source_weights} learned {source_kind}."
        )
    return [method for method in chosen if method.name not in (*no_classes, *no_source)]


def read_data(settings: Settings, source: sources.Source) -> tuple[Preprocessing, Dataset, Splits]:
    """How the data are read, the source's training set and the target's splits.

    Raises:
      UsageError: if classes or canvas do not fit the data.
    """
    # A file's classes and image sizes are the source's; the target's may differ.
    own = source._replace(about=source.about._replace(classes=None, names=(), shape=None))
    ready, form = _data.read_data(settings, own, other_targets=True)
    _data.check_parts(ready)
    if ready.train.kind != "classes":
        given = settings.source_classes or settings.target_classes or settings.canvas
        if settings.source_weights is None or given:
            raise UsageError(
                f"--data {settings.data}: the targets are {ready.train.kind}. Name a source with "
                "--source-weights, without --source-classes, --target-classes or --canvas: only "
                "classes can be divided between a source and a target."
            )
        return form, ready.train, ready
    classes, is_trained = ready.train.classes, settings.source_weights is None
    first = _range(settings.source_classes) or range(classes // 2)
    later = range(first.stop, classes) if is_trained else range(classes)
    second = _range(settings.target_classes) or later
    for name, chosen in (("source", first), ("target", second)):
        if not chosen or chosen.stop > classes:
            raise UsageError(
                f"--{name}-classes: the data has classes 0-{classes - 1}, got "
                f"{chosen.start}-{chosen.stop - 1}"
            )
    if is_trained and len(first) < 2:
        raise UsageError(
            f"--source-classes: a source of one class learns nothing, and the data has {classes}. "
            "Name a trained model with --source-weights, or two classes or more."
        )
    sources = only_classes(ready.train, first) if is_trained else ready.train
    target = Splits(*(only_classes(part, second) for part in ready))
    default = CANVAS if settings.data == "digits" and is_trained else 0
    canvas = default if settings.canvas is None else settings.canvas
    if not canvas:
        return form, sources, target
    sides = ready.train.inputs.shape[1:3]
    if ready.train.inputs.ndim != 4 or max(sides) > canvas:
        raise UsageError(
            f"--canvas {canvas}: needs images no larger than that, but the data is {list(sides)}"
        )
    placed = [on_canvas(part, canvas, seed=1 + i) for i, part in enumerate(target)]
    return form, on_canvas(sources, canvas, seed=0, copies=8), Splits(*placed)


def on_canvas(data: Dataset, canvas: int, *, seed: int, copies: int = 1) -> Dataset:
    """Every image at a random place on a larger, blank canvas; `copies` places per image."""
    rng = np.random.default_rng(seed)
    inputs, labels = np.tile(data.inputs, (copies, 1, 1, 1)), np.tile(data.labels, copies)
    count, height, width, channels = inputs.shape
    blank = data.inputs.min()  # the digits' background is the smallest value
    out = np.full((count, canvas, canvas, channels), blank, np.float32)
    corners = rng.integers(0, (canvas - height + 1, canvas - width + 1), (count, 2))
    for i, (row, column) in enumerate(corners):
        out[i, row : row + height, column : column + width] = inputs[i]
    return data._replace(inputs=out, labels=labels)


def _range(text: str | None) -> range | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    return range(int(first), int(last if dash else first) + 1)
