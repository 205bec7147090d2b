"""The building blocks of every transformer here: masked attention and feed-forward layers.

Submodule names are the same in all families (`attention/query`, `attention/out`, `mlp/up`,
`mlp/down`), so selectors and layer maps carry over. Attention probabilities are sown as
`.../attention/probs`; they cost nothing unless tapped. Softmax and norms accumulate in float32.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

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


def layer_norm(epsilon: float, name: str | None = None, *, use_bias: bool = True) -> nn.LayerNorm:
    """LayerNorm with the two-pass variance: the one-pass form loses digits when |mean| >> std."""
    return nn.LayerNorm(epsilon, use_bias=use_bias, use_fast_variance=False, name=name)


def share_fields(module: nn.Module, part: type[nn.Module]) -> Callable[..., nn.Module]:
    """The class of a part of a module, with the module's values of the fields that both have."""
    names = part.__dataclass_fields__.keys() & module.__dataclass_fields__.keys()
    return partial(part, **{name: getattr(module, name) for name in names - {"name", "parent"}})


def run_layers(layer: Callable[..., nn.Module], count: int, x: Array, *args: Any) -> Array:
    """Runs `layers_0` to the last, one after another; `layer(name=)` makes each of them."""
    for i in range(count):
        x = layer(name=f"layers_{i}")(x, *args)
    return x


