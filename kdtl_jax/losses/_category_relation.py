"""Co-Tuning's relation between target and source classes, and its calibration."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def category_relation(probabilities: Array, labels: Array, *, num_classes: int) -> Array:
    """Row c = mean of the source probabilities over the target samples of class c.

    The direct relation `p(source class | target class)`. For the calibrated one pass
    `softmax(fit_logit_scale(...) * logits)`.

    Args:
      probabilities: `[N, Cs]`, the source head's on target samples, each row summing to 1.
      labels: int `[N]`, target classes.
      num_classes: Ct.

    Returns:
      `[Ct, Cs]`. A class without samples gets the mean over all samples.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if labels are not integers.

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020, direct approach.
    """
    probabilities = _door.one("category_relation", probabilities, at_least=2, at_most=2)
    _checks.labels(labels, jnp.zeros((probabilities.shape[0], num_classes)))
    member = jax.nn.one_hot(labels, num_classes, dtype=probabilities.dtype)
    count = jnp.sum(member, axis=0)[:, None]
    means = member.T @ probabilities / jnp.maximum(count, 1)
    return jnp.where(count > 0, means, jnp.mean(probabilities, axis=0, keepdims=True))


def reverse_relation(conditional: Array, prior: Array) -> Array:
    """`R[c, s] = p(c | s) p(s) / sum_s' p(c | s') p(s')`: the reverse relation, by Bayes' rule.

    Args:
      conditional: `[Cs, Ct]`, `p(target class | source class)`: a classifier trained from source
        probabilities to target labels, evaluated at the one-hot rows.
      prior: `[Cs]`, mean source probabilities over the target samples.

    Returns:
      `[Ct, Cs]`, rows summing to 1; a target class that no source class predicts gets the prior.

    Raises:
      ValueError: if shapes do not fit.

    References:
      You et al., Co-Tuning for Transfer Learning, NeurIPS 2020, reverse approach.
    """
    conditional = _door.one("reverse_relation", conditional, at_least=2, at_most=2)
    prior = _door.one("reverse_relation", prior, at_least=1, at_most=1)
    if prior.shape[0] != conditional.shape[0]:
        raise ValueError(
            "expected conditional [Cs, Ct] and prior [Cs], got "
            f"{_checks.described(conditional=conditional, prior=prior)}."
        )
    prior = prior.astype(conditional.dtype)
    joint = (conditional * prior[:, None]).T
    total = jnp.sum(joint, axis=-1, keepdims=True)
    fallback = (prior / jnp.sum(prior))[None, :]
    return jnp.where(total != 0, joint / jnp.where(total != 0, total, 1), fallback)


def fit_logit_scale(
    logits: Array, labels: Array, *, low: Scalar = 1e-2, high: Scalar = 1e2
) -> Array:
    """The scale s minimizing the cross-entropy of `softmax(s z)`: temperature scaling, T = 1/s.

    The cross-entropy is convex in s, so its derivative is bisected (60 halvings of `log s`).

    Args:
      logits: `[N, C]`, on held-out *source* samples.
      labels: int `[N]`.
      low: smallest scale considered; the result when confidence is worthless.
      high: largest scale considered; the result when every sample is right.

    Returns:
      `[]`.

    Raises:
      ValueError: if shapes do not fit, or labels are out of range.
      TypeError: if labels are not integers.

    References:
      Guo et al., On Calibration of Modern Neural Networks, 2017 (1706.04599).
    """
    logits = _door.one("fit_logit_scale", logits, at_least=2, at_most=2)
    _checks.labels(labels, logits)
    right = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]

    def slope(scale: Array) -> Array:
        p = jnp.exp(_numerics.log_softmax(scale * logits))
        return jnp.mean(jnp.sum(p * logits, axis=-1) - right)

    def body(_: Array, bounds: Array) -> Array:
        middle = jnp.mean(bounds)
        too_sharp = slope(jnp.exp(middle)) > 0
        below, above = bounds[0], bounds[1]
        return jnp.stack([jnp.where(too_sharp, below, middle), jnp.where(too_sharp, middle, above)])

    start = jnp.log(jnp.stack([_numerics.scalar(low, logits), _numerics.scalar(high, logits)]))
    return jnp.exp(jnp.mean(jax.lax.fori_loop(0, 60, body, start)))
