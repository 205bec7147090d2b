"""Softmax in log space, and Kullback-Leibler divergences to float accuracy at any distance.

`0 log 0 = 0`; classes with logit -inf are absent, with finite values and gradients. Guards are
those of `_numerics`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kdtl_jax import _numerics

# Where `|log p - log q|` is below this, differences of p and q use a series. A smaller value would
# be cheaper but lose digits: of sharp distributions, p and q are known to 1e-5, but log p - log q
# to 1e-7.
SERIES_RADIUS = 1.0
FEW_CLASSES = 32  # up to this many classes are summed over the outermost axis


def log_softmax(logits: Array, *, where: Array | None = None) -> Array:
    """`log softmax` over the last axis; excluded or -inf classes give -inf, never NaN.

    A row without classes is -inf throughout. Gradients are finite in every case: an absent class
    has a finite derivative with respect to its own logit, and `exp(-inf) = 0` with respect to all
    others.
    """
    logits = _numerics.upcast(logits)
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    top, total, _ = _softmax_parts(logits)
    return (logits - top) - jnp.log(total)


def softmax(logits: Array) -> Array:
    """`softmax` over the last axis in float32 or wider; -inf gives 0, an empty row zeros."""
    return _softmax_parts(_numerics.upcast(logits))[2]


def cross_entropy(logits: Array, labels: Array, where: Array | None = None) -> Array:
    """`-log softmax(z)_y`, `[..., classes]` and int `[...]` -> `[...]`, float32 or wider.

    0 where `where` masks the label, NaN where it is out of range; both with gradient 0. (optax
    counts a negative label from the last class.)
    """
    labels, usable = _numerics.usable_labels(labels, logits.shape[-1], where)
    values = optax.softmax_cross_entropy_with_integer_labels(_numerics.upcast(logits), labels)
    return _numerics.at_usable(values, usable, where)


def masked_difference(p_logits: Array, q_logits: Array) -> Array:
    """`p_logits - q_logits`; 0 where either is -inf."""
    is_finite = (p_logits != -jnp.inf) & (q_logits != -jnp.inf)
    return jnp.where(is_finite, p_logits, 0) - jnp.where(is_finite, q_logits, 0)


def log_ratio(p_logits: Array, q_logits: Array, difference: Array | None = None) -> Array:
    """`log p - log q` over the last axis, relatively accurate even if p and q nearly agree.

    Subtracting two log-softmaxes loses the digits that they share. The difference of the logits
    keeps them. The remaining error of the two normalizers is one number r per row, visible in
    `sum q expm1(d) = r`, which is 0 for the true ratio; one Newton step removes it. Entries outside
    either support (logits of -inf) give 0. Pass `difference` (`p_logits - q_logits`) if it is known
    more accurately: that of the unsoftened logits, divided by the temperature once.
    """
    if difference is None:
        difference = masked_difference(p_logits, q_logits)
    return _compare(p_logits, q_logits, difference, -1).ratio


def kl_terms(log_p: Array, log_q: Array, ratio: Array | None = None) -> Array:
    """Terms of `KL(p || q)`, each >= 0, which sum to it if p and q are both normalized.

    `p (d + expm1(-d))` with `d = log p - log q`. The usual `p d` sums positive and negative terms
    that cancel; here nothing cancels, so the relative error stays near the float's own (1e-6
    in float32 where the plain sum reaches 1e-2). For `|d| >= 1` the equal form `p d + q - p`
    avoids `0 * inf`. A class absent from p contributes q, absent from both 0, absent only from q
    +inf. Pass `log_ratio(...)` as `ratio` if the logits are available.
    """
    in_p, in_q = log_p != -jnp.inf, log_q != -jnp.inf
    in_both = in_p & in_q
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    d = masked_difference(log_p, log_q) if ratio is None else jnp.where(in_both, ratio, 0)
    is_near = jnp.abs(d) < SERIES_RADIUS
    terms = jnp.where(is_near, p * _near_expm1_plus(jnp.where(is_near, d, 0)), p * d + (q - p))
    return jnp.where(in_both, terms, jnp.where(in_p, jnp.inf, q))


def kl_from_logits(
    p_logits: Array,
    q_logits: Array,
    *,
    where: Array | None = None,
    difference: Array | None = None,
) -> Array:
    """`KL(softmax(z_p) || softmax(z_q))` over the last axis, to float accuracy at any distance.

    The derivative is the closed form, `p (d - KL)` for z_p and `q - p` for z_q: as accurate as the
    value, and cheaper than differentiating through its guards. `difference` is as in `log_ratio`.
    """
    p_logits, q_logits = _numerics.upcast(p_logits), _numerics.upcast(q_logits)
    if difference is None:
        difference = masked_difference(p_logits, q_logits)
    if where is not None:
        p_logits = jnp.where(where, p_logits, -jnp.inf)
        q_logits = jnp.where(where, q_logits, -jnp.inf)
    # Sums of few numbers are slow along the innermost axis: put the rows there.
    axis = 0 if p_logits.shape[-1] <= FEW_CLASSES else -1
    return _kl(*(jnp.moveaxis(x, -1, axis) for x in (p_logits, q_logits, difference)), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _kl(p_logits: Array, q_logits: Array, difference: Array, axis: int) -> Array:
    return _kl_value(_compare(p_logits, q_logits, difference, axis), axis)


@_kl.defjvp
def _kl_jvp(
    axis: int, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    # The difference restates the logits more accurately, so it adds no derivative.
    in_p, in_q, is_near, p, q, d, series = comparison = _compare(*primals, axis)
    kl = _kl_value(comparison, axis)
    # A row with an infinite KL has no finite derivative; only that of its finite part remains.
    finite_kl = jnp.expand_dims(jnp.where(jnp.isfinite(kl), kl, 0), axis)
    in_both = in_p & in_q
    p_derivative = jnp.where(in_both, p * (d - finite_kl), 0)
    # A class absent from p leaves q, one absent from q nothing.
    q_derivative = jnp.where(is_near, p * (series - d), jnp.where(in_both, q - p, q))
    return kl, jnp.sum(p_derivative * tangents[0] + q_derivative * tangents[1], axis=axis)


class _Comparison(NamedTuple):
    """`is_near`: both have the class and `|d| < SERIES_RADIUS`, with d as in `log_ratio`."""

    in_p: Array
    in_q: Array
    is_near: Array
    p: Array
    q: Array
    ratio: Array
    series: Array  # `d + expm1(-d)` where `is_near`


def _compare(p_logits: Array, q_logits: Array, difference: Array, axis: int) -> _Comparison:
    """`log_softmax` and `log_ratio` of both in one pass: one exponential per logit.

    The exponentials of the normalizers are reused as probabilities, and the terms' `d + expm1(-d)`
    gives `p - q = p (d - series)` for the derivative.
    """
    in_p, in_q = p_logits != -jnp.inf, q_logits != -jnp.inf
    in_both = in_p & in_q
    top_p, total_p, p = _softmax_parts(p_logits, axis)
    top_q, total_q, q = _softmax_parts(q_logits, axis)
    # If the tops are far apart, as for a one-hot teacher at 1e9, the difference has lost the digits
    # of the smaller side; relative to its own top, each side keeps its digits.
    q_offset = jnp.where(in_both, q_logits - top_q, 0)
    is_exact = jnp.abs(top_p - top_q) <= SERIES_RADIUS
    offset_difference = jnp.where(
        is_exact, difference - (top_p - top_q), (p_logits - top_p) - q_offset
    )
    d = jnp.where(in_both, offset_difference - (jnp.log(total_p) - jnp.log(total_q)), 0)
    is_near = in_both & (jnp.abs(d) < SERIES_RADIUS)
    excess = jnp.where(is_near, q * _near_expm1(jnp.where(is_near, d, 0)), p - q)
    # Far above practical values, at logits of 1e15, rounding makes the correction meaningless.
    residual = jnp.clip(jnp.sum(excess, axis=axis, keepdims=True), -0.5, 1)
    d = jnp.where(in_both, d - jnp.log1p(jax.lax.stop_gradient(residual)), 0)
    return _Comparison(in_p, in_q, is_near, p, q, d, _near_expm1_plus(jnp.where(is_near, d, 0)))


def _softmax_parts(logits: Array, axis: int = -1) -> tuple[Array, Array, Array]:
    """`(top, sum exp(z - top), softmax)`; an empty row has `(0, 1, zeros)`.

    Guards are per row, not per element: with a finite top, `exp(-inf - top) = 0` has derivative 0.
    """
    top = jnp.max(logits, axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(top != -jnp.inf, top, 0))
    e = jnp.exp(logits - top)
    total = jnp.sum(e, axis=axis, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    return top, total, e / total


def _kl_value(comparison: _Comparison, axis: int) -> Array:
    in_p, in_q, is_near, p, q, d, series = comparison
    terms = jnp.where(is_near, p * series, p * d + (q - p))
    return jnp.sum(jnp.where(in_p & in_q, terms, jnp.where(in_p, jnp.inf, q)), axis=axis)


def _near_expm1(d: Array) -> Array:
    """`expm1(d)` for |d| < SERIES_RADIUS by its series, exact to rounding: a few multiply-adds."""
    last = _last_power(d)
    series = jnp.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 0, -1):
        series = 1 / math.factorial(k) + series * d
    return d * series


def _near_expm1_plus(d: Array) -> Array:
    """`d + expm1(-d)` for |d| < SERIES_RADIUS, `d^2 / 2 - d^3 / 6 + ...`, without cancellation."""
    last = _last_power(d)
    series = jnp.full_like(d, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        series = 1 / math.factorial(k) - series * d
    return jnp.square(d) * series


def _last_power(d: Array) -> int:
    """The last power that matters: later, `2 SERIES_RADIUS^(k - 2) / k!` is below rounding."""
    return 11 if jnp.finfo(d.dtype).bits <= 32 else 19
