"""Rows of the losses of regularized fine-tuning."""

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase


def maps(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.normal(size=(batch, 2, 3, 4)), rng.normal(size=(batch, 2, 3, 4))


def logits(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 5)), 2 * rng.normal(size=(batch, 5))


def logits_and_target(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 5)), rng.dirichlet(np.ones(5), size=batch)


def projections(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    labels = rng.integers(0, 2, size=batch).astype(np.int32)
    return rng.normal(size=(batch, 3)), rng.normal(size=(batch, 3)), labels


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def behavioral(student: np.ndarray, source: np.ndarray) -> np.ndarray:
    return 0.5 * ((student - source) ** 2).sum((1, 2, 3))


def delta(student: np.ndarray, source: np.ndarray, channel_weights: np.ndarray) -> np.ndarray:
    positions = student.shape[1] * student.shape[2]
    by_channel = ((student - source) ** 2).sum((1, 2)) / positions
    return 0.5 * (len(channel_weights) * channel_weights * by_channel).sum(-1)


def lwf(student: np.ndarray, old: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softmax(old / temperature), softmax(student / temperature)
    return (q * (np.log(q) - np.log(p))).sum(-1)


def co_tuning(student: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -(target * np.log(softmax(student))).sum(-1)


def bi_tuning_projection(
    queries: np.ndarray, keys: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q = queries / np.linalg.norm(queries, axis=-1, keepdims=True)
    k = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    log_p = np.log(softmax(q @ k.T / temperature))
    out = []
    for row, label in zip(log_p, labels, strict=True):
        u = (labels == label) / (labels == label).sum()
        out.append(sum(ui * (np.log(ui) - r) for ui, r in zip(u, row, strict=True) if ui > 0))
    return np.asarray(out)


CASES: dict[str, LossCase] = {
    "behavioral": LossCase(losses.behavioral, maps, behavioral),
    "delta": LossCase(
        losses.delta, maps, delta, {"channel_weights": np.asarray([0.125, 0.25, 0.125, 0.5])}
    ),
    "lwf": LossCase(losses.lwf, logits, lwf, {"temperature": 2.0}),
    "co_tuning": LossCase(
        losses.co_tuning,
        logits_and_target,
        co_tuning,
        zero_at_equality=False,
        nonnegative=False,
        note="a cross-entropy against probabilities; the battery also passes it other numbers",
    ),
    "bi_tuning_projection": LossCase(
        losses.bi_tuning_projection,
        projections,
        bi_tuning_projection,
        {"temperature": 0.5},
        relational=True,
        zero_at_equality=False,
        note="at equality every query finds itself, but not the rest of its class",
    ),
}
