"""Output distillation, `y_small = f_large(x) w`: fits w, applies w, folds w into the head.

w is the ridge regression of targets on features,

    min_w  (1 / n) sum_i ||f_i w + b - y_i||^2 + ridge ||w||^2,

solved in closed form from second moments, which stream over batches and merge over devices or hosts
in any order. Features may be a large model's outputs (a probe), or a small model's last hidden
layer with the large model's logits as targets (a student's head without a gradient step). To learn
w by gradient descent instead, as an ordinary parameter, see `model`.

ValueError: batch sizes or widths differ, a batch is empty, or a concrete weight or ridge is out of
its range. TypeError: features or targets are not floating point.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import ModelFn, Outputs, Params, PyTree, Scalar

# One per example, `[B]`.
Weights = Array | Sequence[float]


class Projection(NamedTuple):
    """An affine map of features: `f kernel + bias`."""

    kernel: Array  # [D, K]
    bias: Array  # [K]


class Moments(NamedTuple):
    """Centered second moments of features and targets; batches and devices merge exactly."""

    weight: Array  # [], number of examples, or the sum of their weights
    feature_mean: Array  # [D]
    target_mean: Array  # [K]
    gram: Array  # [D, D], sum of (f - mean)^T (f - mean)
    cross: Array  # [D, K], sum of (f - mean)^T (y - mean)


def moments(
    features: Array,
    targets: Array,
    *,
    weights: Weights | None = None,
    where: Array | None = None,
) -> Moments:
    """Moments of one batch.

    Args:
      features: `[B, ...]`, flattened to `[B, D]`.
      targets: `[B, K]`.
      weights: `[B]`, non-negative; 0 excludes an example (padding).
      where: bool `[B]`, real examples; the others are excluded and may hold anything.
    """
    _checks.floating(features=features, targets=targets)
    _checks.rank(2, 2, targets=targets)
    _checks.rank(2, features=features)
    _checks.same_batch(features=features, targets=targets)
    _checks.nonempty(features=features, targets=targets)
    f = _numerics.batch_flat(_numerics.upcast(features))
    y = _numerics.upcast(targets).astype(f.dtype)
    _checks.mask(where, f.shape[:1])
    w = jnp.ones(f.shape[:1], f.dtype) if weights is None else _check_weights(weights, f, where)
    w = _numerics.kept(w, where)
    total = jnp.sum(w)
    share = (w / _numerics.nonzero(total))[:, None]
    f, y = _numerics.kept(f, w != 0), _numerics.kept(y, w != 0)
    feature_mean, target_mean = jnp.sum(share * f, axis=0), jnp.sum(share * y, axis=0)
    centered = f - feature_mean[None]
    weighted = w[:, None] * centered
    return Moments(
        weight=total,
        feature_mean=feature_mean,
        target_mean=target_mean,
        gram=_matmul(weighted.T, centered),
        cross=_matmul(weighted.T, y - target_mean[None]),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan's pairwise update): associative."""
    _checks.same_shape(**{"a.cross": a.cross, "b.cross": b.cross})
    total = a.weight + b.weight
    share = b.weight / _numerics.nonzero(total)
    df, dy = b.feature_mean - a.feature_mean, b.target_mean - a.target_mean
    correction = a.weight * share
    return Moments(
        weight=total,
        feature_mean=a.feature_mean + share * df,
        target_mean=a.target_mean + share * dy,
        gram=a.gram + b.gram + correction * jnp.outer(df, df),
        cross=a.cross + b.cross + correction * jnp.outer(df, dy),
    )


def solve(moments: Moments, *, ridge: Scalar = 1e-3) -> Projection:
    """The ridge solution `w = (F^T F / n + ridge I)^-1 F^T Y / n`, `[D, K]`, of centered data.

    Args:
      ridge: > 0, in squared feature units (it is added to the features' variance); the bias is not
        penalized. The solution is differentiable in it.

    Returns:
      The projection; it does not depend on the scale of the weights. Without examples, the kernel
      and the bias are 0. NaN if the features' squares or the ridge overflow, and possibly if the
      ridge is below the rounding of the largest variance while features depend on each other.
    """
    _checks.positive(ridge=ridge)
    n = jnp.where(moments.weight != 0, moments.weight, 1)
    dim = moments.gram.shape[0]
    system = moments.gram / n + _numerics.scalar(ridge, n, "ridge") * jnp.eye(dim, dtype=n.dtype)
    factor = jax.scipy.linalg.cho_factor(system)
    kernel = jax.scipy.linalg.cho_solve(factor, moments.cross / n)
    # Squares outside the float's range would give a kernel of zeros.
    kernel = jnp.where(jnp.all(jnp.isfinite(system)), kernel, jnp.nan)
    bias = moments.target_mean - _matmul(moments.feature_mean[None], kernel)[0]
    return Projection(kernel, bias)


