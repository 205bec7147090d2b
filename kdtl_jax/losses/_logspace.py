"""Log-space pieces shared by the losses on distributions: pairs, mixtures, cross-entropies.

All work over the last axis. A class outside a distribution's support has log-probability -inf;
every guard is a double `where`, which keeps values and gradients finite.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar


class LogPair(NamedTuple):
    """Both log-distributions `[..., num_classes]` and `log_teacher - log_student`.

    The difference is kept too because it can be computed more accurately from the logits.
    """

    log_student: Array
    log_teacher: Array
    ratio: Array


def soften(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Scalar = 1.0,
    where: Array | None = None,
    **per_example: Scalar,
) -> tuple[Array, Array]:
    """Checks the arguments of a logit loss and returns `(z_S / T, z_T / T)`, float32 or wider.

    Logits and results are `[..., num_classes]`; `where` is bool of that shape. `per_example` holds
    further hyper-parameters, each a scalar or one value per example. Errors are those of
    `forward_kl`.
    """
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    _checks.floating(**logits)
    _checks.same_shape(**logits)
    _check_classes("student_logits", student_logits, temperature, per_example)
    _checks.mask(where, jnp.shape(student_logits))
    student, teacher = _numerics.upcast(student_logits), _numerics.upcast(teacher_logits)
    dtype = np.promote_types(student.dtype, teacher.dtype)  # one float64 side widens the other
    student, teacher = student.astype(dtype), teacher.astype(dtype)
    return (
        student / _numerics.per_example(temperature, student, "temperature"),
        teacher / _numerics.per_example(temperature, teacher, "temperature"),
    )


def soften_teacher(
    teacher_logits: Array, temperature: Scalar = 1.0, **per_example: Scalar
) -> Array:
    """The teacher's side of `soften` alone, `[..., num_classes]`, with the same errors."""
    _checks.floating(teacher_logits=teacher_logits)
    _check_classes("teacher_logits", teacher_logits, temperature, per_example)
    teacher = _numerics.upcast(teacher_logits)
    return teacher / _numerics.per_example(temperature, teacher, "temperature")


def _check_classes(
    name: str, logits: Array, temperature: Scalar, per_example: Mapping[str, Scalar]
) -> None:
    _checks.rank(1, None, **{name: logits})
    _checks.nonempty(**{name: logits})
    _checks.several_classes(**{name: logits})
    _checks.positive(temperature=temperature)
    _checks.per_example(jnp.shape(logits)[:-1], temperature=temperature, **per_example)


def softened_difference(p_logits: Array, q_logits: Array, temperature: Scalar) -> Array:
    """`(z_p - z_q) / T`, `[..., num_classes]`: exact where the two are close.

    Unlike `z_p / T - z_q / T`, in which each side is rounded first.
    """
    difference = _softmax.masked_difference(_numerics.upcast(p_logits), _numerics.upcast(q_logits))
    return difference / _numerics.per_example(temperature, difference, "temperature")


def compare(
    student_logits: Array,
    teacher_logits: Array,
    temperature: Scalar,
    where: Array | None,
    **per_example: Scalar,
) -> LogPair:
    """`log softmax(z / T)` of both sides, `[..., num_classes]`, and their difference.

    A class that `where` (bool, the same shape) excludes has -inf on both sides. Raises the same
    errors as `soften`.
    """
    student, teacher = soften(student_logits, teacher_logits, temperature, where, **per_example)
    if where is not None:
        student, teacher = (jnp.where(where, z, -jnp.inf) for z in (student, teacher))
    log_student, log_teacher = _softmax.log_softmax(student), _softmax.log_softmax(teacher)
    difference = softened_difference(teacher_logits, student_logits, temperature)
    ratio = _softmax.log_ratio(teacher, student, difference)
    return LogPair(log_student, log_teacher, ratio)


def logsumexp(x: Array, *, where: Array | None = None, axis: int = -1) -> Array:
    """`log sum_i exp(x_i)` over one axis, in the dtype of x; -inf, with gradient 0, over nothing.

    An entry of -inf is absent; `where`, bool, broadcasts to x and marks the entries to include.
    """
    present = x != -jnp.inf
    if where is not None:
        present &= where
    low = jnp.finfo(x.dtype).min
    top = jax.lax.stop_gradient(jnp.max(jnp.where(present, x, low), axis=axis, keepdims=True))
    shifted = jnp.where(present, x - jnp.where(present, top, 0), 0)
    total = jnp.sum(jnp.where(present, jnp.exp(shifted), 0), axis=axis)
    has_any = total != 0
    return jnp.where(
        has_any, jnp.log(jnp.where(has_any, total, 1)) + jnp.squeeze(top, axis), -jnp.inf
    )


def cross_entropy(log_p: Array, log_q: Array) -> Array:
    """`-sum p log q` over the last axis, with `0 log 0 = 0`; +inf if q lacks a class of p."""
    return minus_mean_log(jnp.exp(log_p), log_p != -jnp.inf, log_q)


