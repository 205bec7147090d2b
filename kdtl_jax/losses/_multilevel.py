"""Relations between predictions: multi-level logit distillation and SKD's direction term."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace
from kdtl_jax.losses._logits import kd_kl


def class_correlation(
    student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 4.0
) -> Array:
    """`|P_T' P_T - P_S' P_S|^2 / C`: the classes' correlations over the batch.

    One number for the batch, given to every example, so that the mean is the published value.

    Args:
      student_logits: `[batch, num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.

    Returns:
      `[batch]`, all equal. No `T^2`.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, or the temperature is not
        positive.
      TypeError: if the logits are not floating point.

    References:
      Jin, Wang and Lin, Multi-Level Logit Distillation, CVPR 2023. `.mean()` is the
      number of the authors' `cc_loss`.
    """
    student, teacher = _probabilities(
        "class_correlation", student_logits, teacher_logits, temperature
    )
    batch, classes = student.shape
    gap = _numerics.gram(teacher.T, teacher.T) - _numerics.gram(student.T, student.T)
    return jnp.broadcast_to(jnp.sum(jnp.square(gap)) / classes, (batch,))


def batch_correlation(
    student_logits: Array, teacher_logits: Array, *, temperature: Scalar = 4.0
) -> Array:
    """`sum_b' (<p_T, p_T'> - <p_S, p_S'>)^2`: an example's similarities to the batch.

    Args:
      student_logits: `[batch, num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.

    Returns:
      `[batch]`. No `T^2`.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, or the temperature is not
        positive.
      TypeError: if the logits are not floating point.

    References:
      Jin, Wang and Lin, CVPR 2023. `.mean()` is the number of the authors' `bc_loss`.
    """
    student, teacher = _probabilities(
        "batch_correlation", student_logits, teacher_logits, temperature
    )
    gap = _numerics.gram(teacher, teacher) - _numerics.gram(student, student)
    return jnp.sum(jnp.square(gap), axis=-1)


def mlld(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperatures: Sequence[Scalar] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> Array:
    """Multi-level logit distillation: `sum_T (T^2 KL + batch_correlation + class_correlation)`.

    Alignment of each example, of the batch and of the classes, under several temperatures. For a
    weakly and a strongly augmented view, add the two values.

    Args:
      student_logits: `[batch, num_classes]`.
      teacher_logits: the same shape.
      temperatures: the prediction augmentation's; at least one.

    Returns:
      `[batch]`.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, no temperature is given
        or one is not positive.
      TypeError: if the logits are not floating point.

    References:
      Jin, Wang and Lin, CVPR 2023. The published code departs from it: its confidence masks
      multiply losses that are already reduced, its strong view uses weak logits at two
      temperatures, and the strong view's correlations are computed and dropped.
    """
    if not temperatures:
        raise ValueError("needs at least one temperature, got none.")
    levels = (kd_kl, batch_correlation, class_correlation)
    first, *others = [
        level(student_logits, teacher_logits, temperature=temperature)
        for temperature in temperatures
        for level in levels
    ]
    return sum(others, first)


def skd_direction(student_logits: Array, teacher_logits: Array, *, tikhonov: Scalar = 0.1) -> Array:
    """`sqrt(d_b' S^-1 d_b)`, `d` the rows of the gap between the similarity matrices.

    `d = Z_S Z_S' - Z_T Z_T'` of unit logits, `S = cov(d) + tikhonov I` (divisor batch - 1).

    Args:
      student_logits: `[batch, num_classes]`.
      teacher_logits: the same shape.
      tikhonov: added to the covariance's diagonal, > 0.

    Returns:
      `[batch]`; zero, with gradient zero, at equality.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, or tikhonov is not positive.
      TypeError: if the logits are not floating point.

    References:
      The direction term of SKD (Jeong et al., CVPR 2026); its instance term is
      `forward_kl(..., temperature=4.0)`. `.mean()` is torchdistill's `SKDDirectionLoss`.
    """
    _checks.rank(2, 2, student_logits=student_logits)
    student, teacher = _logspace.softened("skd_direction", student_logits, teacher_logits, 1, None)
    _checks.positive(tikhonov=tikhonov)
    student, teacher = _numerics.normalize(student), _numerics.normalize(teacher)
    gap = _numerics.gram(student, student) - _numerics.gram(teacher, teacher)
    centered = gap - jnp.mean(gap, axis=0, keepdims=True)
    batch = gap.shape[0]
    covariance = _numerics.gram(centered.T, centered.T) / max(batch - 1, 1)
    covariance += _numerics.scalar(tikhonov, gap) * jnp.eye(batch, dtype=gap.dtype)
    root = jnp.linalg.cholesky(covariance)
    whitened = jax.scipy.linalg.solve_triangular(root, gap.T, lower=True)
    return _numerics.safe_norm(whitened, axis=0)


def _probabilities(
    fn: str, student_logits: Array, teacher_logits: Array, temperature: Scalar
) -> tuple[Array, Array]:
    _checks.rank(2, 2, student_logits=student_logits)
    student, teacher = _logspace.softened(fn, student_logits, teacher_logits, temperature, None)
    return (
        _numerics.softmax(student),
        _numerics.softmax(teacher),
    )
