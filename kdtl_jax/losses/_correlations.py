"""Correlations between examples (EGA), between features (ITRD), and the information they share."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _numerics
from kdtl_jax.losses import _door


def _flat(fn: str, student: Array, teacher: Array) -> tuple[Array, Array]:
    student, teacher = _door.same_shape(fn, student, teacher)
    return _numerics.batch_flat(student), _numerics.batch_flat(teacher)


def _unit_centered(x: Array, axis: int) -> Array:
    return _numerics.unit(x - jnp.mean(x, axis=axis, keepdims=True), axis=axis)


def ega_edge(student: Array, teacher: Array) -> Array:
    """`sum_j (rho(s_i, s_j) - rho(t_i, t_j))^2`, rho the Pearson correlation over features.

    `sqrt(.sum())` is the Frobenius norm that the authors weight by .3.

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: the same shape.

    Returns:
      `[B]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Ma et al., Knowledge Distillation via the Embedding Graph Alignment, 2022.
    """
    s, t = (_unit_centered(x, 1) for x in _flat("ega_edge", student, teacher))
    return jnp.sum(jnp.square(_numerics.gram(s, s) - _numerics.gram(t, t)), axis=-1)


def ega_node(student: Array, teacher: Array) -> Array:
    """`sum_j (rho(t_i, s_j) - [i = j])^2`: each student must correlate with its teacher alone.

    `sqrt(.sum())` is the authors' Frobenius norm.

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: the same shape.

    Returns:
      `[B]`; not 0 at equality unless different examples are uncorrelated.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Ma et al., Knowledge Distillation via the Embedding Graph Alignment, 2022.
    """
    s, t = (_unit_centered(x, 1) for x in _flat("ega_node", student, teacher))
    return jnp.sum(jnp.square(_numerics.gram(t, s) - jnp.eye(len(s), dtype=s.dtype)), axis=-1)


def feature_correlation(student: Array, teacher: Array) -> Array:
    """Pearson correlation over the batch of each feature with its teacher's.

    Not a loss yet: ITRD minimizes `log2 sum_d |rho_d - 1|^(2 alpha)` of it (its code shrinks rho
    by `(B - 1) / B`), DIST `1 - mean rho` over classes. A constant feature gives 0.

    Args:
      student: `[B, D]`.
      teacher: the same shape.

    Returns:
      `[D]`, in `[-1, 1]`.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Miles, Rodriguez and Mikolajczyk, Information Theoretic Representation Distillation, 2022
      (2112.00459).
    """
    student, teacher = _door.same_shape("feature_correlation", student, teacher, at_most=2)
    return jnp.sum(_unit_centered(student, 0) * _unit_centered(teacher, 0), axis=0)


def itrd_mutual(student: Array, teacher: Array) -> Array:
    """`sum_j G_S^2 - G_ST^2` of trace-one Gram matrices, `G_ST = G_S * G_T` entrywise: ITRD.

    The matrix-based Renyi mutual information (order 2) up to constants. `.sum()` is the number of
    the distillers zoo (weight 1).

    Args:
      student: `[B, ...]`, flattened per example and normalized here.
      teacher: `[B, ...]`, any width.

    Returns:
      `[B]`, at least 0; not 0 at equality.

    Raises:
      ValueError: if the batch sizes differ or are 0.
      TypeError: if an array is not floating point.

    References:
      Miles, Rodriguez and Mikolajczyk, Information Theoretic Representation Distillation, 2022
      (2112.00459).
    """
    sides = _door.same_batch("itrd_mutual", student, teacher)
    units = (_numerics.unit(_numerics.batch_flat(side)) for side in sides)
    gram_s, gram_t = (_numerics.gram(unit, unit) for unit in units)
    own, shared = _trace_one(gram_s), _trace_one(gram_s * gram_t)
    return jnp.sum(jnp.square(own) - jnp.square(shared), axis=-1)


def _trace_one(gram: Array) -> Array:
    trace = jnp.trace(gram)
    return jnp.where(trace != 0, gram / jnp.where(trace != 0, trace, 1), 0)
