"""Rows of the relational losses: every value depends on the whole batch, none on padding."""

import math
from collections.abc import Callable

import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase


def other_widths(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 3))


def rows(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 5)), rng.normal(size=(batch, 5))


def units(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sp(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((units(student @ student.T) - units(teacher @ teacher.T)) ** 2).mean(-1)


def pkt(student: np.ndarray, teacher: np.ndarray, eps: float) -> np.ndarray:
    def affinities(x: np.ndarray) -> np.ndarray:
        u = x / (np.linalg.norm(x, axis=-1, keepdims=True) + eps)
        k = (u @ u.T + 1) / 2
        return k / k.sum(-1, keepdims=True)

    q, p = affinities(student), affinities(teacher)
    return (p * np.log((p + eps) / (q + eps))).sum(-1)


def cc(student: np.ndarray, teacher: np.ndarray, gamma: float, order: int) -> np.ndarray:
    def kernel(x: np.ndarray) -> np.ndarray:
        g = units(x) @ units(x).T
        powers = [(2 * gamma) ** p / math.factorial(p) * g**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * np.sum(powers, axis=0)

    return ((kernel(student) - kernel(teacher)) ** 2).mean(-1)


def huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def rkd_distance(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    def relative(x: np.ndarray) -> np.ndarray:
        d = np.linalg.norm(x[:, None] - x[None], axis=-1)
        pairs = len(x) * (len(x) - 1)
        return d / (d.sum() / pairs) if pairs and d.any() else d

    return huber(relative(student) - relative(teacher)).mean(-1)


def rkd_angle(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    def cosines(x: np.ndarray) -> np.ndarray:
        e = x[None] - x[:, None]
        length = np.linalg.norm(e, axis=-1, keepdims=True)
        e = np.where(length > 0, e / np.where(length > 0, length, 1), 0)
        return np.einsum("ijd,ikd->ijk", e, e)

    return huber(cosines(student) - cosines(teacher)).mean((1, 2))


def relational(
    fn: Callable[..., Array],
    oracle: Callable[..., np.ndarray],
    example: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]] = other_widths,
    **hyper: float,
) -> LossCase:
    return LossCase(fn, example, oracle, hyper, relational=True, where_rank=1)


CASES: dict[str, LossCase] = {
    "sp": relational(losses.sp, sp),
    "pkt": relational(losses.pkt, pkt, eps=1e-9)._replace(
        nonnegative=False, note="at least 0 up to B eps, as published"
    ),
    "cc": relational(losses.cc, cc, gamma=0.3, order=3),
    "rkd_distance": relational(losses.rkd_distance, rkd_distance),
    "rkd_angle": relational(losses.rkd_angle, rkd_angle),
}
