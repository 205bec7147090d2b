"""Sentence embeddings from token features."""

import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics


def mean_pool(hidden: Array, mask: Array | None = None) -> Array:
    """The mean over the tokens that are there.

    Args:
      hidden: `[B, L, width]`.
      mask: bool `[B, L]`, True where there is a token; None means everywhere.

    Returns:
      `[B, width]`, float32 or wider; zero for a row without tokens.
    """
    _checks.rank(3, 3, hidden=hidden)
    hidden = _numerics.upcast(hidden)
    _checks.mask(mask, hidden.shape[:2])
    if mask is None:
        return jnp.mean(hidden, axis=1)
    present = mask[..., None]
    count = jnp.maximum(jnp.sum(present.astype(hidden.dtype), axis=1), 1)
    return jnp.sum(jnp.where(present, hidden, 0), axis=1) / count


def sentence_embedding(hidden: Array, mask: Array | None = None) -> Array:
    """`mean_pool` scaled to unit length, as sentence encoders of the MiniLM kind define it."""
    pooled = mean_pool(hidden, mask)
    square = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, pooled / jnp.sqrt(safe), 0)
