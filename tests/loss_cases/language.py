"""Rows of the losses of language models: sampled tokens, on-policy, drafts, rankings, chunks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import losses
from loss_cases import LossCase
from loss_cases.divergences import kl, of_probabilities, softmax, tokens

CONSTANT = "the teacher's judgement is a constant: the gradient is not the value's"
DRAWS = np.asarray([[[0, 2, 2], [4, 1, 0]]], np.int32)


def sampled(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """Log-probabilities under student, teacher and sampler."""
    return tuple(-rng.exponential(size=(batch, 3)) for _ in range(3))


def two(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return sampled(rng, batch)[:2]


def ranked(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return 2 * rng.normal(size=(batch, 4)), 2 * rng.normal(size=(batch, 4))


def counted(oracle: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """What does not count is 0 and may be anything."""

    def masked(*args: np.ndarray, where: Any = None, **hyper: Any) -> np.ndarray:
        return oracle(*args, **hyper)

    return masked


def ratio(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.clip(np.exp(np.clip(p - q, -20, 20)), 0, None)


def reverse(student: np.ndarray, teacher: np.ndarray, sampler: np.ndarray) -> np.ndarray:
    return ratio(student, sampler) * (student - teacher)


def gradient_of(p: np.ndarray, advantages: np.ndarray, q: np.ndarray) -> np.ndarray:
    return -ratio(p, q) * advantages


def clipped(
    p: np.ndarray,
    advantages: np.ndarray,
    q: np.ndarray,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> np.ndarray:
    out = np.zeros(p.shape)
    for i in np.ndindex(p.shape):
        a, r = advantages[i], ratio(p, q)[i]
        if a >= 0:
            out[i] = -a * min(r, 1 + clip_high)
        else:
            out[i] = -a * min(max(r, 1 - clip_low), dual_clip)
    return out


def k2(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return np.log(np.exp(student - teacher)) ** 2 / 2


def k3(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    r = ratio(teacher, student)
    return r - 1 - np.log(r)


def student_top_k(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros(q.shape[:-1])
    for i in np.ndindex(out.shape):
        order = np.argsort(-q[i])
        own, other = (np.append(z[i][order][:k], z[i][order][k:].sum()) for z in (q, p))
        out[i] = kl(own, other)
    return out


def judged(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    """Logits of both sides, a token, and the sampler's log-probability of it."""
    drawn = rng.integers(0, 5, size=(batch, 2)).astype(np.int32)
    return *tokens(rng, batch), drawn, -rng.exponential(size=(batch, 2))


@functools.wraps(losses.top_k_reverse_kl_sampled_tail)
def of_top_k_and_token(
    student: Array, teacher: Array, drawn: Array, sampler: Array, *, k: int, where: Any = None
) -> Array:
    """The loss of what a dense teacher answers on the student's k classes and the token."""
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(f"{list(jnp.shape(student))} and {list(jnp.shape(teacher))} differ")
    classes = jnp.argsort(student, descending=True, stable=True)[..., :k]
    targets = losses.top_k_at(jax.lax.stop_gradient(teacher), classes)
    of_teacher = losses.token_log_probs(jax.lax.stop_gradient(teacher), drawn, where=where)
    return losses.top_k_reverse_kl_sampled_tail(
        student, targets, drawn, of_teacher, sampler, where=where
    )


def top_k_and_token(
    student: np.ndarray, teacher: np.ndarray, drawn: np.ndarray, sampler: np.ndarray, k: int
) -> np.ndarray:
    q, p = softmax(student), softmax(teacher)
    out = np.zeros(drawn.shape)
    for i in np.ndindex(out.shape):
        kept = np.argsort(-q[i], kind="stable")[:k]
        out[i] = (q[i][kept] * np.log(q[i][kept] / p[i][kept])).sum()
        y = drawn[i]
        if y not in kept:
            own = np.log(q[i][y])
            out[i] += ratio(own, sampler[i]) * (own - np.log(p[i][y]))
    return out


def entropy_aware(p: np.ndarray, q: np.ndarray, threshold: float, weight: float) -> np.ndarray:
    unsure = -(p * np.log(p)).sum(-1) > threshold
    return kl(q, p) + weight * unsure * kl(p, q)


def entropy_aware_k(
    p: np.ndarray, q: np.ndarray, threshold: float, weight: float, k: int
) -> np.ndarray:
    kept = np.where(p >= np.sort(p, -1)[..., -k][..., None], p, 0)
    kept = kept / kept.sum(-1, keepdims=True)
    terms = np.where(kept > 0, kept * np.log(np.where(kept > 0, kept, 1) / q), 0)
    unsure = -(p * np.log(p)).sum(-1) > threshold
    return kl(q, p) + weight * unsure * terms.sum(-1)


