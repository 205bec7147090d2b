"""Optimal transport between class distributions: WKD-L, with Sinkhorn in log space."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._decoupled import target_cross_entropy


def sinkhorn_cost(
    student_log_probs: Array,
    teacher_log_probs: Array,
    cost: Array,
    *,
    regularization: Scalar = 0.05,
    iterations: int = 10,
    eps: Scalar = 0.0,
) -> Array:
    """`sum_ij F_ij cost_ij` of the entropic transport plan F from student to teacher.

    Alternating scalings of `exp(-cost / regularization)`, all in log space, so that no kernel entry
    underflows however small the regularization. The gradient runs through the iterations, which are
    recomputed in the backward pass. Absent classes (-inf) take no part.

    Args:
      student_log_probs: `[..., num_classes]`, normalized.
      teacher_log_probs: the same shape.
      cost: `[num_classes, num_classes]`, >= 0; `cost[i, j]` moves student class i to
        teacher class j.
      regularization: of the entropy, > 0.
      iterations: of the pair of scalings.
      eps: added to the denominators of the scalings; 1e-8 in the authors' code, unnecessary here.

    Returns:
      `[...]`, units of the cost; at finite regularization not zero at equality.

    Raises:
      ValueError: if shapes do not fit, the regularization is not positive or iterations below 1.
      TypeError: if an array is not floating point.

    References:
      Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport, 2013 (1306.0895).
    """
    fn = "sinkhorn_cost"
    _checks.floating(cost=cost)
    log_a, log_b = _logspace.softened(fn, student_log_probs, teacher_log_probs, 1.0, None)
    _checks.positive(regularization=regularization, iterations=iterations)
    classes = log_a.shape[-1]
    if jnp.shape(cost) != (classes, classes):
        raise ValueError(
            f"cost must be [{classes}, {classes}] for "
            f"{_checks.described(student_log_probs=student_log_probs, cost=cost)}."
        )
    cost = cost.astype(log_a.dtype)
    cost = cost.reshape((1,) * (log_a.ndim - 1) + cost.shape)
    log_kernel = -cost / _numerics.scalar(regularization, cost)
    floor = _numerics.scalar(eps, cost)
    floor = jnp.where(floor > 0, jnp.log(jnp.where(floor > 0, floor, 1)), -jnp.inf)

    def scaled(log_mass: Array, log_other: Array, axis: int) -> Array:
        """`log(mass / (kernel @ other + eps))`, -inf where there is no mass."""
        others = jnp.expand_dims(log_other, -1 if axis == -2 else -2)
        reached = _logspace.logsumexp(_plus(log_kernel, others), axis=axis)
        reached = _logspace.logsumexp(
            jnp.stack([reached, jnp.broadcast_to(floor, reached.shape)], axis=-1)
        )
        inside = (log_mass != -jnp.inf) & (reached != -jnp.inf)
        return jnp.where(
            inside, jnp.where(inside, log_mass, 0) - jnp.where(inside, reached, 0), -jnp.inf
        )

    @jax.checkpoint
    def iterate(log_u: Array, _: None) -> tuple[Array, Array]:
        log_v = scaled(log_b, log_u, -2)
        return scaled(log_a, log_v, -1), log_v

    present = log_a != -jnp.inf
    count = jnp.sum(present, axis=-1, keepdims=True, dtype=log_a.dtype)
    log_u = jnp.where(present, -jnp.log(jnp.maximum(count, 1)), -jnp.inf)
    log_u, log_vs = jax.lax.scan(iterate, log_u, length=iterations)
    plan = _plus(_plus(log_kernel, log_u[..., :, None]), log_vs[-1][..., None, :])
    return jnp.sum(_logspace.probabilities(plan) * cost, axis=(-2, -1))


def wkd_logit(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    cost: Array,
    *,
    gamma: Scalar = 25.0,
    temperature: Scalar = 2.0,
    regularization: Scalar = 0.05,
    iterations: int = 10,
    eps: Scalar = 0.0,
) -> Array:
    """WKD-L: `-p_T(y) log p_S(y) + gamma W(q_S, q_T)`, `q` over the classes other than the label.

    Transport knows that some classes are close: mass on a related class costs less. The cost is
    commonly `1 - exp(-kappa (1 - similarity))` of class weights or features.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      labels: `[...]`, integers.
      cost: `[num_classes, num_classes]`, >= 0.
      gamma: weight of the transport term.
      temperature: of the transport term; a scalar or one value per example.
      regularization: see `sinkhorn_cost`.
      iterations: see `sinkhorn_cost`.
      eps: see `sinkhorn_cost`.

    Returns:
      `[...]`; not zero at equality (a cross-entropy, and an entropic plan).

    Raises:
      ValueError: if shapes do not fit, labels are out of range or a hyper-parameter is.
      TypeError: if the logits or the cost are not floating point or the labels not integers.

    References:
      Lv, Yang and Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, 2024 (2412.08139). `.mean()` with cost `relu(M) + 1e-8` and `eps=1e-8` is the
      authors' number.
    """
    target = target_cross_entropy(student_logits, teacher_logits, labels)
    student, teacher = _logspace.softened(
        "wkd_logit", student_logits, teacher_logits, temperature, None
    )
    others = ~_logspace.is_label(labels, student.shape[-1])
    moved = sinkhorn_cost(
        _numerics.log_softmax(student, where=others),
        _numerics.log_softmax(teacher, where=others),
        cost,
        regularization=regularization,
        iterations=iterations,
        eps=eps,
    )
    return target + _numerics.per_example(gamma, moved) * moved


def _plus(x: Array, y: Array) -> Array:
    """`x + y` broadcast over equal ranks; -inf, with gradient 0, where either is."""
    finite = (x != -jnp.inf) & (y != -jnp.inf)
    return jnp.where(
        finite, jnp.where(x != -jnp.inf, x, 0) + jnp.where(y != -jnp.inf, y, 0), -jnp.inf
    )
