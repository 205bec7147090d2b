"""Losses on pre-activations: what matters is on which side of the ReLU a neuron lies."""

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def _sum(x: Array) -> Array:
    return jnp.sum(_numerics.batch_flat(x), axis=-1)


def partial_l2(student: Array, teacher: Array) -> Array:
    """`sum (s - t)^2 [s > t or t > 0]`: no penalty below a negative teacher response.

    `.mean()` over 1000 is mmrazor's `OFDLoss` at its default; the sum over layers is "be your own
    teacher"'s feature term.

    Args:
      student: `[B, ...]`, before the ReLU.
      teacher: the same shape.

    Returns:
      `[B]`, squared feature units, summed.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019 (1904.01866).
    """
    student, teacher = _door.same_shape("partial_l2", student, teacher)
    low = (student <= teacher) & (teacher <= 0)
    return _sum(jnp.where(low, 0, jnp.square(student - teacher)))


def activation_boundary(student: Array, teacher: Array, *, margin: Scalar = 1.0) -> Array:
    """`sum (s + m)^2 [s > -m, t <= 0] + (s - m)^2 [s <= m, t > 0]`: activation boundaries (AB).

    A squared hinge that puts every student neuron on the teacher's side of 0. RepDistiller sums
    layers with `3/1000 * 2^(i - n + 1) * .mean()` and trains the student with it before the task.

    Args:
      student: `[B, ...]`, before the ReLU.
      teacher: the same shape.
      margin: `m > 0`.

    Returns:
      `[B]`, squared feature units, summed; not 0 at equality (the margin is asked of both).

    Raises:
      ValueError: if shapes differ or are empty, or the margin is not positive.
      TypeError: if an array is not floating point.

    References:
      Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons, 2019 (1811.03233).
    """
    student, teacher = _door.same_shape("activation_boundary", student, teacher)
    _checks.positive(margin=margin)
    m = _numerics.scalar(margin, student)
    short = jnp.where(teacher > 0, m - student, m + student)
    return _sum(_numerics.nan_of(jnp.square(jnp.maximum(short, 0)), teacher))


def ofd(student: Array, teacher: Array, *, margin: Array) -> Array:
    """`sum (s - t')^2 [s > t' or t > 0]`: partial L2 to margin-clipped responses `t' = max(t, m)`.

    `.mean()` is the number of mdistiller's `feat_loss`; the authors add layers with
    `1 / 2^(n - i - 1)` and weight the sum by .001.

    Args:
      student: `[B, ..., C]`, before the ReLU, through 1x1 convolution and batch normalization.
      teacher: the same shape, before the ReLU.
      margin: `[C]`, negative, from `ofd_margin` of the teacher's batch normalization.

    Returns:
      `[B]`, squared feature units, summed. Positive at equality where the teacher is below a
      margin.

    Raises:
      ValueError: if shapes differ or are empty, or the margin is not one value per channel.
      TypeError: if an array is not floating point.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019 (1904.01866).
    """
    student, teacher = _door.same_shape("ofd", student, teacher)
    if jnp.shape(margin) != student.shape[-1:]:
        raise ValueError(
            "margin must have one value per channel, got "
            f"{_checks.described(margin=margin, student=student)}."
        )
    target = jnp.maximum(
        teacher, jnp.broadcast_to(_numerics.scalar(margin, student), teacher.shape)
    )
    low = (student <= target) & (teacher <= 0)
    return _sum(jnp.where(low, 0, jnp.square(student - target)))


def ofd_margin(bn_scale: Array, bn_offset: Array) -> Array:
    """`E[x | x < 0]` of a batch-normalized channel `x ~ N(offset, scale^2)`: OFD's margins.

    `offset - |scale| phi(r) / Phi(-r)` with `r = offset / |scale|`, computed in logarithms; the
    authors' `-3 |scale|` where the channel is below 0 less than once in a thousand.

    Args:
      bn_scale: `[C]`, the scale of the teacher's batch normalization before the ReLU.
      bn_offset: `[C]`, its offset.

    Returns:
      `[C]`, <= 0 wherever the scale is not 0.

    Raises:
      ValueError: if the shapes differ.
      TypeError: if an array is not floating point.

    References:
      Heo et al., A Comprehensive Overhaul of Feature Distillation, 2019 (1904.01866), eq. 4.
    """
    scale, offset = _door.same_shape("ofd_margin", bn_scale, bn_offset, at_least=1, at_most=1)
    sigma = jnp.abs(scale)
    flat = sigma == 0  # a constant channel: its conditional mean is its value, or nothing
    ratio = offset / jnp.where(flat, 1, sigma)
    log_below = log_ndtr(-ratio)
    log_density = -0.5 * jnp.square(ratio) - 0.5 * jnp.log(2 * jnp.asarray(jnp.pi, ratio.dtype))
    often = log_below > jnp.log(jnp.asarray(1e-3, ratio.dtype))
    inside = offset - sigma * jnp.exp(jnp.where(often, log_density - log_below, 0))
    return jnp.where(flat, jnp.minimum(offset, 0), jnp.where(often, inside, -3 * sigma))
