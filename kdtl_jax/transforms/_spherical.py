"""Merging on spheres, leaf by leaf: SLERP, its forms for several models, and Model Stock.

Each leaf is one vector, or with `axis` each of its rows (`axis=-1`: the last index runs along a
row; the weights of one output of a flax kernel `[in, out]` run along `axis=-2`).

Every method is a weighted sum of the models, or of their task vectors, whose shares follow from
lengths and angles alone (`angles`). So leaves larger than memory are merged in pieces: their angles
by passes over the pieces, then `sum(share_i * piece_i)`.
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

# Directions cancel below this share of their length: what is left is rounding, amplified.
_CANCELED = 1e-3


class Angles(NamedTuple):
    """How long vectors are and how they lie; with `axis`, arrays of one number per row."""

    lengths: Sequence[Array]
    cosines: Sequence[Sequence[Array]]  # 0 for zero vectors, 1 of a vector with itself


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
      source: any pytree.
      target: the same structure and shapes.
      t: 0 gives the source, 1 the target; a number, traced scalar, or one number per leaf;
        leaves that no rule names stay the source's.
      axis: along which a leaf's rows run; None, or a leaf of fewer axes, is one vector.
      threshold: of the cosine's size. 1.0 with `axis=-1` is mergekit's NuSLERP.

    Returns:
      A tree with the structure and dtypes of the source.

    Raises:
      ValueError: if names or shapes differ.

    References:
      Shoemake, Animating rotation with quaternion curves, 1985; mergekit's `slerp`.
    """
    _checks.scalar(threshold=threshold)
    _checks.finite(threshold=threshold)
    values = _leaves.coefficients(t, source)

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        if values[i] is None:
            return a
        share = _numerics.scalar(values[i], a)
        return _mixed([a, b], slerp_shares(_angles([a, b], axis), share, threshold=threshold))

    return _leaves.combine_leaves(formula, {"source": source, "target": target}, [values])


