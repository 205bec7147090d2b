"""Correlations over a batch: between examples, between features, and what a regression explains.

All take float arrays, student first, `[B, ...]` of one shape, flattened per example, and return
`[B]` in float32 or wider unless stated otherwise; each value depends on the whole batch. `where`
(bool `[B]`) marks the real examples. The others have the value 0 and enter no statistic, so a
padded batch gives the same numbers as its real rows alone.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _sides


def ega_edge(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`sum_j (rho(s_i, s_j) - rho(t_i, t_j))^2`, with rho the Pearson correlation over features.

    `sqrt(.sum())` is the Frobenius norm that the authors weight by .3. Takes `[B, ...]` features of
    one shape and `where` `[B]`; returns `[B]`.

    References:
      Ma, Chen and Akata, Distilling Knowledge from Self-Supervised Teacher by Embedding Graph
      Alignment, 2022 (2211.13264).
    """
    s, t = map(_unit_features, _sides.flat(where, *_sides.same_shape(student, teacher)))
    return jnp.sum(jnp.square(_numerics.gram(s, s) - _numerics.gram(t, t)), axis=-1)


def ega_node(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`sum_j (rho(t_i, s_j) - [i = j])^2`: each student must correlate with its teacher alone.

    `sqrt(.sum())` is the authors' Frobenius norm.

    Args:
      student: `[B, ...]`, flattened per example.
      teacher: the same shape.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`; not 0 at equality unless different examples are uncorrelated.

    References:
      Ma, Chen and Akata, 2022 (2211.13264).
    """
    s, t = map(_unit_features, _sides.flat(where, *_sides.same_shape(student, teacher)))
    difference = _numerics.gram(t, s) - jnp.eye(len(s), dtype=s.dtype)
    return _numerics.kept(jnp.sum(jnp.square(difference), axis=-1), where)


def itrd_mutual(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """`sum_j G_S^2 - G_ST^2` of trace-one Gram matrices, `G_ST = G_S * G_T` entrywise: ITRD.

    This is the matrix-based Renyi mutual information (order 2) up to constants. `.sum()` is the
    number of the distillers zoo.

    Args:
      student: `[B, ...]`, flattened per example and normalized here.
      teacher: `[B, ...]`, any width.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, at least 0; not 0 at equality.

    References:
      Miles, Rodriguez and Mikolajczyk, Information Theoretic Representation Distillation, 2022
      (2112.00459).
    """
    sides = _sides.flat(where, *_sides.same_batch(student, teacher))
    units = (_numerics.normalize(side) for side in sides)
    gram_s, gram_t = (_numerics.gram(unit, unit) for unit in units)
    self_information, shared_information = _trace_one(gram_s), _trace_one(gram_s * gram_t)
    return jnp.sum(jnp.square(self_information) - jnp.square(shared_information), axis=-1)


def _trace_one(gram: Array) -> Array:
    trace = jnp.trace(gram)
    return _numerics.ratio(gram, trace)


def feature_correlation(student: Array, teacher: Array, *, where: Array | None = None) -> Array:
    """Pearson correlation over the batch of each feature with its teacher's.

    This is not a loss by itself: ITRD minimizes `log2 sum_d |rho_d - 1|^(2 alpha)` of it (its code
    shrinks rho by `(B - 1) / B`), and DIST minimizes `1 - mean rho` over classes.

    Args:
      student: `[B, D]`.
      teacher: the same shape.
      where: bool `[B]`, real examples.

    Returns:
      `[D]`, in `[-1, 1]`; 0 for a constant feature.

    References:
      Miles, Rodriguez and Mikolajczyk, 2022 (2112.00459).
    """
    sides = _sides.zero_masked(where, *_sides.same_shape(student, teacher, at_most=2))
    s, t = (_numerics.normalize(_numerics.centered(x, where), axis=0) for x in sides)
    return jnp.sum(s * t, axis=0)


def pkd_pearson(
    student: Array,
    teacher: Array,
    *,
    ddof: int = 0,
    eps: Scalar = 1e-6,
    where: Array | None = None,
) -> Array:
    """`1/2 mean (z_S - z_T)^2` of maps standardized per channel over the batch and positions: PKD.

    Its mean over the batch is `1 - rho`, the Pearson correlation averaged over channels, at
    `ddof=0`; mmrazor divides the variance by n - 1 (`ddof=1`).

    Args:
      student: `[B, ..., C]`.
      teacher: the same shape (resize the smaller map bilinearly, `connectors.resize_bilinear`).
      ddof: the variance divides by `n - ddof`, which must be positive.
      eps: added to the standard deviation, in feature units; the authors' constant. With `eps=0`
        the value does not depend on the features' scale (1e-18 to 1e18).
      where: bool `[B]`, real examples.

    References:
      Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson Correlation
      Coefficient, 2022 (2207.02039).
    """
    student, teacher = _sides.zero_masked(where, *_sides.same_shape(student, teacher))
    _checks.non_negative(eps=eps)
    _checks.count(0, ddof=ddof)
    count = student.size // student.shape[-1]
    if count <= ddof:
        raise ValueError(
            f"needs more than ddof={ddof} positions per channel, got "
            f"{_checks.described(student=student)}. Use a larger batch or ddof=0."
        )
    difference = _standardize(student, ddof, eps, where) - _standardize(teacher, ddof, eps, where)
    return 0.5 * jnp.mean(jnp.square(_numerics.batch_flat(difference)), axis=-1)


def _standardize(x: Array, ddof: int, eps: Scalar, where: Array | None) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    positions = len(rows) // len(x)
    of_rows = None if where is None else jnp.repeat(where, positions)
    centered = _numerics.centered(rows, of_rows)
    freedom = jnp.maximum(_numerics.row_count(rows, of_rows) - ddof, 1)
    squares = jnp.sum(jnp.square(centered), axis=0, keepdims=True)
    deviation = _numerics.safe_sqrt(squares / freedom) + _numerics.scalar(eps, x, "eps")
    factor = _numerics.ratio(1, deviation)
    return (centered * factor).reshape(x.shape)


def ridge_hint(
    student: Array, teacher: Array, *, ridge: Scalar = 1e-3, where: Array | None = None
) -> Array:
    """`mean (f_S W* + b* - f_T)^2`, with `W*, b*` the ridge regression of this batch.

    This is a hint loss without a regressor to train. The best linear map is solved for inside the
    loss (variable projection), and the gradient flows through the solve, so the loss is invariant
    to invertible linear maps of the student's features up to the ridge. All positions of the batch
    are rows of one regression; use more positions than student channels. The penalty is `ridge`
    times the mean square of the centered student features, so the loss does not depend on their
    scale.

    Args:
      student: `[B, ..., Cs]`.
      teacher: `[B, ..., Ct]`, the same leading axes.
      ridge: relative penalty, > 0.
      where: bool `[B]`, real examples.

    Returns:
      `[B]`, squared teacher units.

    References:
      Golub and Pereyra, Separable nonlinear least squares: the variable projection method, 2003.
    """
    student, teacher = _sides.zero_masked(
        where, *_sides.same_positions(student, teacher, at_least=2)
    )
    _checks.positive(ridge=ridge)
    x, y = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    of_rows = None if where is None else jnp.repeat(where, len(x) // len(student))
    x, y = _numerics.centered(x, of_rows), _numerics.centered(y, of_rows)
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))  # it cancels
    x = x / _numerics.nonzero(scale)
    count = _numerics.row_count(x, of_rows)
    covariance, cross = _numerics.gram(x.T, x.T) / count, _numerics.gram(x.T, y.T) / count
    penalty = _numerics.scalar(ridge, x, "ridge") * jnp.trace(covariance) / x.shape[-1]
    penalty = penalty + jnp.finfo(x.dtype).tiny ** 0.5  # of features scaled to at most 1
    damped = covariance + penalty * jnp.eye(x.shape[-1], dtype=x.dtype)
    weights = jax.scipy.linalg.solve(damped, cross, assume_a="pos")
    residual = y - jnp.matmul(x, weights, precision="highest")
    squares = jnp.square(residual).reshape(teacher.shape)
    return jnp.mean(_numerics.batch_flat(squares), axis=-1)


def _unit_features(x: Array) -> Array:
    """Each example centered over its features, of unit length."""
    return _numerics.normalize(x - jnp.mean(x, axis=1, keepdims=True), axis=1)
