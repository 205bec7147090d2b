"""Losses that treat the labelled class and the others apart: DKD and NKD."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def tckd(
    student_logits: Array, teacher_logits: Array, labels: Array, *, temperature: Scalar = 4.0
) -> Array:
    """Target-class KD: `T^2 KL` between `(p_y, 1 - p_y)` of teacher and student.

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
      Zhao et al., Decoupled Knowledge Distillation, 2022 (2203.08679).
    """
    student, teacher, others = _split("tckd", student_logits, teacher_logits, labels, temperature)
    kl = _numerics.kl_from_logits(_two(teacher, labels, others), _two(student, labels, others))
    return jnp.square(_numerics.per_example(temperature, kl)) * kl


def nckd(
    student_logits: Array, teacher_logits: Array, labels: Array, *, temperature: Scalar = 4.0
) -> Array:
    """Non-target KD: `T^2 KL` between the distributions over the classes other than the label.

    0 for two classes.

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
      Zhao et al., 2022 (2203.08679).
    """
    student, teacher, others = _split("nckd", student_logits, teacher_logits, labels, temperature)
    kl = _numerics.kl_from_logits(teacher, student, where=others)
    return jnp.square(_numerics.per_example(temperature, kl)) * kl


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
) -> Array:
    """Decoupled KD: `alpha TCKD + beta NCKD`.

    KD itself is `TCKD + (1 - p_T(y)) NCKD`: it mutes the other classes where the teacher is sure.
    `.mean()` is mdistiller's number (there times `min(epoch / 20, 1)`, beside the cross-entropy).

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integers.
      temperature: softens both; a scalar or one value per example.
      alpha: weight of the target class.
      beta: weight of the others; 8 for CIFAR-100 pairs of one family, 2 to 6 for some, 0.5 (at
        T = 1) for ImageNet.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or the temperature is not positive.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Zhao et al., 2022 (2203.08679). In log space throughout: the authors' code takes the
      log of summed probabilities and overflows on large margins.
    """
    target = tckd(student_logits, teacher_logits, labels, temperature=temperature)
    others = nckd(student_logits, teacher_logits, labels, temperature=temperature)
    alpha, beta = _numerics.per_example(alpha, target), _numerics.per_example(beta, target)
    return alpha * target + beta * others


def nkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 1.0,
    gamma: Scalar = 1.5,
) -> Array:
    """Normalized KD: `-p_T(y) log p_S(y) - gamma T^2 sum_{c != y} q_T(c) log q_S(c)`.

    `q` is the distribution over the classes other than the label, at temperature T; `p` is at
    temperature 1. A cross-entropy on both parts, so not zero at equality.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integers; of a soft label, its argmax.
      temperature: of the non-target part; a scalar or one value per example.
      gamma: weight of the non-target part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or the temperature is not positive.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, 2023 (2303.13005).
      `.mean()` is the number of the authors' code, cross-entropy with the label not included.
    """
    student, teacher, others = _split("nkd", student_logits, teacher_logits, labels, temperature)
    non_target = _logspace.cross_entropy(
        _numerics.log_softmax(teacher, where=others), _numerics.log_softmax(student, where=others)
    )
    target = target_cross_entropy(student_logits, teacher_logits, labels)
    scale = jnp.square(_numerics.per_example(temperature, target))
    return target + _numerics.per_example(gamma, target) * scale * non_target


def target_cross_entropy(student_logits: Array, teacher_logits: Array, labels: Array) -> Array:
    """`-p_T(y) log p_S(y)`: the label's cross-entropy, weighted by the teacher's belief in it.

    The target part of NKD and of WKD-L.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integers.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Yang et al., 2023 (2303.13005).
    """
    student, teacher, _ = _split("target_cross_entropy", student_logits, teacher_logits, labels, 1)
    belief = _logspace.probabilities(_logspace.at(_numerics.log_softmax(teacher), labels))
    return -belief * _logspace.at(_numerics.log_softmax(student), labels)


def _split(
    fn: str, student_logits: Array, teacher_logits: Array, labels: Array, temperature: Scalar
) -> tuple[Array, Array, Array]:
    """Checked, softened logits and the mask of the non-target classes."""
    student, teacher = _logspace.softened(fn, student_logits, teacher_logits, temperature, None)
    _checks.labels(labels, student_logits)
    return student, teacher, ~_logspace.is_label(labels, student.shape[-1])


def _two(logits: Array, labels: Array, others: Array) -> Array:
    """`[..., 2]` logits of (label, all others together)."""
    return jnp.stack(
        [_logspace.at(logits, labels), _logspace.logsumexp(logits, where=others)], axis=-1
    )
