"""Objectives that only exist for a whole batch: spectra, covariances, kernel means, confusions.

They return one scalar, which the objective counts once. Unlike every other loss of this package
they are not means over examples: microbatches do not add up to the large batch.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Scalar
from kdtl_jax.losses import _door


def bss(features: Array, *, k: int = 1) -> Array:
    """Batch spectral shrinkage: the sum of the k smallest squared singular values.

    Directions of little energy are not worth transferring; shrinking them avoids negative
    transfer. The gradient is finite for repeated and for zero singular values.

    Args:
      features: `[B, D]`, before the head.
      k: how many of the `min(B, D)` values, from the smallest.

    Returns:
      `[]`; TLL's number (weight 1e-3 there), not divided by B.

    Raises:
      ValueError: if k does not lie in `1..min(B, D)`.
      TypeError: if the features are not floating point.

    References:
      Chen et al., Catastrophic Forgetting Meets Negative Transfer, NeurIPS 2019.
    """
    features = _door.one("bss", features, at_least=2, at_most=2)
    if not 1 <= k <= min(features.shape):
        raise ValueError(
            f"k must lie in 1..{min(features.shape)}, the number of singular values of "
            f"{_checks.described(features=features)}, got {k}."
        )
    return jnp.sum(jnp.square(jnp.linalg.svd(features, compute_uv=False)[-k:]))


def coral(student_features: Array, target_features: Array) -> Array:
    """Deep CORAL: `||C_s - C_t||_F^2 / (4 D^2)`, covariances with divisor B - 1.

    Args:
      student_features: `[Bs, D]` of one domain.
      target_features: `[Bt, D]` of the other; batches may differ in size.

    Returns:
      `[]`. TLL's number is 4 times this plus the mean squared difference of the means.

    Raises:
      ValueError: if widths differ or a batch has fewer than two examples.
      TypeError: if the features are not floating point.

    References:
      Sun and Saenko, Deep CORAL, 2016 (1607.01719), eq. 1.
    """
    first, second = _domains("coral", student_features, target_features)
    gap = _covariance(first) - _covariance(second)
    return jnp.mean(jnp.square(gap)) / 4


def mk_mmd(
    student_features: Array,
    target_features: Array,
    *,
    scale: Scalar,
    alphas: Sequence[Scalar] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> Array:
    """Squared maximum mean discrepancy, unbiased, with `k = sum_a exp(-||x - y||^2 / (2 a scale))`.

    `mean_{i != j} k(s_i, s_j) + mean_{i != j} k(t_i, t_j) - 2 mean_{i, j} k(s_i, t_j)`; slightly
    negative values are possible.

    Args:
      student_features: `[Bs, D]` of one domain.
      target_features: `[Bt, D]` of the other.
      scale: the unit of bandwidth, usually `stop_gradient(mean_squared_distance(...))`.
      alphas: bandwidths in that unit.

    Returns:
      `[]`. TLL adds the constant `2 / (B - 1)`.

    Raises:
      ValueError: if widths differ, or a batch has fewer than two examples.
      TypeError: if the features are not floating point.

    References:
      Gretton et al., A kernel two-sample test, 2012, eq. 3; Long et al., Learning Transferable
      Features with Deep Adaptation Networks, 2015 (1502.02791).
    """
    first, second = _domains("mk_mmd", student_features, target_features)
    inner_first = multi_gaussian(first, first, scale=scale, alphas=alphas)
    inner_second = multi_gaussian(second, second, scale=scale, alphas=alphas)
    cross = multi_gaussian(first, second, scale=scale, alphas=alphas)
    return _off_diagonal(inner_first) + _off_diagonal(inner_second) - 2 * jnp.mean(cross)


def mk_mmd_linear(
    student_features: Array,
    target_features: Array,
    *,
    scale: Scalar,
    alphas: Sequence[Scalar] = (0.25, 0.5, 1.0, 2.0, 4.0),
) -> Array:
    """`mk_mmd` estimated from neighbors in the batch only, in linear time.

    `mean_i k(s_i, s_i') + k(t_i, t_i') - k(s_i, t_i') - k(s_i', t_i)` with `i' = i + 1 mod B`. Both
    batches are `[B, D]`, the estimate is `[]`; all else, errors and source too, as `mk_mmd`.
    """
    first, second = _domains("mk_mmd_linear", student_features, target_features)
    _checks.same_shape(student_features=first, target_features=second)
    after = jnp.roll(first, -1, axis=0), jnp.roll(second, -1, axis=0)

    def kernel(a: Array, b: Array) -> Array:
        return _gaussians(jnp.sum(jnp.square(a - b), axis=-1), scale, alphas)

    within = kernel(first, after[0]) + kernel(second, after[1])
    return jnp.mean(within - kernel(first, after[1]) - kernel(after[0], second))


def mean_squared_distance(student_features: Array, target_features: Array) -> Array:
    """Mean of `||x - y||^2` over all pairs of the joint batch, self pairs included: MMD's scale.

    Args:
      student_features: `[B, D]`.
      target_features: `[B', D]`.

    Returns:
      `[]`, squared feature units.

    Raises:
      ValueError: if the widths differ or a batch has fewer than two examples.
      TypeError: if an array is not floating point.
    """
    first, second = _domains("mean_squared_distance", student_features, target_features)
    joint = jnp.concatenate([first, second])
    # The mean over all pairs is twice the total variance.
    return 2 * jnp.sum(jnp.var(joint, axis=0))


def multi_gaussian(
    first: Array, second: Array, *, scale: Scalar, alphas: Sequence[Scalar]
) -> Array:
    """`sum_a exp(-||x_i - y_j||^2 / (2 a scale))`, `[N, D], [M, D] -> [N, M]`."""
    gaps = first[:, None, :] - second[None, :, :]
    return _gaussians(jnp.sum(jnp.square(gaps), axis=-1), scale, alphas)


def mcc(logits: Array, *, temperature: Scalar = 2.5, example_weights: Array | None = None) -> Array:
    """Minimum class confusion: the off-diagonal share of the batch's class correlation.

    With `p = softmax(z / T)` and `M = sum_b w_b p_b p_b^T`, columns normalized to sum 1, returns
    `(sum M - tr M) / C`.

    Args:
      logits: `[B, C]` on the unlabeled target batch.
      temperature: softens.
      example_weights: `[B]`, usually `stop_gradient(entropy_weights(logits))`; None for 1 each.

    Returns:
      `[]`, in `[0, 1]`.

    Raises:
      ValueError: if shapes do not fit, or the temperature is not positive.
      TypeError: if the logits are not floating point.

    References:
      Jin et al., Minimum Class Confusion for Versatile Domain Adaptation, 2020 (1912.03699).
    """
    logits = _door.one("mcc", logits, at_least=2, at_most=2)
    _checks.positive(temperature=temperature)
    p = jnp.exp(_numerics.log_softmax(logits / _numerics.scalar(temperature, logits)))
    if example_weights is None:
        example_weights = jnp.ones(logits.shape[:1], logits.dtype)
    if jnp.shape(example_weights) != logits.shape[:1]:
        raise ValueError(
            "expected one weight per example, got "
            f"{_checks.described(logits=logits, example_weights=example_weights)}."
        )
    weighted = p * _numerics.scalar(example_weights, p)[:, None]
    confusion = _numerics.gram(weighted.T, p.T)
    columns = jnp.sum(confusion, axis=0, keepdims=True)
    # A class that nobody predicts confuses nobody.
    confusion = confusion / jnp.where(columns != 0, columns, 1)
    return (jnp.sum(confusion) - jnp.trace(confusion)) / logits.shape[1]


def entropy_weights(logits: Array, *, temperature: Scalar = 2.5) -> Array:
    """`1 + exp(-H(softmax(z / T)))`, scaled to mean 1: certain examples weigh more in `mcc`.

    `[B, num_classes]` logits give `[B]` weights.

    Raises:
      ValueError: if the logits have other than two axes, or the temperature is not positive.
      TypeError: if they are not floating point.
    """
    logits = _door.one("entropy_weights", logits, at_least=2, at_most=2)
    _checks.positive(temperature=temperature)
    log_p = _numerics.log_softmax(logits / _numerics.scalar(temperature, logits))
    finite = jnp.where(log_p != -jnp.inf, log_p, 0)
    entropy = -jnp.sum(jnp.exp(log_p) * finite, axis=-1)
    weights = 1 + jnp.exp(-entropy)
    return weights / jnp.mean(weights)


def _domains(fn: str, first: Array, second: Array) -> tuple[Array, Array]:
    _checks.rank(2, 2, student_features=first, target_features=second)
    if first.shape[1] != second.shape[1] or min(first.shape[0], second.shape[0]) < 2:
        raise ValueError(
            f"expected two batches of two examples or more and of one width, got "
            f"{_checks.described(student_features=first, target_features=second)}."
        )
    a, b = _door.one(fn, first, at_least=2), _door.one(fn, second, at_least=2)
    dtype = np.result_type(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


def _covariance(features: Array) -> Array:
    centered = features - jnp.mean(features, axis=0, keepdims=True)
    return _numerics.gram(centered.T, centered.T) / (features.shape[0] - 1)


def _off_diagonal(kernel: Array) -> Array:
    count = kernel.shape[0]
    return (jnp.sum(kernel) - jnp.trace(kernel)) / (count * (count - 1))


def _gaussians(square: Array, scale: Scalar, alphas: Sequence[Scalar]) -> Array:
    widths = [
        2 * _numerics.scalar(alpha, square) * _numerics.scalar(scale, square) for alpha in alphas
    ]
    return sum((jnp.exp(-square / width) for width in widths[1:]), jnp.exp(-square / widths[0]))
