"""Rows of the regressions on features, predictions and pre-activations."""

import jax
import numpy as np
from jax import Array

from kdtl_jax import _numerics, losses
from loss_cases import LossCase


def maps(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 2, 3, 4)), rng.normal(size=(batch, 2, 3, 4))


def states(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 3, 4)), rng.normal(size=(batch, 3, 4))


def rows(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 5))


def three_maps(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """A third map beside both: variances, targets."""
    return (*maps(rng, batch), rng.normal(size=(batch, 2, 3, 4)))


def mse(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True)])


def summed(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([((s - t) ** 2).sum() for s, t in zip(student, teacher, strict=True)])


def huber(student: np.ndarray, teacher: np.ndarray, delta: float) -> np.ndarray:
    d = np.abs(student - teacher)
    return np.where(d <= delta, d**2 / 2, delta * (d - delta / 2)).mean((1, 2, 3))


def mae(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([np.abs(s - t).mean() for s, t in zip(student, teacher, strict=True)])


def teacher_bounded(
    student: np.ndarray, teacher: np.ndarray, targets: np.ndarray, margin: float
) -> np.ndarray:
    own, of_teacher = mse(student, targets), mse(teacher, targets)
    return own * (own + margin > of_teacher)


def last_axis_mse(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((student - teacher) ** 2).mean(-1)


def cosine_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / lengths


def srd(student: np.ndarray, teacher: np.ndarray, exponent: float) -> np.ndarray:
    return np.log((np.abs(student - teacher) ** exponent).sum(-1))


def vid(student: Array, teacher: Array, raw: Array) -> Array:
    """The loss with a variance that is one: what `connectors.variance` makes of any number."""
    variance = jax.nn.softplus(_numerics.upcast(raw)) + 1e-5
    return losses.vid(student, teacher, variance)


def likelihood(student: np.ndarray, teacher: np.ndarray, raw: np.ndarray) -> np.ndarray:
    variance = np.log1p(np.exp(raw)) + 1e-5
    density = np.exp(-((teacher - student) ** 2) / (2 * variance)) / np.sqrt(variance)
    return -np.log(density).mean((1, 2, 3))


def partial_l2(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    free = (student <= teacher) & (teacher <= 0)
    return np.where(free, 0, (student - teacher) ** 2).sum((1, 2, 3))


def activation_boundary(student: np.ndarray, teacher: np.ndarray, margin: float) -> np.ndarray:
    on = np.maximum(margin - student, 0) ** 2
    off = np.maximum(student + margin, 0) ** 2
    return np.where(teacher > 0, on, off).sum((1, 2, 3))


def ofd(student: np.ndarray, teacher: np.ndarray, margin: np.ndarray) -> np.ndarray:
    value = np.zeros_like(student)
    m = np.broadcast_to(margin, student.shape)
    for i in np.ndindex(student.shape):
        s, t = student[i], teacher[i]
        if t > 0 or (m[i] < t <= 0 and s > t):
            value[i] = (s - t) ** 2
        elif t <= m[i] and s > m[i]:
            value[i] = (s - m[i]) ** 2
    return value.sum((1, 2, 3))


CASES: dict[str, LossCase] = {
    "mse": LossCase(losses.mse, maps, mse, has_where=True),
    "huber": LossCase(losses.huber, maps, huber, {"delta": 0.7}, has_where=True),
    "mae": LossCase(losses.mae, maps, mae, has_where=True),
    "teacher_bounded": LossCase(
        losses.teacher_bounded,
        three_maps,
        teacher_bounded,
        {"margin": 0.1},
        has_where=True,
        zero_at_equality=False,
        note="with a margin, a student as good as its teacher goes on",
    ),
    "teacher_bounded_no_margin": LossCase(
        losses.teacher_bounded, three_maps, teacher_bounded, {"margin": 0.0}
    ),
    "squared_distance": LossCase(losses.squared_distance, maps, summed, has_where=True),
    "squared_distance_positions": LossCase(losses.squared_distance, maps, summed, where_rank=3),
    "mse_rows": LossCase(losses.mse, maps, mse, where_rank=1),
    "last_axis_mse": LossCase(losses.last_axis_mse, states, last_axis_mse),
    "cosine_distance": LossCase(losses.cosine_distance, states, cosine_distance),
    "srd": LossCase(
        losses.srd,
        rows,
        srd,
        {"exponent": 3.0},
        zero_at_equality=False,
        nonnegative=False,
        note="a logarithm: the floor's at equality",
    ),
    "vid": LossCase(
        vid,
        three_maps,
        likelihood,
        zero_at_equality=False,
        nonnegative=False,
        note="a density's logarithm: no zero, no sign",
    ),
    "partial_l2": LossCase(losses.partial_l2, maps, partial_l2),
    "activation_boundary": LossCase(
        losses.activation_boundary,
        maps,
        activation_boundary,
        {"margin": 0.7},
        zero_at_equality=False,
        note="the margin is asked of a teacher too",
    ),
    "partial_l2_margin": LossCase(
        losses.partial_l2,
        maps,
        ofd,
        {"margin": np.asarray([-0.25, -0.5, -0.75, -1.25])},
        zero_at_equality=False,
        note="positive where the teacher is below a margin",
    ),
}
