"""Distillation of classifier logits: Hinton's loss and its direct relatives."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._divergences import forward_kl


def kd_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """Hinton's distillation loss `T^2 KL(softmax(z_T / T) || softmax(z_S / T))`.

    The `T^2` keeps the size of the gradient as the temperature grows. `.mean()` gives
    RepDistiller's and mdistiller's number (sum over classes, mean over the batch); divide by
    `num_classes` for Model-Optimizer's default, by `T^2` for TRL's and Liger's convention.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: `T > 0`, a scalar or one value per example.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015 (1503.02531).
    """
    kl = forward_kl(student_logits, teacher_logits, temperature=temperature, where=where)
    return jnp.square(_numerics.per_example(temperature, kl)) * kl


def soft_cross_entropy(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`-sum_c p_T log p_S`: the cross-entropy form, `forward_kl` plus the teacher's entropy.

    Its gradient is the KL's, but it is not zero at equality. `.mean()` gives TextBrewer's
    `kd_ce_loss`; divide by `num_classes` for TinyBERT's prediction loss. With the teacher on both
    sides it is the teacher's entropy.

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
      Hinton, Vinyals and Dean, 2015 (1503.02531).
    """
    student, teacher = _logspace.softened(
        "soft_cross_entropy", student_logits, teacher_logits, temperature, where
    )
    if where is not None:
        teacher = jnp.where(where, teacher, -jnp.inf)
    log_q = _numerics.log_softmax(student, where=where)
    return _logspace.minus_mean_log(_numerics.softmax(teacher), teacher != -jnp.inf, log_q)


def hard_kd(
    student_logits: Array, teacher_logits: Array, *, label_smoothing: Scalar = 0.0
) -> Array:
    """Cross-entropy with the teacher's decision: `-log p_S(argmax z_T)`.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      label_smoothing: share of the target spread over all classes, in [0, 1].

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the smoothing is outside [0, 1].
      TypeError: if the logits are not floating point.

    References:
      Touvron et al., Training data-efficient image transformers & distillation through attention,
      2021 (2012.12877).
    """
    _checks.within(0, 1, label_smoothing=label_smoothing)
    student, teacher = _logspace.softened("hard_kd", student_logits, teacher_logits, 1.0, None)
    log_p = _numerics.log_softmax(student)
    hard = -_logspace.at(log_p, jnp.argmax(teacher, axis=-1))
    hard = _numerics.nan_of(hard, jnp.max(teacher, axis=-1))
    known = _checks.concrete(label_smoothing)
    if known is not None and not known.any():
        return hard
    smoothing = _numerics.per_example(label_smoothing, hard)
    return (1 - smoothing) * hard - smoothing * _logspace.mean_log(log_p)


def logit_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """`mean_c (z_S - z_T)^2`: regression on logits, the `T -> inf` limit of KD on centered logits.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.

    Returns:
      `[...]`, squared logit units. TextBrewer's `kd_mse_loss` divides by `T^2`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if the logits are not floating point.

    References:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014 (1312.6184).
    """
    _checks.floating(student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.rank(1, student_logits=student_logits)
    _checks.nonempty(student_logits=student_logits)
    difference = _numerics.upcast(student_logits) - _numerics.upcast(teacher_logits)
    return jnp.mean(jnp.square(difference), axis=-1)
