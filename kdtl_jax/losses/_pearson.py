"""Correlation in place of a divergence: DIST."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _logspace


def dist_inter(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
) -> Array:
    """`1 - rho(p_S[b, :], p_T[b, :])`: Pearson distance of each example's probabilities.

    Args:
      student_logits: `[..., num_classes]`.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.
      eps: added to the product of the two norms, as in the authors' code. A row without variance
        has correlation 0, hence distance 1.

    Returns:
      `[...]`, in [0, 2]; at equality `eps / (norm^2 + eps)`.

    Raises:
      ValueError: if shapes differ or are empty, the temperature is not positive or eps negative.
      TypeError: if the logits are not floating point.

    References:
      Huang et al., Knowledge Distillation from A Stronger Teacher, 2022 (2205.10536).
    """
    _checks.non_negative(eps=eps)
    student, teacher = _probabilities("dist_inter", student_logits, teacher_logits, temperature)
    terms, rest = _pearson_terms(student, teacher, -1, eps)
    return jnp.sum(terms, axis=-1) + jnp.squeeze(rest, -1)


def dist_intra(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
) -> Array:
    """`1 - rho(p_S[:, c], p_T[:, c])` over the batch, averaged over classes: each example's part.

    With unit columns u, v the distance is `1/2 |u - v|^2`; the example's part is `B/C` of what its
    row contributes, so that the mean over the batch is the mean distance over classes. Depends on
    the other examples: on several devices gather the batch first.

    Args:
      student_logits: `[batch, num_classes]`; flatten a map's positions into the batch.
      teacher_logits: the same shape.
      temperature: softens both; a scalar or one value per example.
      eps: added to the product of the two norms, as in the authors' code.

    Returns:
      `[batch]`, >= 0.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, the temperature is not
        positive or eps negative.
      TypeError: if the logits are not floating point.

    References:
      Huang et al., 2022 (2205.10536).
    """
    _checks.rank(2, 2, student_logits=student_logits)
    _checks.non_negative(eps=eps)
    student, teacher = _probabilities("dist_intra", student_logits, teacher_logits, temperature)
    terms, rest = _pearson_terms(student, teacher, 0, eps)
    return jnp.mean(terms, axis=1) * terms.shape[0] + jnp.mean(rest)


def dist(
    student_logits: Array,
    teacher_logits: Array,
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    eps: Scalar = 1e-8,
) -> Array:
    """DIST: `beta (1 - rho over classes) + gamma (1 - rho over the batch)`.

    Invariant to the scale and shift of probabilities: only preferences are taught. `.mean()` is
    the authors' number; torchdistill and mmrazor multiply by `temperature^2`.

    Args:
      student_logits: `[batch, num_classes]`; flatten a map's positions into the batch.
      teacher_logits: the same shape.
      beta: weight of the relation between classes (`dist_inter`).
      gamma: weight of the relation between examples (`dist_intra`).
      temperature: softens both; 1 for ImageNet, 4 for CIFAR-100.
      eps: added to the product of the two norms.

    Returns:
      `[batch]`.

    Raises:
      ValueError: if shapes differ, are empty or not of two dimensions, the temperature is not
        positive or eps negative.
      TypeError: if the logits are not floating point.

    References:
      Huang et al., 2022 (2205.10536).
    """
    _checks.non_negative(eps=eps)
    inter = dist_inter(student_logits, teacher_logits, temperature=temperature, eps=eps)
    intra = dist_intra(student_logits, teacher_logits, temperature=temperature, eps=eps)
    return _numerics.per_example(beta, inter) * inter + _numerics.per_example(gamma, intra) * intra


def _probabilities(
    fn: str, student_logits: Array, teacher_logits: Array, temperature: Scalar
) -> tuple[Array, Array]:
    student, teacher = _logspace.softened(fn, student_logits, teacher_logits, temperature, None)
    return (
        _numerics.softmax(student),
        _numerics.softmax(teacher),
    )


def _pearson_terms(x: Array, y: Array, axis: int, eps: Scalar) -> tuple[Array, Array]:
    """Terms >= 0 along `axis` and a rest: in all `1 - <x', y'> / (|x'| |y'| + eps)`, centered.

    `1 - rho = 1/2 |u - v|^2` of the unit vectors does not cancel where the two nearly agree.
    """
    x = x - jnp.mean(x, axis=axis, keepdims=True)
    y = y - jnp.mean(y, axis=axis, keepdims=True)
    # Probabilities: their squares are in range.
    square_x = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    square_y = jnp.sum(jnp.square(y), axis=axis, keepdims=True)
    both = (square_x != 0) & (square_y != 0)
    norm_x = jnp.sqrt(jnp.where(both, square_x, 1))
    norm_y = jnp.sqrt(jnp.where(both, square_y, 1))
    floor = _numerics.scalar(eps, norm_x)
    whole = norm_x * norm_y + floor
    # `product / whole` of half the squared distance of the unit vectors, and `floor / whole`; all
    # that can be is done per row. Without variance the distance is 1, also for eps = 0.
    scale = jnp.where(both, jnp.sqrt(0.5 / whole), 0)
    root_x, root_y = jnp.sqrt(norm_y / norm_x), jnp.sqrt(norm_x / norm_y)
    terms = jnp.square(x * (scale * root_x) - y * (scale * root_y))
    return terms, jnp.where(both, floor / whole, 1)
