"""Temperatures, scheduled or learned adversarially to the student, and calibration.

Every loss takes its temperature as an array, so a schedule can be any function of the step,
including optax's, and nothing recompiles:

    >>> import optax
    >>> from kdtl_jax import losses
    >>> cooling = optax.linear_schedule(8.0, 1.0, 1000)
    >>> def terms(inputs):
    ...     student, teacher = inputs.student["logits"], inputs.teacher["logits"]
    ...     return {"kd": losses.kd_kl(student, teacher, temperature=cooling(inputs.step))}
    >>> weights = {"kd": optax.linear_schedule(0.0, 1.0, 100)}  # a weight may be a schedule itself

The step is part of the state, so a resumed run continues its schedules. The learned temperature of
CTKD is an extra parameter, among the connectors (`inputs.connectors`); its gradient is reversed, so
the optimizer that minimizes the loss for the student maximizes it over the temperature.

ValueError: shapes do not fit, or a number or label is out of its range. TypeError: an array is not
floating point, or labels are not integers.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar, Schedule


def reverse_gradient(x: Array, scale: Scalar = 1.0) -> Array:
    """`x`, bit-identical, with its gradient multiplied by `-scale`.

    Args:
      x: any floating point array.
      scale: the strength of the reversal, possibly traced; 0 stops the gradient.

    References:
      Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, 2015 (1409.7495).
    """
    _checks.floating(x=x)
    _checks.finite(scale=scale)
    constant = jax.lax.stop_gradient(x)
    # x - fixed is exactly 0 and carries the gradient; this works in forward mode too, and twice.
    return constant - _numerics.per_example(scale, x, "scale") * (x - constant)


def temperature_init() -> Array:
    """The learned temperature's parameter, `[]`: 1; `learned_temperature` maps to about 15.6."""
    return jnp.ones((), jnp.float32)


def learned_temperature(
    parameter: Array, *, start: Scalar = 1.0, span: Scalar = 20.0, reversal: Scalar = 1.0
) -> Array:
    """CTKD: `T = start + span * sigmoid(g)`, with a reversed gradient for `g`.

    Use it as the temperature of `losses.kd_kl` or any other loss:

        temperature = learned_temperature(inputs.connectors["temperature"],
                                          reversal=ramp(inputs.step))

    Args:
      parameter: `g`, a scalar or `[B]` (the instance-wise variant's network output).
      start: the lowest temperature, > 0.
      span: the range above it, > 0; the published code calls it `t_end`.
      reversal: strength of the reversal, usually `adversarial_ramp(steps)(step)`.

    Returns:
      The temperature, in `(start, start + span)`, of the parameter's shape.

    References:
      Li et al., Curriculum Temperature for Knowledge Distillation, 2022 (2211.16231). The
      published code's initial g = 1 gives 15.62.
    """
    _checks.floating(parameter=parameter)
    _checks.positive(start=start, span=span)
    _checks.scalar(reversal=reversal)
    _checks.finite(reversal=reversal)
    g = reverse_gradient(_numerics.upcast(parameter), reversal)
    return _numerics.scalar(start, g, "start") + _numerics.scalar(span, g, "span") * jax.nn.sigmoid(
        g
    )


def adversarial_ramp(steps: int, *, strength: float = 1.0) -> Schedule:
    """`strength (1 - cos(pi t / steps)) / 2`, then constant: CTKD's curriculum for the reversal.

    Args:
      steps: length of the ramp; the paper's is 10 epochs.
      strength: the value it reaches.
    """
    _checks.scalar(strength=strength)
    _checks.finite(strength=strength)
    _checks.count(1, steps=steps)

    decay = optax.cosine_decay_schedule(strength, steps)
    return lambda step: jnp.asarray(strength - decay(jnp.asarray(step).astype(jnp.float32)))


def fit_logit_scale(
    logits: Array,
    labels: Array,
    *,
    low: Scalar = 1e-2,
    high: Scalar = 1e2,
    where: Array | None = None,
) -> Array:
    """The scale s that minimizes the cross-entropy of `softmax(s z)`: temperature scaling, T = 1/s.

    The cross-entropy is convex in s, so s is found by bisecting its derivative (60 halvings of
    `log s`).

    Args:
      logits: `[N, C]`, on held-out *source* samples, with int `[N]` labels; `where`, bool `[N]`,
        marks the samples to include.
      low: smallest scale considered; the result if confidence is uninformative.
      high: largest scale considered; the result if every sample is correct.

    Returns:
      `[]`; NaN if a logit is NaN, a traced label is out of range, or no sample is included.

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017 (1706.04599).
    """
    _checks.floating(logits=logits)
    _checks.rank(2, 2, logits=logits)
    _checks.nonempty(logits=logits)
    _checks.several_classes(logits=logits)
    _checks.scalar(low=low, high=high)
    _checks.positive(low=low, high=high)
    _checks.ordered(low=low, high=high)
    _checks.labels(labels, logits, where)
    logits = _numerics.kept(_numerics.upcast(logits), where)
    labels, usable = _numerics.usable_labels(labels, logits.shape[1], where)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    def slope(scale: Array) -> Array:
        p = jnp.exp(_softmax.log_softmax(scale * logits))
        expected = jnp.sum(p * jnp.where(logits == -jnp.inf, 0, logits), axis=-1)
        return _numerics.masked_mean(expected - label_logits, where)

    def body(_: Array, bounds: Array) -> Array:
        middle = jnp.mean(bounds)
        too_sharp = slope(jnp.exp(middle)) > 0
        lower, upper = bounds[0], bounds[1]
        return jnp.stack([jnp.where(too_sharp, lower, middle), jnp.where(too_sharp, middle, upper)])

    start = jnp.log(
        jnp.stack([_numerics.scalar(low, logits, "low"), _numerics.scalar(high, logits, "high")])
    )
    scale = jnp.exp(jnp.mean(jax.lax.fori_loop(0, 60, body, start)))
    included = jnp.ones_like(usable) if where is None else where
    is_defined = jnp.all(usable == included) & jnp.any(included) & ~jnp.isnan(slope(scale))
    return jnp.where(is_defined, scale, jnp.nan)
