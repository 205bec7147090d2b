"""Scores that may not be finite: they are NaN, rank last and never win.

The argmax of NaN is class 0, and comparisons with NaN are false. Use these functions to turn
logits into classes, count correct answers, or pick the best of several scores.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks

WRONG = -1  # the class of an example whose logits are not finite


def predicted(logits: Array) -> Array:
    """The class of the largest logit, int32 `[...]`; -1 where logits are not finite.

    Args:
      logits: `[..., K]`. Classes masked with -inf are fine as long as one is finite.

    Raises:
      ValueError: if K is 1, as the largest of one is always the first.
    """
    _checks.several_classes(logits=logits)
    invalid = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), -1) | jnp.all(logits == -jnp.inf, -1)
    classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(invalid, jnp.full_like(classes, WRONG), classes)


def accuracy(classes: Any, labels: Any) -> np.ndarray:
    """The share of correct `classes` `[..., N]`, as `[...]`; NaN where any of them is -1."""
    classes = np.asarray(classes)
    correct = (classes == np.asarray(labels)).mean(axis=-1)
    return np.where((classes == WRONG).any(axis=-1), np.nan, correct)


def ranked(values: Sequence[Any], *, minimize: bool = False) -> list[int]:
    """Indices from best to worst, stable; non-finite values and None come last.

    Args:
      values: one number each, or numbers `[S]`, of which the mean is used.
      minimize: whether smaller is better.
    """
    means = [np.mean(np.asarray(value, np.float64)) for value in values]
    sign = 1 if minimize else -1
    keys = [sign * mean if np.isfinite(mean) else np.inf for mean in means]
    return sorted(range(len(keys)), key=keys.__getitem__)


def best(values: Sequence[Any], *, minimize: bool = False) -> int | None:
    """The index of the best value, the first among equals; None if none is finite."""
    order = ranked(values, minimize=minimize)
    return order[0] if order and np.isfinite(np.mean(np.asarray(values[order[0]], float))) else None
