"""Regression losses per example, where optax's are per element."""

import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar


def mse(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`mean (s - t)^2` over all but the batch dimension.

    Args:
      student: `[B, ...]`, predictions.
      teacher: the same shape; targets, or a teacher's predictions.
      where: bool, the same shape; elements that take part.

    Returns:
      `[B]`; 0 for an example without elements that take part.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.
    """
    return _mean(jnp.square(_difference("mse", student, teacher, where)), where)


def huber(
    student: Array, teacher: Array, *, delta: Scalar = 1.0, where: Array | None = None
) -> Array:
    """Mean over all but the batch of `d^2 / 2` where `|d| <= delta`, else `delta (|d| - delta/2)`.

    Args:
      student: `[B, ...]`, predictions.
      teacher: the same shape; targets, or a teacher's predictions.
      delta: where the square turns into a line, > 0. Torch's smooth L1 is this over delta.
      where: bool, the same shape; elements that take part.

    Returns:
      `[B]`; 0 for an example without elements that take part.

    Raises:
      ValueError: if shapes differ or are empty, or delta is not positive.
      TypeError: if an array is not floating point.

    References:
      Huber, Robust Estimation of a Location Parameter, 1964.
    """
    _checks.positive(delta=delta)
    difference = _difference("huber", student, teacher, where)
    return _mean(
        optax.losses.huber_loss(difference, delta=_numerics.scalar(delta, difference)), where
    )


def _difference(fn: str, student: Array, teacher: Array, where: Array | None) -> Array:
    _checks.floating(student=student, teacher=teacher)
    _checks.same_shape(student=student, teacher=teacher)
    _checks.rank(1, student=student)
    _checks.nonempty(student=student)
    _checks.mask(where, student.shape)
    student, teacher = _numerics.upcast(student), _numerics.upcast(teacher)
    if where is not None:
        student, teacher = jnp.where(where, student, 0), jnp.where(where, teacher, 0)
    return student - teacher


def _mean(values: Array, where: Array | None) -> Array:
    flat = _numerics.batch_flat(values)
    return _numerics.masked_mean(
        flat, where if where is None else _numerics.batch_flat(where), axis=1
    )
