"""Learning the teacher's order of its most likely classes: hinge and logistic ranking."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._topk import TopK, _student


def hinge_ranking(
    student_logits: Array,
    targets: TopK,
    *,
    margin: Scalar | None = None,
    eps: Scalar = 1e-8,
) -> Array:
    """Mean over ordered pairs `p_T(k) > p_T(l) + eps` of `max(0, margin - (p_S(k) - p_S(l)))`.

    Args:
      student_logits: `[..., num_classes]`.
      targets: the teacher's k classes (`top_k_targets`); pairs are taken among them, k^2 of them.
      margin: by how much the better class must lead; by default as much as the teacher has it,
        `p_T(k) - p_T(l)`.
      eps: pairs closer than this, and classes below it, do not count.

    Returns:
      `[...]`, a probability; 0 where no pair counts.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if arrays have the wrong kind of dtype.

    References:
      DistillKit's `sparse_hinge_loss`, which divides by the number of pairs of all positions.
    """
    p_s = _logspace.probabilities(_student("hinge_ranking", student_logits, targets, 1.0))
    chosen = jnp.take_along_axis(p_s, targets.indices, axis=-1)
    p_t = _logspace.probabilities(_numerics.upcast(targets.log_probs))
    lead = _gaps(p_t) if margin is None else _numerics.scalar(margin, p_t)
    mean = _numerics.masked_mean(
        jax.nn.relu(lead - _gaps(chosen)), _ordered(p_t, eps), axis=(-2, -1)
    )
    return _numerics.nan_of(mean, jnp.sum(p_t, axis=-1))


def logistic_ranking(student_logits: Array, targets: TopK, *, eps: Scalar = 1e-9) -> Array:
    """Mean over ordered pairs `p_T(k) > p_T(l) + eps` of `log(1 + exp(-(z_S(k) - z_S(l))))`.

    Args:
      student_logits: `[..., num_classes]`.
      targets: the teacher's k classes (`top_k_targets`); pairs are taken among them, k^2 of them.
      eps: pairs closer than this, and classes below it, do not count.

    Returns:
      `[...]`, nats; 0 where no pair counts. Not zero at equality.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if arrays have the wrong kind of dtype.

    References:
      Burges et al., Learning to Rank using Gradient Descent, 2005. DistillKit's
      `sparse_logistic_ranking_loss` divides by the number of pairs of all positions.
    """
    log_q = _student("logistic_ranking", student_logits, targets, 1.0)
    chosen = jnp.take_along_axis(log_q, targets.indices, axis=-1)
    present = chosen != -jnp.inf
    p_t = _logspace.probabilities(_numerics.upcast(targets.log_probs))
    # A class masked to -inf for the student cannot be ranked.
    counted = _ordered(p_t, eps) & present[..., :, None] & present[..., None, :]
    gap = _gaps(jnp.where(present, chosen, 0))
    mean = _numerics.masked_mean(jax.nn.softplus(-gap), counted, axis=(-2, -1))
    return _numerics.nan_of(mean, jnp.sum(p_t, axis=-1))


def _gaps(x: Array) -> Array:
    """`x_k - x_l`, `[..., k, l]`."""
    return x[..., :, None] - x[..., None, :]


def _ordered(p: Array, eps: Scalar) -> Array:
    small = _numerics.scalar(eps, p)
    some = p > small
    return (_gaps(p) > small) & some[..., :, None] & some[..., None, :]
