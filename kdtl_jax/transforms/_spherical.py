"""Merging on spheres, leaf by leaf: SLERP, its forms for several models, and Model Stock.

Each leaf is one vector, or with `axis` each of its rows (`axis=-1`: the last index runs along a
row; the weights of one output of a flax kernel `[in, out]` run along `axis=-2`).

Every method is a weighted sum of the models, or of their task vectors, with shares that depend only
on lengths and angles (`angles`). Leaves larger than memory can thus be merged in pieces, which are
read again in every pass: passes over the pieces compute the angles, then each merged piece is
`sum(share_i * piece_i)`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _blocks, _leaves
from kdtl_jax.transforms._blocks import Read
from kdtl_jax.transforms._leaves import Coefficient, Weights

# Directions cancel below this share of their length: the remainder is amplified rounding error.
_CANCELED = 1e-3


class Angles(NamedTuple):
    """Lengths of vectors and cosines between them; with `axis`, arrays of one number per row."""

    lengths: Sequence[Array]
    cosines: Sequence[Sequence[Array]]  # 0 for zero vectors, 1 of a vector with itself


def angles(read: Read, axis: int | None = None) -> Angles:
    """Lengths and cosines of N vectors, from corresponding pieces that `read()` yields.

    Args:
      read: called twice; must yield the same pieces each time, which may be read from files.
      axis: None treats each leaf as one vector; otherwise the axis along which each row is a
        vector: a piece holds whole rows, or a part of every row (blocks `[n, ...]` for axis 0).
    """
    tops = _tops(read, axis)
    products: Any = None
    for pieces in read():
        sums = _products(pieces, tops, axis)
        products = sums if products is None else jax.tree.map(jnp.add, products, sums)
    sizes = [_numerics.safe_sqrt(row[-1]) for row in products]

    def cosine(i: int, j: int) -> Array:
        product = sizes[i] * sizes[j]
        return jnp.clip(products[max(i, j)][min(i, j)] / jnp.where(product > 0, product, 1), -1, 1)

    indices = range(len(tops))
    lengths = [size * top for size, top in zip(sizes, tops, strict=True)]
    return Angles(lengths, [[cosine(i, j) for j in indices] for i in indices])


def slerp_shares(angles: Angles, t: Scalar, *, threshold: float = 0.9995) -> list[Array]:
    """The shares of two vectors at `t` of the way from the first to the second; see `slerp`."""
    cosine = angles.cosines[0][1]
    t = _numerics.cast(t, cosine)
    # Closer to 1 than rounding can resolve, the angle is noise.
    limit = min(threshold, 1 - 4 * float(jnp.finfo(cosine.dtype).eps))
    linear = jnp.abs(cosine) > limit
    # The unused branch gets a harmless angle, which keeps its gradient finite.
    angle = jnp.arccos(jnp.where(linear, 0, cosine))
    sine = jnp.sin(angle)
    first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / sine)
    return [first, jnp.where(linear, t, jnp.sin(t * angle) / sine)]


def multi_slerp_shares(angles: Angles, weights: Sequence[Scalar] | None = None) -> list[Array]:
    """The shares of N vectors in `multi_slerp`, with its weights."""
    weights = _normalized(weights, angles.lengths)
    pairs = [
        a * b * cosine
        for a, row in zip(weights, angles.cosines, strict=True)
        for b, cosine in zip(weights, row, strict=True)
    ]
    mean = _numerics.safe_sqrt(_leaves.total(pairs))
    cancels = mean <= _CANCELED
    length = _sum_of(angles.lengths, weights) / jnp.where(cancels, 1, mean)
    return [
        jnp.where(cancels, weight, length * weight / jnp.where(size > 0, size, 1))
        for weight, size in zip(weights, angles.lengths, strict=True)
    ]


def model_stock_shares(angles: Angles, *, floor: Scalar = 0.0) -> list[Array]:
    """The shares of N task vectors in `model_stock`."""
    count = len(angles.lengths)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    cosine = _leaves.total([_floored_cosine(angles, *pair, floor) for pair in pairs])
    cosine = cosine / (count * (count - 1) / 2)
    denominator = 1 + (count - 1) * cosine
    canceled = jnp.abs(denominator) < _CANCELED
    return [jnp.where(canceled, 0, cosine / jnp.where(canceled, 1, denominator))] * count


def karcher_shares(
    read: Read,
    weights: Sequence[Scalar] | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> list[Array]:
    """The shares of N vectors in `karcher_mean`, with its weights.

    `read()` is as in `angles` and is called twice per iteration. Concrete tangents can end the
    iteration early; traced ones cannot, so the gradient has a fixed number of steps. Invalid
    weights raise ValueError.
    """
    starting_angles = angles(read)
    sizes = [jnp.where(size > 0, size, 1) for size in starting_angles.lengths]
    start = multi_slerp_shares(starting_angles, weights)
    weights = _normalized(weights, sizes)
    length = _sum_of(starting_angles.lengths, weights)
    # The point is a sum of the vectors with these shares.
    point = [share / jnp.where(length > 0, length, 1) for share in start]
    for _ in range(iterations):
        cosines = _sum_of_pieces(_cosines, read, point, sizes)
        tangent = _tangent(point, cosines, sizes, weights, tolerance)
        square = _sum_of_pieces(_square, read, tangent)
        point, is_moving = _step(point, tangent, square, tolerance)
        if (concrete := _checks.concrete(is_moving)) is not None and not concrete.any():
            break
    return [length * share for share in point]


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
      t: 0 gives the source, 1 the target; leaves that match no rule stay the source's.
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
        shares = slerp_shares(_angles_of_leaves([a, b], axis), share, threshold=threshold)
        return _sum_of([a, b], shares)

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
        mean = _sum_of(vectors, multi_slerp_shares(_angles_of_leaves(vectors), by_leaf[i]))
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
        return _sum_of(leaves, shares)

    return _leaves.combine_leaves(formula, trees_by_name, [by_leaf])


def model_stock(
    base: Params, models: Sequence[Params], *, axis: int | None = None, floor: Scalar = 0.0
) -> Params:
    """`t mean_i theta_i + (1 - t) base` with `t = N c / (1 + (N - 1) c)`, of N >= 2 models.

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
        shares = model_stock_shares(
            _angles_of_leaves(deltas, axis), floor=_numerics.scalar(floor, start)
        )
        return start + _sum_of(deltas, shares)

    trees_by_name = {"base": base} | _leaves.name_members("models", models)
    return _leaves.combine_leaves(formula, trees_by_name, [])


