"""Rows of the contrastive losses."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.relations import relational, rows, units


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


def projections(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    labels = rng.integers(0, 2, size=batch).astype(np.int32)
    return rng.normal(size=(batch, 3)), rng.normal(size=(batch, 3)), labels


def bi_tuning_projection(
    queries: np.ndarray, keys: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
    k = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    log_p = log_softmax(q @ k.T / temperature)
    out = []
    for row, label in zip(log_p, labels, strict=True):
        u = (labels == label) / (labels == label).sum()
        out.append(sum(ui * (np.log(ui) - r) for ui, r in zip(u, row, strict=True) if ui > 0))
    return np.asarray(out)


CASES: dict[str, LossCase] = {
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
    "bi_tuning_projection": LossCase(
        losses.bi_tuning_projection,
        projections,
        bi_tuning_projection,
        {"temperature": 0.5},
        relational=True,
        where_rank=1,
        zero_at_equality=False,
        note="at equality every query finds itself, but not the rest of its class",
    ),
}
