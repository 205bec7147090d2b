"""DeBERTa-v2 as a Linen module.

Inputs are those of `Bert`. Outputs: `last_hidden` `[B, L, width]`, and with a head `logits`. Taps:
`layers_0` …, `layers_0/attention/probs`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    attention_probs,
    check_length,
    gelu,
    layer_norm,
    mix_values,
    share_fields,
    token_inputs,
)
from kdtl_jax.models._encoders import LanguageHead


class DebertaLayers(NamedTuple):
    """The settings shared by all layers; the fields are those of `Deberta`."""

    width: int
    heads: int
    hidden: int
    span: int | None
    buckets: int
    most: int
    by_key: bool
    by_query: bool
    shares_projections: bool
    activation: Activation
    norm_epsilon: float
    dropout: float
    attention_dropout: float


class Deberta(nn.Module):
    """DeBERTa-v2: disentangled attention by content and by relative position; post-norm.

    Attributes:
      positions: number of rows of the table of absolute positions; None means no such table.
      span: number of relative positions on each side that have an embedding; None means attention
        by content only.
      buckets: if positive, distances are in log-spaced buckets up to `most`.
      by_key, by_query: whether positions meet the queries ("c2p"), and the keys ("p2c").
      shares_projections: whether positions are projected by the layer's own key and query.
      window: width of a convolution parallel to the first layer, in `window_groups` groups of
        channels; 0 means none.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int | None = None
    types: int = 0
    span: int | None = None
    buckets: int = -1
    most: int = 512
    by_key: bool = False
    by_query: bool = False
    shares_projections: bool = False
    norms_positions: bool = False
    window: int = 0
    window_activation: Activation = jnp.tanh
    window_groups: int = 1
    embedding_width: int | None = None
    classes: int | None = None
    token_classes: int | None = None
    has_language_head: bool = False
    is_tied: bool = True
    has_own_bias: bool = False  # as of `Bert`
    activation: Activation = gelu
    pooled_activation: Activation = gelu
    norm_epsilon: float = 1e-7
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pooled_dropout: float = 0.0
    head_dropout: float | None = None

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, types = token_inputs(inputs, self.vocabulary)
        where = None if mask is None else mask[:, None, None, :]
        length = tokens.shape[1]

        def drop(rate: float, y: Array) -> Array:
            return nn.Dropout(rate, deterministic=not train)(y)

        def mask_padding(y: Array) -> Array:
            return y if mask is None else jnp.where(mask[..., None], y, 0)

        width = self.embedding_width or self.width
        table = nn.Embed(self.vocabulary, width, name="tokens")
        x = table(tokens)
        if self.positions is not None:
            check_length(tokens, self.positions)
            x = x + nn.Embed(self.positions, width, name="positions")(jnp.arange(length))[None]
        if self.types:
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + nn.Embed(self.types, width, name="types")(types)
        if width != self.width:
            x = nn.Dense(self.width, use_bias=False, name="project")(x)
        x = drop(self.dropout, mask_padding(layer_norm(self.norm_epsilon, "tokens_norm")(x)))
        relative = None
        if self.span is not None:
            table_of_positions = nn.Embed(2 * self.span, self.width, name="relative")
            relative = table_of_positions(jnp.arange(2 * self.span))
            if self.norms_positions:
                relative = layer_norm(self.norm_epsilon, "relative_norm")(relative)
        layout = DebertaLayers(*(getattr(self, name) for name in DebertaLayers._fields))
        after_first_layer: Callable[[Array], Array] | None = None
        if self.window:
            groups = self.window_groups
            conv = nn.Conv(self.width, (self.window,), feature_group_count=groups, name="conv")
            y = self.window_activation(drop(self.dropout, mask_padding(conv(x))))
            norm = layer_norm(self.norm_epsilon, "conv_norm")

            def add_convolution(x: Array) -> Array:
                return mask_padding(norm(x + y))

            after_first_layer = add_convolution

        for i in range(self.layers):
            layer = DebertaLayer(layout, name=f"layers_{i}")
            x = layer(x, where, relative, train, None if i else after_first_layer)
        outputs = {"last_hidden": x}
        rate = self.dropout if self.head_dropout is None else self.head_dropout
        if self.classes is not None:
            dense = nn.Dense(self.width, name="pooler")
            y = self.pooled_activation(dense(drop(self.pooled_dropout, x[:, 0])))
            outputs["pooled"] = y
            outputs["logits"] = nn.Dense(self.classes, name="head")(drop(rate, y))
        if self.token_classes is not None:
            outputs["logits"] = nn.Dense(self.token_classes, name="head")(drop(self.dropout, x))
        if self.has_language_head:
            outputs["logits"] = share_fields(self, LanguageHead)(name="language")(x, table)
        return outputs


