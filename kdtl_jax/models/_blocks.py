"""The building blocks of every transformer here: masked attention and feed-forward layers.

Submodule names are the same in all families (`attention/query`, `attention/out`, `mlp/up`,
`mlp/down`), so selectors and layer maps carry over. Attention probabilities are sown as
`.../attention/probs`; they cost nothing unless tapped. Softmax and norms accumulate in float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics

Activation = Callable[[Array], Array]  # elementwise, any shape


def gelu(x: Array) -> Array:
    """`x Phi(x)` with the exact error function, as BERT and ViT were trained. Any shape."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU, as GPT-2 was trained. Any shape."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """`x sigmoid(1.702 x)`, as CLIP was trained. Any shape."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


def layer_norm(epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the two-pass variance: the one-pass form loses digits when |mean| >> std."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def attend(
    query: Array,
    key: Array,
    value: Array,
    where: Array | None,
    bias: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Callable[[Array], Array]]:
    """Attention probabilities, and the function that applies them to the values.

    Args:
      query: `[B, Q, H, D]`.
      key, value: `[B, K, H, D]`.
      where: bool, broadcastable to `[B, H, Q, K]`: the keys that a query may attend to.
      bias: added to the scaled scores, broadcastable to `[B, H, Q, K]`.
      scale: factor of the scores; None means `1 / sqrt(D)`.

    Returns:
      `(probs [B, H, Q, K], mix)` with `mix(probs) -> [B, Q, H * D]`; dropout can go in between.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scores * jnp.asarray(scale, jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if where is not None:
        scores = jnp.where(where, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)

    def mix(weights: Array) -> Array:
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return mixed.reshape(*mixed.shape[:2], -1)

    return probs, mix


class SelfAttention(nn.Module):
    """Multi-head self-attention, with an optional bias added to the scores."""

    heads: int
    head_width: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0
    scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        where: Array | None,
        train: bool = False,
        bias: Array | None = None,
    ) -> Array:
        width = self.head_width or x.shape[-1] // self.heads

        def project(name: str) -> Array:
            y = nn.Dense(self.heads * width, use_bias=self.use_bias, name=name)(x)
            return y.reshape(*x.shape[:2], self.heads, width)

        query, key, value = (project(name) for name in ("query", "key", "value"))
        probs, mix = attend(query, key, value, where, bias, self.scale)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(self.dropout, deterministic=not train)(probs)
        return nn.Dense(x.shape[-1], use_bias=self.out_bias, name="out")(mix(probs))


class FusedSelfAttention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    heads: int
    dropout: float = 0.0
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Array,
        where: Array | None,
        train: bool = False,
        rotate: Callable[[Array], Array] | None = None,
    ) -> Array:
        fused = nn.Dense(3 * x.shape[-1], use_bias=self.use_bias, name="qkv")(x)
        query, key, value = (
            part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(fused, 3, axis=-1)
        )
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        probs, mix = attend(query, key, value, where)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(self.dropout, deterministic=not train)(probs)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="out")(mix(probs))


class FeedForward(nn.Module):
    """`down(activation(up(x)))`."""

    hidden: int
    activation: Activation = gelu
    use_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        y = self.activation(nn.Dense(self.hidden, use_bias=self.use_bias, name="up")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="down")(y)


class GatedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`."""

    hidden: int
    activation: Activation
    use_bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        gate = self.activation(nn.Dense(self.hidden, use_bias=self.use_bias, name="gate")(x))
        up = nn.Dense(self.hidden, use_bias=self.use_bias, name="up")(x)
        y = nn.Dropout(self.dropout, deterministic=not train)(gate * up)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="down")(y)


class FusedGatedFeedForward(nn.Module):
    """`down(activation(first half) * second half)`, with the halves of one projection."""

    hidden: int
    activation: Activation
    use_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        both = nn.Dense(2 * self.hidden, use_bias=self.use_bias, name="gate_up")(x)
        gate, up = jnp.split(both, 2, axis=-1)
        y = nn.Dropout(self.dropout, deterministic=not train)(self.activation(gate) * up)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="down")(y)


def token_inputs(inputs: Any, vocabulary: int | None) -> tuple[Array, Array | None, Array | None]:
    """`(tokens, mask, types)` from an int array `[B, L]` or a mapping of such arrays.

    Tokens are those of `known_ids`, or with None as they are.

    Raises:
      ValueError: if the tokens are missing, not `[B, L]`, or another array has another shape.
      TypeError: if the tokens are not integers.
    """
    given = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    known = {"tokens", "mask", "types"}
    if "tokens" not in given or not given.keys() <= known:
        raise ValueError(
            f"inputs must be an int array [B, L] or a dict with 'tokens' and optionally "
            f"'mask' (bool) and 'types', got keys {sorted(given)}."
        )
    tokens = given["tokens"]
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}{list(tokens.shape)}.")
    for name, array in given.items():
        if array.ndim != 2 or array.shape != tokens.shape:
            raise ValueError(
                f"{name} must be [B, L] like the tokens, got {list(array.shape)} for "
                f"tokens{list(tokens.shape)}."
            )
    mask = None if given.get("mask") is None else given["mask"].astype(jnp.bool_)
    ids = tokens if vocabulary is None else known_ids(tokens, vocabulary, mask)
    return ids, mask, given.get("types")


def known_ids(tokens: Array, vocabulary: int, where: Array | None = None) -> Array:
    """The ids; outside the vocabulary 0 in padding, and otherwise one whose embedding is NaN.

    JAX itself reads -1 as the last row of a table.
    """
    safe, usable = _numerics.usable_labels(tokens, vocabulary)
    if where is not None:
        usable |= ~where
    return jnp.where(usable, safe, vocabulary)


def check_length(tokens: Array, positions: int) -> None:
    """Raises ValueError if sequences are longer than the table of positions."""
    if tokens.shape[1] > positions:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens, but the model has {positions} "
            "positions. Cut the sequences."
        )


def mean_pool(hidden: Array, mask: Array | None = None) -> Array:
    """The mean over the real tokens.

    Args:
      hidden: `[B, L, width]`.
      mask: bool `[B, L]`, True where there is a token; None means everywhere.

    Returns:
      `[B, width]`, float32 or wider; zero for a row without tokens.

    Raises:
      TypeError: if the mask is not bool.
      ValueError: if the shapes do not fit.
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
    """`mean_pool` scaled to unit length, as in MiniLM and similar sentence encoders.

    Arguments, result and errors are those of `mean_pool`: `[B, L, width]` to `[B, width]`.
    """
    pooled = mean_pool(hidden, mask)
    square = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, pooled / jnp.sqrt(safe), 0)


def relative_buckets(length: int, buckets: int, most: int = 128) -> Array:
    """int32 `[L, L]`: T5's bucket of `key - query`, with half of the buckets for each direction.

    Distances below a quarter of the number of buckets have their own bucket; beyond that, buckets
    grow logarithmically up to the distance `most`.

    Raises:
      ValueError: if there are fewer than 4 buckets, or `most` is no more than a quarter of them.
    """
    at = np.arange(length)
    offset = at[None, :] - at[:, None]
    half = buckets // 2
    exact = half // 2
    if not 0 < exact < most:
        raise ValueError(
            "relative positions need at least 4 buckets, and a largest distance above a quarter of "
            f"their number; got {buckets} buckets, and {most} as the largest distance."
        )
    distance = np.abs(offset)
    # In float32, as in the published code, since rounding can decide the bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(
        math.log(most / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int64), half - 1)
    bucket = np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)
    return jnp.asarray(bucket, jnp.int32)


def rotary(length: int, frequencies: Sequence[float]) -> Callable[[Array], Array]:
    """Rotates channel `i` with channel `i + D/2` by `position * frequency_i`.

    Published checkpoints in this layout pair the two halves in this way. Angles are float32.
    """
    angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), jnp.asarray(frequencies, jnp.float32))
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))

    def rotate(x: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x.dtype)

    return rotate


def causal(length: int) -> Array:
    """bool `[1, 1, L, L]`: each position sees itself and earlier positions."""
    return jnp.tril(jnp.ones((length, length), jnp.bool_))[None, None]
