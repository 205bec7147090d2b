"""Temperatures and weights that change: by schedule, per example, or learned against the student.

Every loss takes its temperature as an array, so a schedule is any function of the step, optax's
among them, and nothing recompiles:

    >>> import optax
    >>> from kdtl_jax import losses
    >>> cooling = optax.linear_schedule(8.0, 1.0, 1000)
    >>> def terms(inputs):
    ...     student, teacher = inputs.student["logits"], inputs.teacher["logits"]
    ...     return {"kd": losses.kd_kl(student, teacher, temperature=cooling(inputs.step))}
    >>> weights = {"kd": optax.linear_schedule(0.0, 1.0, 100)}  # a weight may be a schedule itself

The step lives in the state, so a resumed run continues its schedules. The learned temperature of
CTKD is a parameter beside the student's (`params["connectors"]`), reached in terms through
`inputs.params`; its gradient is reversed, so that the optimizer which minimizes the loss for the
student maximizes it over the temperature.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar, Schedule


def reverse_gradient(x: Array, scale: Scalar = 1.0) -> Array:
    """`x`, whose gradient is multiplied by `-scale`.

    Args:
      x: any floating point array.
      scale: the strength of the reversal, possibly traced; 0 stops the gradient.

    Returns:
      `x`, unchanged to the bit.

    Raises:
      TypeError: if x is not floating point.

    References:
      Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, 2015 (1409.7495).
    """
    _checks.floating(x=x)
    fixed = jax.lax.stop_gradient(x)
    # x - fixed is exactly 0 and carries the gradient: works in forward mode too, and twice.
    return fixed - _numerics.per_example(scale, x) * (x - fixed)


def temperature_init() -> Array:
    """The learned temperature's parameter: 1, which `learned_temperature` maps to about 15.6."""
    return jnp.ones((), jnp.float32)


def learned_temperature(
    parameter: Array, *, start: Scalar = 1.0, span: Scalar = 20.0, reversal: Scalar = 1.0
) -> Array:
    """CTKD: `T = start + span * sigmoid(g)`, with the gradient by `g` reversed.

    Use it as the temperature of `losses.kd_kl` or any other loss:

        temperature = learned_temperature(inputs.params["connectors"]["temperature"],
                                          reversal=ramp(inputs.step))

    Args:
      parameter: `g`, a scalar or `[B]` (the instance-wise variant's network output).
      start: the lowest temperature.
      span: the range above it; the published code calls it `t_end`.
      reversal: strength of the reversal, usually `adversarial_ramp(steps)(step)`.

    Returns:
      The temperature, in `(start, start + span)`, of the parameter's shape.

    Raises:
      ValueError: if start or span is not positive.
      TypeError: if the parameter is not floating point.

    References:
      Li et al., Curriculum Temperature for Knowledge Distillation, 2022 (2211.16231). The
      published code's initial g = 1 gives 15.62.
    """
    _checks.floating(parameter=parameter)
    _checks.positive(start=start, span=span)
    g = reverse_gradient(_numerics.upcast(parameter), reversal)
    return _numerics.scalar(start, g) + _numerics.scalar(span, g) * jax.nn.sigmoid(g)


def adversarial_ramp(steps: int, *, strength: float = 1.0) -> Schedule:
    """`strength (1 - cos(pi t / steps)) / 2`, then constant: CTKD's curriculum of the reversal.

    Args:
      steps: length of the ramp; the paper's is 10 epochs.
      strength: the value it reaches.

    Raises:
      ValueError: if steps is not positive.
    """
    _checks.positive(steps=steps)

    def ramp(step: Array) -> Array:
        done = jnp.clip(jnp.asarray(step).astype(jnp.float32) / steps, 0, 1)
        return strength * (1 - jnp.cos(jnp.pi * done)) / 2

    return ramp
