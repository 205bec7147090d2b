"""Rows of the losses on a classifier's logits: KD, its relatives, correlations, transport."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kl, logits, softmax


def labelled(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    labels = rng.integers(0, 5, size=batch).astype(np.int32)
    return *logits(rng, batch), labels


def kd(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    return temperature**2 * kl(softmax(teacher / temperature), softmax(student / temperature))


def soft_cross_entropy(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return -(p * np.log(q)).sum(-1)


def hard_kd(student: np.ndarray, teacher: np.ndarray, label_smoothing: float) -> np.ndarray:
    classes = student.shape[-1]
    target = (1 - label_smoothing) * np.eye(classes)[teacher.argmax(-1)]
    return -((target + label_smoothing / classes) * np.log(softmax(student))).sum(-1)


def logit_mse(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return ((student - teacher) ** 2).mean(-1)


def standardized_kd(
    student: np.ndarray, teacher: np.ndarray, temperature: float, ddof: int
) -> np.ndarray:
    def z_score(z: np.ndarray) -> np.ndarray:
        return (z - z.mean(-1, keepdims=True)) / (z.std(-1, ddof=ddof, keepdims=True) + 1e-7)

    return kd(z_score(student), z_score(teacher), temperature)


def at(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return p[np.arange(len(p)), labels]


def without(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The distribution over the classes other than the label."""
    rest = np.stack([np.delete(row, label) for row, label in zip(p, labels, strict=True)])
    return rest / rest.sum(-1, keepdims=True)


def softened(student: np.ndarray, teacher: np.ndarray, temperature: float) -> tuple[Any, Any]:
    return softmax(student / temperature), softmax(teacher / temperature)


def tckd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q, p = (at(x, labels) for x in softened(student, teacher, temperature))
    binary = [np.stack([x, 1 - x], axis=-1) for x in (p, q)]
    return temperature**2 * kl(*binary)


def nckd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    q, p = (without(x, labels) for x in softened(student, teacher, temperature))
    return temperature**2 * kl(p, q)


def dkd(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    temperature: float,
    alpha: float,
    beta: float,
) -> np.ndarray:
    """By the decomposition of KD itself, eq. 7 of the paper, with its weights exchanged."""
    target = tckd(student, teacher, labels, temperature)
    whole = kd(student, teacher, temperature)
    rest = 1 - at(softened(student, teacher, temperature)[1], labels)
    return alpha * target + beta * (whole - target) / rest


