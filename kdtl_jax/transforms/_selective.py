"""Merging by choosing entries: from which model each entry comes, and how much of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdtl_jax import _numerics
from kdtl_jax._types import Array, Params, Scalar
from kdtl_jax.transforms import _leaves, _ranking


def near_swap(base: Params, model: Params, *, t: Scalar) -> Params:
    """Takes the model's entries where the two are within `t`, less of them the further apart.

    `q model + (1 - q) base` with `q = min(t / |base - model|, 1)`.

    Args:
      base: any pytree.
      model: the same structure and shapes.
      t: the distance up to which the model's entry is taken whole; >= 0.

    Returns:
      A tree with the structure and dtypes of the base.

    Raises:
      ValueError: if names or shapes differ.

    References:
      mergekit's `nearswap` (2403.13257).
    """

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        gap, within = jnp.abs(a - b), _numerics.scalar(t, a)
        near = gap <= within
        share = jnp.where(near, 1, within / jnp.where(near, 1, gap))
        return share * b + (1 - share) * a

    return _leaves.combine_leaves(formula, {"base": base, "model": model}, [])


def arcee_fusion(base: Params, model: Params) -> Params:
    """Takes the model's entries whose importance stands out, the base's elsewhere.

    The importance of an entry is `|model - base|` times `KL(softmax(model) || softmax(base))` of
    its row (the last axis), with 1e-8 added to probabilities. It stands out from
    `median + 1.5 (third quartile - first quartile)` of its leaf on.

    Args:
      base: any pytree.
      model: the same structure and shapes.

    Returns:
      A tree with the structure and dtypes of the base.

    Raises:
      ValueError: if names or shapes differ.

    References:
      mergekit's `arcee_fusion`, which estimates quartiles of leaves of more than a million entries
      from random ones; here they are exact.
    """

    def formula(i: int, path: str, a: Array, b: Array) -> Array:
        before, after = (jnp.atleast_1d(x) for x in (a, b))
        p, q = (jax.nn.softmax(x, axis=-1) + 1e-8 for x in (after, before))
        divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
        importance = jnp.abs(after - before) * divergence
        low, middle, high = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
        chosen = importance >= middle + 1.5 * (high - low)
        return jnp.where(chosen, after, before).reshape(a.shape)

    return _leaves.combine_leaves(formula, {"base": base, "model": model}, [])


def ram(
    base: Params,
    models: Sequence[Params],
    *,
    epsilon: Scalar = 1e-5,
    gain: Scalar = 0.0,
    limit: Scalar = 0.2,
) -> Params:
    """Reinforced Agent Merging: a change that one model made alone is kept, shared ones averaged.

    A model changed an entry if it moved by more than `epsilon`. What only model i changed is
    multiplied by `1 + gain min(rho_i, limit)`, `rho_i` the number of entries it changed together
    with others over the number it changed alone, leaf by leaf.

    Args:
      base: pretrained parameters.
      models: a list of fine-tuned models of its structure.
      epsilon: in units of the weights.
      gain: 0 is RAM; 0.1 is RAM+.
      limit: of `rho`.

    Returns:
      A tree with the structure and dtypes of the base.

    Raises:
      ValueError: if names or shapes differ.

    References:
      Reinforced Agent Merging, 2026 (2601.13572); mergekit's `ram` and `ramplus_tl`.
    """

    def formula(i: int, path: str, start: Array, *leaves: Array) -> Array:
        deltas = [leaf - start for leaf in leaves]
        changed = [jnp.abs(delta) > _numerics.scalar(epsilon, start) for delta in deltas]
        count = sum(mask.astype(start.dtype) for mask in changed)
        out = jnp.zeros_like(start)
        for delta, mask in zip(deltas, changed, strict=True):
            alone, shared = mask & (count == 1), mask & (count > 1)
            ratio = jnp.sum(shared, dtype=start.dtype) / jnp.maximum(
                jnp.sum(alone, dtype=start.dtype), _numerics.scalar(epsilon, start)
            )
            boost = 1 + _numerics.scalar(gain, start) * jnp.clip(
                ratio.astype(start.dtype), 0, limit
            )
            out = out + jnp.where(alone, boost * delta, jnp.where(shared, delta / count, 0))
        return start + out

    named = {"base": base} | _leaves.numbered("models", models)
    return _leaves.combine_leaves(formula, named, [])


def _quantile(x: Array, share: float) -> Array:
    """The entry at place `floor(share (n - 1))` of the sorted array."""
    return _ranking.kth_largest(x, x.size - int(share * (x.size - 1)))