@functools.wraps(losses.random_sampling_cross_entropy)
def of_draws(
    student: Array, teacher: Array, *, exponent: float = 0.7, temperature: Any = 1.0
) -> Array:
    """The loss with the targets drawn from a dense teacher, always the same draws."""
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(f"{list(jnp.shape(student))} and {list(jnp.shape(teacher))} differ")
    draws = jnp.broadcast_to(jnp.asarray(DRAWS), (*jnp.shape(teacher)[:-1], 3))
    targets = losses.random_sampling_targets(
        jax.lax.stop_gradient(teacher), draws, exponent=exponent
    )
    return losses.random_sampling_cross_entropy(student, targets, temperature=temperature)


def draws(p: np.ndarray, q: np.ndarray, exponent: float) -> np.ndarray:
    proposal = p**exponent / (p**exponent).sum(-1, keepdims=True)
    out = np.zeros(p.shape[:-1])
    for i in np.ndindex(out.shape):
        for v in DRAWS[0, i[1]]:
            out[i] -= p[i][v] / proposal[i][v] / 3 * np.log(q[i][v])
    return out


def accepted(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.minimum(p, q).sum(-1)


def lk_lambda(p: np.ndarray, q: np.ndarray, weight: float) -> np.ndarray:
    return weight * kl(p, q) + (1 - weight) * (1 - accepted(p, q))


def margins(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    apart = [(student[:, 0] - student[:, i]) - (teacher[:, 0] - teacher[:, i]) for i in (1, 2, 3)]
    return np.mean(np.square(apart), axis=0)


def alm(student: np.ndarray, teacher: np.ndarray, temperature: float, eps: float) -> np.ndarray:
    q, p = (np.exp(z / temperature - eps) for z in (student, teacher))
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def alm_limit(student: np.ndarray, teacher: np.ndarray, eps: float) -> np.ndarray:
    x, y = student - eps, teacher - eps
    return y - x + y * np.log(-x) - y * np.log(-y)


def of_policy(fn: Any, oracle: Any, **hyper: Any) -> LossCase:
    return LossCase(
        fn, sampled, counted(oracle), hyper, zero_at_equality=False, nonnegative=False,
        has_where=True, twice_differentiable=False, frozen=True, note=CONSTANT,
    )  # fmt: skip


CASES: dict[str, LossCase] = {
    "sampled_reverse_kl": of_policy(losses.sampled_reverse_kl, reverse),
    "policy_gradient": of_policy(losses.policy_gradient, gradient_of),
    "clipped_policy_gradient": of_policy(
        losses.clipped_policy_gradient, clipped, clip_low=0.2, clip_high=0.3, dual_clip=3.0
    ),
    "kl_k2": LossCase(losses.kl_k2, two, counted(k2), has_where=True),
    "kl_k3": LossCase(losses.kl_k3, two, counted(k3), has_where=True),
    "student_top_k_reverse_kl": LossCase(
        losses.student_top_k_reverse_kl,
        tokens,
        of_probabilities(student_top_k),
        {"k": 3, "temperature": 2.0},
    ),
    "top_k_reverse_kl_sampled_tail": LossCase(
        of_top_k_and_token,
        judged,
        top_k_and_token,
        {"k": 3},
        nonnegative=False,
        where_rank=2,
        twice_differentiable=False,
        frozen=True,
        note=CONSTANT,
    ),
    "entropy_aware_kl": LossCase(
        losses.entropy_aware_kl,
        tokens,
        of_probabilities(entropy_aware),
        {"threshold": 1.0, "weight": 0.5, "temperature": 2.0},
    ),
    "entropy_aware_kl_top_k": LossCase(
        losses.entropy_aware_kl,
        tokens,
        of_probabilities(entropy_aware_k),
        {"threshold": 1.0, "weight": 0.5, "k": 3},
        zero_at_equality=False,
        note="renormalized on k classes, the teacher teaches an empty tail",
    ),
    "random_sampling_cross_entropy": LossCase(
        of_draws,
        tokens,
        of_probabilities(draws),
        {"exponent": 0.7},
        zero_at_equality=False,
        frozen=True,
        note="a cross-entropy; the targets are drawn",
    ),
    "lk_alpha": LossCase(
        losses.lk_alpha,
        tokens,
        of_probabilities(lambda p, q: -np.log(accepted(p, q))),
        twice_differentiable=False,
    ),
    "lk_lambda": LossCase(
        losses.lk_lambda,
        tokens,
        of_probabilities(lk_lambda),
        {"weight": 0.3},
        twice_differentiable=False,
    ),
    "margin_mse": LossCase(losses.margin_mse, ranked, margins),
    "alm": LossCase(losses.alm, two, alm, {"temperature": 100.0, "eps": 1e-6}),
    "alm_limit": LossCase(losses.alm_limit, two, alm_limit, {"eps": 1e-6}),
}
