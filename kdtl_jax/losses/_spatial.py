"""Losses over spatial grids: ReviewKD's hierarchy of pools, WKD-F's Gaussian cells."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def hcl(student: Array, teacher: Array, *, sizes: Sequence[int] = (4, 2, 1)) -> Array:
    """`sum_l w_l mean (pool_l(f_S) - pool_l(f_T))^2 / sum_l w_l`: hierarchical context loss.

    Level 0 is the full map with weight 1; each pool to `k x k`, `k` smaller than the height,
    halves the weight. `.mean()`, summed over the pairs of fused maps (`connectors.abf`), is
    mdistiller's number (weights 1, 5 or 8 by pair of models).

    Args:
      student: `[B, H, W, C]`, fused.
      teacher: the same shape.
      sizes: sides of the pools, tried in order.

    Returns:
      `[B]`, squared feature units.

    Raises:
      ValueError: if shapes differ or are empty.
      TypeError: if an array is not floating point.

    References:
      Chen et al., Distilling Knowledge via Knowledge Review, 2021 (2104.09044).
    """
    student, teacher = _door.same_shape("hcl", student, teacher, at_least=4, at_most=4)
    apart = student - teacher  # pooling is linear: pool the difference
    total, weight, weights = jnp.mean(jnp.square(apart), axis=(1, 2, 3)), 1.0, 1.0
    for size in sizes:
        if size < apart.shape[1]:
            weight /= 2
            pooled = _numerics.pool_to(apart, (size, size))
            total = total + weight * jnp.mean(jnp.square(pooled), axis=(1, 2, 3))
            weights += weight
    return total / weights


def wkd_feature(
    student: Array,
    teacher: Array,
    *,
    grid: int = 1,
    mean_weight: Scalar = 2.0,
    ddof: int = 0,
    eps: Scalar = 1e-5,
) -> Array:
    """`mean over cells of w ||mu_S - mu_T||^2 + ||sigma_S - sigma_T||^2`: WKD-F.

    The squared Wasserstein-2 distance between diagonal Gaussians fitted to the pixels of each cell
    of a `grid x grid` partition (w = 1 is the exact distance; the authors weight the means by 2
    or 4). `.mean()` is their number with `ddof=1`: their variance divides by n - 1.

    Args:
      student: `[B, H, W, C]`, projected to the teacher's width.
      teacher: the same shape.
      grid: cells per side (the authors use 1 or 4).
      mean_weight: w.
      ddof: the variance of a cell divides by `n - ddof`.
      eps: added to the variance under the root.

    Returns:
      `[B]`, squared feature units.

    Raises:
      ValueError: if shapes differ or are empty, or a cell has no more than `ddof` pixels.
      TypeError: if an array is not floating point.

    References:
      Lv et al., Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge
      Distillation, 2024 (2412.08139).
    """
    student, teacher = _door.same_shape("wkd_feature", student, teacher, at_least=4, at_most=4)
    _checks.positive(grid=grid, eps=eps)
    rows, columns = (_numerics.pool_bounds(n, grid) for n in student.shape[1:3])
    cells = [(slice(*row), slice(*column)) for row in rows for column in columns]
    smallest = min((r.stop - r.start) * (c.stop - c.start) for r, c in cells)
    if smallest <= ddof:
        raise ValueError(
            f"every cell needs more than ddof={ddof} pixels, the smallest of a "
            f"{grid} x {grid} grid has {smallest} of {_checks.described(student=student)}. "
            "Use a coarser grid or ddof=0."
        )
    total = jnp.zeros((len(student),), student.dtype)
    weight = _numerics.scalar(mean_weight, student)
    for cell in cells:
        mean_s, std_s = _moments(student[:, *cell], ddof, eps)
        mean_t, std_t = _moments(teacher[:, *cell], ddof, eps)
        means = weight * jnp.sum(jnp.square(mean_s - mean_t), axis=-1)
        total = total + means + jnp.sum(jnp.square(std_s - std_t), axis=-1)
    return total / len(cells)


def _moments(x: Array, ddof: int, eps: Scalar) -> tuple[Array, Array]:
    """Mean and standard deviation of each channel, `[B, C]` each."""
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    count = x.shape[1] * x.shape[2]
    variance = jnp.sum(jnp.square(x - mean), axis=(1, 2)) / (count - ddof)
    return mean[:, 0, 0], jnp.sqrt(variance + _numerics.scalar(eps, x))
