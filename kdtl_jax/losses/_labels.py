"""The label side: virtual teachers, and teachers corrected where they contradict the label.

What is made here are logits (or log-probabilities, which are logits), for any loss of the package.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._logits import kd_kl


def virtual_teacher(
    labels: Array, num_classes: int, *, correct_probability: Scalar = 0.99
) -> Array:
    """Log-probabilities of a hand-made teacher: `a` for the label, `(1 - a) / (C - 1)` elsewhere.

    Label smoothing by e is `soft_cross_entropy` against `a = 1 - e + e / C`.

    Args:
      labels: `[...]`, integers.
      num_classes: C, at least 2.
      correct_probability: a, in [0, 1]; a scalar or one value per example.

    Returns:
      `[..., num_classes]`, float32 (or a's dtype if wider).

    Raises:
      ValueError: if labels are out of range, C is below 2, or a is outside [0, 1].
      TypeError: if labels are not integers.

    References:
      Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, 2019
      (1909.11723).
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    shape = (*jnp.shape(labels), num_classes)
    _checks.labels(labels, jnp.broadcast_to(jnp.float32(0), shape))
    _checks.within(0, 1, correct_probability=correct_probability)
    a = _numerics.upcast(jnp.asarray(correct_probability))
    a = a.reshape(a.shape + (1,) * (len(shape) - a.ndim))
    some = a > 0
    right = jnp.where(some, jnp.log(jnp.where(some, a, 1)), -jnp.inf)
    unsure = a < 1
    wrong = jnp.log1p(-jnp.where(unsure, a, 0)) - jnp.log(jnp.asarray(num_classes - 1, a.dtype))
    wrong = jnp.where(unsure, wrong, -jnp.inf)
    return jnp.where(_logspace.is_label(labels, num_classes), right, wrong)


def tf_kd(
    student_logits: Array,
    labels: Array,
    *,
    correct_probability: Scalar = 0.99,
    temperature: Scalar = 20.0,
) -> Array:
    """Teacher-free KD: `kd_kl` against the virtual teacher of the labels.

    Args:
      student_logits: `[..., num_classes]`.
      labels: `[...]`, integers.
      correct_probability: the virtual teacher's for the label, in [0, 1].
      temperature: softens both; a scalar or one value per example.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or a hyper-parameter is.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Yuan et al., 2019 (1909.11723) (Tf-KD_reg). The authors' code averages over classes as
      well and makes up for it by a large constant.
    """
    _checks.floating(student_logits=student_logits)
    _checks.rank(1, student_logits=student_logits)
    _checks.labels(labels, student_logits)
    student = _numerics.upcast(student_logits)
    a = _numerics.scalar(correct_probability, student)
    _checks.within(0, 1, correct_probability=correct_probability)
    teacher = virtual_teacher(labels, student.shape[-1], correct_probability=a)
    return kd_kl(student, teacher, temperature=temperature)


def probability_shift(teacher_logits: Array, labels: Array) -> Array:
    """The teacher with its largest logit and the label's exchanged: never wrong, equally sure.

    Rows that are right come back unchanged; the argument is never modified.

    Args:
      teacher_logits: `[..., num_classes]`.
      labels: `[...]`, integers.

    Returns:
      `[..., num_classes]`, the teacher's dtype.

    Raises:
      ValueError: if shapes do not fit or labels are out of range.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Wen et al., Preparing Lessons: Improve Knowledge Distillation with Better Supervision, 2019
      (1911.07471).
    """
    _checks.floating(teacher_logits=teacher_logits)
    _checks.rank(1, teacher_logits=teacher_logits)
    _checks.labels(labels, teacher_logits)
    best = jnp.argmax(teacher_logits, axis=-1)
    top = _logspace.at(teacher_logits, best)[..., None]
    right = _logspace.at(teacher_logits, labels)[..., None]
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
) -> Array:
    """Minifinetuning's corrected teacher: mixed toward the label until it leads by `threshold`.

    Where the teacher is wrong, the share of the label is
    `(p_max - p_y + threshold) / (1 + p_max - p_y)`, which puts the label that much above the rest;
    where it is right, the label is raised by `threshold`, at most to 1.

    Args:
      teacher_logits: `[..., num_classes]`; the model before fine-tuning.
      labels: `[...]`, integers.
      threshold: by how much the label shall lead, in [0, 1].
      temperature: softens the teacher before it is corrected; a scalar or one value per example.
      eps: added to the denominators, the authors' constant; a teacher surer than `1 - eps` is
        left alone.

    Returns:
      `[..., num_classes]` log-probabilities of the corrected teacher.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or a hyper-parameter is.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Belcak et al., Minifinetuning: Low-Data Generation Domain Adaptation through Corrective
      Self-Distillation, 2025 (2506.15702).
    """
    _checks.within(0, 1, threshold=threshold)
    teacher, _ = _logspace.softened(
        "mft_teacher", teacher_logits, teacher_logits, temperature, None
    )
    _checks.labels(labels, teacher_logits)
    log_p = _numerics.log_softmax(teacher)
    is_label = _logspace.is_label(labels, log_p.shape[-1])
    right = _logspace.probabilities(_logspace.at(log_p, labels))
    top = _logspace.probabilities(jnp.max(log_p, axis=-1))
    lead, small = _numerics.per_example(threshold, right), _numerics.scalar(eps, right)
    # 1 - p_y as the sum of the others: no digits lost where the teacher is sure.
    rest = jnp.sum(jnp.where(is_label, 0, _logspace.probabilities(log_p)), axis=-1)
    raised = jnp.minimum(lead, rest) / jnp.where(rest > 0, rest + small, 1)
    moved = (top - right + lead) / (1 + top - right + small)
    best = jnp.argmax(log_p, axis=-1).astype(labels.dtype)
    share = jnp.where(best == labels, raised, moved)
    onto = jnp.where(is_label, jnp.zeros_like(log_p), -jnp.inf)
    return _logspace.log_mixture(log_p, onto, share[..., None])


def mft(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    threshold: Scalar = 0.2,
    temperature: Scalar = 1.0,
) -> Array:
    """Minifinetuning: `T^2 KL(corrected teacher || softmax(z_S / T))`.

    Fine-tuning by distilling from the model's own past, corrected by the labels: learns the new
    domain and forgets less. Not zero at equality, since the teacher is corrected.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape; the model before fine-tuning.
      labels: `[...]`, integers.
      threshold: see `mft_teacher`.
      temperature: softens both; a scalar or one value per example.

    Returns:
      `[...]`, nats times `T^2`.

    Raises:
      ValueError: if shapes do not fit, labels are out of range, or a hyper-parameter is.
      TypeError: if the logits are not floating point or the labels not integers.

    References:
      Belcak et al., 2025 (2506.15702). `.mean()` is Model-Optimizer's `MFTLoss` ("batchmean").
    """
    student, _ = _logspace.softened("mft", student_logits, teacher_logits, temperature, None)
    target = mft_teacher(teacher_logits, labels, threshold=threshold, temperature=temperature)
    kl = _numerics.kl_from_logits(target, student)
    return jnp.square(_numerics.per_example(temperature, kl)) * kl