def _floored_cosine(angles: Angles, i: int, j: int, floor: Scalar) -> Array:
    """A cosine that shrinks where the product of the lengths is below `floor`."""
    product = angles.lengths[i] * angles.lengths[j]
    is_small = product < floor
    return jnp.where(
        is_small,
        angles.cosines[i][j] * product / jnp.where(is_small, floor, 1),
        angles.cosines[i][j],
    )


def _angles_of_leaves(vectors: Sequence[Array], axis: int | None = None) -> Angles:
    """The angles of leaves; a leaf of fewer than two axes is one vector."""
    rank = vectors[0].ndim
    axis = None if axis is None or rank < 2 or not -rank <= axis < rank else axis
    if axis is None or (rank == 2 and axis in (0, -2)):  # columns add up over blocks of rows
        return angles(lambda: _blocks.row_blocks(vectors), axis)
    return angles(lambda: [vectors], axis)


def _tops(read: Read, axis: int | None) -> list[Array]:
    """Each vector's largest entry, by which it is divided so that squares do not underflow."""
    tops: Any = None
    for pieces in read():
        largest = _largest(pieces, axis)
        tops = largest if tops is None else list(map(jnp.maximum, tops, largest))
    return [jnp.where((top > 0) & jnp.isfinite(top), top, 1) for top in tops]


def _normalized(weights: Sequence[Scalar] | None, lengths: Sequence[Array]) -> list[Array]:
    weights = [1.0] * len(lengths) if weights is None else weights
    shares = [_numerics.cast(w, lengths[0]) for w in weights]
    return [share / _leaves.total(shares) for share in shares]


def _sum_of(vectors: Sequence[Array], shares: Sequence[Array]) -> Array:
    """`sum_i share_i v_i` of vectors of one shape, and of that shape."""
    return _leaves.total([share * vector for share, vector in zip(shares, vectors, strict=True)])


# All callers share one program per kind of piece, so sums over pieces are equal bit for bit.


@functools.partial(jax.jit, static_argnums=1)
def _largest(pieces: Sequence[Array], axis: int | None) -> list[Array]:
    pieces = jax.lax.stop_gradient(list(pieces))
    return [jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None, initial=0) for x in pieces]


@functools.partial(jax.jit, static_argnums=2)
def _products(
    pieces: Sequence[Array], tops: Sequence[Array], axis: int | None
) -> list[list[Array]]:
    rows = [x / top for x, top in zip(pieces, tops, strict=True)]

    def product(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=axis, keepdims=axis is not None)

    return [[product(a, b) for b in rows[: i + 1]] for i, a in enumerate(rows)]


@jax.jit
def _cosines(pieces: Sequence[Array], shares: Sequence[Array], sizes: Sequence[Array]) -> Any:
    point = _sum_of(pieces, shares)
    return [jnp.sum(x / size * point) for x, size in zip(pieces, sizes, strict=True)]


@jax.jit
def _square(pieces: Sequence[Array], shares: Sequence[Array]) -> Array:
    return jnp.sum(jnp.square(_sum_of(pieces, shares)))


def _sum_of_pieces(program: Any, read: Read, *args: Any) -> Any:
    terms = [program(pieces, *args) for pieces in read()]
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), terms)


@jax.jit
def _tangent(
    point: Sequence[Array],
    cosines: Sequence[Array],
    sizes: Sequence[Array],
    weights: Sequence[Array],
    tolerance: float,
) -> list[Array]:
    """The shares of `sum w_i (a_i / sin a_i) (u_i - cos(a_i) point)`, without near vectors."""
    factors = []
    for weight, cosine in zip(weights, cosines, strict=True):
        # The direction to an opposite vector is undefined, and its computed value is noise.
        is_undefined = (cosine >= 1) | (cosine <= 16 * float(jnp.finfo(cosine.dtype).eps) - 1)
        angle = jnp.where(is_undefined, 0, jnp.arccos(jnp.where(is_undefined, 0, cosine)))
        is_far = angle >= tolerance
        factors.append(weight * jnp.where(is_far, angle / jnp.where(is_far, jnp.sin(angle), 1), 0))
    radial = _sum_of(cosines, factors)
    rows = zip(factors, sizes, point, strict=True)
    return [factor / size - radial * share for factor, size, share in rows]


@jax.jit
def _step(
    point: Sequence[Array], tangent: Sequence[Array], square: Array, tolerance: float
) -> tuple[list[Array], Array]:
    """Steps along the tangent; also returns whether the tangent was large enough to do so."""
    norm = _numerics.safe_sqrt(square)
    is_moving = norm >= tolerance
    step_size = jnp.sin(norm) / jnp.where(is_moving, norm, 1)
    candidates = [
        jnp.cos(norm) * start + step_size * direction
        for start, direction in zip(point, tangent, strict=True)
    ]
    return [
        jnp.where(is_moving, end, start) for end, start in zip(candidates, point, strict=True)
    ], is_moving
