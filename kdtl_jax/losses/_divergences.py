"""Divergences between class distributions given by logits.

Every function takes `[..., num_classes]` logits and returns `[...]` nats, in float32 or wider. None
reduces, weights or multiplies by `T^2`. Log-probabilities are logits too, so any of these
compares stored log-probabilities, or the buckets of `top_k_buckets`, as it stands. The
Jensen-Shannon family is in `_jensen_shannon`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._logspace import softened as softened


def forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_T || p_S) = sum_c p_T log(p_T / p_S)` of softened distributions.

    Computed as a sum of non-negative terms, so it is never negative and keeps its relative
    accuracy when the two are close. A class masked on both sides contributes nothing.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example. No `T^2` factor is applied.
      where: bool, the logits' shape; classes that take part. -inf logits do not either.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Kullback and Leibler, On information and sufficiency, 1951. TRL's `GKDTrainer` gives this
      at beta=0, DistiLLM's `forward_kl` the cross-entropy form (`soft_cross_entropy`).
    """
    student, teacher = softened("forward_kl", student_logits, teacher_logits, temperature, where)
    apart = _logspace.softened_difference(teacher_logits, student_logits, temperature)
    return _numerics.kl_from_logits(teacher, student, where=where, difference=apart)


def reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_S || p_T)`: mode seeking, the divergence of on-policy distillation.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example. No `T^2` factor is applied.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023 (2306.08543).
    """
    student, teacher = softened("reverse_kl", student_logits, teacher_logits, temperature, where)
    apart = _logspace.softened_difference(student_logits, teacher_logits, temperature)
    return _numerics.kl_from_logits(student, teacher, where=where, difference=apart)


def symmetric_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    weight: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`(1 - weight) KL(p_T || p_S) + weight KL(p_S || p_T)`.

    Twice this at `weight=0.5` is Jeffreys' divergence. DistiLLM's `symmetric_kl` uses weight 0.9
    and leaves the teacher's entropy in: add `(1 - weight)` times
    `soft_cross_entropy(teacher, teacher)`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      weight: share of the reverse divergence, in [0, 1]; a scalar or `[...]`.
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive, or the weight is
        outside [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Jeffreys, An invariant form for the prior probability in estimation problems, 1946.
    """
    _checks.within(0, 1, weight=weight)
    log_s, log_t, ratio = _logspace.compared(
        "symmetric_kl", student_logits, teacher_logits, temperature, where
    )
    forward = jnp.sum(_numerics.kl_terms(log_t, log_s, ratio), axis=-1)
    reverse = jnp.sum(_numerics.kl_terms(log_s, log_t, -ratio), axis=-1)
    share = _numerics.per_example(weight, forward)
    return (1 - share) * forward + share * reverse


def skew_forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_T || alpha p_T + (1 - alpha) p_S)`: bounded by `-log alpha`.

    DistiLLM's `skewed_forward_kl` is the cross-entropy form: add
    `soft_cross_entropy(teacher, teacher)`, a constant.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      alpha: the teacher's share of the mixture, in [0, 1]; 0 is the forward KL. A scalar or one
        value per example.
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive, or alpha is
        outside [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, 2024
      (2402.03898).
    """
    _checks.within(0, 1, alpha=alpha)
    log_s, log_t, ratio = _logspace.compared(
        "skew_forward_kl", student_logits, teacher_logits, temperature, where
    )
    student_share = 1 - _numerics.per_example(alpha, log_t)
    return _logspace.kl_to_mixture(log_t, log_s, ratio, student_share)


def skew_reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_S || (1 - alpha) p_T + alpha p_S)`: bounded by `-log alpha`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      alpha: the student's share of the mixture, in [0, 1]; 0 is the reverse KL. A scalar or one
        value per example.
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive, or alpha is
        outside [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Ko et al., DistiLLM, 2024 (2402.03898). DistiLLM's `skewed_reverse_kl` is this number.
    """
    _checks.within(0, 1, alpha=alpha)
    log_s, log_t, ratio = _logspace.compared(
        "skew_reverse_kl", student_logits, teacher_logits, temperature, where
    )
    teacher_share = 1 - _numerics.per_example(alpha, log_s)
    return _logspace.kl_to_mixture(log_s, log_t, -ratio, teacher_share)


def total_variation(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`1/2 sum_c |p_S - p_T|`, in [0, 1].

    No `T^2` belongs to it: its gradient does not fall as `1/T^2`. DistillKit multiplies by it all
    the same.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, a probability.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation, 2023
      (2307.15190). DistiLLM's `tv_distance` is this number.
    """
    pair = _logspace.compared("total_variation", student_logits, teacher_logits, temperature, where)
    return jnp.sum(_absolute_gaps(pair), axis=-1) / 2


def adaptive_kl_weight(
    student_logits: Array,
    teacher_logits: Array,
    *,
    mu: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """The share of the reverse KL in adaptive KL: the gap on the teacher's tail, over all of it.

    The head is the most likely class and those within the teacher's first `mu` of mass; the gap is
    `sum |p_T - p_S|`. One half at equality, where both gaps vanish.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      mu: mass of the head, in [0, 1].
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, in [0, 1]: a `weight` for `symmetric_kl`.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive, or mu is outside
        [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language
      Models, 2024 (2404.02657).
    """
    _checks.within(0, 1, mu=mu)
    pair = _logspace.compared(
        "adaptive_kl_weight", student_logits, teacher_logits, temperature, where
    )
    order = jnp.argsort(pair.log_teacher, axis=-1, descending=True)
    mass = jnp.take_along_axis(_logspace.probabilities(pair.log_teacher), order, axis=-1)
    gap = jnp.take_along_axis(_absolute_gaps(pair), order, axis=-1)
    first = jax.lax.broadcasted_iota(jnp.int32, mass.shape, mass.ndim - 1) == 0
    head = first | (jnp.cumsum(mass, axis=-1) <= _numerics.per_example(mu, mass))
    total = jnp.sum(gap, axis=-1)
    some = total != 0
    tail = jnp.sum(jnp.where(head, 0, gap), axis=-1)
    return jnp.where(some, tail / jnp.where(some, total, 1), 0.5)


def adaptive_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    mu: Scalar = 0.5,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`(1 - w) KL(p_T || p_S) + w KL(p_S || p_T)`, `w` the tail's share of the gap.

    Forward KL learns the teacher's head first, reverse KL its tail; each is weighted by how much
    is left to learn there. `w` is a constant of the method: no gradient passes through it.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      mu: mass of the head, in [0, 1].
      temperature: softens both; a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive, or mu is outside
        [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Wu et al., 2024 (2404.02657); `.mean()` is LLM_KD_AKL's number. DSKD sorts ascending, so its
      "head" is the tail: pass its weight to `symmetric_kl` instead.
    """
    weight = adaptive_kl_weight(
        student_logits, teacher_logits, mu=mu, temperature=temperature, where=where
    )
    return symmetric_kl(
        student_logits,
        teacher_logits,
        weight=jax.lax.stop_gradient(weight),
        temperature=temperature,
        where=where,
    )


def _absolute_gaps(pair: _logspace.Pair) -> Array:
    """`|p_T - p_S|`, relatively accurate also where the two nearly agree."""
    p_t, p_s = _logspace.probabilities(pair.log_teacher), _logspace.probabilities(pair.log_student)
    near = (p_t > 0) & (p_s > 0) & (jnp.abs(pair.ratio) < 1)
    close = p_s * jnp.expm1(jnp.where(near, pair.ratio, 0))
    return jnp.abs(jnp.where(near, close, p_t - p_s))