def minus_mean_log(p: Array, present: Array, log_q: Array) -> Array:
    """`cross_entropy` of probabilities `p`; `present`, bool, marks the classes that they include.

    All `[..., num_classes]`; `[...]`, nats.
    """
    in_q = log_q != -jnp.inf
    terms = p * jnp.where(in_q, log_q, 0)
    return -jnp.sum(jnp.where(present & ~in_q, -jnp.inf, terms), axis=-1)


def mean_log(log_p: Array) -> Array:
    """The mean of `log p` over the classes that are present: minus the uniform cross-entropy.

    `[..., num_classes]` log-probabilities, -inf of an absent class; `[...]`, nats.
    """
    present = log_p != -jnp.inf
    return _numerics.masked_mean(jnp.where(present, log_p, 0), present, axis=-1)


def log_mixture(log_p: Array, log_q: Array, weight: Array) -> Array:
    """`log((1 - weight) p + weight q)`, valid at weights 0 and 1 too.

    `[..., num_classes]` log-probabilities of both sides and of the result; the weight broadcasts
    to them. It enters linearly, not through its logarithm, so that the derivative with respect to
    it is correct at both ends too.
    """
    has_p, has_q = ~(weight >= 1), ~(weight <= 0)
    in_p, in_q = log_p != -jnp.inf, log_q != -jnp.inf
    is_present = (in_p & has_p) | (in_q & has_q)
    low = jnp.finfo(log_p.dtype).min
    p, q = jnp.where(in_p, log_p, 0), jnp.where(in_q, log_q, 0)
    share_p = jnp.log1p(-jnp.where(has_p, weight, 0))
    share_q = jnp.log(jnp.where(has_q, weight, 1))
    top = jnp.maximum(
        jnp.where(in_p & has_p, p + share_p, low), jnp.where(in_q & has_q, q + share_q, low)
    )
    top = jax.lax.stop_gradient(jnp.where(is_present, top, 0))
    # Only a side with weight 0 can exceed the bound.
    bound = 0.99 * math.log(float(jnp.finfo(log_p.dtype).max))
    p = jnp.where(in_p, jnp.exp(jnp.minimum(p - top, bound)), 0)
    q = jnp.where(in_q, jnp.exp(jnp.minimum(q - top, bound)), 0)
    total = (1 - weight) * p + weight * q
    return jnp.where(is_present, jnp.log(jnp.where(is_present, total, 1)) + top, -jnp.inf)


def ratio_to_mixture(log_p: Array, log_q: Array, ratio: Array, weight: Array) -> Array:
    """`log p - log((1 - weight) p + weight q)`, relatively accurate where p and q nearly agree.

    With `d = log p - log q` (`ratio`) it is `-log1p(weight expm1(-d))`. All `[..., num_classes]`;
    the weight broadcasts to them.
    """
    log_m = log_mixture(log_p, log_q, weight)
    in_p, in_q, in_m = log_p != -jnp.inf, log_q != -jnp.inf, log_m != -jnp.inf
    is_near = in_p & in_q & (jnp.abs(ratio) < 1)
    near_value = -jnp.log1p(weight * jnp.expm1(jnp.where(is_near, -ratio, 0)))
    usable = in_p & in_m
    far_value = jnp.where(usable, log_p, 0) - jnp.where(usable, log_m, 0)
    return jnp.where(is_near, near_value, far_value)


def kl_to_mixture(log_p: Array, log_q: Array, ratio: Array, weight: Array) -> Array:
    """`KL(p || (1 - weight) p + weight q)` over the last axis, as a sum of terms >= 0.

    Arguments are those of `ratio_to_mixture`; `[...]`, nats.
    """
    log_m = log_mixture(log_p, log_q, weight)
    to_mixture = ratio_to_mixture(log_p, log_q, ratio, weight)
    return jnp.sum(_softmax.kl_terms(log_p, log_m, to_mixture), axis=-1)


def at_label(values: Array, labels: Array) -> Array:
    """`values[..., labels]`: one entry of the last axis per row."""
    return jnp.squeeze(jnp.take_along_axis(values, labels[..., None], axis=-1), axis=-1)


def columns(values: Array, ids: Array) -> Array:
    """`values[..., ids]`, `[..., n]`; NaN, with gradient 0, for an id outside the last axis."""
    safe, usable = _numerics.usable_labels(ids, jnp.shape(values)[-1])
    entries = jnp.take(values, safe, axis=-1)
    return _numerics.at_usable(entries, jnp.broadcast_to(usable, entries.shape))


def is_label(labels: Array, num_classes: int) -> Array:
    """bool `[..., num_classes]`, true at the label."""
    return labels[..., None] == jax.lax.broadcasted_iota(
        labels.dtype, labels.shape + (num_classes,), labels.ndim
    )
