"""Transfer on the UCI digits: a model trained on 0-4 gives its weights to one for 5-9.

On the digits as they are, centered and alike, transfer from 0-4 does not help a perceptron: ten
labels per class already suffice. So both tasks are made harder in the same way: every digit is put
at a random place on a 12x12 canvas. The source has many images of that kind, the target ten labels
per class, drawn anew for every seed. Settings are chosen on validation data. Run by `kdtl demo`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import penalties, transforms
from kdtl_jax._types import Params
from kdtl_jax.datasets import Dataset, Splits, only_classes, per_class
from kdtl_jax.interop import linen
from kdtl_jax.models import mlp
from kdtl_jax.objective import Inputs
from kdtl_jax.recipes import _fits
from kdtl_jax.run import report

FAMILY = "transfer"
BODY = "dense_.*"
SOURCE_RATE, CANVAS = 3e-3, 12


class Settings(NamedTuple):
    """What fixes the experiment."""

    seeds: int = 16
    widths: tuple[int, ...] = (128, 64)
    copies: int = 8  # places per source image
    source_epochs: int = 20
    labels_per_class: int = 10
    epochs: int = 60
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    l2_sp: tuple[float, ...] = (1e-3, 1e-2, 1e-1)


QUICK = Settings(seeds=2, copies=1, source_epochs=2, epochs=10, rates=(3e-3,), l2_sp=(1e-2,))


class Outcome(NamedTuple):
    """What the demo takes from here."""

    rows: list[report.Row]
    learning: dict[str, dict[str, list[float]]]


def run(splits: Splits, settings: Settings, progress: Callable[[str], None]) -> Outcome:
    """Trains sources and targets, and compares the targets on their test split."""
    model = linen.model(mlp(settings.widths, 5))
    sources = [only_classes(part, range(5)) for part in splits]
    targets = [only_classes(part, range(5, 10)) for part in splits]
    train_source = placed(sources[0], seed=0, copies=settings.copies)
    target = Splits(*(placed(part, seed=1 + i) for i, part in enumerate(targets)))

    progress("source")
    source = _train_sources(model, train_source, settings)
    seeds = range(settings.seeds)
    few = [per_class(target.train, settings.labels_per_class, seed=seed) for seed in seeds]
    data = _fits.stacked(few)
    fresh = _fits.initial(model, settings.seeds, data["inputs"][0, :1], offset=1000)
    copied = jax.vmap(_copy)(source, fresh)
    held = _fits.held(target.validation), _fits.held(target.test)

    outcome = Outcome([], {})
    full = _fits.program(
        model.apply, _with_l2_sp, ("task", "l2_sp"), epochs=settings.epochs, batch_size=25
    )
    head = _fits.program(
        model.apply, _task, ("task",), epochs=settings.epochs, batch_size=25, trainable="head/.*"
    )
    plain, none = {"task": 1.0}, {"l2_sp": (0.0,)}
    methods = (
        ("scratch", "From scratch", full, fresh, plain, none),
        ("copied_head_only", "Copied, head only", head, copied, plain, {}),
        ("copied_finetuned", "Copied, all fine-tuned", full, copied, plain, none),
        ("copied_l2_sp", "Copied, fine-tuned with L2-SP", full, copied, plain,
         {"l2_sp": settings.l2_sp}),
    )  # fmt: skip
    for method, label, program, start, weights, axes in methods:
        progress(method)
        points, columns = _fits.points(
            lambda setting, start=start: start,
            seeds=settings.seeds,
            weights=weights,
            rate=settings.rates,
            **axes,
        )
        if axes:
            points["l2_sp"] = jnp.asarray(columns["l2_sp"], jnp.float32)
        fitted, seconds = _fits.timed(program, points, data, *held)
        chosen = _fits.best(fitted, columns)
        picked = _fits.pick(fitted, chosen.rows)
        described = {"epochs": settings.epochs, "batch_size": 25, "optimizer": "adam"}
        outcome.rows.append(
            _fits.row(method, FAMILY, label, picked, seconds, {**described, **chosen.setting})
        )
        outcome.learning[method] = _fits.learning_curve(picked, settings.epochs)
    return outcome


def placed(data: Dataset, *, seed: int, copies: int = 1, canvas: int = CANVAS) -> Dataset:
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


def _copy(source: Params, target: Params) -> Params:
    """`theta_target = theta_source`, all but the head, which names other classes."""
    return transforms.transfer(
        source, target, where=BODY, on_missing="keep", on_extra="ignore", check_finite=False
    )[0]


def _task(point: Mapping[str, Any]) -> Callable[[Inputs], dict[str, Array]]:
    return lambda inputs: {"task": _cross_entropy(inputs)}


def _with_l2_sp(point: Mapping[str, Any]) -> Callable[[Inputs], dict[str, Array]]:
    """L2-SP pulls towards the start: the copied weights. From scratch its weight is 0."""
    return lambda inputs: {
        "task": _cross_entropy(inputs),
        "l2_sp": penalties.l2_sp(inputs.params, point["start"], where=BODY),
    }


def _cross_entropy(inputs: Inputs) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        inputs.student["logits"], inputs.batch["labels"]
    )


def _train_sources(model: linen.Linen, part: Dataset, settings: Settings) -> Params:
    """One source model per seed, stacked."""
    data = _fits.stacked([part])
    starts = _fits.initial(model, settings.seeds, data["inputs"][0, :1])
    data = jax.tree.map(lambda x: jnp.repeat(x, settings.seeds, axis=0), data)
    program = _fits.program(
        model.apply, _task, ("task",), epochs=settings.source_epochs, batch_size=64, checks=1
    )
    points, _ = _fits.points(
        lambda setting: starts, seeds=settings.seeds, weights={"task": 1.0}, rate=(SOURCE_RATE,)
    )
    few = _fits.held(part.subset(np.arange(64)))  # its accuracy is not reported
    return program(points, data, few, few).params
