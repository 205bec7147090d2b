"""Choosing among the settings of one method by mean validation accuracy over seeds.

The test split is not used. A setting with non-finite scores is chosen only if all have them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax.datasets import Dataset
from kdtl_jax.recipes._training import Fitted, pick
from kdtl_jax.run import report, scores
from kdtl_jax.train import sweep


class Choice(NamedTuple):
    """The best setting, and its students, one per seed."""

    setting: dict[str, float]
    fitted: Fitted


def columns(seeds: int, **axes: Sequence[float]) -> dict[str, np.ndarray]:
    """Every combination of the axes, for every seed; seeds run fastest."""
    grid = sweep.grid(**axes)
    return for_every_seed({name: np.asarray(x, np.float32) for name, x in grid.items()}, seeds)


def for_every_seed(settings: Mapping[str, np.ndarray], seeds: int) -> dict[str, np.ndarray]:
    """Columns `[K]` of settings as columns `[K * S]` of points; seeds run fastest."""
    count = len(next(iter(settings.values()), [0]))
    seed = np.tile(np.arange(seeds, dtype=np.int32), count)
    return {**{name: np.repeat(column, seeds) for name, column in settings.items()}, "seed": seed}


def best(fitted: Fitted, points: Mapping[str, np.ndarray]) -> Choice:
    """The first among the settings with the highest mean validation accuracy over seeds."""
    seeds = int(points["seed"].max()) + 1
    first = int(scores.ranked(_by_setting(fitted.validation, seeds).mean(axis=1))[0]) * seeds
    setting = {name: rounded(points[name][first]) for name in points if name != "seed"}
    return Choice(setting, pick(fitted, np.arange(first, first + seeds)))


def learning_curve(
    fitted: Fitted, epochs: int, score: report.Score = report.ACCURACY
) -> dict[str, list[float]]:
    """Means over seeds: the validation score by "epoch", and the loss of every epoch."""
    curve = np.asarray(fitted.curve, np.float64).mean(axis=0)
    epoch = [epochs * (i + 1) / len(curve) for i in range(len(curve))]
    losses = np.asarray(fitted.losses, np.float64).mean(axis=0)
    return {"epoch": epoch, f"validation_{score.key}": curve.tolist(), "loss": losses.tolist()}


def rounded(value: Any) -> float:
    """A float32 rounded to six significant digits, which restores the number as typed."""
    return float(f"{float(value):.6g}")


def setting_curve(fitted: Fitted, points: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Mean accuracies over seeds by value of one axis, the other axes chosen on validation."""
    seeds = int(points["seed"].max()) + 1
    values = points[name].reshape(-1, seeds)[:, 0]
    validation, test = (
        _by_setting(x, seeds).mean(axis=1) for x in (fitted.validation, fitted.test)
    )
    order = scores.ranked(validation)
    rows = [next(i for i in order if values[i] == value) for value in np.unique(values)]
    axis_values = [rounded(values[i]) for i in rows]
    return {
        name: axis_values,
        "validation_accuracy": validation[rows].tolist(),
        "test_accuracy": test[rows].tolist(),
        "best": rounded(values[order[0]]),
    }


def stacked(parts: Sequence[Dataset]) -> dict[str, Any]:
    """Equally long training sets, one per seed, as arrays `[S, n, ...]` on the device."""
    inputs = np.stack([part.inputs for part in parts])
    labels = np.stack([part.labels for part in parts])
    return jax.device_put({"inputs": inputs, "labels": labels})


def on_device(part: Dataset) -> dict[str, Any]:
    """A held-out split on the device."""
    return jax.device_put({"inputs": part.inputs, "labels": part.labels})


def per_seed(make: Callable[[Any], Any], seeds: int, *, offset: int = 0) -> Any:
    """`make(seed)` for every seed, stacked, in one program."""
    return jax.jit(jax.vmap(make))(jnp.arange(offset, offset + seeds, dtype=jnp.int32))


def _by_setting(scores: Any, seeds: int) -> np.ndarray:
    return np.asarray(scores, np.float64).reshape(-1, seeds)
