"""Rows of the relational and contrastive losses."""

import math
from collections.abc import Callable

import jax.numpy as jnp
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


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def info_nce(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    return -np.diag(log_softmax(units(student) @ units(teacher).T / temperature))


def dcd_invariance(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    a = units(student) @ units(teacher).T / temperature
    log_p, log_q = log_softmax(a.T), log_softmax(a)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


QUEUE = np.round(64 * units(np.random.default_rng(5).normal(size=(7, 5)))) / 64  # exact in halves


def rrd(
    student: np.ndarray,
    teacher: np.ndarray,
    queue: np.ndarray,
    student_temperature: float,
    teacher_temperature: float,
) -> np.ndarray:
    log_p = log_softmax(units(teacher) @ queue.T / teacher_temperature)
    log_q = log_softmax(units(student) @ queue.T / student_temperature)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def embeddings(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return *rows(rng, batch), rng.normal(size=(batch, 4, 5))


def crd(student: Array, teacher: Array, negatives: Array, *, num_data: int) -> Array:
    """The loss on scores, as a function of the embeddings that make them."""
    if not all(jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) for x in (student, teacher)):
        raise TypeError("embeddings must be floating point")
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(f"{list(jnp.shape(student))} and {list(jnp.shape(teacher))} differ")
    half = jnp.finfo(jnp.asarray(student).dtype).bits < 32
    dtype = jnp.float32 if half else jnp.asarray(student).dtype
    student, teacher, negatives = (jnp.asarray(x, dtype) for x in (student, teacher, negatives))
    contrast = jnp.concatenate([teacher[:, None], negatives], axis=1)
    return losses.crd(jnp.einsum("bd,bkd->bk", student, contrast), num_data=num_data)


def crd_published(
    student: np.ndarray, teacher: np.ndarray, negatives: np.ndarray, num_data: int
) -> np.ndarray:
    noise, eps = negatives.shape[1] / num_data, 1e-7
    positive = np.exp((student * teacher).sum(-1))
    scores = np.exp(np.einsum("bd,bkd->bk", student, negatives))
    right = np.log(positive / (positive + noise + eps))
    return -right - np.log(noise / (scores + noise + eps)).sum(-1)


def relational(
    fn: Callable[..., Array],
    oracle: Callable[..., np.ndarray],
    example: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]] = other_widths,
    **hyper: float,
) -> LossCase:
    return LossCase(fn, example, oracle, hyper, relational=True)


CASES: dict[str, LossCase] = {
    "sp": relational(losses.sp, sp),
    "pkt": relational(losses.pkt, pkt, eps=1e-9)._replace(
        nonnegative=False, note="at least 0 up to B eps, as published"
    ),
    "cc": relational(losses.cc, cc, gamma=0.3, order=3),
    "rkd_distance": relational(losses.rkd_distance, rkd_distance),
    "rkd_angle": relational(losses.rkd_angle, rkd_angle),
    "ega_edge": relational(losses.ega_edge, ega_edge, rows),
    "ega_node": relational(losses.ega_node, ega_node, rows)._replace(
        zero_at_equality=False, note="different examples should be uncorrelated"
    ),
    "itrd_mutual": relational(losses.itrd_mutual, itrd_mutual)._replace(
        zero_at_equality=False, note="an entropy, less the information shared"
    ),
    "info_nce": relational(losses.info_nce, info_nce, rows, temperature=0.5)._replace(
        zero_at_equality=False, note="the other examples stay candidates"
    ),
    "dcd_invariance": relational(losses.dcd_invariance, dcd_invariance, rows, temperature=0.5),
    "rrd": LossCase(
        losses.rrd,
        rows,
        rrd,
        {"queue": QUEUE, "student_temperature": 0.5, "teacher_temperature": 0.2},
        zero_at_equality=False,
        note="the teacher is sharper by its temperature",
    ),
    "crd": LossCase(
        crd,
        embeddings,
        crd_published,
        {"num_data": 50},
        zero_at_equality=False,
        note="a classification against noise",
    ),
}
