"""Losses that weigh examples, or reshape the teacher, by a power of its probabilities."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._logits import kd_kl


def ttm(student_logits: Array, teacher_logits: Array, *, gamma: Scalar = 0.1) -> Array:
    """Transformed teacher matching: `KL(softmax(gamma z_T) || softmax(z_S))`.

    Only the teacher is softened (`gamma = 1 / T`): `p^gamma` normalized is `softmax(gamma z)`,
    which does not underflow. Not zero at equality unless gamma is 1. `.mean()` is the authors'
    number.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      gamma: exponent of the teacher's probabilities, > 0; a scalar or one value per example.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or gamma is not positive.
      TypeError: if the logits are not floating point.

    References:
      Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, 2024
      (2402.11148).
    """
    _checks.positive(gamma=gamma)
    student, teacher = _logspace.softened("ttm", student_logits, teacher_logits, 1.0, None)
    return _numerics.kl_from_logits(_numerics.per_example(gamma, teacher) * teacher, student)


def wttm(student_logits: Array, teacher_logits: Array, *, gamma: Scalar = 0.2) -> Array:
    """Weighted TTM: `(sum_c p_T^gamma) KL(softmax(gamma z_T) || softmax(z_S))`.

    The weight, between 1 and `num_classes^(1 - gamma)`, grows with the teacher's smoothness.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      gamma: exponent of the teacher's probabilities, > 0; a scalar or one value per example.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or gamma is not positive.
      TypeError: if the logits are not floating point.

    References:
      Zheng and Yang, 2024 (2402.11148). `.mean()` is the authors' number.
    """
    kl = ttm(student_logits, teacher_logits, gamma=gamma)
    log_p = _numerics.log_softmax(teacher_logits)
    in_p = log_p != -jnp.inf
    power = jnp.where(in_p, log_p, 0) * _numerics.per_example(gamma, log_p)
    return jnp.exp(_logspace.logsumexp(power, where=in_p)) * kl


def wsld_weight(
    student_logits: Array, teacher_logits: Array, labels: Array, *, eps: Scalar = 1e-7
) -> Array:
    """`1 - exp(-CE_S / (CE_T + eps))`: near 1 where the student is worse than the teacher.

    A per-example weight for any soft-label loss; the method takes it as a constant (stop_gradient).

    Args:
      student_logits: `[..., num_classes]`, at temperature 1.
      teacher_logits: the same shape.
      labels: `[...]`, integers.
      eps: keeps the ratio finite where the teacher is certain; the authors' constant.

    Returns:
      `[...]`, in [0, 1].

    Raises:
      ValueError: if shapes do not fit, labels are out of range or eps is not positive.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
      Perspective, 2021 (2102.00650).
    """
    student, teacher = _logspace.softened("wsld_weight", student_logits, teacher_logits, 1, None)
    _checks.labels(labels, student_logits)
    _checks.positive(eps=eps)
    of_student = -_logspace.at(_numerics.log_softmax(student), labels)
    of_teacher = -_logspace.at(_numerics.log_softmax(teacher), labels)
    return -jnp.expm1(-of_student / (of_teacher + _numerics.scalar(eps, of_teacher)))


def wsld(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
) -> Array:
    """Weighted soft labels: `wsld_weight * kd_kl`, the weight a constant (no gradient through it).

    The authors and mmrazor write the cross-entropy form, whose gradient this has: their number is
    `T^2 wsld_weight * soft_cross_entropy`. Weights of this term: 2.25 (T = 4), 2.5 (T = 2).

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integers.
      temperature: softens both; a scalar or one value per example.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or the temperature is not positive.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Zhou et al., 2021 (2102.00650).
    """
    weight = wsld_weight(student_logits, teacher_logits, labels)
    return jax.lax.stop_gradient(weight) * kd_kl(
        student_logits, teacher_logits, temperature=temperature
    )
