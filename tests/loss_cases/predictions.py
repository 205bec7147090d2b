"""Rows of the correlations of predictions, of standardized logits and of transport by a cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kd, logits
from loss_cases.labels import softened


def standardized_kd(
    student: np.ndarray, teacher: np.ndarray, temperature: float, ddof: int
) -> np.ndarray:
    def z_score(z: np.ndarray) -> np.ndarray:
        return (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=ddof, keepdims=True) + 1e-7)

    return kd(z_score(student), z_score(teacher), temperature)


def correlations(student: np.ndarray, teacher: np.ndarray, axis: int) -> np.ndarray:
    if axis == 0:
        student, teacher = student.T, teacher.T
    pairs = zip(student, teacher, strict=True)
    return np.asarray([np.corrcoef(s, t)[0, 1] for s, t in pairs])


def dist_inter(
    student: np.ndarray, teacher: np.ndarray, temperature: float, eps: float
) -> np.ndarray:
    return 1 - correlations(*softened(student, teacher, temperature), axis=1)


def dist_intra(
    student: np.ndarray, teacher: np.ndarray, temperature: float, eps: float
) -> np.ndarray:
    """Half the squared distance of unit columns, by rows; distance 1 for a batch of one."""
    q, p = softened(student, teacher, temperature)
    if len(q) == 1:
        return np.ones(1)

    def units(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(0)) / (x.std(0) * np.sqrt(len(x)))

    rows = 0.5 * ((units(q) - units(p)) ** 2).mean(-1) * len(q)
    np.testing.assert_allclose(rows.mean(), 1 - correlations(q, p, axis=0).mean())
    return rows


def class_correlation(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softened(student, teacher, temperature)
    total = np.linalg.norm(p.T @ p - q.T @ q) ** 2
    return np.full(len(q), total / q.shape[1])


def batch_correlation(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softened(student, teacher, temperature)
    return np.linalg.norm(p @ p.T - q @ q.T, axis=-1) ** 2


def skd_direction(student: np.ndarray, teacher: np.ndarray, tikhonov: float) -> np.ndarray:
    s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
    d = s @ s.T - t @ t.T
    batch = len(d)
    covariance = np.cov(d, rowvar=False) if batch > 1 else np.zeros((1, 1))
    inverse = np.linalg.inv(covariance + tikhonov * np.eye(batch))
    return np.sqrt(np.einsum("bi,ij,bj->b", d, inverse, d))


# Numbers that half precision holds.
COST = np.round(8 * np.abs(np.random.default_rng(7).normal(size=(5, 5)))) / 8


def transport(
    q: np.ndarray, p: np.ndarray, cost: np.ndarray, regularization: float, iterations: int
) -> float:
    """Sinkhorn's scalings of the kernel, in probability space."""
    kernel = np.exp(-cost / regularization)
    u = np.ones_like(q) / len(q)
    v = u
    for _ in range(iterations):
        v = p / (kernel.T @ u)
        u = q / (kernel @ v)
    return float((u[:, None] * kernel * v[None] * cost).sum())


def sinkhorn_cost(
    student: np.ndarray,
    teacher: np.ndarray,
    cost: np.ndarray,
    temperature: float,
    regularization: float,
    iterations: int,
) -> np.ndarray:
    pairs = zip(*softened(student, teacher, temperature), strict=True)
    return np.asarray([transport(q, p, cost, regularization, iterations) for q, p in pairs])


def of_standardized(student: Array, teacher: Array, *, temperature: float, ddof: int) -> Array:
    student, teacher = (losses.standardize_logits(z, ddof=ddof) for z in (student, teacher))
    return losses.kd_kl(student, teacher, temperature=temperature)


def over_the_batch(
    fn: Callable[..., Array], oracle: Callable[..., np.ndarray], **hyper: Any
) -> LossCase:
    return LossCase(fn, logits, oracle, hyper, relational=True, where_rank=1)


CASES: dict[str, LossCase] = {
    "standardized_kd": LossCase(
        of_standardized, logits, standardized_kd, {"temperature": 2.0, "ddof": 1}
    ),
    "dist_inter": LossCase(losses.dist_inter, logits, dist_inter, {"temperature": 2.0, "eps": 0.0}),
    "dist_intra": over_the_batch(losses.dist_intra, dist_intra, temperature=2.0, eps=0.0),
    "class_correlation": over_the_batch(
        losses.class_correlation, class_correlation, temperature=2.0
    ),
    "batch_correlation": over_the_batch(
        losses.batch_correlation, batch_correlation, temperature=2.0
    ),
    "skd_direction": over_the_batch(losses.skd_direction, skd_direction, tikhonov=0.2),
    "sinkhorn_cost": LossCase(
        losses.sinkhorn_cost,
        logits,
        sinkhorn_cost,
        {"cost": COST, "temperature": 2.0, "regularization": 0.25, "iterations": 4},
        zero_at_equality=False,
        note="an entropic plan moves some mass always",
    ),
}
