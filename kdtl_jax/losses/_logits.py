"""Distillation of classifier logits: Hinton's loss and its direct relatives."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
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
    return jnp.square(_numerics.scalar(temperature, kl)) * kl


def logit_mse(student_logits: Array, teacher_logits: Array) -> Array:
    """`mean_c (z_S - z_T)^2`: regression on logits, the `T -> inf` limit of KD on centered logits.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.

    Returns:
      `[...]`, squared logit units.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if the logits are not floating point.

    References:
      Ba and Caruana, Do Deep Nets Really Need to be Deep?, 2014 (1312.6184).
    """
    _checks.floating("logit_mse", student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.same_shape("logit_mse", student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.rank("logit_mse", 1, student_logits=student_logits)
    _checks.nonempty("logit_mse", student_logits=student_logits)
    difference = _numerics.upcast(student_logits) - _numerics.upcast(teacher_logits)
    return jnp.mean(jnp.square(difference), axis=-1)
