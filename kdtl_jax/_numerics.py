"""Numerics that are part of a loss's meaning.

Log space, float32 accumulation or wider, `0 log 0 = 0`, zero (never NaN) gradients of norms at
zero, masked entries finite in value and gradient. Guards use a double `where`: the unsafe branch is
evaluated on a harmless value, because `where(mask, nan, 0)` still has a NaN gradient. A guard asks
whether something *is* the special case (`== 0`, `!= -inf`), so that NaN passes and is seen.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Where `|log p - log q|` is below this, differences of p and q go by series. Smaller would be
# cheaper and lose digits: sharp distributions know p and q to 1e-5 only, but log p - log q to 1e-7.
NEAR = 1.0
UNIT = 2.0**80  # by which what is too small, or too large, to be squared is multiplied
FEW = 32  # so many classes or fewer are summed over the outermost axis


def upcast(x: Array) -> Array:
    """float32 or wider: half precisions are widened before any arithmetic."""
    half = jnp.finfo(jnp.result_type(x)).bits < 32
    return jnp.asarray(x, jnp.float32) if half else jnp.asarray(x)


def cast(x: float | Array, like: Array) -> Array:
    """An array in the dtype of `like` (no weak types, no silent promotion, no part lost)."""
    value = jnp.asarray(x)
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(like):
        raise TypeError(f"this number must be real, got {value.dtype}: pass its real part.")
    return value.astype(like.dtype)


def scalar(x: float | Array, like: Array) -> Array:
    """A scalar hyper-parameter in the dtype of `like`; `[B]` would broadcast along another axis."""
    value = cast(x, like)
    if value.ndim:
        raise ValueError(
            f"this hyper-parameter must be one number, got shape {list(value.shape)}. Weigh "
            "examples in the objective, or call the function once per value (jax.vmap)."
        )
    return value


def per_example(x: float | Array, like: Array) -> Array:
    """A scalar or `[B]` hyper-parameter, shaped to broadcast over the rest of `like`.

    Raises:
      ValueError: if it is neither: `[B, 1]` against `[B]` would silently make `[B, B]`.
    """
    value = cast(x, like)
    if value.shape != like.shape[: value.ndim]:
        raise ValueError(
            f"a hyper-parameter must be one number or one per example {list(like.shape)}, got "
            f"shape {list(value.shape)}. Reshape it, e.g. jnp.squeeze(value, axis=-1)."
        )
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def kept(x: Array, where: Array | None) -> Array:
    """x with 0 at the masked positions (leading axes), whatever stood there.

    Masks go in before any arithmetic: an inf that is dropped only afterwards still has a NaN
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
    """Labels with 0 in place of those that are masked or out of range, and bool: which are not."""
    labels = jnp.asarray(labels)
    if labels.dtype.itemsize < 4:  # num_classes need not fit
        labels = labels.astype(jnp.int32)
    usable = (labels >= 0) & (labels < num_classes)
    if where is not None:
        usable &= where
    return jnp.where(usable, labels, 0), usable


def at_usable(values: Array, usable: Array, where: Array | None = None) -> Array:
    """The values of a loss with labels: 0 where masked, NaN where a label is out of range.

    The gradient is 0 in both cases, so that a mask applied later leaves no NaN.
    """
    values = jnp.where(usable, values, jnp.nan)
    return values if where is None else jnp.where(where, values, 0)