def multi_slerp(
    base: Params | None, models: Sequence[Params], weights: Weights | None = None
) -> Params:
    """The mean direction of several models' changes, times their mean length.

    With `u_i` the direction of `theta_i - base`: `sum w_i u_i / |sum w_i u_i| * sum w_i |theta_i -
    base|`. (mergekit then steps along the mean tangent at that direction, which is 0.) Where the
    directions cancel there is no mean direction, and the differences are averaged instead.

    Args:
      base: the common starting point; None is zero.
      models: a list of trees of its structure.
      weights: None for equal ones, else one per model; normalized to sum 1.

    Returns:
      A tree with the structure and dtypes of the base, or of the first model.

    Raises:
      ValueError: if names, shapes or the number of weights differ, or the weights sum to 0.

    References:
      mergekit's `multislerp` (2403.13257).
    """
    named = ({} if base is None else {"base": base}) | _leaves.numbered("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        vectors = leaves if base is None else [leaf - leaves[0] for leaf in leaves[1:]]
        _leaves.nonzero_total(path, by_leaf[i])
        moved = _mixed(vectors, multi_slerp_shares(_angles(vectors), by_leaf[i]))
        return moved if base is None else leaves[0] + moved

    return _leaves.combine_leaves(formula, named, [by_leaf])


def karcher_mean(
    models: Sequence[Params],
    weights: Weights | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Params:
    """The point of the sphere nearest to all models' directions, times their mean length.

    Fixed-point iteration with the tangent `T = sum w_i (a_i / sin a_i) (u_i - cos(a_i) u)`, stopped
    where `|T| < tolerance`; models nearer than `tolerance` are left out of it.

    Args:
      models: a list of trees of one structure.
      weights: None for equal ones, else one per model; normalized to sum 1.
      iterations: at most this many.
      tolerance: radians, >= 0.

    Returns:
      A tree with the structure and dtypes of the first model.

    Raises:
      ValueError: if names, shapes or the number of weights differ, or the weights sum to 0.

    References:
      Karcher, Riemannian center of mass, 1977; mergekit's `karcher` (2403.13257).
    """
    _checks.scalar(tolerance=tolerance)
    _checks.non_negative(tolerance=tolerance)
    _checks.count(0, iterations=iterations)
    named = _leaves.numbered("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        _leaves.nonzero_total(path, by_leaf[i])
        read = functools.partial(_blocks.row_blocks, leaves)
        shares = karcher_shares(read, by_leaf[i], iterations=iterations, tolerance=tolerance)
        return _mixed(leaves, shares)

    return _leaves.combine_leaves(formula, named, [by_leaf])


def model_stock(
    base: Params, models: Sequence[Params], *, axis: int | None = None, floor: Scalar = 0.0
) -> Params:
    """`t mean_i theta_i + (1 - t) base` with `t = N c / (1 + (N - 1) c)`.

    `c` is the mean cosine over pairs of task vectors: models that moved in the same direction are
    trusted, models that moved apart are pulled back to the base. Where they cancel
    (`1 + (N - 1) c` below 1e-3, as of two opposite changes) t has no finite value, and the base is
    kept.

    Args:
      base: pretrained parameters.
      models: fine-tuned models, two or more.
      axis: None takes a leaf as one vector, else the axis along which its rows run, each
        with a ratio of its own (leaves of fewer axes are one vector).
      floor: `c` divides by the product of two lengths, or by this if it is larger (squared units of
        the weights). mergekit's 1e-6 pulls small changes back to the base.

    Returns:
      A tree with the structure and dtypes of the base.

    Raises:
      ValueError: if there are fewer than two models, names or shapes differ, or `floor < 0`.

    References:
      Jang, Yun and Han, Model Stock: All we need is just a few fine-tuned models, 2024
      (2403.19522), for two models and more; t is not clamped there nor here.
    """
    if len(models) < 2:
        raise ValueError(f"expected two or more models, got {len(models)}.")
    _checks.non_negative(floor=floor)

    def formula(i: int, path: str, start: Array, *leaves: Array) -> Array:
        deltas = [leaf - start for leaf in leaves]
        shares = model_stock_shares(_angles(deltas, axis), floor=_numerics.scalar(floor, start))
        return start + _mixed(deltas, shares)

    named = {"base": base} | _leaves.numbered("models", models)
    return _leaves.combine_leaves(formula, named, [])


# --- shares from angles --------------------------------------------------------------------------


def angles(read: Read, axis: int | None = None) -> Angles:
    """Lengths and cosines of N vectors, whose pieces `read()` yields side by side.

    Args:
      read: called twice; must yield the same pieces each time, which may be read from files.
      axis: None takes each vector as one; else the axis of the rows: they lie whole in a piece, or
        the pieces are parts of each (blocks `[n, ...]` for axis 0).
    """
    tops = _tops(read, axis)
    products: Any = None
    for pieces in read():
        found = _products(pieces, tops, axis)
        products = found if products is None else jax.tree.map(jnp.add, products, found)
    sizes = [_numerics.safe_sqrt(row[-1]) for row in products]

    def cosine(i: int, j: int) -> Array:
        both = sizes[i] * sizes[j]
        return jnp.clip(products[max(i, j)][min(i, j)] / jnp.where(both > 0, both, 1), -1, 1)

    count = range(len(tops))
    lengths = [size * top for size, top in zip(sizes, tops, strict=True)]
    return Angles(lengths, [[cosine(i, j) for j in count] for i in count])


def slerp_shares(found: Angles, t: Scalar, *, threshold: float = 0.9995) -> list[Array]:
    """The shares of two vectors, `t` of the way from the first to the second: see `slerp`."""
    cosine = found.cosines[0][1]
    t = _numerics.cast(t, cosine)
    # Nearer to 1 than rounding tells, the angle is noise.
    limit = min(threshold, 1 - 4 * float(jnp.finfo(cosine.dtype).eps))
    linear = jnp.abs(cosine) > limit
    # The angle of the unused branch is harmless, so that its gradient is finite.
    angle = jnp.arccos(jnp.where(linear, 0, cosine))
    sine = jnp.sin(angle)
    first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / sine)
    return [first, jnp.where(linear, t, jnp.sin(t * angle) / sine)]


def multi_slerp_shares(found: Angles, weights: Sequence[Scalar] | None = None) -> list[Array]:
    """The shares of N vectors in `multi_slerp`; its weights."""
    weights = _of_sum_one(weights, found.lengths)
    pairs = [
        a * b * cosine
        for a, row in zip(weights, found.cosines, strict=True)
        for b, cosine in zip(weights, row, strict=True)
    ]
    mean = _numerics.safe_sqrt(_total(pairs))
    cancels = mean <= _CANCELED
    length = _mixed(found.lengths, weights) / jnp.where(cancels, 1, mean)
    return [
        jnp.where(cancels, weight, length * weight / jnp.where(size > 0, size, 1))
        for weight, size in zip(weights, found.lengths, strict=True)
    ]


def model_stock_shares(found: Angles, *, floor: Scalar = 0.0) -> list[Array]:
    """The shares of N task vectors in `model_stock`."""
    count = len(found.lengths)
    cosine = _total([_floored(found, i, j, floor) for i in range(count) for j in range(i)])
    cosine = cosine / (count * (count - 1) / 2)
    below = 1 + (count - 1) * cosine
    canceled = jnp.abs(below) < _CANCELED
    return [jnp.where(canceled, 0, cosine / jnp.where(canceled, 1, below))] * count


def karcher_shares(
    read: Read,
    weights: Sequence[Scalar] | None = None,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> list[Array]:
    """The shares of N vectors in `karcher_mean`; its weights.

    `read()` as in `angles`, called twice an iteration. Known tangents end the iteration; traced
    ones do not, so that the gradient has a fixed number of steps. ValueError: for other weights.
    """
    found = angles(read)
    sizes = [jnp.where(size > 0, size, 1) for size in found.lengths]
    start = multi_slerp_shares(found, weights)
    weights = _of_sum_one(weights, sizes)
    length = _mixed(found.lengths, weights)
    # The point is a sum of the vectors with these shares.
    point = [share / jnp.where(length > 0, length, 1) for share in start]
    for _ in range(iterations):
        cosines = _sum_of_pieces(_cosines, read, point, sizes)
        tangent = _tangent(point, cosines, sizes, weights, tolerance)
        square = _sum_of_pieces(_square, read, tangent)
        point, goes = _moved(point, tangent, square, tolerance)
        if (known := _checks.concrete(goes)) is not None and not known.any():
            break
    return [length * share for share in point]


def _floored(found: Angles, i: int, j: int, floor: Scalar) -> Array:
    """A cosine that shrinks where the product of the lengths is below `floor`."""
    product = found.lengths[i] * found.lengths[j]
    small = product < floor
    return jnp.where(
        small, found.cosines[i][j] * product / jnp.where(small, floor, 1), found.cosines[i][j]
    )


def _angles(vectors: Sequence[Array], axis: int | None = None) -> Angles:
    """The angles of leaves; a leaf of fewer than two axes is one vector."""
    rank = vectors[0].ndim
    axis = None if axis is None or rank < 2 or not -rank <= axis < rank else axis
    if axis is None or (rank == 2 and axis in (0, -2)):  # columns add up over blocks of rows
        return angles(lambda: _blocks.row_blocks(vectors), axis)
    return angles(lambda: [vectors], axis)


def _tops(read: Read, axis: int | None) -> list[Array]:
    """Each vector's largest entry, by which it is divided: squares must not underflow."""
    tops: Any = None
    for pieces in read():
        found = _largest(pieces, axis)
        tops = found if tops is None else list(map(jnp.maximum, tops, found))
    return [jnp.where((top > 0) & jnp.isfinite(top), top, 1) for top in tops]


def _of_sum_one(weights: Sequence[Scalar] | None, like: Sequence[Array]) -> list[Array]:
    weights = [1.0] * len(like) if weights is None else weights
    shares = [_numerics.cast(w, like[0]) for w in weights]
    return [share / _total(shares) for share in shares]


def _mixed(vectors: Sequence[Array], shares: Sequence[Array]) -> Array:
    return _total([share * vector for share, vector in zip(shares, vectors, strict=True)])


def _total(terms: Sequence[Array]) -> Array:
    return sum(terms[1:], terms[0])


# One program per kind of piece, whoever asks: what is summed over pieces is equal bit for bit.


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
    point = _mixed(pieces, shares)
    return [jnp.sum(x / size * point) for x, size in zip(pieces, sizes, strict=True)]


@jax.jit
def _square(pieces: Sequence[Array], shares: Sequence[Array]) -> Array:
    return jnp.sum(jnp.square(_mixed(pieces, shares)))


def _sum_of_pieces(program: Any, read: Read, *args: Any) -> Any:
    found = [program(pieces, *args) for pieces in read()]
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), found)


@jax.jit
def _tangent(
    point: Sequence[Array],
    cosines: Sequence[Array],
    sizes: Sequence[Array],
    weights: Sequence[Array],
    tolerance: float,
) -> list[Array]:
    """The shares of `sum w_i (a_i / sin a_i) (u_i - cos(a_i) point)`; near vectors left out."""
    factors = []
    for weight, cosine in zip(weights, cosines, strict=True):
        near = jnp.abs(cosine) >= 1
        angle = jnp.where(near, 0, jnp.arccos(jnp.where(near, 0, cosine)))
        moves = angle >= tolerance
        factors.append(weight * jnp.where(moves, angle / jnp.where(moves, jnp.sin(angle), 1), 0))
    back = _mixed(cosines, factors)
    rows = zip(factors, sizes, point, strict=True)
    return [factor / size - back * share for factor, size, share in rows]


@jax.jit
def _moved(
    point: Sequence[Array], tangent: Sequence[Array], square: Array, tolerance: float
) -> tuple[list[Array], Array]:
    """A step along the tangent, and whether it was worth one."""
    norm = _numerics.safe_sqrt(square)
    goes = norm >= tolerance
    along = jnp.sin(norm) / jnp.where(goes, norm, 1)
    moved = [jnp.cos(norm) * old + along * step for old, step in zip(point, tangent, strict=True)]
    return [jnp.where(goes, new, old) for new, old in zip(moved, point, strict=True)], goes