def target_cross_entropy(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    return -at(softmax(teacher), labels) * np.log(at(softmax(student), labels))


def nkd(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float, gamma: float
) -> np.ndarray:
    q, p = (without(x, labels) for x in softened(student, teacher, temperature))
    rest = -(p * np.log(q)).sum(-1)
    return target_cross_entropy(student, teacher, labels) + gamma * temperature**2 * rest


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


def dist(
    student: np.ndarray,
    teacher: np.ndarray,
    beta: float,
    gamma: float,
    temperature: float,
    eps: float,
) -> np.ndarray:
    inter = dist_inter(student, teacher, temperature, eps)
    return beta * inter + gamma * dist_intra(student, teacher, temperature, eps)


def class_correlation(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softened(student, teacher, temperature)
    total = np.linalg.norm(p.T @ p - q.T @ q) ** 2
    return np.full(len(q), total / q.shape[1])


def batch_correlation(student: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    q, p = softened(student, teacher, temperature)
    return np.linalg.norm(p @ p.T - q @ q.T, axis=-1) ** 2


def mlld(student: np.ndarray, teacher: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    levels = (kd, class_correlation, batch_correlation)
    return np.sum([f(student, teacher, t) for f in levels for t in temperatures], axis=0)


def skd_direction(student: np.ndarray, teacher: np.ndarray, tikhonov: float) -> np.ndarray:
    s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
    d = s @ s.T - t @ t.T
    batch = len(d)
    covariance = np.cov(d, rowvar=False) if batch > 1 else np.zeros((1, 1))
    inverse = np.linalg.inv(covariance + tikhonov * np.eye(batch))
    return np.sqrt(np.einsum("bi,ij,bj->b", d, inverse, d))


def ttm(student: np.ndarray, teacher: np.ndarray, gamma: float) -> np.ndarray:
    p = softmax(teacher) ** gamma
    return kl(p / p.sum(-1, keepdims=True), softmax(student))


def wttm(student: np.ndarray, teacher: np.ndarray, gamma: float) -> np.ndarray:
    return (softmax(teacher) ** gamma).sum(-1) * ttm(student, teacher, gamma)


def wsld_weight(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> np.ndarray:
    of_student, of_teacher = (-np.log(at(softmax(x), labels)) for x in (student, teacher))
    return 1 - np.exp(-of_student / (of_teacher + 1e-7))


def wsld(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float
) -> np.ndarray:
    return wsld_weight(student, teacher, labels) * kd(student, teacher, temperature)


def log_probabilities(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    q, p = logits(rng, batch)
    return np.log(softmax(q)), np.log(softmax(p))


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
    regularization: float,
    iterations: int,
) -> np.ndarray:
    pairs = zip(np.exp(student), np.exp(teacher), strict=True)
    return np.asarray([transport(q, p, cost, regularization, iterations) for q, p in pairs])


def wkd_logit(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    cost: np.ndarray,
    gamma: float,
    temperature: float,
    regularization: float,
    iterations: int,
) -> np.ndarray:
    q, p = (without(x, labels) for x in softened(student, teacher, temperature))
    moved = [
        transport(q[b], p[b], np.delete(np.delete(cost, y, 0), y, 1), regularization, iterations)
        for b, y in enumerate(labels)
    ]
    return target_cross_entropy(student, teacher, labels) + gamma * np.asarray(moved)


def heads(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """The student's head, its weak head, labels."""
    return labelled(rng, batch)


def uskd(
    student: np.ndarray,
    weak: np.ndarray,
    labels: np.ndarray,
    alpha: float,
    beta: float,
    mu: float,
    label_smoothing: float,
) -> np.ndarray:
    p, w = softmax(student), softmax(weak)
    weight = at(p, labels) ** 2 + 1 - (at(p, labels) ** 2).mean()
    target = -weight * np.log(at(p, labels))
    non_target = []
    for b, y in enumerate(labels):
        rest, of_weak = (np.where(np.arange(5) == y, 0, x[b]) for x in (p, w))
        score = rest / rest.sum() + of_weak / of_weak.sum()
        zipf = np.zeros(5)
        zipf[np.argsort(-score)] = 1 / np.arange(1, 6)
        zipf[y] = 0
        terms = [z * np.log(r) for z, r in zip(zipf, rest / rest.sum(), strict=True) if z > 0]
        non_target.append(-np.sum(terms) / zipf.sum())
    smooth = (1 - label_smoothing) * np.eye(5)[labels] + label_smoothing / 5
    of_head = -(smooth * np.log(w)).sum(-1)
    return alpha * target + beta * np.asarray(non_target) + mu * of_head


def on(
    fn: Callable[..., Array],
    oracle: Callable[..., np.ndarray],
    example: Callable[[np.random.Generator, int], tuple[np.ndarray, ...]] = logits,
    **hyper: Any,
) -> LossCase:
    return LossCase(fn, example, oracle, hyper)


def not_zero(case: LossCase, note: str) -> LossCase:
    return case._replace(zero_at_equality=False, note=note)


CE = "a cross-entropy: the teacher's entropy remains"

CASES: dict[str, LossCase] = {
    "kd_kl": on(losses.kd_kl, kd, temperature=3.0)._replace(has_where=True),
    "soft_cross_entropy": not_zero(
        on(losses.soft_cross_entropy, soft_cross_entropy, temperature=2.0), CE
    )._replace(has_where=True),
    "hard_kd": not_zero(on(losses.hard_kd, hard_kd, label_smoothing=0.1), CE),
    "logit_mse": on(losses.logit_mse, logit_mse),
    "standardized_kd": on(
        losses.standardized_kd, standardized_kd, temperature=2.0, ddof=1
    )._replace(has_where=True),
    "tckd": on(losses.tckd, tckd, labelled, temperature=2.0),
    "nckd": on(losses.nckd, nckd, labelled, temperature=2.0),
    "dkd": on(losses.dkd, dkd, labelled, temperature=2.0, alpha=0.5, beta=3.0),
    "nkd": not_zero(on(losses.nkd, nkd, labelled, temperature=2.0, gamma=0.7), CE),
    "target_cross_entropy": not_zero(
        on(losses.target_cross_entropy, target_cross_entropy, labelled), CE
    ),
    "dist_inter": on(losses.dist_inter, dist_inter, temperature=2.0, eps=0.0),
    "dist_intra": on(losses.dist_intra, dist_intra, temperature=2.0, eps=0.0)._replace(
        relational=True
    ),
    "dist": on(losses.dist, dist, beta=0.5, gamma=2.0, temperature=2.0, eps=0.0)._replace(
        relational=True
    ),
    "class_correlation": on(losses.class_correlation, class_correlation, temperature=2.0)._replace(
        relational=True
    ),
    "batch_correlation": on(losses.batch_correlation, batch_correlation, temperature=2.0)._replace(
        relational=True
    ),
    "mlld": on(losses.mlld, mlld, temperatures=(2.0, 4.0))._replace(relational=True),
    "skd_direction": on(losses.skd_direction, skd_direction, tikhonov=0.2)._replace(
        relational=True
    ),
    "ttm": not_zero(on(losses.ttm, ttm, gamma=0.3), "only the teacher is softened"),
    "wttm": not_zero(on(losses.wttm, wttm, gamma=0.3), "only the teacher is softened"),
    "wsld_weight": not_zero(on(losses.wsld_weight, wsld_weight, labelled), "1 - 1/e at equality"),
    "wsld": on(losses.wsld, wsld, labelled, temperature=2.0)._replace(
        frozen=True, note="the weight is a constant of the method"
    ),
    "sinkhorn_cost": not_zero(
        on(
            losses.sinkhorn_cost,
            sinkhorn_cost,
            log_probabilities,
            cost=COST,
            regularization=0.25,
            iterations=4,
        ),
        "an entropic plan moves some mass always; the logarithms of probabilities are never 1e4",
    )._replace(extreme=False),
    "wkd_logit": not_zero(
        on(
            losses.wkd_logit,
            wkd_logit,
            labelled,
            cost=COST,
            gamma=2.0,
            temperature=2.0,
            regularization=0.25,
            iterations=4,
        ),
        "a cross-entropy, and an entropic plan",
    ),
    "uskd": not_zero(
        on(losses.uskd, uskd, heads, alpha=0.5, beta=0.7, mu=0.3, label_smoothing=0.2),
        "cross-entropies; the weights are constants of the method",
    )._replace(relational=True, frozen=True),
}
