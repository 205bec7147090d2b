"""Statistics of whole batches: distances between two batches, spectrum and confusion of one.

Each returns one scalar, which the objective counts once, like a penalty. They are not losses: since
they are not means over examples, microbatches do not add up to the large batch.

`where` (bool `[B]`) marks the real examples; padded rows have no effect and may hold anything. With
two batches, it marks the rows of both, or only of the first if `target_where` (`[B']`) is given for
the second. If fewer examples are left than a statistic needs, the result is 0.

Features are squared: in float32, differences below 1e-18 or above 1e18 leave its range. Rescale
such features first.

TypeError: an array is not floating point. ValueError: shapes do not fit, a batch has fewer than two
examples, or a hyper-parameter is out of its range.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics, _softmax
from kdtl_jax._types import Scalar

# Bandwidths of the mixture of Gaussian kernels.
ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)


def bss(features: Array, *, k: int = 1, where: Array | None = None) -> Array:
    """Batch spectral shrinkage: the sum of the k smallest squared singular values.

    Directions with little energy are not worth transferring; shrinking them avoids negative
    transfer. The gradient is finite for repeated and zero singular values.

    Args:
      features: `[B, D]`, before the head.
      k: how many of the `min(B, D)` values to sum, from the smallest, at least 1; `B` counts real
        examples.

    Returns:
      `[]`; TLL's number (with weight 1e-3 there), not divided by B.

    References:
      Chen et al., Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019.
    """
    batch = _batch(features=features, where=where)
    _checks.integer(k=k)
    if not 1 <= k <= min(features.shape):
        raise ValueError(
            f"k must lie in 1..{min(features.shape)}, the number of singular values of "
            f"{_checks.described(features=features)}, got {k}."
        )
    squares = jnp.square(jnp.linalg.svd(batch.rows, compute_uv=False))
    if where is None:
        return jnp.sum(squares[-k:])
    # Masked rows are zeros: they add singular values of 0, which come last.
    rank = jnp.minimum(jnp.sum(where), features.shape[1])
    index = jnp.arange(len(squares))
    return jnp.sum(jnp.where((index >= rank - k) & (index < rank), squares, 0))


def coral(
    student_features: Array,
    target_features: Array,
    *,
    where: Array | None = None,
    target_where: Array | None = None,
) -> Array:
    """Deep CORAL: `||C_s - C_t||_F^2 / (4 D^2)`, covariances with divisor B - 1.

    Args:
      student_features: `[Bs, D]` of one domain.
      target_features: `[Bt, D]` of the other; batches may differ in size.

    Returns:
      `[]`. TLL's number is 4 times this plus the mean squared difference of the means.

    References:
      Sun and Saenko, Deep CORAL, 2016 (1607.01719), eq. 1.
    """
    first, second = _check_domains(student_features, target_features, where, target_where)
    difference = _covariance(first) - _covariance(second)
    return _zero_if_few(jnp.mean(jnp.square(difference)) / 4, first, second)


def mk_mmd(
    student_features: Array,
    target_features: Array,
    *,
    scale: Scalar,
    alphas: Sequence[Scalar] = ALPHAS,
    where: Array | None = None,
    target_where: Array | None = None,
) -> Array:
    """Unbiased squared maximum mean discrepancy with `k = sum_a exp(-||x - y||^2 / (2 a scale))`.

    `mean_{i != j} k(s_i, s_j) + mean_{i != j} k(t_i, t_j) - 2 mean_{i, j} k(s_i, t_j)`; slightly
    negative values are possible.

    Args:
      student_features: `[Bs, D]` of one domain.
      scale: the unit of bandwidth, usually `stop_gradient(mean_squared_distance(...))`.
      alphas: bandwidths in that unit.

    Returns:
      `[]`. TLL adds the constant `2 / (B - 1)`.

    References:
      Gretton et al., A kernel two-sample test, 2012, eq. 3; Long et al., Learning Transferable
      Features with Deep Adaptation Networks, 2015 (1502.02791).
    """
    first, second = _check_domains(student_features, target_features, where, target_where)

    def kernel(a: "_Batch", b: "_Batch") -> Array:
        pairs = multi_gaussian(a.rows, b.rows, scale=scale, alphas=alphas)
        if a.where is None and b.where is None:
            return pairs
        masks = [jnp.ones(len(x.rows), jnp.bool_) if x.where is None else x.where for x in (a, b)]
        return jnp.where(masks[0][:, None] & masks[1][None, :], pairs, 0)

    def mean_off_diagonal(batch: "_Batch") -> Array:
        pairs = kernel(batch, batch)
        count = jnp.maximum(batch.size * (batch.size - 1), 1)
        return (jnp.sum(pairs) - jnp.trace(pairs)) / count

    cross = jnp.sum(kernel(first, second)) / (first.size * second.size)
    return _zero_if_few(
        mean_off_diagonal(first) + mean_off_diagonal(second) - 2 * cross, first, second
    )


def mk_mmd_linear(
    student_features: Array,
    target_features: Array,
    *,
    scale: Scalar,
    alphas: Sequence[Scalar] = ALPHAS,
    where: Array | None = None,
) -> Array:
    """`mk_mmd` estimated from neighbors in the batch only, in linear time.

    `mean_i k(s_i, s_i') + k(t_i, t_i') - k(s_i, t_i') - k(s_i', t_i)` with `i' = i + 1 mod B` among
    the real examples. Both batches are `[B, D]` with one mask `[B]`; everything else is as in
    `mk_mmd`.
    """
    _checks.same_shape(student_features=student_features, target_features=target_features)
    first, second = _check_domains(student_features, target_features, where, None)
    x, y, size = first.rows, second.rows, len(first.rows)
    neighbor = jnp.roll(jnp.arange(size), -1)
    if where is not None:
        order = jnp.argsort(~where, stable=True)  # real examples first
        x, y = x[order], y[order]
        neighbor = jnp.where(jnp.arange(size) == jnp.sum(where) - 1, 0, neighbor)

    def kernel(a: Array, b: Array) -> Array:
        return _gaussians(jnp.sum(jnp.square(a - b), axis=-1), scale, alphas)

    within = kernel(x, x[neighbor]) + kernel(y, y[neighbor])
    values = within - kernel(x, y[neighbor]) - kernel(x[neighbor], y)
    if where is not None:
        values = jnp.where(jnp.arange(size) < jnp.sum(where), values, 0)
    return _zero_if_few(jnp.sum(values) / first.size, first, second)


def mean_squared_distance(
    student_features: Array,
    target_features: Array,
    *,
    where: Array | None = None,
    target_where: Array | None = None,
) -> Array:
    """Mean of `||x - y||^2` over all pairs of the joint batch, including self pairs: MMD's scale.

    Takes `[B, D]` and `[B', D]` features.

    Returns:
      `[]`, squared feature units.
    """
    first, second = _check_domains(student_features, target_features, where, target_where)
    joint = jnp.concatenate([first.rows, second.rows])
    count = first.size + second.size
    mean = jnp.sum(joint, axis=0, keepdims=True) / count
    squares = sum(
        jnp.sum(jnp.square(_numerics.kept(batch.rows - mean, batch.where)))
        for batch in (first, second)
    )
    # The mean over all pairs is twice the total variance.
    return 2 * jnp.asarray(squares) / count


def multi_gaussian(
    first: Array, second: Array, *, scale: Scalar, alphas: Sequence[Scalar]
) -> Array:
    """`sum_a exp(-||x_i - y_j||^2 / (2 a scale))`, `[N, D], [M, D] -> [N, M]`."""
    differences = first[:, None, :] - second[None, :, :]
    return _gaussians(jnp.sum(jnp.square(differences), axis=-1), scale, alphas)


def mcc(
    logits: Array,
    *,
    temperature: Scalar = 2.5,
    example_weights: Array | None = None,
    where: Array | None = None,
) -> Array:
    """Minimum class confusion: the off-diagonal share of the batch's class correlation.

    With `p = softmax(z / T)` and `M = sum_b w_b p_b p_b^T`, columns normalized to sum 1, returns
    `(sum M - tr M) / C`.

    Args:
      logits: `[B, C]` on the unlabeled target batch.
      example_weights: `[B]`, usually `stop_gradient(entropy_weights(logits))`; None for 1 each.

    Returns:
      `[]`, in `[0, 1]`.

    References:
      Jin et al., Minimum Class Confusion for Versatile Domain Adaptation, 2020 (1912.03699).
    """
    logits = _batch(logits=logits, where=where).rows
    _checks.several_classes(logits=logits)
    _checks.positive(temperature=temperature)
    p = jnp.exp(_softmax.log_softmax(logits / _numerics.scalar(temperature, logits, "temperature")))
    if example_weights is None:
        example_weights = jnp.ones(logits.shape[:1], logits.dtype)
    if jnp.shape(example_weights) != logits.shape[:1]:
        raise ValueError(
            "expected one weight per example, got "
            f"{_checks.described(logits=logits, example_weights=example_weights)}."
        )
    weights = _numerics.kept(_numerics.cast(example_weights, p), where)
    confusion = _numerics.gram((p * weights[:, None]).T, p.T)
    columns = jnp.sum(confusion, axis=0, keepdims=True)
    # A class that is never predicted adds no confusion.
    confusion = confusion / _numerics.nonzero(columns)
    return (jnp.sum(confusion) - jnp.trace(confusion)) / logits.shape[1]


def entropy_weights(
    logits: Array, *, temperature: Scalar = 2.5, where: Array | None = None
) -> Array:
    """`1 + exp(-H(softmax(z / T)))`, scaled to mean 1: confident examples count more in `mcc`.

    `[B, num_classes]` logits give `[B]` weights; the mean runs over the real examples, and the
    weights of the others are 0.
    """
    logits = _batch(logits=logits, where=where).rows
    _checks.several_classes(logits=logits)
    _checks.positive(temperature=temperature)
    log_p = _softmax.log_softmax(logits / _numerics.scalar(temperature, logits, "temperature"))
    finite_log_p = jnp.where(log_p != -jnp.inf, log_p, 0)
    entropy = -jnp.sum(jnp.exp(log_p) * finite_log_p, axis=-1)
    weights = 1 + jnp.exp(-entropy)
    return _numerics.kept(weights / _numerics.masked_mean(weights, where), where)


class _Batch(NamedTuple):
    rows: Array  # 0 where masked
    where: Array | None
    size: Array


def _batch(where: Array | None, **named_array: Array) -> _Batch:
    _checks.floating(**named_array)
    _checks.rank(2, 2, **named_array)
    _checks.nonempty(**named_array)
    (rows,) = named_array.values()
    _checks.mask(where, jnp.shape(rows)[:1])
    rows = _numerics.kept(_numerics.upcast(rows), where)
    return _Batch(rows, where, _numerics.row_count(rows, where))


def _check_domains(
    first: Array, second: Array, where: Array | None, target_where: Array | None
) -> tuple[_Batch, _Batch]:
    _checks.floating(student_features=first, target_features=second)
    _checks.rank(2, 2, student_features=first, target_features=second)
    if first.shape[1] != second.shape[1] or min(first.shape[0], second.shape[0]) < 2:
        raise ValueError(
            f"expected two batches of two examples or more and of one width, got "
            f"{_checks.described(student_features=first, target_features=second)}."
        )
    if where is not None and target_where is None and len(first) != len(second):
        raise ValueError(
            "batches of different sizes need a mask each, where and target_where, got "
            f"{_checks.described(where=where, student_features=first, target_features=second)}."
        )
    a = _batch(where, student_features=first)
    b = _batch(where if target_where is None else target_where, target_features=second)
    dtype = np.result_type(a.rows.dtype, b.rows.dtype)
    a, b = (_Batch(x.rows.astype(dtype), x.where, x.size.astype(dtype)) for x in (a, b))
    return a, b


def _zero_if_few(value: Array, *batches: _Batch) -> Array:
    """The value, or 0 if a batch has fewer than two real examples."""
    if all(batch.where is None for batch in batches):
        return value
    return jnp.where(jnp.all(jnp.stack([batch.size >= 2 for batch in batches])), value, 0)


def _covariance(batch: _Batch) -> Array:
    centered = _numerics.centered(batch.rows, batch.where)
    return _numerics.gram(centered.T, centered.T) / jnp.maximum(batch.size - 1, 1)


def _gaussians(square: Array, scale: Scalar, alphas: Sequence[Scalar]) -> Array:
    _checks.scalar(scale=scale)
    _checks.non_negative(scale=scale)
    if not np.iterable(alphas) or not len(alphas):
        raise ValueError(f"alphas must be a list of at least one number, got {alphas!r:.80}.")
    for alpha in alphas:
        _checks.scalar(alphas=alpha)
        _checks.positive(alphas=alpha)
    widths = [
        2 * _numerics.scalar(alpha, square, "alphas") * _numerics.scalar(scale, square, "scale")
        for alpha in alphas
    ]

    def kernel(width: Array) -> Array:
        """A Gaussian; for scale 0, that of a batch of equal rows, 1 for equal rows and else 0."""
        gaussian = jnp.exp(-square / jnp.where(width == 0, 1, width))
        return jnp.where(width == 0, (square == 0).astype(square.dtype), gaussian)

    return sum((kernel(width) for width in widths[1:]), kernel(widths[0]))
