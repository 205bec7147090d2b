"""Merging on spheres, leaf by leaf: SLERP, its forms for several models, and Model Stock.

Each leaf is one vector, or with `axis` each of its rows (`axis=-1`: the last index runs along a
row; the weights of one output of a flax kernel `[in, out]` run along `axis=-2`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdtl_jax import _numerics
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _leaves
from kdtl_jax.transforms._leaves import Coefficient, Weights, flat_norm

# Directions cancel below this share of their length: what is left is rounding, amplified.
_CANCELED = 1e-4


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
    (`|cos a| > threshold`) are interpolated linearly.

    Args:
      source: any pytree.
      target: the same structure and shapes.
      t: 0 gives the source, 1 the target; a number, traced scalar, or one number per leaf;
        leaves that no rule names stay the source's.
      axis: None takes a leaf as one vector, else the axis along which its rows run (leaves
        of fewer axes are one vector).
      threshold: of the cosine's size. 1.0 with `axis=-1` is mergekit's NuSLERP.

    Returns:
      A tree with the structure and dtypes of the source.

    Raises:
      ValueError: if names or shapes differ.

    References:
      Shoemake, Animating rotation with quaternion curves, 1985; mergekit's `slerp`.
    """
    values = _leaves.coefficients(t, source)

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        if values[i] is None:
            return a
        return _slerp(a, b, _numerics.scalar(values[i], a), _row_axis(a, axis), threshold)

    return _leaves.combine_leaves(formula, {"source": source, "target": target}, [values])


def multi_slerp(
    base: Params | None, models: Sequence[Params], weights: Weights | None = None
) -> Params:
    """One step on the sphere for several models: their directions averaged in a tangent space.

    With `u_i` the direction of `theta_i - base`, `m` their normalized weighted mean and
    `T = sum w_i (u_i - <u_i, m> m)`, moves along `cos|T| m + sin|T| T/|T|`, as far as the
    weighted mean of the lengths. Where the directions cancel there is no mean direction, and the
    differences are averaged instead.

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
    named = _leaves.numbered("models", models)
    if base is not None:
        named = {"base": base} | named
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        start, leaves = (None, leaves) if base is None else (leaves[0], leaves[1:])
        return _multi_slerp(start, leaves, _shares(path, by_leaf[i], leaves[0]))

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
      tolerance: radians.

    Returns:
      A tree with the structure and dtypes of the first model.

    Raises:
      ValueError: if names, shapes or the number of weights differ, or the weights sum to 0.

    References:
      Karcher, Riemannian center of mass, 1977; mergekit's `karcher` (2403.13257).
    """
    named = _leaves.numbered("models", models)
    by_leaf = _leaves.weights_by_leaf(weights, len(models), models[0])

    def formula(i: int, path: str, *leaves: Array) -> Array:
        return _karcher(leaves, _shares(path, by_leaf[i], leaves[0]), iterations, tolerance)

    return _leaves.combine_leaves(formula, named, [by_leaf])


def model_stock(
    base: Params, models: Sequence[Params], *, axis: int | None = None, floor: Scalar = 0.0
) -> Params:
    """`t mean_i theta_i + (1 - t) base` with `t = N c / (1 + (N - 1) c)`.

    `c` is the mean cosine over pairs of task vectors: models that moved alike are trusted, models
    that moved apart are pulled back to the base. Where they cancel (`1 + (N - 1) c` below 1e-4, as
    of two opposite changes) t has no finite value, and the base is kept.

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
      ValueError: if there are fewer than two models, or names or shapes differ.

    References:
      Jang, Yun and Han, Model Stock: All we need is just a few fine-tuned models, 2024
      (2403.19522), eq. 7 (two models) and its extension; t is not clamped there nor here.
    """
    if len(models) < 2:
        raise ValueError(f"expected two or more models, got {len(models)}.")

    def formula(i: int, path: str, start: Array, *leaves: Array) -> Array:
        least = _numerics.scalar(floor, start)
        return _model_stock(start, leaves, least, _row_axis(start, axis))

    named = {"base": base} | _leaves.numbered("models", models)
    return _leaves.combine_leaves(formula, named, [])


def _row_axis(leaf: Array, axis: int | None) -> int | None:
    """The rows' axis, or None where the leaf is one vector anyway."""
    if axis is None or leaf.ndim < 2 or not -leaf.ndim <= axis < leaf.ndim:
        return None
    return axis


def _cosine(a: Array, b: Array, axis: int | None, floor: Scalar = 0.0) -> Array:
    """Cosine, `[]` or with the row axis kept at length 1; 0 for zero vectors.

    It shrinks where the product of the lengths is below `floor`.
    """
    keep = axis is not None
    cosine = jnp.clip(jnp.sum(_unit(a, axis) * _unit(b, axis), axis=axis, keepdims=keep), -1, 1)
    product = flat_norm(a, axis, keepdims=keep) * flat_norm(b, axis, keepdims=keep)
    small = product < floor
    return jnp.where(small, cosine * product / jnp.where(small, floor, 1), cosine)


