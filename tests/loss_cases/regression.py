"""Rows of the regression losses per example."""

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase


def boxes(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 3, 4)), rng.normal(size=(batch, 3, 4))


def mse(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])


def huber(student: np.ndarray, teacher: np.ndarray, delta: float) -> np.ndarray:
    d = np.abs(student - teacher)
    return np.where(d <= delta, d**2 / 2, delta * (d - delta / 2)).mean((1, 2))


CASES: dict[str, LossCase] = {
    "mse": LossCase(losses.mse, boxes, mse, has_where=True),
    "huber": LossCase(losses.huber, boxes, huber, {"delta": 0.7}, has_where=True),
}
