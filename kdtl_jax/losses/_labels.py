"""Losses that use the label, and teachers made from labels or corrected by them.

What all functions here share:

- `student_logits` and `teacher_logits` are `[..., num_classes]`, of one shape, with at least two
  classes.
- `labels` are class numbers `[...]` in `0..num_classes-1`; for soft labels, pass the argmax.
- `where`, bool `[...]`, marks the examples that count. The labels and logits of the others may be
  anything (-100, 255); their value is 0, with gradient 0. Under `jit`, an unmasked label out of
  range gives the value NaN, with gradient 0, so a mask applied later (`Masked`) leaves no NaN.
- If a label is masked or, under `jit`, out of range, functions that make logits for other losses
  (log-probabilities are logits too) leave the row unchanged, and weights are 0.
- `temperature > 0` is a scalar or one value per example.
- Losses return `[...]`, float32 or wider.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def tckd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """Target-class KD: `T^2 KL` between `(p_y, 1 - p_y)` of teacher and student.

    Decoupled KD is `tckd + 8 nckd`: 8 by default in mdistiller, 2 or 6 for some CIFAR-100 pairs,
    0.5 (at T = 1) for ImageNet. KD itself is `tckd + (1 - p_T(y)) nckd`: it suppresses the other
    classes where the teacher is confident. The mean is mdistiller's number, which is multiplied by
    `min(epoch / 20, 1)` there. Takes `[..., num_classes]` logits, `[...]` labels and `where`;
    returns `[...]`, in nats.

    References:
      Zhao et al., Decoupled Knowledge Distillation, 2022 (2203.08679). This function works in log
      space throughout; the authors' code takes the log of summed probabilities and overflows on
      large margins.
    """
    student, teacher, labels, usable = _check_labels(
        student_logits, teacher_logits, labels, temperature, where
    )
    kl = _softmax.kl_from_logits(_two(teacher, labels), _two(student, labels))
    kl = jnp.square(_numerics.per_example(temperature, kl, "temperature")) * kl
    return _numerics.at_usable(kl, usable, where)


def nckd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: Scalar = 4.0,
    where: Array | None = None,
) -> Array:
    """Non-target KD: `T^2 KL` between the distributions over the classes other than the label.

    `T^2 KL(q_T || q_S)`, where q is the softmax of `z / T` without the label's entry; 0 for two
    classes. Takes `[..., num_classes]` logits, `[...]` labels and `where`; returns `[...]`, in
    nats.

    References:
      Zhao et al., 2022 (2203.08679).
    """
    student, teacher, labels, usable = _check_labels(
        student_logits, teacher_logits, labels, temperature, where
    )
    is_other = ~_logspace.is_label(labels, student.shape[-1])
    kl = _softmax.kl_from_logits(teacher, student, where=is_other)
    kl = jnp.square(_numerics.per_example(temperature, kl, "temperature")) * kl
    return _numerics.at_usable(kl, usable, where)


def target_cross_entropy(
    student_logits: Array, teacher_logits: Array, labels: Array, *, where: Array | None = None
) -> Array:
    """`-p_T(y) log p_S(y)`: the label's cross-entropy, weighted by its teacher probability.

    Normalized KD adds `gamma T^2` times the `soft_cross_entropy` at temperature T of the
    `non_target_logits`; WKD-L adds gamma times their `sinkhorn_cost`. Not zero at equality. Takes
    `[..., num_classes]` logits, `[...]` labels and `where`; returns `[...]`, in nats.

    References:
      Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, 2023 (2303.13005).
    """
    student, teacher, labels, usable = _check_labels(
        student_logits, teacher_logits, labels, 1.0, where
    )
    belief = jnp.exp(_logspace.at_label(_softmax.log_softmax(teacher), labels))
    values = -belief * _logspace.at_label(_softmax.log_softmax(student), labels)
    return _numerics.at_usable(values, usable, where)


def wsld_weight(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    eps: Scalar = 1e-7,
    where: Array | None = None,
) -> Array:
    """`1 - exp(-CE_S / (CE_T + eps))`: near 1 where the student is worse than the teacher.

    Weighted soft labels use this weight, as a constant (`jax.lax.stop_gradient`), times `kd_kl`;
    the authors and mmrazor use `T^2 soft_cross_entropy` instead, which has the same gradient. They
    weight the term by 2.25 (T = 4) or 2.5 (T = 2).

    Args:
      student_logits: `[..., num_classes]`, at temperature 1.
      teacher_logits: the same shape.
      labels: `[...]`.
      eps: > 0, keeps the ratio finite where the teacher is certain; the authors' constant.
      where: bool `[...]`, examples that count.

    Returns:
      `[...]`, in [0, 1].

    References:
      Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
      Perspective, 2021 (2102.00650).
    """
    _checks.positive(eps=eps)
    student, teacher, labels, usable = _check_labels(
        student_logits, teacher_logits, labels, 1.0, where
    )
    student_loss = -_logspace.at_label(_softmax.log_softmax(student), labels)
    teacher_loss = -_logspace.at_label(_softmax.log_softmax(teacher), labels)
    weight = -jnp.expm1(-student_loss / (teacher_loss + _numerics.scalar(eps, teacher_loss, "eps")))
    return jnp.where(usable, weight, 0)


def uskd_weight(student_logits: Array, labels: Array, *, where: Array | None = None) -> Array:
    """`p(y)^2 + 1 - mean_b p(y)^2`: USKD's weight for the label's cross-entropy, a constant there.

    `[B, num_classes]` logits, `[B]` labels and values; the mean is over the examples that count.

    USKD distills without a teacher. In addition to the weighted cross-entropy, it has `beta` (0.1)
    times the `soft_cross_entropy` of the student's `non_target_logits` with `zipf_targets`, and
    `mu` (0.005) times the cross-entropy of a weak head on an early feature with smoothed labels
    (0.1).

    Args:
      student_logits: `[B, num_classes]`.
      labels: `[B]`.
      where: bool `[B]`, examples that count; the mean is over them.

    Returns:
      `[B]`.

    References:
      Yang et al., 2023 (2303.13005).
    """
    _checks.rank(2, 2, student_logits=student_logits)
    student, _, labels, usable = _check_labels(student_logits, student_logits, labels, 1.0, where)
    squared = jnp.square(jnp.exp(_logspace.at_label(_softmax.log_softmax(student), labels)))
    weight = squared + 1 - _numerics.masked_mean(squared, usable)
    return jnp.where(usable, weight, 0)


def non_target_logits(logits: Array, labels: Array, *, where: Array | None = None) -> Array:
    """The logits with -inf at the label: any divergence then compares the other classes alone.

    `[..., num_classes]` logits and `[...]` labels.

    Returns:
      `[..., num_classes]`, the dtype of the logits.
    """
    labels, usable = _check_teacher(logits, labels, where)
    at_label = _logspace.is_label(labels, logits.shape[-1]) & usable[..., None]
    return jnp.where(at_label, -jnp.inf, logits)


def virtual_teacher(
    labels: Array,
    num_classes: int,
    *,
    correct_probability: Scalar = 0.99,
    where: Array | None = None,
) -> Array:
    """Log-probabilities of a synthetic teacher: `a` for the label, `(1 - a) / (C - 1)` elsewhere.

    Teacher-free KD is the `forward_kl` to it, e.g. at temperature 20. The authors' code keeps the
    student at temperature 1, uses `softmax(p / T)` of the teacher's probabilities p, and also
    averages over classes. Label smoothing by e is `soft_cross_entropy` against `a = 1 - e + e / C`.

    Args:
      labels: `[...]`.
      num_classes: C, at least 2.
      correct_probability: a, in [0, 1]; a scalar or one value per example.
      where: bool `[...]`, examples that count; the others get the uniform distribution.

    Returns:
      `[..., num_classes]`, float32 (or a's dtype if wider).

    References:
      Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, 2019
      (1909.11723).
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    shape = (*jnp.shape(labels), num_classes)
    _checks.labels(labels, jax.ShapeDtypeStruct(shape, jnp.float32), where)
    _checks.within(0, 1, correct_probability=correct_probability)
    a = _numerics.upcast(jnp.asarray(correct_probability))
    _checks.per_example(shape[:-1], correct_probability=a)
    labels, usable = _numerics.usable_labels(labels, num_classes, where)
    a = jnp.where(usable, a.reshape(a.shape + (1,) * (usable.ndim - a.ndim)), 1 / num_classes)
    a = a[..., None]
    is_positive = a > 0
    correct_log_prob = jnp.where(is_positive, jnp.log(jnp.where(is_positive, a, 1)), -jnp.inf)
    is_below_one = a < 1
    other_log_prob = jnp.log1p(-jnp.where(is_below_one, a, 0)) - jnp.log(
        jnp.asarray(num_classes - 1, a.dtype)
    )
    other_log_prob = jnp.where(is_below_one, other_log_prob, -jnp.inf)
    return jnp.where(_logspace.is_label(labels, num_classes), correct_log_prob, other_log_prob)


def probability_shift(teacher_logits: Array, labels: Array, *, where: Array | None = None) -> Array:
    """The teacher with its largest logit and the label's swapped: never wrong, equally confident.

    `[..., num_classes]` logits and `[...]` labels. Correct rows are returned unchanged.

    Returns:
      `[..., num_classes]`, the teacher's dtype.

    References:
      Wen et al., Preparing Lessons: Improve Knowledge Distillation with Better Supervision, 2019
      (1911.07471).
    """
    labels, usable = _check_teacher(teacher_logits, labels, where)
    best = jnp.argmax(teacher_logits, axis=-1)
    labels = jnp.where(usable, labels.astype(best.dtype), best)
    top = _logspace.at_label(teacher_logits, best)[..., None]
    right = _logspace.at_label(teacher_logits, labels)[..., None]
    classes = teacher_logits.shape[-1]
    swapped = jnp.where(_logspace.is_label(best, classes), right, teacher_logits)
    return jnp.where(_logspace.is_label(labels, classes), top, swapped)


def mft_teacher(
    teacher_logits: Array,
    labels: Array,
    *,
    threshold: Scalar = 0.2,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-7,
    where: Array | None = None,
) -> Array:
    """Minifinetuning's corrected teacher: moved toward the label until it leads by `threshold`.

    Where the teacher is wrong, the label's mixing weight is
    `(p_max - p_y + threshold) / (1 + p_max - p_y)`, which puts the label `threshold` above the
    rest; where it is right, the label is raised by `threshold`, to at most 1. Minifinetuning is
    `T^2 forward_kl(student_logits / T, mft_teacher(..., temperature=T))`: fine-tuning by distilling
    from the model's own past, corrected by the labels. Its mean is Model-Optimizer's `MFTLoss`
    ("batchmean").

    Args:
      teacher_logits: `[..., num_classes]`; the model before fine-tuning.
      threshold: how much the label should lead by, in [0, 1]; a scalar or one value per example.
      temperature: softens the teacher before it is corrected.
      eps: added to the denominators, the authors' constant; a teacher more confident than `1 - eps`
        is not changed.

    Returns:
      `[..., num_classes]` log-probabilities of the corrected teacher.

    References:
      Belcak et al., Minifinetuning: Low-Data Generation Domain Adaptation through Corrective
      Self-Distillation, 2025 (2506.15702).
    """
    _checks.within(0, 1, threshold=threshold)
    _checks.non_negative(eps=eps)
    labels, usable = _check_teacher(teacher_logits, labels, where)
    teacher = _logspace.soften_teacher(teacher_logits, temperature, threshold=threshold)
    log_p = _softmax.log_softmax(teacher)
    is_label = _logspace.is_label(labels, log_p.shape[-1])
    right = jnp.exp(_logspace.at_label(log_p, labels))
    top = jnp.exp(jnp.max(log_p, axis=-1))
    lead = _numerics.per_example(threshold, right, "threshold")
    epsilon = _numerics.scalar(eps, right, "eps")
    # 1 - p_y as the sum of the others, so no digits are lost where the teacher is confident.
    other_mass = jnp.sum(jnp.where(is_label, 0, jnp.exp(log_p)), axis=-1)
    raised_share = jnp.minimum(lead, other_mass) / jnp.where(
        other_mass > 0, other_mass + epsilon, 1
    )
    mixing = (top - right + lead) / (1 + top - right + epsilon)
    best = jnp.argmax(log_p, axis=-1).astype(labels.dtype)
    share = jnp.where(usable, jnp.where(best == labels, raised_share, mixing), 0)
    label_log_probs = jnp.where(is_label, jnp.zeros_like(log_p), -jnp.inf)
    return _logspace.log_mixture(log_p, label_log_probs, share[..., None])


def zipf_targets(scores: Array, labels: Array) -> Array:
    """Log-probabilities proportional to `1 / rank` over the classes other than the labels.

    Ranks count all classes, including the labels, from 1 for the largest score; ties go to the
    lower index. USKD's score is the sum of the normalized non-target probabilities of its two
    heads; the authors' code ranks by the probabilities of the weak head plus the
    *log*-probabilities of the student, each divided by its own "rest".

    Args:
      scores: `[..., num_classes]`; the classes are ranked by these.
      labels: `[...]`, or `[..., k]` for more than one label per example.

    Returns:
      `[..., num_classes]` log-probabilities, -inf at the labels. Constant in the scores.

    References:
      Yang et al., 2023 (2303.13005).
    """
    _checks.floating(scores=scores)
    _checks.rank(1, scores=scores)
    _checks.no_text(labels=labels)
    _checks.indices(scores.shape[-1], labels=labels)
    leading = jnp.shape(labels)[: scores.ndim - 1]
    is_one_hot = jnp.shape(labels) == scores.shape
    if leading != scores.shape[:-1] or labels.ndim > scores.ndim or is_one_hot:
        raise ValueError(
            "labels must be [...] or [..., k], k < num_classes, for scores [..., num_classes], got "
            f"{_checks.described(labels=labels, scores=scores)}. One-hot labels: "
            "jnp.argmax(labels, axis=-1)."
        )
    scores = _numerics.upcast(scores)
    several = labels if labels.ndim == scores.ndim else labels[..., None]
    several, usable = _numerics.usable_labels(several, scores.shape[-1])
    at_label = _logspace.is_label(several, scores.shape[-1]) & usable[..., None]
    order = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    ranks = jnp.argsort(order, axis=-1).astype(scores.dtype) + 1
    return _softmax.log_softmax(-jnp.log(ranks), where=~jnp.any(at_label, axis=-2))


def _check_labels(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    temperature: Scalar,
    where: Array | None,
) -> tuple[Array, Array, Array, Array]:
    """Checks and softens logits; also returns safe labels and which rows have a usable label."""
    student, teacher = _logspace.soften(student_logits, teacher_logits, temperature)
    _checks.labels(labels, student_logits, where)
    labels, usable = _numerics.usable_labels(labels, student.shape[-1], where)
    return _numerics.kept(student, where), _numerics.kept(teacher, where), labels, usable


def _check_teacher(logits: Array, labels: Array, where: Array | None) -> tuple[Array, Array]:
    """Checks logits and labels; returns safe labels and which rows have a usable label."""
    _checks.floating(logits=logits)
    _checks.rank(1, logits=logits)
    _checks.several_classes(logits=logits)
    _checks.labels(labels, logits, where)
    return _numerics.usable_labels(labels, logits.shape[-1], where)


def _two(logits: Array, labels: Array) -> Array:
    """`[..., 2]` logits of (label, all others together)."""
    is_other = ~_logspace.is_label(labels, logits.shape[-1])
    return jnp.stack(
        [_logspace.at_label(logits, labels), _logspace.logsumexp(logits, where=is_other)], axis=-1
    )
