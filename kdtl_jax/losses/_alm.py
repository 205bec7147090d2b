"""Approximate likelihood matching: compare a stretch of text's probability across two tokenizers.

A chunk is a stretch that both tokenizations cut at its ends (`language.align_tokens`); its
log-probability is the sum of its tokens' (`language.chunk_log_probs`). Only chunks are the same
text on both sides, which is why only this binary comparison, the observed chunk against all others,
is exact. Both arguments are log-probabilities <= 0 of the same shape, e.g. `[B, C]`; the result has
that shape, in nats, float32 or wider. Arrays that are not floating point raise TypeError; shapes
and ranges that do not fit raise ValueError.

References:
  Minixhofer, Vulić and Ponti, Cross-Tokenizer Distillation via Approximate Likelihood Matching,
  2025 (2503.20083), and its code, tokenkit.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar


def alm(
    student_log_probs: Array,
    teacher_log_probs: Array,
    *,
    temperature: Scalar = 100.0,
    eps: Scalar = 1e-6,
) -> Array:
    """`KL(Bernoulli(p_T^(1/T)) || Bernoulli(p_S^(1/T)))` of a chunk's probability on both sides.

    `eps` is subtracted from `log p / T` to keep the logarithm finite at probability 1. tokenkit's
    `binary_ce` is this plus the teacher's binary entropy, a constant.

    Args:
      temperature: > 0; a high value compares log-probabilities, 1 compares probabilities.
    """
    student, teacher = _check_log_probs(student_log_probs, teacher_log_probs)
    _checks.positive(temperature=temperature, eps=eps)
    _checks.per_example(student.shape, temperature=temperature)
    t, epsilon = (
        _numerics.per_example(temperature, student, "temperature"),
        _numerics.scalar(eps, student, "eps"),
    )
    log_s, log_t = student / t - epsilon, teacher / t - epsilon
    log_q = jnp.stack([log_s, _numerics.log1mexp(log_s)], axis=-1)
    log_p = jnp.stack([log_t, _numerics.log1mexp(log_t)], axis=-1)
    return jnp.sum(_softmax.kl_terms(log_p, log_q), axis=-1)


def alm_limit(student_log_probs: Array, teacher_log_probs: Array, *, eps: Scalar = 1e-6) -> Array:
    """`T` times `alm` as T grows: `y - x + y log(x / y)`, x the student's log-probability, y the
    teacher's.

    tokenkit's `binary_kl_temp_limit`: a Bregman divergence of log-probabilities.

    Args:
      eps: > 0, subtracted from both.
    """
    student, teacher = _check_log_probs(student_log_probs, teacher_log_probs)
    _checks.positive(eps=eps)
    x, y = (
        student - _numerics.scalar(eps, student, "eps"),
        teacher - _numerics.scalar(eps, teacher, "eps"),
    )
    # The term of a KL between -y and -x. When they are close, r gives the ratio y / x = 1 + r more
    # accurately.
    r = (teacher - student) / x
    is_near = jnp.abs(r) < 0.5
    ratio = jnp.where(is_near, jnp.log1p(jnp.where(is_near, r, 0)), jnp.log(y / x))
    return _softmax.kl_terms(jnp.log(-y), jnp.log(-x), ratio)


def _check_log_probs(student: Array, teacher: Array) -> tuple[Array, Array]:
    _checks.floating(student_log_probs=student, teacher_log_probs=teacher)
    _checks.rank(1, student_log_probs=student)
    _checks.same_shape(student_log_probs=student, teacher_log_probs=teacher)
    _checks.nonempty(student_log_probs=student)
    # Sums of rounded logarithms may come out just above 0.
    return jnp.minimum(_numerics.upcast(student), 0), jnp.minimum(_numerics.upcast(teacher), 0)
