"""What students learn from the labels: cross-entropy, with smoothed labels or weighted classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from kdtl_jax import objective
from kdtl_jax.objective import TermsFn
from kdtl_jax.recipes.settings import UsageError


def cross_entropy(inputs: objective.Inputs) -> dict[str, Array]:
    """Cross-entropy with the labels, or with the mixed labels `batch["targets"]` `[B, K]`."""
    if "targets" not in inputs.batch:
        return objective.classification(inputs)
    logits = inputs.student["logits"]
    return {"task": optax.softmax_cross_entropy(logits, inputs.batch["targets"])}


def task(settings: Any, labels: np.ndarray, classes: int) -> TermsFn:
    """`inputs -> {"task": [B]}`, as the settings say.

    `--label-smoothing e` mixes the labels with the uniform distribution, `(1 - e) y + e / K`.
    `--class-weights balanced` weighs an example of class k by `N / (K n_k)`, so that all classes
    together count alike and the mean weight of the training examples is 1. Both concern this term
    alone; without either it is `cross_entropy`.

    Args:
      settings: `label_smoothing` and `class_weights`.
      labels: of the training examples.
      classes: K.
    """
    smoothing = settings.label_smoothing
    weights = balanced(labels, classes) if settings.class_weights == "balanced" else None
    if not smoothing and weights is None:
        return cross_entropy

    def terms(inputs: objective.Inputs) -> dict[str, Array]:
        logits, batch = inputs.student["logits"], inputs.batch
        targets = batch.get("targets")  # mixed labels
        if targets is None:
            targets = jax.nn.one_hot(batch["labels"], classes, dtype=logits.dtype)
        values = optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
        if weights is not None:
            values = values * (targets @ jnp.asarray(weights, logits.dtype))
        return {"task": values}

    return terms


def check(settings: Any, kind: str | None = None) -> None:
    """Raises UsageError if what is for classes is asked of other targets.

    Args:
      settings: `label_smoothing`, `class_weights` and `target`.
      kind: of the targets; None: as the settings say, which may leave it to the data.
    """
    kind = kind or settings.target
    if kind in ("labels", "numbers") and (
        settings.label_smoothing or settings.class_weights != "none"
    ):
        raise UsageError(
            f"--label-smoothing and --class-weights are for classes, the targets are {kind}."
        )


def balanced(labels: np.ndarray, classes: int) -> np.ndarray:
    """`N / (K n_k)` by class, K counting the classes that occur; 0 for one that does not."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (np.sum(counts > 0) * np.maximum(counts, 1)), 0.0)