# The formulas are compiled, so that what they compute on the way is fused and not held: a leaf
# costs its models and the result.


@functools.partial(jax.jit, static_argnums=3)
def _slerp(a: Array, b: Array, t: Array, axis: int | None, threshold: float) -> Array:
    cosine = _cosine(a, b, axis)
    linear = (jnp.abs(cosine) > threshold) | (jnp.abs(cosine) >= 1)
    # The angle of the unused branch is harmless, so that its gradient is finite.
    angle = jnp.arccos(jnp.where(linear, 0, cosine))
    sine = jnp.sin(angle)
    first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * angle) / sine)
    second = jnp.where(linear, t, jnp.sin(t * angle) / sine)
    return first * a + second * b


@jax.jit
def _multi_slerp(start: Array | None, leaves: Sequence[Array], shares: Sequence[Array]) -> Array:
    deltas = leaves if start is None else [leaf - start for leaf in leaves]
    units = [_unit(delta) for delta in deltas]
    total = _mix(shares, units)
    cancels = flat_norm(total) <= _CANCELED
    mean = _unit(total)
    tangent = total - _mix(shares, [jnp.sum(unit * mean) for unit in units]) * mean
    angle = flat_norm(tangent)
    length = _mix(shares, [flat_norm(delta) for delta in deltas])
    arc = length * (jnp.cos(angle) * mean + jnp.sinc(angle / jnp.pi) * tangent)
    moved = jnp.where(cancels, _mix(shares, deltas), arc)
    return moved if start is None else start + moved


@functools.partial(jax.jit, static_argnums=3)
def _model_stock(start: Array, leaves: Sequence[Array], floor: Array, axis: int | None) -> Array:
    count = len(leaves)
    deltas = [leaf - start for leaf in leaves]
    cosines = [_cosine(deltas[j], deltas[k], axis, floor) for j in range(count) for k in range(j)]
    cosine = sum(cosines[1:], cosines[0]) / len(cosines)
    below = 1 + (count - 1) * cosine
    canceled = jnp.abs(below) < _CANCELED
    share = jnp.where(canceled, 0, count * cosine / jnp.where(canceled, 1, below))
    return start + share * (sum(deltas[1:], deltas[0]) / count)


def _unit(x: Array, axis: int | None = None) -> Array:
    """The direction; a zero vector stays zero."""
    norm = flat_norm(x, axis, keepdims=axis is not None)
    return x / jnp.where(norm > 0, norm, 1)


def _shares(path: str, weights: Sequence[Scalar], like: Array) -> list[Array]:
    """Weights of sum 1."""
    _leaves.nonzero_total(path, weights)
    shares = [_numerics.scalar(w, like) for w in weights]
    return [share / sum(shares[1:], shares[0]) for share in shares]


def _mix(shares: Sequence[Array], vectors: Sequence[Array]) -> Array:
    terms = [share * vector for share, vector in zip(shares, vectors, strict=True)]
    return sum(terms[1:], terms[0])


@functools.partial(jax.jit, static_argnums=2)
def _karcher(
    leaves: Sequence[Array], shares: Sequence[Array], iterations: int, tolerance: float
) -> Array:
    """The number of steps is fixed, for the gradient."""
    norms = [flat_norm(leaf) for leaf in leaves]
    divisors = [jnp.where(norm > 0, norm, 1) for norm in norms]

    def body(_: Array, point: Array) -> Array:
        factors, steps = [], []
        for leaf, divisor, share in zip(leaves, divisors, shares, strict=True):
            cosine = jnp.clip(jnp.sum(leaf / divisor * point), -1, 1)
            near = jnp.abs(cosine) >= 1
            angle = jnp.where(near, 0, jnp.arccos(jnp.where(near, 0, cosine)))
            moves = angle >= tolerance
            factor = jnp.where(moves, angle / jnp.where(moves, jnp.sin(angle), 1), 0)
            factors.append(share * factor)
            steps.append(leaf / divisor - cosine * point)
        tangent = _mix(factors, steps)
        norm = flat_norm(tangent)
        goes = norm >= tolerance
        direction = tangent / jnp.where(goes, norm, 1)
        moved = _unit(jnp.cos(norm) * point + jnp.sin(norm) * direction)
        return jnp.where(goes, moved, point)

    start = _unit(_mix(shares, [_unit(leaf) for leaf in leaves]))
    point = jax.lax.fori_loop(0, iterations, body, start)
    return _mix(shares, norms) * point
