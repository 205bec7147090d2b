"""Normalization during fine-tuning: Stochastic Normalization, and frozen statistics.

For dropout toward the pretrained weights, see `transforms.mixout`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Array, ModelFn, Outputs, Params, PyTree, Scalar


class Running(NamedTuple):
    """Running statistics of a normalization layer, `[C]` each; part of the model's state."""

    mean: Array
    var: Array


def stoch_norm(
    x: Array,
    scale: Array,
    offset: Array,
    running: Running,
    uses_batch: Array,
    *,
    momentum: Scalar = 0.1,
    eps: float = 1e-5,
    where: Array | None = None,
) -> tuple[Array, Running]:
    """Batch normalization in which each channel randomly uses batch or running statistics.

    Channels where `uses_batch` is true are normalized by the batch's mean and variance (divisor n),
    the others by the running statistics from before this step. The running statistics are updated
    for all channels, the variance with divisor n - 1. At test time, use only the running
    statistics: call `stoch_norm` with `uses_batch` all false, and drop the new statistics.

    Args:
      x: `[..., C]`.
      scale: `[C]`.
      offset: `[C]`.
      running: statistics before the step.
      uses_batch: bool `[C]`, one draw per batch: `jax.random.bernoulli(key, p, (C,))`, p = 0.5.
      momentum: weight of the batch in the new running statistics.
      eps: >= 0, added to variances, in squared feature units; with 0, a channel that does not vary
        becomes its offset.
      where: bool `[B]` or other leading axes of x, real examples. The others enter no statistic; if
        fewer than two values per channel are real, the running statistics do not change.

    Returns:
      `(y [..., C] in x's dtype, running statistics after the step)`.

    Raises:
      ValueError: if shapes do not fit, or there are fewer than two values per channel.
      TypeError: if `x` is not floating point or `uses_batch` is not bool.

    References:
      Kou et al., Stochastic Normalization, NeurIPS 2020.
    """
    _checks.floating(x=x)
    _checks.rank(2, x=x)
    _checks.scalar(momentum=momentum, eps=eps)
    _checks.within(0, 1, momentum=momentum)
    _checks.non_negative(eps=eps)
    channels = (x.shape[-1],)
    vectors = {"scale": scale, "offset": offset, "mean": running.mean, "var": running.var}
    if any(jnp.shape(vector) != channels for vector in vectors.values()):
        raise ValueError(f"expected vectors [{x.shape[-1]}], got {_checks.described(**vectors)}.")
    _checks.mask(uses_batch, channels)
    if x.size // x.shape[-1] < 2:
        raise ValueError(f"one value per channel has no variance, got {_checks.described(x=x)}.")
    rank = jnp.ndim(where) if where is not None else 0
    _checks.mask(where, x.shape[:rank])
    values = _numerics.upcast(x)
    is_real = None
    if where is not None:
        leading = where.reshape(where.shape + (1,) * (x.ndim - 1 - rank))
        is_real = jnp.broadcast_to(leading, x.shape[:-1]).reshape(-1)
        values = _numerics.kept(values, where)
    values = values.reshape(-1, *channels)
    count = _numerics.row_count(values, is_real)
    mean = _numerics.row_mean(values, is_real)[0]
    var = jnp.sum(jnp.square(_numerics.centered(values, is_real)), axis=0) / count
    old_mean, old_var, gain, shift = (
        jnp.asarray(v, values.dtype) for v in (running.mean, running.var, scale, offset)
    )
    center = jnp.where(uses_batch, mean, old_mean)
    variance = jnp.where(uses_batch, var, old_var)
    factor = gain * _numerics.safe_rsqrt(variance + eps)
    normalized = (values - center[None, :]) * factor[None, :] + shift[None, :]
    batch_weight = jnp.where(count >= 2, _numerics.scalar(momentum, values, "momentum"), 0)
    unbiased = var * (count / jnp.maximum(count - 1, 1))
    new_running = Running(
        ((1 - batch_weight) * old_mean + batch_weight * mean).astype(running.mean.dtype),
        ((1 - batch_weight) * old_var + batch_weight * unbiased).astype(running.var.dtype),
    )
    return normalized.reshape(x.shape).astype(x.dtype), new_running


def freeze_stats(before: PyTree, after: PyTree, *, where: trees.Selector) -> PyTree:
    """Returns `after` with the selected leaves of `before`, to keep statistics from changing.

    Optimizer masks do not reach batch statistics, which are a separate collection.

    Raises:
      ValueError: if the selector matches nothing, or names or shapes differ.
    """
    _checks.same_leaves(before=trees.flatten(before), after=trees.flatten(after))
    is_frozen = trees.mask(before, where)
    return jax.tree.map(lambda keep, old, new: old if keep else new, is_frozen, before, after)


def with_frozen_stats(model: ModelFn, *, where: trees.Selector = trees.everything) -> ModelFn:
    """Wraps a model so that the selected statistics of its state never change, in any mode.

    In training mode a batch-normalized model still *normalizes* by the batch; to normalize by
    the frozen statistics too, wrap it in `in_evaluation_mode`.
    """

    def run(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs, after = model(params, model_state, inputs, key=key, train=train)
        return outputs, freeze_stats(model_state, after, where=where)

    return run


def in_evaluation_mode(model: ModelFn) -> ModelFn:
    """Wraps a model to always run with `train=False`: running statistics, no dropout."""

    def run(
        params: Params,
        model_state: PyTree,
        inputs: Any,
        *,
        key: Array | None = None,
        train: bool = False,
    ) -> tuple[Outputs, PyTree]:
        outputs, _ = model(params, model_state, inputs, key=key, train=False)
        return outputs, model_state

    return run
