"""Numerics that are part of a loss's meaning.

Log space, accumulation in float32 or wider, `0 log 0 = 0`, zero (never NaN) gradients of norms at
zero, masked entries finite in value and gradient. Guards use a double `where`: the unsafe branch is
evaluated on a harmless value, because `where(mask, nan, 0)` still has a NaN gradient. A guard tests
whether a value *is* the special case (`== 0`, `!= -inf`), so NaN passes through and stays visible.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

UNIT = 2.0**80  # scales values that are too small or too large to be squared


def upcast(x: Array) -> Array:
    """Widens half precisions to float32, before any arithmetic."""
    is_half = jnp.finfo(jnp.result_type(x)).bits < 32
    return jnp.asarray(x, jnp.float32) if is_half else jnp.asarray(x)


def cast(x: float | Array, like: Array, name: str = "this number") -> Array:
    """Converts to the dtype of `like` (no weak types, no silent promotion, no lost part)."""
    if x is None or isinstance(x, (bool, str)):
        raise TypeError(f"{name} must be a number, got {x!r:.80}.")
    value = jnp.asarray(x)
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(like):
        raise TypeError(f"{name} must be real, got {value.dtype}: pass its real part.")
    return value.astype(like.dtype)


def scalar(x: float | Array, like: Array, name: str = "this hyper-parameter") -> Array:
    """A scalar hyper-parameter in the dtype of `like`; `[B]` would broadcast along another axis."""
    value = cast(x, like, name)
    if value.ndim:
        raise ValueError(
            f"{name} must be one number, got shape {list(value.shape)}. Weigh examples in the "
            "objective, or call the function once per value (jax.vmap)."
        )
    return value


def per_example(x: float | Array, like: Array, name: str = "this hyper-parameter") -> Array:
    """A scalar or `[B]` hyper-parameter, shaped to broadcast over the rest of `like`.

    Raises:
      ValueError: if it is neither: `[B, 1]` against `[B]` would silently make `[B, B]`.
    """
    value = cast(x, like, name)
    if value.shape != like.shape[: value.ndim]:
        raise ValueError(
            f"{name} must be one number or one per example {list(like.shape)}, got shape "
            f"{list(value.shape)}. Reshape it, e.g. jnp.squeeze({name.split()[-1]}, axis=-1)."
        )
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def kept(x: Array, where: Array | None) -> Array:
    """Replaces masked positions (leading axes) of x by 0, whatever their values.

    Masks are applied before any arithmetic: an inf that is dropped afterwards still has a NaN
    gradient.
    """
    if where is None:
        return x
    x = jnp.asarray(x)
    rows = where.reshape(where.shape + (1,) * (x.ndim - where.ndim))
    return jnp.where(rows, x, jnp.zeros((), x.dtype))


def usable_labels(
    labels: Array, num_classes: int, where: Array | None = None
) -> tuple[Array, Array]:
    """Labels with 0 where they are masked or out of range, and bool: where they are usable."""
    labels = jnp.asarray(labels)
    if labels.dtype.itemsize < 4:  # num_classes need not fit
        labels = labels.astype(jnp.int32)
    usable = (labels >= 0) & (labels < num_classes)
    if where is not None:
        usable &= where
    return jnp.where(usable, labels, 0), usable


def at_usable(values: Array, usable: Array, where: Array | None = None) -> Array:
    """The values of a loss with labels: 0 where masked, NaN where a label is out of range.

    The gradient is 0 in both cases, so a mask applied later leaves no NaN.
    """
    values = jnp.where(usable, values, jnp.nan)
    return values if where is None else jnp.where(where, values, 0)


def nan_of(value: Array, source: Array) -> Array:
    """`value`, but NaN where `source` is NaN, which a comparison would hide."""
    return jnp.where(jnp.isnan(source), jnp.nan, value)


def nonzero(x: Array) -> Array:
    """`x` as a divisor: 1 where it is 0."""
    return jnp.where(x != 0, x, 1)


def ratio(x: Any, y: Array, otherwise: Any = 0) -> Array:
    """`x / y`; where y is 0, `otherwise`, and no NaN in the gradient."""
    return jnp.where(y != 0, x / nonzero(y), otherwise)


def log1mexp(x: Array) -> Array:
    """`log(1 - exp(x))` for x <= 0, stable at both ends; -inf at 0 with a finite gradient."""
    is_negative = ~(x >= 0)
    return jnp.where(is_negative, _log1mexp(jnp.where(is_negative, x, -1)), -jnp.inf)


@jax.custom_jvp
def _log1mexp(x: Array) -> Array:
    return jax.nn.log1mexp(-x)


@_log1mexp.defjvp
def _log1mexp_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX's own has exp(-x) in its second derivative, which overflows below -88.
    (x,), (tangent,) = primals, tangents
    return _log1mexp(x), tangent * (jnp.exp(x) / jnp.expm1(x))


def safe_sqrt(x: Array) -> Array:
    """`sqrt` with gradient 0, not infinity, at 0; 0 for negative values."""
    is_positive = ~(x <= 0)
    return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1)), 0)


def safe_rsqrt(x: Array) -> Array:
    """`1 / sqrt(x)`, but 0 with gradient 0 at 0, so that constant features are normalized to 0."""
    return jnp.where(x == 0, 0, jax.lax.rsqrt(jnp.where(x == 0, 1, x)))


def safe_norm(x: Array, *, axis: int | tuple[int, ...] = -1, keepdims: bool = False) -> Array:
    """Euclidean norm with gradient 0 at 0, and no overflow of the squares."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    norm = safe_sqrt(jnp.sum(jnp.square(x / scale), axis=axis, keepdims=True)) * scale
    return norm if keepdims else jnp.squeeze(norm, axis=axis)


