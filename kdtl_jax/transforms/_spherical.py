"""Merging on spheres, leaf by leaf: SLERP, its forms for several models, and Model Stock.

Each leaf is one vector, or with `axis` each of its rows (`axis=-1`: the last index runs along a
row; the weights of one output of a flax kernel `[in, out]` run along `axis=-2`).

Every method is a weighted sum of the models, or of their task vectors, with shares that depend only
on lengths and angles (`_angles`). Leaves larger than memory can thus be merged in pieces: passes
over the pieces compute the angles, then each merged piece is `sum(share_i * piece_i)`.
"""

import functools
from collections.abc import Sequence

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _blocks, _leaves
from kdtl_jax.transforms._angles import (
    karcher_shares,
    model_stock_shares,
    multi_slerp_shares,
    of_leaves,
    slerp_shares,
    weighted_sum,
)
from kdtl_jax.transforms._leaves import Coefficient, Weights


def slerp(
    source: Params,
    target: Params,
    t: Coefficient,
    *,
    axis: int | None = None,
    threshold: float = 0.9995,
) -> Params:
    """`sin((1-t) a)/sin(a) source + sin(t a)/sin(a) target`, `a` the angle between the two.

    The parameters themselves are combined, not their unit vectors. Near-parallel pairs
    (`|cos a| > threshold`, or 1 up to rounding) are interpolated linearly.

    Args:
      t: 0 gives the source, 1 the target; a number, traced scalar, or one number per leaf;
        leaves that match no rule stay the source's.
      axis: the axis along which a leaf's rows run; None, or a leaf of fewer axes, is one vector.
      threshold: on the cosine's absolute value. 1.0 with `axis=-1` is mergekit's NuSLERP.

    References:
      Shoemake, Animating rotation with quaternion curves, 1985; mergekit's `slerp`.
    """
    _checks.scalar(threshold=threshold)
    _checks.finite(threshold=threshold)
    values = _leaves.coefficients(t, source, name="t")

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        if values[i] is None:
            return a
        share = _numerics.scalar(values[i], a)
        shares = slerp_shares(of_leaves([a, b], axis), share, threshold=threshold)
        return weighted_sum([a, b], shares)

    return _leaves.combine_leaves(formula, {"source": source, "target": target}, [values])


def multi_slerp(
    base: Params | None, models: Sequence[Params], weights: Weights | None = None
) -> Params:
    """The mean direction of several models' changes, times their mean length.

    With `u_i` the direction of `theta_i - base`: `sum w_i u_i / |sum w_i u_i| * sum w_i |theta_i -
    base|`. (mergekit then steps along the mean tangent at that direction, which is 0.) If the
    directions cancel, there is no mean direction, and the differences are averaged instead.

    Args:
      base: the common starting point; None means zero.
      weights: None for equal ones, else one per model; normalized to sum to 1.

    References:
      mergekit's `multislerp` (2403.13257).
    """
    trees_by_name = ({} if base is None else {"base": base}) | _leaves.name_members(
        "models", models
    )
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        vectors = leaves if base is None else [leaf - leaves[0] for leaf in leaves[1:]]
        _leaves.nonzero_total(path, by_leaf[i])
        mean = weighted_sum(vectors, multi_slerp_shares(of_leaves(vectors), by_leaf[i]))
        return mean if base is None else leaves[0] + mean

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def karcher_mean(
    models: Sequence[Params],
    weights: Weights | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Params:
    """The point of the sphere nearest to all models' directions, times their mean length.

    Fixed-point iteration with the tangent `T = sum w_i (a_i / sin a_i) (u_i - cos(a_i) u)`, stopped
    when `|T| < tolerance`; T leaves out models closer than `tolerance`, and opposite ones.

    Args:
      weights: None for equal ones, else one per model; normalized to sum to 1.
      iterations: the largest number of iterations.
      tolerance: in radians, >= 0.

    References:
      Karcher, Riemannian center of mass, 1977; mergekit's `karcher` (2403.13257).
    """
    _checks.scalar(tolerance=tolerance)
    _checks.non_negative(tolerance=tolerance)
    _checks.count(0, iterations=iterations)
    trees_by_name = _leaves.name_members("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        _leaves.nonzero_total(path, by_leaf[i])
        read = functools.partial(_blocks.row_blocks, leaves)
        shares = karcher_shares(read, by_leaf[i], iterations=iterations, tolerance=tolerance)
        return weighted_sum(leaves, shares)

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def model_stock(
    base: Params, models: Sequence[Params], *, axis: int | None = None, floor: Scalar = 0.0
) -> Params:
    """`t mean_i theta_i + (1 - t) base` with `t = N c / (1 + (N - 1) c)`.

    `c` is the mean cosine over pairs of task vectors: models that moved in the same direction are
    trusted, models that moved apart are pulled back to the base. If they cancel
    (`1 + (N - 1) c` below 1e-3, e.g. for two opposite changes), t has no finite value, and the
    base is kept.

    Args:
      axis: None treats a leaf as one vector; otherwise the axis along which its rows run, each
        row with its own ratio (leaves of fewer axes are one vector).
      floor: `c` divides by the product of two lengths, or by this if it is larger (squared units of
        the weights), >= 0. mergekit's 1e-6 pulls small changes back to the base.

    References:
      Jang, Yun and Han, Model Stock: All we need is just a few fine-tuned models, 2024
      (2403.19522), for two or more models; t is clamped neither there nor here.
    """
    if len(models) < 2:
        raise ValueError(f"expected two or more models, got {len(models)}.")
    _checks.non_negative(floor=floor)

    def formula(i: int, path: str, start: Array, *leaves: Array) -> Array:
        deltas = [leaf - start for leaf in leaves]
        shares = model_stock_shares(of_leaves(deltas, axis), floor=_numerics.scalar(floor, start))
        return start + weighted_sum(deltas, shares)

    trees_by_name = {"base": base} | _leaves.name_members("models", models)
    return _leaves.combine_leaves(formula, trees_by_name, [])