def attention_probs(
    query: Array,
    key: Array,
    where: Array | None,
    bias: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention probabilities `[B, H, Q, K]`.

    Args:
      query: `[B, Q, H, D]`.
      key: `[B, K, H, D]`.
      where: bool, broadcastable to `[B, H, Q, K]`: the keys that a query may attend to.
      bias: added to the scaled scores, broadcastable to `[B, H, Q, K]`.
      scale: factor of the scores; None means `1 / sqrt(D)`.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scores * jnp.asarray(scale, jnp.float32)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if where is not None:
        scores = jnp.where(where, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).astype(query.dtype)


def mix_values(probs: Array, value: Array) -> Array:
    """The heads' outputs side by side: `[B, H, Q, K], [B, K, H, D] -> [B, Q, H * D]`."""
    mixed = jnp.einsum("bhqk,bkhd->bqhd", probs, value)
    return mixed.reshape(*mixed.shape[:2], -1)


class SelfAttention(nn.Module):
    """Multi-head self-attention, with three projections or a fused one.

    Optionally, a bias is added to the scores, and queries and keys are rotated by position.
    """

    heads: int
    head_width: int | None = None
    use_bias: bool = True
    out_bias: bool = True
    dropout: float = 0.0
    scale: float | None = None
    is_fused: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        where: Array | None,
        train: bool = False,
        bias: Array | None = None,
        rotate: Callable[[Array], Array] = lambda heads: heads,
    ) -> Array:
        dense = partial(nn.Dense, use_bias=self.use_bias)
        if self.is_fused:
            parts = jnp.split(dense(3 * x.shape[-1], name="qkv")(x), 3, axis=-1)
        else:
            width = self.heads * (self.head_width or x.shape[-1] // self.heads)
            parts = [dense(width, name=name)(x) for name in ("query", "key", "value")]
        query, key, value = (part.reshape(*x.shape[:2], self.heads, -1) for part in parts)
        probs = attention_probs(rotate(query), rotate(key), where, bias, self.scale)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(self.dropout, deterministic=not train)(probs)
        mixed = mix_values(probs, value)
        return nn.Dense(x.shape[-1], use_bias=self.out_bias, name="out")(mixed)


class FeedForward(nn.Module):
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))`.

    If the gate is fused, gate and up are the two halves of one projection.
    """

    hidden: int
    activation: Activation = gelu
    use_bias: bool = True
    dropout: float = 0.0
    gate: Literal["separate", "fused"] | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense = partial(nn.Dense, use_bias=self.use_bias)
        if self.gate == "fused":
            gate, up = jnp.split(dense(2 * self.hidden, name="gate_up")(x), 2, axis=-1)
            y = self.activation(gate) * up
        elif self.gate == "separate":
            y = self.activation(dense(self.hidden, name="gate")(x))
            y = y * dense(self.hidden, name="up")(x)
        else:
            y = self.activation(dense(self.hidden, name="up")(x))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return dense(x.shape[-1], name="down")(y)


def token_inputs(inputs: Any, vocabulary: int | None) -> tuple[Array, Array | None, Array | None]:
    """`(tokens, mask, types)` from an int array `[B, L]` or a mapping of such arrays.

    Tokens are those of `known_ids`, or with None as they are.

    Raises:
      ValueError: if the tokens are missing, not `[B, L]`, or another array has another shape.
      TypeError: if the tokens are not integers.
    """
    arrays = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    if "tokens" not in arrays or not arrays.keys() <= {"tokens", "mask", "types"}:
        raise ValueError(
            f"inputs must be an int array [B, L] or a dict with 'tokens' and optionally "
            f"'mask' (bool) and 'types', got keys {sorted(arrays)}."
        )
    tokens = arrays["tokens"]
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}{list(tokens.shape)}.")
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape != tokens.shape:
            raise ValueError(
                f"{name} must be [B, L] like the tokens, got {list(array.shape)} for "
                f"tokens{list(tokens.shape)}."
            )
    mask = None if arrays.get("mask") is None else arrays["mask"].astype(jnp.bool_)
    ids = tokens if vocabulary is None else known_ids(tokens, vocabulary, mask)
    return ids, mask, arrays.get("types")


def known_ids(tokens: Array, vocabulary: int, where: Array | None = None) -> Array:
    """The ids; outside the vocabulary 0 in padding, and otherwise one whose embedding is NaN.

    JAX itself reads -1 as the last row of a table.
    """
    safe, usable = _numerics.usable_labels(tokens, vocabulary)
    if where is not None:
        usable |= ~where
    return jnp.where(usable, safe, vocabulary)


def check_images(model: str, inputs: Array) -> None:
    """Raises ValueError unless the inputs of a model are images `[B, H, W, C]`."""
    if inputs.ndim != 4:
        raise ValueError(
            f"{model}: images must be [B, H, W, C], got {list(inputs.shape)}. "
            "Gray images need a last axis of one: images[..., None]."
        )


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
    _checks.mask(mask, hidden.shape[:2], "mask")
    where = None if mask is None else mask[..., None]
    return _numerics.masked_mean(hidden, where, axis=1)


def sentence_embedding(hidden: Array, mask: Array | None = None) -> Array:
    """`mean_pool` scaled to unit length, as in MiniLM and similar sentence encoders.

    Arguments, result and errors are those of `mean_pool`: `[B, L, width]` to `[B, width]`.
    """
    pooled = mean_pool(hidden, mask)
    square = jnp.sum(pooled * pooled, axis=-1, keepdims=True)
    safe = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, pooled / jnp.sqrt(safe), 0)


def relative_bias(length: int, heads: int, buckets: int, max_distance: int = 128) -> Array:
    """A module's bias of the scores `[1, heads, L, L]`: a table by `relative_buckets`."""
    table = nn.Embed(buckets, heads, name="relative")
    return jnp.moveaxis(table(relative_buckets(length, buckets, max_distance)), -1, 0)[None]


def relative_buckets(length: int, buckets: int, max_distance: int) -> Array:
    """int32 `[L, L]`: T5's bucket of `key - query`, with half of the buckets for each direction.

    Distances below a quarter of the number of buckets have their own bucket; beyond that, buckets
    grow logarithmically up to `max_distance`.

    Raises:
      ValueError: if there are fewer than 4 buckets, or `max_distance` is no more than a quarter of
        them.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    if not 0 < exact < max_distance:
        raise ValueError(
            "relative positions need at least 4 buckets, and a largest distance above a quarter of "
            f"their number; got {buckets} buckets, and {max_distance} as the largest distance."
        )
    distance = np.abs(offset)
    # In float32, as in the published code, since rounding can decide the bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(
        math.log(max_distance / exact)
    )
    logarithmic = exact + (ratio * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(logarithmic, half - 1))
    return jnp.asarray(bucket + np.where(offset > 0, half, 0), jnp.int32)


def rotary(length: int, frequencies: Sequence[float]) -> Callable[[Array], Array]:
    """Rotates channel `i` with channel `i + D/2` by `position * frequency_i`.

    Published checkpoints in this layout pair the two halves in this way. Angles are float32.
    """
    angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), jnp.asarray(frequencies, jnp.float32))
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))

    def rotate(x: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)

    return rotate


def causal(length: int) -> Array:
    """bool `[1, 1, L, L]`: each position sees itself and earlier positions."""
    return jnp.tril(jnp.ones((length, length), jnp.bool_))[None, None]
