"""Many trainings of one small model as one compiled program, and choosing among them fairly.

Every recipe here trains the same model from many starts: seeds, learning rates, alphas. All of them
run side by side under `vmap` (`kdtl_jax.train.sweep`). Settings are chosen by the mean *validation*
accuracy over seeds; the test split is only read off.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import train, trees
from kdtl_jax._types import ModelFn, Params
from kdtl_jax.datasets import Dataset
from kdtl_jax.interop import linen
from kdtl_jax.objective import TermsFn
from kdtl_jax.run import report
from kdtl_jax.train import sweep

Point = Mapping[str, Any]
TermsFor = Callable[[Point], TermsFn]


class Held(NamedTuple):
    """A held-out split on the device."""

    inputs: Array
    labels: Array


class Fitted(NamedTuple):
    """Results of all points, `[N, ...]` each."""

    params: Params
    curve: Array  # [N, checks], validation accuracy along the way
    validation: Array  # [N], at the end
    test: Array  # [N]
    predictions: Array  # [N, test examples], the classes named


class Chosen(NamedTuple):
    """The points of the best setting, one per seed."""

    setting: dict[str, float]
    rows: np.ndarray  # [seeds], into Fitted


def held(data: Dataset) -> Held:
    """A data set as device arrays."""
    return Held(jnp.asarray(data.inputs), jnp.asarray(data.labels))


def stacked(parts: Sequence[Dataset]) -> dict[str, Any]:
    """Equally long training sets, one per seed, as a batch dict with a leading seed axis."""
    inputs = np.stack([part.inputs for part in parts])
    labels = np.stack([part.labels for part in parts])
    return {"inputs": jnp.asarray(inputs), "labels": jnp.asarray(labels)}


def checkpoints_of(epochs: int, checks: int) -> list[int]:
    """The epochs after which validation accuracy is recorded: evenly spaced, the last included."""
    return [round(epochs * (i + 1) / checks) for i in range(checks)]


def accuracy(model: ModelFn, params: Params, split: Held) -> tuple[Array, Array]:
    """The share of right answers, and the classes named `[N]`."""
    outputs, _ = model(params, None, split.inputs)
    named = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
    return jnp.mean((named == split.labels).astype(jnp.float32)), named


def initial(model: linen.Linen, seeds: int, example: Array, *, offset: int = 0) -> Params:
    """Fresh parameters of every seed, stacked."""
    keys = jax.vmap(jax.random.key)(jnp.arange(offset, offset + seeds, dtype=jnp.uint32))
    return jax.jit(jax.vmap(lambda key: model.init(key, example).params))(keys)


def program(
    model: ModelFn,
    terms: TermsFor,
    weights: Sequence[str],
    *,
    epochs: int,
    batch_size: int,
    checks: int = 10,
    trainable: trees.Selector = trees.everything,
) -> Callable[..., Fitted]:
    """`fit(points, data, validation, test) -> Fitted`, all points at once.

    A point has `start` (parameters), `seed` (a row of `data`, and the order of its batches),
    `rate` (Adam's learning rate) and one entry per name in `weights`. Calls with equally many
    points share one compilation.

    Args:
      model: the model function.
      terms: from a point to its objective's terms.
      weights: names of the terms.
      epochs: passes over each training set; a multiple of `checks`.
      batch_size: examples per step.
      checks: how often validation accuracy is recorded.
      trainable: selector over the model's parameters.
    """
    per_check = max(1, epochs // checks)

    def fit(point: Point, data: Any, validation: Held, test: Held) -> Fitted:
        own = jax.tree.map(lambda x: x[point["seed"]], data)
        tx = optax.adam(point["rate"])
        chosen = {name: point[name] for name in weights}
        step = train.make_step(model, terms(point), chosen, tx, trainable=trainable)
        key = jax.random.fold_in(jax.random.key(0), point["seed"])
        state = train.init_state(point["start"], tx, key=key, trainable=trainable)
        epoch = train.scan_epoch(step)

        def one_epoch(state: train.TrainState, number: Array) -> tuple[train.TrainState, None]:
            index = train.epoch_index(key, number, own["labels"].shape[0], batch_size)
            return epoch(state, own, index)[0], None

        def between_checks(
            state: train.TrainState, numbers: Array
        ) -> tuple[train.TrainState, Array]:
            state, _ = jax.lax.scan(one_epoch, state, numbers)
            return state, accuracy(model, state.params, validation)[0]

        numbers = jnp.arange(epochs, dtype=jnp.int32).reshape(-1, per_check)
        state, curve = jax.lax.scan(between_checks, state, numbers)
        on_test, predictions = accuracy(model, state.params, test)
        return Fitted(state.params, curve, curve[-1], on_test, predictions)

    return sweep.vectorized(fit)


def points(
    starts: Callable[[Mapping[str, float]], Params],
    *,
    seeds: int,
    weights: Mapping[str, float],
    **axes: Sequence[float],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The points of a grid `axes x seeds`, and their settings as columns.

    Args:
      starts: from a setting to the stacked initial parameters `[seeds, ...]`.
      seeds: their number.
      weights: the objective's weights.
      **axes: settings to choose from; `rate` is one of them.
    """
    grid = {name: np.asarray(column) for name, column in sweep.grid(**axes).items()}
    settings = [dict(zip(grid, row, strict=True)) for row in zip(*grid.values(), strict=True)]
    stacks = [starts(setting) for setting in settings]
    total = len(settings) * seeds
    columns = {name: np.repeat(column, seeds) for name, column in grid.items()}
    seed = np.tile(np.arange(seeds, dtype=np.int32), len(settings))
    out = {
        "start": jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks),
        "seed": jnp.asarray(seed),
        "rate": jnp.asarray(columns["rate"], jnp.float32),
        **{name: jnp.full((total,), weight, jnp.float32) for name, weight in weights.items()},
    }
    return out, {**columns, "seed": seed}


