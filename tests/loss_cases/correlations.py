"""Rows of the losses on correlations over the batch."""

import math

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.maps import same
from loss_cases.relations import relational, rows, units


def widths(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 6, 2)), rng.normal(size=(batch, 6, 3))


def ega_edge(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((correlated(student, student) - correlated(teacher, teacher)) ** 2).sum(-1)


def ega_node(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((correlated(teacher, student) - np.eye(len(student))) ** 2).sum(-1)


def correlated(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray([[np.corrcoef(a, b)[0, 1] for b in y] for a in x])


def itrd_mutual(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    gram_s, gram_t = (units(x) @ units(x).T for x in (student, teacher))
    shared = gram_s * gram_t
    own = gram_s / np.trace(gram_s)
    return (own**2 - (shared / np.trace(shared)) ** 2).sum(-1)


def pkd_pearson(student: np.ndarray, teacher: np.ndarray, ddof: int, eps: float) -> np.ndarray:
    def standardized(x: np.ndarray) -> np.ndarray:
        deviation = x.std((0, 1, 2), ddof=ddof)
        return (x - x.mean((0, 1, 2))) / (deviation + eps)

    return 0.5 * ((standardized(student) - standardized(teacher)) ** 2).mean((1, 2, 3))


def ridge_hint(student: np.ndarray, teacher: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on rows augmented by the square root of the penalty."""
    x, y = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    x, y = x - x.mean(0), y - y.mean(0)
    width = x.shape[1]
    damping = math.sqrt(ridge * (x**2).sum() / width) * np.eye(width)
    padded = np.concatenate([y, np.zeros((width, y.shape[1]))])
    weights = np.linalg.lstsq(np.concatenate([x, damping]), padded, rcond=None)[0]
    return ((y - x @ weights) ** 2).reshape(len(student), -1).mean(-1)


CASES: dict[str, LossCase] = {
    "ega_edge": relational(losses.ega_edge, ega_edge, rows),
    "ega_node": relational(losses.ega_node, ega_node, rows)._replace(
        zero_at_equality=False, note="different examples should be uncorrelated"
    ),
    "itrd_mutual": relational(losses.itrd_mutual, itrd_mutual)._replace(
        zero_at_equality=False, note="an entropy, less the information shared"
    ),
    "pkd_pearson": LossCase(
        losses.pkd_pearson,
        same,
        pkd_pearson,
        {"ddof": 1, "eps": 1e-3},
        relational=True,
        where_rank=1,
    ),
    "ridge_hint": LossCase(
        losses.ridge_hint,
        widths,
        ridge_hint,
        {"ridge": 0.1},
        relational=True,
        where_rank=1,
        zero_at_equality=False,
        note="one regression for the batch, shrunk by the ridge",
    ),
}
