"""Students and teachers of different vocabularies: universal logit distillation (ULD).

Only the sorted probabilities are compared, so the vocabularies may differ in size and meaning.
"""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar


def uld(
    student_logits: Array,
    teacher_logits: Array,
    *,
    student_temperature: Scalar = 1.0,
    teacher_temperature: Scalar = 1.0,
) -> Array:
    """`sum_r |p_S(r) - p_T(r)|` of probabilities sorted from the largest, the shorter padded by 0.

    The Wasserstein distance when moving mass between any two classes costs the same.

    Args:
      student_logits: `[..., student_vocabulary]`.
      teacher_logits: `[..., teacher_vocabulary]`, other dimensions equal.
      student_temperature: a scalar or one value per example.
      teacher_temperature: a scalar or one value per example.

    Returns:
      `[...]`, in [0, 2].

    Raises:
      ValueError: if leading dimensions differ, or a temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
      for LLMs, 2024 (2402.12030).
    """
    return sorted_l1(
        *_probabilities(
            "uld", student_logits, teacher_logits, student_temperature, teacher_temperature
        )
    )


def uld_w1(
    student_logits: Array,
    teacher_logits: Array,
    *,
    student_temperature: Scalar = 1.0,
    teacher_temperature: Scalar = 1.0,
) -> Array:
    """`sum_r |F_S(r) - F_T(r)|`, F the cumulative sums of the sorted probabilities.

    The Wasserstein-1 distance along ranks: moving mass by one rank costs 1, so that mass deep in
    the tail counts for more than in `uld`.

    Args:
      student_logits: `[..., student_vocabulary]`.
      teacher_logits: `[..., teacher_vocabulary]`, other dimensions equal.
      student_temperature: a scalar or one value per example.
      teacher_temperature: a scalar or one value per example.

    Returns:
      `[...]`, in ranks.

    Raises:
      ValueError: if leading dimensions differ, or a temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Boizard et al., 2024 (2402.12030), with ranks as the ground distance.
    """
    student, teacher = _probabilities(
        "uld_w1", student_logits, teacher_logits, student_temperature, teacher_temperature
    )
    return jnp.sum(jnp.abs(jnp.cumsum(_sorted_gaps(student, teacher), axis=-1)), axis=-1)


def sorted_l1(student_probs: Array, teacher_probs: Array) -> Array:
    """`sum_r |s(r) - t(r)|` of non-negative vectors sorted from the largest, the shorter 0-padded.

    Args:
      student_probs: `[..., student_vocabulary]`; need not sum to 1, as merged tokens do not.
      teacher_probs: `[..., teacher_vocabulary]`, other dimensions equal.

    Returns:
      `[...]`.

    Raises:
      ValueError: if leading dimensions differ.
      TypeError: if the arrays are not floating point.
    """
    student, teacher = _checked("sorted_l1", student_probs, teacher_probs)
    return jnp.sum(jnp.abs(_sorted_gaps(student, teacher)), axis=-1)


def _checked(fn: str, student: Array, teacher: Array) -> tuple[Array, Array]:
    _checks.floating(student=student, teacher=teacher)
    _checks.rank(1, student=student, teacher=teacher)
    _checks.nonempty(student=student, teacher=teacher)
    if jnp.shape(student)[:-1] != jnp.shape(teacher)[:-1]:
        raise ValueError(
            f"all dimensions but the vocabulary must be equal, got "
            f"{_checks.described(student=student, teacher=teacher)}. "
            "Align the positions first (answers_first, align_tokens)."
        )
    return _numerics.upcast(student), _numerics.upcast(teacher)


def _probabilities(
    fn: str,
    student_logits: Array,
    teacher_logits: Array,
    student_temperature: Scalar,
    teacher_temperature: Scalar,
) -> tuple[Array, Array]:
    student, teacher = _checked(fn, student_logits, teacher_logits)
    _checks.positive(
        student_temperature=student_temperature, teacher_temperature=teacher_temperature
    )
    student = student / _numerics.per_example(student_temperature, student)
    teacher = teacher / _numerics.per_example(teacher_temperature, teacher)
    return (
        _numerics.softmax(student),
        _numerics.softmax(teacher),
    )


def _sorted_gaps(student: Array, teacher: Array) -> Array:
    student = jnp.sort(student, axis=-1, descending=True)
    teacher = jnp.sort(teacher, axis=-1, descending=True)
    size = max(student.shape[-1], teacher.shape[-1])

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])

    return padded(student) - padded(teacher)