def fit(
    features: Array,
    targets: Array,
    *,
    ridge: Scalar = 1e-3,
    weights: Weights | None = None,
    where: Array | None = None,
) -> Projection:
    """`solve(moments(features, targets))`, the whole fit in one call.

    Example:
      >>> import jax.numpy as jnp
      >>> from kdtl_jax import projection
      >>> x = jnp.array([[0.0], [1.0], [2.0]])
      >>> w = projection.fit(x, 3 * x + 1, ridge=1e-9)
      >>> print(round(float(w.kernel[0, 0]), 3), round(float(w.bias[0]), 3))
      3.0 1.0
    """
    return solve(moments(features, targets, weights=weights, where=where), ridge=ridge)


def apply(projection: Projection, features: Array) -> Array:
    """`f w + b`: `[B, ...] -> [B, K]`."""
    f = _numerics.batch_flat(features)
    if f.shape[1] != projection.kernel.shape[0]:
        raise ValueError(
            f"features must have width {projection.kernel.shape[0]}, "
            f"got {_checks.described(features=features)}."
        )
    return f @ projection.kernel + projection.bias[None]


def fold(projection: Projection, kernel: Array, bias: Array | None = None) -> Projection:
    """Merges w into the linear layer before it: `(h A + a) w + b = h (A w) + (a w + b)`.

    Args:
      projection: `[D, K]` map of the layer's outputs.
      kernel: `[H, D]`, the layer.
      bias: `[D]` or None.
    """
    if kernel.ndim != 2 or kernel.shape[1] != projection.kernel.shape[0]:
        raise ValueError(
            f"kernel must be [H, {projection.kernel.shape[0]}], "
            f"got {_checks.described(kernel=kernel)}. Flatten a convolution's kernel first."
        )
    offset = projection.bias
    if bias is not None:
        if np.shape(bias) != kernel.shape[1:]:
            raise ValueError(
                f"bias must be [{kernel.shape[1]}], the kernel's outputs, "
                f"got {_checks.described(bias=bias, kernel=kernel)}."
            )
        offset = offset + _matmul(bias[None], projection.kernel)[0]
    return Projection(_matmul(kernel, projection.kernel), offset)


def model(base: ModelFn, *, features: str = "logits") -> ModelFn:
    """Wraps `base` to project its output, for learning w by gradient descent.

    Parameters are `{"base": ..., "projection": Projection}`; if trained with
    `trainable="projection/.*"`, no gradient is computed for the base.

    Args:
      base: the large model.
      features: the name of the output to project.

    Returns:
      A model whose "logits" are the projection; the base's own, if any, are "base_logits".

    Raises:
      ValueError: when traced, if the output does not exist (the existing ones are listed).
    """

    def apply_model(
        params: Params,
        model_state: PyTree,
        inputs: Array,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs, model_state = base(params["base"], model_state, inputs, key=key, train=train)
        if features not in outputs:
            raise ValueError(f"no output {features!r}, the model has {sorted(outputs)}.")
        logits = apply(params["projection"], outputs[features])
        base_outputs = {"base_logits": outputs["logits"]} if "logits" in outputs else {}
        return {**outputs, "logits": logits, **base_outputs}, model_state

    return apply_model


def _check_weights(weights: Weights, features: Array, where: Array | None) -> Array:
    """Checks weights `[B]`, converts them to the features' dtype; masked rows may hold anything."""
    _checks.rank(1, 1, weights=weights)
    _checks.same_batch(features=features, weights=weights)
    weights = _numerics.kept(jnp.asarray(weights), where)
    _checks.non_negative(weights=weights)
    return weights.astype(features.dtype)


def _matmul(a: Array, b: Array) -> Array:
    """Multiplies in full precision: with TF32 or bfloat16, moments would lose digits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
