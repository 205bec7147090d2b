"""Rows of the losses on tokens: top-k teachers, rankings, foreign vocabularies, TAID."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kl, logits, softmax, tokens

K = 3


def vocabularies(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 2, 5)), 2 * rng.normal(size=(batch, 2, 7))


def probabilities(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return rng.dirichlet(np.ones(5), size=batch), rng.dirichlet(np.ones(7), size=batch)


def of_dense_teacher(loss: Callable[..., Array]) -> Callable[..., Array]:
    """The loss with the targets made from a dense teacher, so that equality has a meaning."""

    @functools.wraps(loss)
    def wrapped(student: Array, teacher: Array, **hyper: Any) -> Array:
        if jnp.shape(student) != jnp.shape(teacher):
            raise ValueError(f"{list(jnp.shape(student))} and {list(jnp.shape(teacher))} differ")
        targets = losses.top_k_targets(teacher, k=K, temperature=hyper.get("temperature", 1.0))
        return loss(student, targets, **hyper)

    return wrapped


def on_rows(fn: Callable[..., float]) -> Callable[..., np.ndarray]:
    """An oracle from a function of one distribution of each side, the teacher's sorted."""

    def oracle(
        student: np.ndarray, teacher: np.ndarray, temperature: float = 1.0, **hyper: Any
    ) -> np.ndarray:
        q, p = (softmax(z / temperature) for z in (student, teacher))
        out = np.zeros(q.shape[:-1])
        for i in np.ndindex(out.shape):
            order = np.argsort(-p[i])
            out[i] = fn(p[i][order], q[i][order], **hyper)
        return out

    return oracle


def tail(p: np.ndarray, q: np.ndarray) -> float:
    return float(kl(np.append(p[:K], p[K:].sum()), np.append(q[:K], q[K:].sum())))


def renormalized(p: np.ndarray, q: np.ndarray) -> float:
    return float(kl(p[:K] / p[:K].sum(), q[:K] / q[:K].sum()))


def teacher_renormalized(p: np.ndarray, q: np.ndarray) -> float:
    return float(kl(p[:K] / p[:K].sum(), q[:K]))


def truncated(p: np.ndarray, q: np.ndarray) -> float:
    return float(kl(p[:K], q[:K]))


def sampled(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.log(p[0] / q[0]))


def ordered(p: np.ndarray, eps: float) -> list[tuple[int, int]]:
    """Pairs of the k classes that count, the likelier first."""
    pairs = [(k, m) for k in range(K) for m in range(k + 1, K)]
    return [(k, m) for k, m in pairs if p[k] > p[m] + eps and p[m] > eps]


def hinge(p: np.ndarray, q: np.ndarray, margin: float | None, eps: float) -> float:
    terms = [
        max(0.0, (p[k] - p[m] if margin is None else margin) - (q[k] - q[m]))
        for k, m in ordered(p, eps)
    ]
    return float(np.mean(terms or [0.0]))


def logistic(p: np.ndarray, q: np.ndarray, eps: float) -> float:
    """`log(1 + q_m / q_k)`: log-odds of one against the other."""
    return float(np.mean([np.log1p(q[m] / q[k]) for k, m in ordered(p, eps)] or [0.0]))


def uld(
    student: np.ndarray,
    teacher: np.ndarray,
    student_temperature: float,
    teacher_temperature: float,
) -> np.ndarray:
    return sorted_l1(softmax(student / student_temperature), softmax(teacher / teacher_temperature))


def ranked(p: np.ndarray, size: int) -> np.ndarray:
    descending = -np.sort(-p, axis=-1)
    padding = np.zeros((*p.shape[:-1], size - p.shape[-1]))
    return np.concatenate([descending, padding], axis=-1)


def sorted_l1(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    size = max(student.shape[-1], teacher.shape[-1])
    return np.abs(ranked(student, size) - ranked(teacher, size)).sum(-1)


def uld_w1(
    student: np.ndarray,
    teacher: np.ndarray,
    student_temperature: float,
    teacher_temperature: float,
) -> np.ndarray:
    """The distance between quantile functions of the ranks, by integration."""
    q = ranked(softmax(student / student_temperature), 7)
    p = ranked(softmax(teacher / teacher_temperature), 7)
    out = np.zeros(q.shape[:-1])
    for i in np.ndindex(out.shape):
        steps = [np.concatenate([[0.0], np.cumsum(x[i])]) for x in (q, p)]
        levels = np.unique(np.clip(np.concatenate(steps), 0, 1))
        middle, width = (levels[1:] + levels[:-1]) / 2, np.diff(levels)
        ranks = [np.searchsorted(step[1:-1], middle) for step in steps]
        out[i] = (width * np.abs(ranks[0] - ranks[1])).sum()
    return out


def taid(student: np.ndarray, teacher: np.ndarray, progress: float) -> np.ndarray:
    """The interpolated teacher as a product of powers of the two distributions."""
    p = softmax(student) ** (1 - progress) * softmax(teacher) ** progress
    return kl(p / p.sum(-1, keepdims=True), softmax(student))


def of_interpolated_teacher(student: Array, teacher: Array, *, progress: float) -> Array:
    interpolated = losses.taid_teacher(student, teacher, progress=progress)
    return losses.forward_kl(student, jax.lax.stop_gradient(interpolated))


def top_k(
    fn: Callable[..., Array], oracle: Callable[..., float], **hyper: float | None
) -> LossCase:
    return LossCase(of_dense_teacher(fn), tokens, on_rows(oracle), hyper)


CASES: dict[str, LossCase] = {
    "top_k_kl_tail": top_k(losses.top_k_kl_tail, tail, temperature=2.0),
    "top_k_kl_renormalized": top_k(losses.top_k_kl_renormalized, renormalized, temperature=2.0),
    "top_k_kl_teacher_renormalized": top_k(
        losses.top_k_kl_teacher_renormalized, teacher_renormalized, temperature=2.0
    )._replace(zero_at_equality=False, note="teaches that the tail is empty"),
    "top_k_kl_truncated": top_k(losses.top_k_kl_truncated, truncated, temperature=2.0)._replace(
        nonnegative=False, note="not a divergence: what leaves the set is not counted"
    ),
    "top_k_kl_sampled": top_k(losses.top_k_kl_sampled, sampled)._replace(
        nonnegative=False, note="one sample of a divergence"
    ),
    "hinge_ranking": top_k(losses.hinge_ranking, hinge, margin=None, eps=1e-3),
    "hinge_ranking_margin": top_k(losses.hinge_ranking, hinge, margin=0.3, eps=1e-3)._replace(
        zero_at_equality=False, note="the margin is asked of a teacher too"
    ),
    "logistic_ranking": top_k(losses.logistic_ranking, logistic, eps=1e-3)._replace(
        zero_at_equality=False, note="a cross-entropy of orders"
    ),
    "uld": LossCase(
        losses.uld,
        vocabularies,
        uld,
        {"student_temperature": 1.5, "teacher_temperature": 0.8},
        zero_at_equality=False,
        note="the temperatures differ",
    ),
    "uld_w1": LossCase(
        losses.uld_w1,
        vocabularies,
        uld_w1,
        {"student_temperature": 1.0, "teacher_temperature": 1.0},
    ),
    "sorted_l1": LossCase(losses.sorted_l1, probabilities, sorted_l1),
    "taid": LossCase(
        of_interpolated_teacher,
        logits,
        taid,
        {"progress": 0.4},
        frozen=True,
        note="the interpolated teacher is a constant",
    ),
}
