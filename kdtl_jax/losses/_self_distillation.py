"""Self-distillation without a teacher network: USKD's customized soft labels."""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def zipf_targets(scores: Array, labels: Array) -> Array:
    """Log-probabilities proportional to `1 / rank` over the classes other than the labels.

    Ranks count all classes, the labels too, from 1 for the largest score; ties go to the lower
    index.

    Args:
      scores: `[..., num_classes]`, what the classes are ranked by.
      labels: `[...]` integers, or `[..., k]` of several labels per example.

    Returns:
      `[..., num_classes]` log-probabilities, -inf at the labels. Constant in the scores.

    Raises:
      ValueError: if shapes do not fit, or a concrete label is out of range.
      TypeError: if the scores are not floating point or the labels not integers.

    References:
      Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, 2023 (2303.13005).
    """
    _checks.floating(scores=scores)
    _checks.rank(1, scores=scores)
    _checks.indices(scores.shape[-1], labels=labels)
    leading = jnp.shape(labels)[: scores.ndim - 1]
    if leading != scores.shape[:-1] or labels.ndim > scores.ndim:
        raise ValueError(
            "labels must be [...] or [..., k] for scores [..., num_classes], got "
            f"{_checks.described(labels=labels, scores=scores)}."
        )
    scores = _numerics.upcast(scores)
    several = labels if labels.ndim == scores.ndim else labels[..., None]
    is_label = jnp.any(_logspace.is_label(several, scores.shape[-1]), axis=-2)
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    ranks = jnp.argsort(order, axis=-1).astype(scores.dtype) + 1
    return _numerics.log_softmax(-jnp.log(ranks), where=~is_label)


def uskd(
    student_logits: Array,
    weak_logits: Array,
    labels: Array,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.1,
    mu: Scalar = 0.005,
    label_smoothing: Scalar = 0.1,
) -> Array:
    """USKD: `alpha target + beta non-target + mu weak`, teacherless distillation.

    - target: `-w log p(y)`, `w = p(y)^2 + 1 - mean_b p(y)^2`, a constant;
    - non-target: cross-entropy, over the classes other than the label, with Zipf weights by the
      rank of the mean of both heads' normalized non-target probabilities;
    - weak: cross-entropy of the weak head (a linear layer on an early feature) with the smoothed
      label.

    Args:
      student_logits: `[batch, num_classes]`.
      weak_logits: the same shape; of the weak head, trained by the third term alone.
      labels: `[batch]`, integers.
      alpha: weight of the target class.
      beta: weight of the other classes.
      mu: weight of the weak head.
      label_smoothing: of the weak head's target.

    Returns:
      `[batch]`. Depends on the batch through the mean in `w`.

    Raises:
      ValueError: if shapes do not fit, labels are out of range or the smoothing is outside [0, 1].
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Yang et al., 2023 (2303.13005). The authors' code ranks by probabilities of the weak head plus
      *log*-probabilities of the student, each divided by its own "rest": compose `zipf_targets`
      with that score to get its number.
    """
    student, weak = _logspace.softened("uskd", student_logits, weak_logits, 1.0, None)
    _checks.rank(2, 2, student_logits=student_logits)
    _checks.labels(labels, student_logits)
    _checks.within(0, 1, label_smoothing=label_smoothing)
    log_p, log_weak = _numerics.log_softmax(student), _numerics.log_softmax(weak)
    others = ~_logspace.is_label(labels, student.shape[-1])
    log_others = _numerics.log_softmax(student, where=others)
    squared = jnp.square(_logspace.probabilities(_logspace.at(log_p, labels)))
    weight = jax.lax.stop_gradient(squared + 1 - jnp.mean(squared))
    target = -weight * _logspace.at(log_p, labels)
    score = _logspace.probabilities(log_others) + _logspace.probabilities(
        _numerics.log_softmax(weak, where=others)
    )
    non_target = _logspace.cross_entropy(
        zipf_targets(jax.lax.stop_gradient(score), labels), log_others
    )
    smoothing = _numerics.scalar(label_smoothing, student)
    of_weak = -(1 - smoothing) * _logspace.at(log_weak, labels)
    of_weak -= smoothing * _logspace.mean_log(log_weak)
    return (
        _numerics.scalar(alpha, student) * target
        + _numerics.scalar(beta, student) * non_target
        + _numerics.scalar(mu, student) * of_weak
    )