def rescaled(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """Divides `x` by its largest entry, a constant, for functions that do not depend on its scale.

    Products then neither underflow nor overflow, for any unit of the features.
    """
    return x / largest(x, axis=axis)


def largest(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """The largest absolute entry, a constant; 1 where it is 0 or not finite."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None))
    return jnp.where((top != 0) & jnp.isfinite(top), top, 1)


def normalize(x: Array, *, axis: int | tuple[int, ...] = -1) -> Array:
    """`x / ||x||` at any scale of float32, in its dtype; a zero vector stays zero with gradient 0.

    There is no floor: torch's `normalize` leaves vectors shorter than 1e-12 shorter than 1.
    """
    return _unit(upcast(x), axis).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    return x * _inverse_norm(x, axis)


@_unit.defjvp
def _unit_jvp(
    axis: int | tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # The closed form: the derivative of rsqrt leaves the range if norms exceed 1e12.
    (x,), (tangent,) = primals, tangents
    direction = _unit(x, axis)
    parallel = direction * jnp.sum(direction * tangent, axis=axis, keepdims=True)
    return direction, (tangent - parallel) * _inverse_norm(x, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse_norm(x: Array, axis: int | tuple[int, ...]) -> Array:
    """`1 / ||x||`, 0 for a zero vector; squares are summed in three units, one of which fits."""
    if x.size == 1:  # XLA rewrites the square of a product of scalars as a product of squares
        return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, jnp.abs(x)))
    squares, small_squares, large_squares = (
        jnp.sum(jnp.square(x * factor), axis=axis, keepdims=True) for factor in (1, UNIT, 1 / UNIT)
    )
    is_small, is_large = squares < 1e-30, squares > 1e30
    is_zero = small_squares == 0
    regular = jax.lax.rsqrt(jnp.where(is_small, 1, squares))
    small = jax.lax.rsqrt(jnp.where(is_zero, 1, small_squares)) * UNIT
    inverse = jnp.where(
        is_small, small, jnp.where(is_large, jax.lax.rsqrt(large_squares) / UNIT, regular)
    )
    return jnp.where(is_zero, 0, inverse)


@_inverse_norm.defjvp
def _inverse_norm_jvp(
    axis: int | tuple[int, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    # Second derivatives of a direction; the units that do not fit would make them NaN.
    (x,), (tangent,) = primals, tangents
    inverse = _inverse_norm(x, axis)
    parallel = jnp.sum(_unit(x, axis) * tangent, axis=axis, keepdims=True)
    return inverse, -(parallel * inverse) * inverse


def masked_mean(
    x: Array, where: Array | None = None, *, axis: int | tuple[int, ...] | None = None
) -> Array:
    """Mean over the entries where `where` is true; 0 (not NaN) if there are none."""
    if where is None:
        return jnp.mean(x, axis=axis)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=axis, dtype=x.dtype)
    return jnp.sum(jnp.where(where, x, 0), axis=axis) / jnp.maximum(count, 1)


def row_count(x: Array, where: Array | None) -> Array:
    """The number of included rows of `x`, at least 1, as a scalar of its dtype."""
    if where is None:
        return jnp.asarray(max(x.shape[0], 1), x.dtype)
    return jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)


def row_mean(x: Array, where: Array | None = None) -> Array:
    """Mean over the included rows, `[B, ...] -> [1, ...]`."""
    if where is None:
        return jnp.mean(x, axis=0, keepdims=True)
    return jnp.sum(kept(x, where), axis=0, keepdims=True) / row_count(x, where)


def centered(x: Array, where: Array | None = None) -> Array:
    """Included rows minus their mean; the other rows are 0."""
    return kept(x - row_mean(x, where), where)


def batch_flat(x: Array) -> Array:
    """`[B, ...] -> [B, D]`."""
    return x.reshape(x.shape[0], -1)


def gram(x: Array, y: Array) -> Array:
    """`x y^T` over the last two axes: `[..., n, d], [..., m, d] -> [..., n, m]`.

    Computed in full precision: otherwise accelerators round the factors to 8 or 11 bits, and
    distances and correlations are differences of these products.
    """
    return jnp.einsum("...nd,...md->...nm", x, y, precision=jax.lax.Precision.HIGHEST)
