"""Rows of the divergences between class distributions, and of KD's family."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kdtl_jax import losses
from loss_cases import LossCase

Divergence = Callable[[np.ndarray, np.ndarray], np.ndarray]


def logits(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 5)), 2 * rng.normal(size=(batch, 5))


def one_logit(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 1)), 2 * rng.normal(size=(batch, 1))


def tokens(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 2, 5)), 2 * rng.normal(size=(batch, 2, 5))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def of_probabilities(divergence: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """An oracle on logits from the textbook's formula on probabilities p (teacher), q (student)."""

    def oracle(
        student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0, **hyper: Any
    ) -> np.ndarray:
        return divergence(softmax(teacher / temperature), softmax(student / temperature), **hyper)

    return oracle


def reverse(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return kl(q, p)


def symmetric(p: np.ndarray, q: np.ndarray, weight: float | np.ndarray) -> np.ndarray:
    return (1 - weight) * kl(p, q) + weight * kl(q, p)


def skew_forward(p: np.ndarray, q: np.ndarray, alpha: float) -> np.ndarray:
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse(p: np.ndarray, q: np.ndarray, alpha: float) -> np.ndarray:
    return kl(q, (1 - alpha) * p + alpha * q)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The largest difference between the probabilities of one event: where p exceeds q."""
    return np.maximum(p - q, 0).sum(-1)


def adaptive_weight(p: np.ndarray, q: np.ndarray, mu: float) -> np.ndarray:
    """Walks down the teacher's classes until their mass passes mu."""
    out = np.zeros(p.shape[0])
    for b in range(len(out)):
        head, mass, gaps = True, 0.0, [0.0, 0.0]
        for n, c in enumerate(sorted(range(p.shape[1]), key=lambda c, b=b: -p[b, c])):
            mass += p[b, c]
            head = n == 0 or (head and mass <= mu)
            gaps[0 if head else 1] += abs(p[b, c] - q[b, c])
        out[b] = gaps[1] / sum(gaps)
    return out


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The entropy of the mean less the mean of the entropies."""

    def entropy(x: np.ndarray) -> np.ndarray:
        return -(x * np.log(x)).sum(-1)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def gkd(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def continuous(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    m = (1 - beta) * p + beta * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def normalized(p: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    if beta in (0, 1):  # the limits
        return kl(q, p) if beta else kl(p, q)
    return gkd(p, q, beta) / (beta * (1 - beta))


def kd(student: np.ndarray, teacher: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    t = np.reshape(temperature, (-1, 1))
    return np.square(np.ravel(temperature)) * kl(softmax(teacher / t), softmax(student / t))


def binary_kl(
    student: np.ndarray, teacher: np.ndarray, temperature: float, class_weights: Any = 1.0
) -> np.ndarray:
    """Per label, in probabilities."""
    q, p = (1 / (1 + np.exp(-z / temperature)) for z in (student, teacher))
    terms = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return temperature**2 * (class_weights * terms).sum(-1)


def soft_cross_entropy(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return -(p * np.log(q)).sum(-1)


def hard_kd(student: np.ndarray, teacher: np.ndarray, label_smoothing: float) -> np.ndarray:
    classes = student.shape[-1]
    target = (1 - label_smoothing) * np.eye(classes)[teacher.argmax(-1)]
    return -((target + label_smoothing / classes) * np.log(softmax(student))).sum(-1)


def ttm(student: np.ndarray, teacher: np.ndarray, gamma: float) -> np.ndarray:
    p = softmax(teacher) ** gamma
    return kl(p / p.sum(-1, keepdims=True), softmax(student))


def wttm(student: np.ndarray, teacher: np.ndarray, gamma: float) -> np.ndarray:
    return (softmax(teacher) ** gamma).sum(-1) * ttm(student, teacher, gamma)


def row(fn: Callable[..., Any], divergence: Callable[..., np.ndarray], **hyper: float) -> LossCase:
    return LossCase(fn, logits, of_probabilities(divergence), hyper, has_where=True)


CASES: dict[str, LossCase] = {
    "forward_kl": row(losses.forward_kl, kl, temperature=2.0)._replace(example=tokens),
    "reverse_kl": row(losses.reverse_kl, reverse, temperature=0.7),
    "symmetric_kl": row(losses.symmetric_kl, symmetric, weight=0.3, temperature=2.0),
    "skew_forward_kl": row(losses.skew_forward_kl, skew_forward, alpha=0.1, temperature=2.0),
    "skew_reverse_kl": row(losses.skew_reverse_kl, skew_reverse, alpha=0.2, temperature=2.0),
    "total_variation": row(losses.total_variation, total_variation, temperature=2.0),
    "adaptive_kl_weight": row(losses.adaptive_kl_weight, adaptive_weight, mu=0.6)._replace(
        zero_at_equality=False, note="a share; one half where nothing is left to learn"
    ),
    "kd_kl": LossCase(losses.kd_kl, logits, kd, {"temperature": 3.0}, has_where=True),
    "binary_kl": LossCase(
        losses.binary_kl, logits, binary_kl, {"temperature": 3.0}, has_where=True
    ),
    "binary_kl_weighted": LossCase(
        losses.binary_kl,
        logits,
        binary_kl,
        {"temperature": 3.0, "class_weights": np.asarray([1.0, 0.5, 2.0, 0.0, 1.0])},
    ),
    "binary_kl_one_logit": LossCase(losses.binary_kl, one_logit, binary_kl, {"temperature": 2.0}),
    "soft_cross_entropy": LossCase(
        losses.soft_cross_entropy,
        logits,
        soft_cross_entropy,
        {"temperature": 2.0},
        zero_at_equality=False,
        has_where=True,
        note="the teacher's entropy remains",
    ),
    "hard_kd": LossCase(
        losses.hard_kd,
        logits,
        hard_kd,
        {"label_smoothing": 0.1},
        zero_at_equality=False,
        note="a cross-entropy",
    ),
    "ttm": LossCase(
        losses.ttm,
        logits,
        ttm,
        {"gamma": 0.3},
        zero_at_equality=False,
        note="only the teacher is softened",
    ),
    "wttm": LossCase(
        losses.wttm,
        logits,
        wttm,
        {"gamma": 0.3},
        zero_at_equality=False,
        note="only the teacher is softened",
    ),
    "jensen_shannon": row(losses.jensen_shannon, jensen_shannon, temperature=2.0),
    "jsd_gkd": row(losses.jsd_gkd, gkd, beta=0.3, temperature=2.0),
    "jsd_continuous": row(losses.jsd_continuous, continuous, beta=0.3, temperature=2.0),
    "jsd_normalized": row(losses.jsd_normalized, normalized, beta=0.3, temperature=2.0),
    "jsd_normalized_forward_end": row(losses.jsd_normalized, normalized, beta=0.0),
    "jsd_normalized_reverse_end": row(losses.jsd_normalized, normalized, beta=1.0),
}
