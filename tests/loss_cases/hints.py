"""Rows of the regression losses on features and on pre-activations."""

import math

import jax
import numpy as np
from jax import Array

from kdtl_jax import _numerics, losses
from loss_cases import LossCase


def maps(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 2, 3, 4)), rng.normal(size=(batch, 2, 3, 4))


def rows(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 5))


def maps_and_scale(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return (*maps(rng, batch), rng.normal(size=(batch, 2, 3, 4)))


def widths(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 6, 2)), rng.normal(size=(batch, 6, 3))


def hint(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True)])


def summed(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.asarray([((s - t) ** 2).sum() for s, t in zip(student, teacher, strict=True)])


def hint_cosine(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return (1 - (student * teacher).sum(-1) / lengths).mean((1, 2))


HEAD = np.asarray([[1.0, -0.5], [0.25, 2.0], [-1.0, 0.5], [0.5, 1.0]])


def classifier(features: np.ndarray) -> np.ndarray:
    return features @ HEAD.astype(features.dtype)


def srrl(
    student: np.ndarray,
    teacher: np.ndarray,
    classifier: object,
    feature_weight: float,
    classifier_weight: float,
) -> np.ndarray:
    logits = hint(student @ HEAD, teacher @ HEAD)
    return feature_weight * hint(student, teacher) + classifier_weight * logits


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


def ridge_hint(student: np.ndarray, teacher: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on rows augmented by the square root of the penalty."""
    x, y = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    x, y = x - x.mean(0), y - y.mean(0)
    width = x.shape[1]
    damping = math.sqrt(ridge * (x**2).sum() / width) * np.eye(width)
    padded = np.concatenate([y, np.zeros((width, y.shape[1]))])
    weights = np.linalg.lstsq(np.concatenate([x, damping]), padded, rcond=None)[0]
    return ((y - x @ weights) ** 2).reshape(len(student), -1).mean(-1)


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
    "hint": LossCase(losses.hint, maps, hint, has_where=True),
    "hint_cosine": LossCase(losses.hint_cosine, maps, hint_cosine),
    "simkd": LossCase(losses.simkd, maps, hint),
    "mgd": LossCase(losses.mgd, maps, summed, where_rank=3),
    "srrl": LossCase(
        losses.srrl,
        maps,
        srrl,
        {"classifier": classifier, "feature_weight": 0.5, "classifier_weight": 3.0},
    ),
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
        maps_and_scale,
        likelihood,
        zero_at_equality=False,
        nonnegative=False,
        note="a density's logarithm: no zero, no sign",
    ),
    "ridge_hint": LossCase(
        losses.ridge_hint,
        widths,
        ridge_hint,
        {"ridge": 0.1},
        relational=True,
        zero_at_equality=False,
        note="one regression for the batch, shrunk by the ridge",
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
    "ofd": LossCase(
        losses.ofd,
        maps,
        ofd,
        {"margin": np.asarray([-0.25, -0.5, -0.75, -1.25])},
        zero_at_equality=False,
        note="positive where the teacher is below a margin",
    ),
}