class DebertaLayer(nn.Module):
    """Disentangled attention and feed-forward, each followed by its residual and norm."""

    layout: DebertaLayers

    @nn.compact
    def __call__(
        self,
        x: Array,
        where: Array | None,
        relative: Array | None,
        train: bool,
        finish: Callable[[Array], Array] | None,
    ) -> Array:
        m = self.layout
        drop = nn.Dropout(m.dropout, deterministic=not train)
        relative = None if relative is None else drop(relative)
        y = DisentangledAttention(m, name="attention")(x, where, relative, train)
        x = layer_norm(m.norm_epsilon, "attention_norm")(x + drop(y))
        y = FeedForward(m.hidden, m.activation, name="mlp")(x)
        x = layer_norm(m.norm_epsilon, "mlp_norm")(x + drop(y))
        # Inside the layer, so that its tap is the hidden state that transformers returns.
        return x if finish is None else finish(x)


class DisentangledAttention(nn.Module):
    """Attention by scores of contents, of queries with positions, and of keys with positions."""

    layout: DebertaLayers

    @nn.compact
    def __call__(self, x: Array, where: Array | None, relative: Array | None, train: bool) -> Array:
        m = self.layout
        width, length = m.width, x.shape[1]
        projections = {name: nn.Dense(width, name=name) for name in ("query", "key", "value")}

        def heads(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], m.heads, -1)

        def relative_heads(name: str) -> Array:
            shared = projections[name] if m.shares_projections else None
            return heads((shared or nn.Dense(width, name=f"place_{name}"))(relative))

        query, key, value = (heads(project(x)) for project in projections.values())
        scale = (query.shape[-1] * (1 + m.by_key + m.by_query)) ** -0.5
        bias = None
        if relative is not None and (m.by_key or m.by_query):
            assert m.span is not None
            index = log_buckets(length, m.buckets, m.most) + m.span
            index = jnp.clip(index, 0, 2 * m.span - 1)[None, None]
            bias = jnp.zeros((), jnp.float32)
            if m.by_key:
                scores = jnp.einsum("bqhd,phd->bhqp", query, relative_heads("key"))
                scores = jnp.take_along_axis(scores, index, axis=-1)
                bias = bias + scores.astype(jnp.float32) * scale
            if m.by_query:
                scores = jnp.einsum("bkhd,phd->bhkp", key, relative_heads("query"))
                scores = jnp.take_along_axis(scores, jnp.swapaxes(index, -1, -2), axis=-1)
                bias = bias + jnp.swapaxes(scores, -1, -2).astype(jnp.float32) * scale
        probs = attention_probs(query, key, where, bias, scale)
        self.sow("intermediates", "probs", probs)
        probs = nn.Dropout(m.attention_dropout, deterministic=not train)(probs)
        return nn.Dense(width, name="out")(mix_values(probs, value))


def log_buckets(length: int, buckets: int, max_distance: int) -> Array:
    """int32 `[L, L]`: `query - key`; if `buckets` > 0, log-spaced buckets beyond half of it.

    Raises:
      ValueError: if there is one bucket, or tokens are further apart than half of the buckets,
        which reach no further than `max_distance`.
    """
    position = np.arange(length)
    offset = position[:, None] - position[None, :]
    middle = buckets // 2
    if buckets <= 0 or length - 1 <= middle:
        return jnp.asarray(offset, jnp.int32)
    if not 0 < middle < max_distance - 1:
        raise ValueError(
            f"relative positions of {length} tokens need at least 2 buckets, and a largest "
            f"distance above half of their number; got {buckets} buckets, and {max_distance} as "
            "the largest distance."
        )
    distance = np.maximum(np.abs(offset), middle - 1).astype(np.float32)
    # In float32, as in the published code, since rounding can decide the bucket.
    ratio = np.log(np.maximum(distance, 1) / np.float32(middle)) / np.log(
        np.float32((max_distance - 1) / middle)
    )
    bucket = (np.ceil(ratio * np.float32(middle - 1)) + middle) * np.sign(offset)
    return jnp.asarray(np.where(distance <= middle, offset, bucket), jnp.int32)
