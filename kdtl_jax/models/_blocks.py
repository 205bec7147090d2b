"""What every transformer here is made of: masked attention and a feed-forward layer.

Submodule names are the same in all families (`attention/query`, `attention/out`, `mlp/up`,
`mlp/down`), so that selectors and layer maps carry over. Attention probabilities are sown as
`.../attention/probs`; they cost nothing unless tapped. Softmax and norms accumulate in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Activation = Callable[[Array], Array]


def gelu(x: Array) -> Array:
    """`x Phi(x)` with the exact error function, as BERT and ViT were trained."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU, as GPT-2 was trained."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """`x sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


def layer_norm(epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with the two-pass variance: the one-pass form loses digits when |mean| >> std."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


def attend(
    query: Array, key: Array, value: Array, where: Array | None
) -> tuple[Array, Callable[[Array], Array]]:
    """Attention probabilities, and the function that applies them to the values.

    Args:
      query: `[B, Q, H, D]`.
      key: `[B, K, G, D]` with `G` dividing `H`: each key head serves `H / G` query heads.
      value: `[B, K, G, D]`.
      where: bool, broadcastable to `[B, H, Q, K]`: what may be looked at.

    Returns:
      `(probs [B, H, Q, K], mix)` with `mix(probs) -> [B, Q, H * D]`, so that dropout fits between.
    """
    heads, groups = query.shape[2], key.shape[2]
    key, value = (jnp.repeat(x, heads // groups, axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    scores = scores * jnp.asarray(query.shape[-1] ** -0.5, jnp.float32)
    if where is not None:
        scores = jnp.where(where, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(value.dtype)

    def mix(weights: Array) -> Array:
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return mixed.reshape(*mixed.shape[:2], -1)

    return probs, mix


class SelfAttention(nn.Module):
    """Multi-head self-attention, with optional grouped keys and rotary positions."""

    heads: int
    key_heads: int | None = None
    head_width: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Array,
        where: Array | None,
        rotate: Callable[[Array], Array] | None = None,
        train: bool = False,
    ) -> Array:
        groups = self.key_heads or self.heads
        width = self.head_width or x.shape[-1] // self.heads

        def project(name: str, count: int) -> Array:
            y = nn.Dense(count * width, use_bias=self.use_bias, name=name)(x)
            return y.reshape(*x.shape[:2], count, width)

        query, key = project("query", self.heads), project("key", groups)
        value = project("value", groups)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        probs, mix = attend(query, key, value, where)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(self.dropout, deterministic=not train)(probs)
        return nn.Dense(x.shape[-1], use_bias=self.out_bias, name="out")(mix(probs))


class FusedSelfAttention(nn.Module):
    """Multi-head self-attention whose query, key and value are one projection, as in GPT-2."""

    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, where: Array | None, train: bool = False) -> Array:
        fused = nn.Dense(3 * x.shape[-1], name="qkv")(x)
        query, key, value = (
            part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(fused, 3, axis=-1)
        )
        probs, mix = attend(query, key, value, where)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(self.dropout, deterministic=not train)(probs)
        return nn.Dense(x.shape[-1], name="out")(mix(probs))


class FeedForward(nn.Module):
    """`down(activation(up(x)))`."""

    hidden: int
    activation: Activation = gelu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.activation(nn.Dense(self.hidden, name="up")(x))
        return nn.Dense(x.shape[-1], name="down")(y)


def token_inputs(fn: str, inputs: Any) -> tuple[Array, Array | None, Array | None]:
    """`(tokens, mask, types)` from an int array `[B, L]` or a mapping of such arrays.

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
    mask = given.get("mask")
    return tokens, None if mask is None else mask.astype(jnp.bool_), given.get("types")


def check_length(fn: str, tokens: Array, positions: int) -> None:
    """Raises ValueError if a sequence is longer than the table of positions."""
    if tokens.shape[1] > positions:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens, but the model has {positions} "
            "positions. Cut the sequences."
        )


def causal(length: int, window: int | None = None) -> Array:
    """bool `[1, 1, L, L]`: each position sees itself and what came before (at most `window`)."""
    query = jnp.arange(length, dtype=jnp.int32)[:, None]
    key = jnp.arange(length, dtype=jnp.int32)[None, :]
    seen = jnp.less_equal(*jnp.broadcast_arrays(key, query))
    if window is not None:
        q, k = jnp.broadcast_arrays(query, key)
        seen &= q - k < window
    return seen[None, None]