def log_softmax(logits: Array, *, where: Array | None = None) -> Array:
    """`log softmax` over the last axis; excluded or -inf classes give -inf, never NaN.

    A row without any class is -inf throughout. Gradients are finite in every case: what is absent
    has a finite derivative by its own logit, and `exp(-inf) = 0` by all others.
    """
    logits = upcast(logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    top, total, _ = _softmax_parts(logits)
    return (logits - top) - jnp.log(total)


def softmax(logits: Array) -> Array:
    """`softmax` over the last axis in float32 or wider; -inf gives 0, a row of nothing zeros."""
    return _softmax_parts(upcast(logits))[2]


def finite_difference(p_logits: Array, q_logits: Array) -> Array:
    """`p_logits - q_logits`; 0 where either is -inf."""
    both = (p_logits != -jnp.inf) & (q_logits != -jnp.inf)
    return jnp.where(both, p_logits, 0) - jnp.where(both, q_logits, 0)


def log_ratio(
    p_logits: Array, q_logits: Array, log_p: Array, log_q: Array, difference: Array | None = None
) -> Array:
    """`log p - log q` over the last axis, relatively accurate also when p and q nearly agree.

    Subtracting two log-softmaxes loses the digits that they share. The difference of the logits
    keeps them, and what the two normalizers still get wrong is one number r per row, seen in
    `sum q expm1(d) = r`, which is 0 for the true ratio; one Newton step removes it. Entries outside
    either support, -inf among the logits, give 0. Give `difference` (`p_logits - q_logits`) where
    it is known better: that of the unsoftened logits, divided by the temperature once.
    """
    in_p, in_q = log_p != -jnp.inf, log_q != -jnp.inf
    both = in_p & in_q
    top_p, total_p, _ = _softmax_parts(p_logits)
    top_q, total_q, _ = _softmax_parts(q_logits)
    delta = finite_difference(p_logits, q_logits) if difference is None else difference
    shift = (top_p - top_q) + (jnp.log(total_p) - jnp.log(total_q))
    d = jnp.where(both, delta - shift, 0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    near = both & (jnp.abs(d) < NEAR)
    excess = jnp.where(near, q * _near_expm1(jnp.where(near, d, 0)), p - q)
    r = jnp.clip(jnp.sum(excess, axis=-1, keepdims=True), -0.5, 1)  # see `_compared`
    return jnp.where(both, d - jnp.log1p(jax.lax.stop_gradient(r)), 0)


def kl_terms(log_p: Array, log_q: Array, ratio: Array | None = None) -> Array:
    """Terms of `KL(p || q)`, each >= 0, summing to it when p and q are both normalized.

    `p (d + expm1(-d))` with `d = log p - log q`. The usual `p d` sums positive and negative terms
    that cancel; here nothing cancels, so the relative error stays near the float's own (1e-6
    in float32 where the plain sum reaches 1e-2). For `|d| >= 1` the equal form `p d + q - p`
    avoids `0 * inf`. A class absent from p contributes q, absent from both 0, absent from
    q alone +inf. Pass `log_ratio(...)` as `ratio` when the logits are at hand.
    """
    in_p, in_q = log_p != -jnp.inf, log_q != -jnp.inf
    both = in_p & in_q
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if ratio is None:
        ratio = jnp.where(both, log_p, 0) - jnp.where(both, log_q, 0)
    d = jnp.where(both, ratio, 0)
    near = jnp.abs(d) < NEAR
    terms = jnp.where(near, p * _near_expm1_plus(jnp.where(near, d, 0)), p * d + (q - p))
    return jnp.where(both, terms, jnp.where(in_p, jnp.inf, q))


def kl_from_logits(
    p_logits: Array,
    q_logits: Array,
    *,
    where: Array | None = None,
    difference: Array | None = None,
) -> Array:
    """`KL(softmax(z_p) || softmax(z_q))` over the last axis, to float accuracy at any distance.

    The derivative is the closed form, `p (d - KL)` for z_p and `q - p` for z_q: as accurate as the
    value, and cheaper than differentiating through its guards. `difference` is as of `log_ratio`.
    """
    p_logits, q_logits = upcast(p_logits), upcast(q_logits)
    if difference is None:
        difference = finite_difference(p_logits, q_logits)
    if where is not None:
        p_logits = jnp.where(where, p_logits, -jnp.inf)
        q_logits = jnp.where(where, q_logits, -jnp.inf)
    # Sums of a few numbers each are slow along the innermost axis: let rows run there.
    axis = 0 if p_logits.shape[-1] <= FEW else -1
    return _kl(*(jnp.moveaxis(x, -1, axis) for x in (p_logits, q_logits, difference)), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _kl(p_logits: Array, q_logits: Array, difference: Array, axis: int) -> Array:
    return _kl_value(_compared(p_logits, q_logits, difference, axis), axis)


@_kl.defjvp
def _kl_jvp(
    axis: int, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # The difference says more exactly what the logits say already: it adds no derivative.
    in_p, in_q, near, p, q, d, rest = found = _compared(*primals, axis)
    kl = _kl_value(found, axis)
    # A row with an infinite KL has no finite derivative; what remains is that of its finite part.
    level = jnp.expand_dims(jnp.where(jnp.isfinite(kl), kl, 0), axis)
    both = in_p & in_q
    by_p = jnp.where(both, p * (d - level), 0)
    # A class absent from p leaves q, one absent from q nothing.
    by_q = jnp.where(near, p * (rest - d), jnp.where(both, q - p, q))
    return kl, jnp.sum(by_p * tangents[0] + by_q * tangents[1], axis=axis)


class _Compared(NamedTuple):
    """Near is where both have the class and `|d| < NEAR`; d as of `log_ratio`."""

    in_p: Array
    in_q: Array
    near: Array
    p: Array
    q: Array
    ratio: Array
    rest: Array  # `d + expm1(-d)` where near


def _compared(p_logits: Array, q_logits: Array, difference: Array, axis: int) -> _Compared:
    """`log_softmax` and `log_ratio` of both in one pass: one exponential per logit.

    The exponentials of the normalizers serve again as probabilities, and the terms' `d + expm1(-d)`
    gives `p - q = p (d - rest)` for the derivative.
    """
    in_p, in_q = p_logits != -jnp.inf, q_logits != -jnp.inf
    both = in_p & in_q
    top_p, total_p, p = _softmax_parts(p_logits, axis)
    top_q, total_q, q = _softmax_parts(q_logits, axis)
    shift = (top_p - top_q) + (jnp.log(total_p) - jnp.log(total_q))
    d = jnp.where(both, difference - shift, 0)
    near = both & (jnp.abs(d) < NEAR)
    excess = jnp.where(near, q * _near_expm1(jnp.where(near, d, 0)), p - q)
    # Far above any use, at logits of 1e15, rounding leaves no correction but nonsense.
    r = jnp.clip(jnp.sum(excess, axis=axis, keepdims=True), -0.5, 1)
    d = jnp.where(both, d - jnp.log1p(jax.lax.stop_gradient(r)), 0)
    return _Compared(in_p, in_q, near, p, q, d, _near_expm1_plus(jnp.where(near, d, 0)))


def _softmax_parts(logits: Array, axis: int = -1) -> tuple[Array, Array, Array]:
    """`(top, sum exp(z - top), softmax)`; an empty row has `(0, 1, zeros)`.

    Guards of rows, not of elements: with a finite top, `exp(-inf - top) = 0` has derivative 0.
    """
    top = jnp.max(logits, axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top != -jnp.inf, top, 0))
    e = jnp.exp(logits - top)
    total = jnp.sum(e, axis=axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return top, total, e / total


def _kl_value(found: _Compared, axis: int) -> Array:
    in_p, in_q, near, p, q, d, rest = found
    terms = jnp.where(near, p * rest, p * d + (q - p))
    return jnp.sum(jnp.where(in_p & in_q, terms, jnp.where(in_p, jnp.inf, q)), axis=axis)


def _near_expm1(d: Array) -> Array:
    """`expm1(d)` for |d| < NEAR by its series: a few multiply-adds, no call, exact to rounding."""
    last = _last_power(d)
    series = jnp.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 0, -1):
        series = 1 / math.factorial(k) + series * d
    return d * series


def _near_expm1_plus(d: Array) -> Array:
    """`d + expm1(-d)` for |d| < NEAR, `d^2 / 2 - d^3 / 6 + ...`: nothing cancels near 0."""
    last = _last_power(d)
    series = jnp.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        series = 1 / math.factorial(k) - series * d
    return jnp.square(d) * series


def _last_power(d: Array) -> int:
    """The last power of the series that counts: `2 NEAR^(k - 2) / k!` passes below the rounding."""
    return 11 if jnp.finfo(d.dtype).bits <= 32 else 19


def nan_of(value: Array, source: Array) -> Array:
    """`value`, and NaN where `source` is NaN: what a comparison decides does not show it."""
    return jnp.where(jnp.isnan(source), jnp.nan, value)


def log1mexp(x: Array) -> Array:
    """`log(1 - exp(x))` for x <= 0, stable at both ends; -inf at 0 with a finite gradient."""
    inside = ~(x >= 0)
    return jnp.where(inside, jax.nn.log1mexp(jnp.where(inside, -x, 1)), -jnp.inf)


def safe_sqrt(x: Array) -> Array:
    """`sqrt` with gradient 0, not infinity, at 0; 0 below."""
    positive = ~(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def safe_norm(x: Array, *, axis: int | tuple[int, ...] = -1, keepdims: bool = False) -> Array:
    """Euclidean norm with gradient 0 at 0, and no overflow of the squares."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    scale = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
    norm = safe_sqrt(jnp.sum(jnp.square(x / scale), axis=axis, keepdims=True)) * scale
    return norm if keepdims else jnp.squeeze(norm, axis=axis)


def rescaled(x: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """`x` over its largest entry, a constant: for functions that do not depend on the scale of x.

    Their products then neither underflow nor overflow, whatever unit the features have.
    """
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None))
    return x / jnp.where((top != 0) & jnp.isfinite(top), top, 1)


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
    # The closed form: the derivative of rsqrt leaves the range where norms pass 1e12.
    (x,), (moved,) = primals, tangents
    direction = _unit(x, axis)
    along = direction * jnp.sum(direction * moved, axis=axis, keepdims=True)
    return direction, (moved - along) * _inverse_norm(x, axis)


def _inverse_norm(x: Array, axis: int | tuple[int, ...]) -> Array:
    """`1 / ||x||`, 0 of a zero vector; squares are summed in three units, of which one fits."""
    if x.size == 1:  # XLA takes the square of a product of scalars for a product of squares
        return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, jnp.abs(x)))
    squares, of_small, of_large = (
        jnp.sum(jnp.square(x * factor), axis=axis, keepdims=True) for factor in (1, UNIT, 1 / UNIT)
    )
    is_small, is_large = squares < 1e-30, squares > 1e30
    zero = of_small == 0
    usual = jax.lax.rsqrt(jnp.where(is_small, 1, squares))
    small = jax.lax.rsqrt(jnp.where(zero, 1, of_small)) * UNIT
    inverse = jnp.where(is_small, small, jnp.where(is_large, jax.lax.rsqrt(of_large) / UNIT, usual))
    return jnp.where(zero, 0, inverse)


def masked_mean(
    x: Array, where: Array | None = None, *, axis: int | tuple[int, ...] | None = None
) -> Array:
    """Mean over the entries where `where` holds; 0 (not NaN) when there are none."""
    if where is None:
        return jnp.mean(x, axis=axis)
    where = jnp.broadcast_to(where, x.shape)
    count = jnp.sum(where, axis=axis, dtype=x.dtype)
    return jnp.sum(jnp.where(where, x, 0), axis=axis) / jnp.maximum(count, 1)


def row_count(x: Array, where: Array | None) -> Array:
    """How many rows of `x` take part, at least 1, as a scalar of its dtype."""
    if where is None:
        return jnp.asarray(max(x.shape[0], 1), x.dtype)
    return jnp.maximum(jnp.sum(where, dtype=x.dtype), 1)


def row_mean(x: Array, where: Array | None = None) -> Array:
    """Mean over the rows that take part, `[B, ...] -> [1, ...]`."""
    if where is None:
        return jnp.mean(x, axis=0, keepdims=True)
    return jnp.sum(kept(x, where), axis=0, keepdims=True) / row_count(x, where)


def centered(x: Array, where: Array | None = None) -> Array:
    """Rows less the mean of those that take part; the others are 0."""
    return kept(x - row_mean(x, where), where)


def batch_flat(x: Array) -> Array:
    """`[B, ...] -> [B, D]`."""
    return x.reshape(x.shape[0], -1)


def gram(x: Array, y: Array) -> Array:
    """`x y^T` over the last two axes: `[..., n, d], [..., m, d] -> [..., n, m]`.

    In full precision: accelerators otherwise round the factors to 8 or 11 bits, and distances and
    correlations are differences of these products.
    """
    return jnp.einsum("...nd,...md->...nm", x, y, precision=jax.lax.Precision.HIGHEST)