def best(fitted: Fitted, columns: Mapping[str, np.ndarray]) -> Chosen:
    """The setting with the highest mean validation accuracy over seeds (the first among equals)."""
    names = [name for name in columns if name != "seed"]
    seeds = int(columns["seed"].max()) + 1
    scores = np.asarray(fitted.validation, np.float64).reshape(-1, seeds).mean(axis=1)
    first = int(np.argmax(scores)) * seeds
    setting = {name: round(float(columns[name][first]), 6) for name in names}
    return Chosen(setting, np.arange(first, first + seeds))


def pick(fitted: Fitted, rows: np.ndarray) -> Fitted:
    """Some points of a result."""
    return jax.tree.map(lambda leaf: leaf[rows], fitted)


def timed(fit: Callable[..., Fitted], *args: Any) -> tuple[Fitted, float]:
    """The result, and the seconds until it was there, compilation included."""
    start = time.perf_counter()
    fitted = jax.block_until_ready(fit(*args))
    return fitted, time.perf_counter() - start


def row(
    method: str,
    family: str,
    label: str,
    fitted: Fitted,
    seconds: float,
    settings: Mapping[str, Any],
    *,
    teacher: Array | None = None,
) -> report.Row:
    """A line of the table from the chosen points, one per seed.

    Args:
      method: key in results.json.
      family: group of the table.
      label: the method in words.
      fitted: one point per seed.
      seconds: wall time of all its settings.
      settings: what was fixed and what was chosen.
      teacher: its predictions `[seeds, test examples]`, for the agreement.
    """
    one = jax.tree.map(lambda leaf: leaf[0], fitted.params)
    agreement = None
    if teacher is not None:
        same = np.asarray(fitted.predictions) == np.asarray(teacher)
        agreement = report.interval(same.mean(axis=1))
    return report.Row(
        method,
        family,
        label,
        trees.count(one),
        report.interval(fitted.test),
        report.interval(fitted.validation),
        seconds,
        settings,
        agreement,
    )


def learning_curve(fitted: Fitted, epochs: int) -> dict[str, list[float]]:
    """Mean validation accuracy over seeds, by epoch."""
    curve = np.asarray(fitted.curve, np.float64).mean(axis=0)
    at = checkpoints_of(epochs, len(curve))
    return {"epoch": [float(e) for e in at], "validation_accuracy": curve.tolist()}


def setting_curve(fitted: Fitted, columns: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Mean accuracies over seeds by one setting, the others at their best on validation."""
    seeds = int(columns["seed"].max()) + 1
    values = columns[name].reshape(-1, seeds)[:, 0]
    validation = np.asarray(fitted.validation, np.float64).reshape(-1, seeds).mean(axis=1)
    test = np.asarray(fitted.test, np.float64).reshape(-1, seeds).mean(axis=1)
    rows = [
        max(np.flatnonzero(values == value), key=lambda i: validation[i])
        for value in np.unique(values)
    ]
    found = [round(float(values[i]), 6) for i in rows]
    return {
        name: found,
        "validation_accuracy": validation[rows].tolist(),
        "test_accuracy": test[rows].tolist(),
        "best": found[int(np.argmax(validation[rows]))],
    }
