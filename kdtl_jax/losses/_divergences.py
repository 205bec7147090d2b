"""Divergences between class distributions given by logits.

Every function takes `[..., num_classes]` logits and returns `[...]`, in float32 or wider. None
reduces, weights, multiplies by `T^2` or stops a gradient.
"""

from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar


def softened(
    fn: str,
    student_logits: Array,
    teacher_logits: Array,
    temperature: Scalar,
    where: Array | None,
) -> tuple[Array, Array]:
    """Checked `(z_S / T, z_T / T)` in float32 or wider: the door of every logit loss."""
    _checks.floating(fn, student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.same_shape(fn, student_logits=student_logits, teacher_logits=teacher_logits)
    _checks.rank(fn, 1, student_logits=student_logits)
    _checks.nonempty(fn, student_logits=student_logits)
    _checks.positive(fn, temperature=temperature)
    _checks.mask(fn, where, student_logits.shape)
    student, teacher = _numerics.upcast(student_logits), _numerics.upcast(teacher_logits)
    return (
        student / _numerics.per_example(temperature, student),
        teacher / _numerics.per_example(temperature, teacher),
    )


def forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_T || p_S) = sum_c p_T log(p_T / p_S)` of softened distributions.

    Computed as a sum of non-negative terms, so it is never negative and keeps its relative
    accuracy when the two are close. A class masked on both sides contributes nothing.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example. No `T^2` factor is applied.
      where: bool, the logits' shape; classes that take part. -inf logits do not either.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Kullback and Leibler, On information and sufficiency, 1951. TRL's `GKDTrainer` gives this
      at beta=0, DistiLLM's `forward_kl` the cross-entropy form (add the teacher's entropy).
    """
    student, teacher = softened("forward_kl", student_logits, teacher_logits, temperature, where)
    return _numerics.kl_from_logits(teacher, student, where=where)


def reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    where: Array | None = None,
) -> Array:
    """`KL(p_S || p_T)`: mode seeking, the divergence of on-policy distillation.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example. No `T^2` factor is applied.
      where: bool, the logits' shape; classes that take part.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: if shapes differ or are empty, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, 2023.
    """
    student, teacher = softened("reverse_kl", student_logits, teacher_logits, temperature, where)
    return _numerics.kl_from_logits(student, teacher, where=where)
