"""More text encoders as Linen modules: T5, ModernBERT, and the text towers of CLIP and SigLIP.

Inputs are those of `Bert`. Outputs: `last_hidden` `[B, L, width]`, and with a head `logits`. Taps:
`layers_0` …, `layers_0/attention/probs`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    SelfAttention,
    causal,
    check_length,
    gelu,
    gelu_tanh,
    layer_norm,
    mean_pool,
    quick_gelu,
    relative_bias,
    rotary,
    run_layers,
    share_fields,
    token_inputs,
)
from kdtl_jax.models._encoders import LanguageHead
from kdtl_jax.models._vit import ViTLayer


class T5Layer(nn.Module):
    """Pre-norm attention with unscaled scores, then feed-forward; no biases."""

    heads: int
    head_width: int
    hidden: int
    is_gated: bool
    activation: Activation
    norm_epsilon: float
    dropout: float

    @nn.compact
    def __call__(self, x: Array, where: Array | None, bias: Array, train: bool) -> Array:
        def drop(y: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        attention = SelfAttention(
            self.heads,
            self.head_width,
            use_bias=False,
            out_bias=False,
            dropout=self.dropout,
            scale=1.0,
            name="attention",
        )
        y = nn.RMSNorm(epsilon=self.norm_epsilon, name="attention_norm")(x)
        x = x + drop(attention(y, where, train=train, bias=bias))
        y = nn.RMSNorm(epsilon=self.norm_epsilon, name="mlp_norm")(x)
        gate = "separate" if self.is_gated else None
        mlp = FeedForward(self.hidden, self.activation, False, self.dropout, gate, name="mlp")
        return x + drop(mlp(y, train))


class T5Encoder(nn.Module):
    """The encoder of T5: all layers share buckets of relative positions.

    Attributes:
      buckets: number of buckets, each with its own bias; half of them are for each direction.
      most: the distance from which all positions share the last bucket.
      is_gated: T5 1.1's `down(activation(gate(x)) * up(x))`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int
    buckets: int = 32
    most: int = 128
    is_gated: bool = False
    activation: Activation = jax.nn.relu
    norm_epsilon: float = 1e-6
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs, self.vocabulary)
        where = None if mask is None else mask[:, None, None, :]
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(tokens)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        bias = relative_bias(tokens.shape[1], self.heads, self.buckets, self.most)
        x = run_layers(share_fields(self, T5Layer), self.layers, x, where, bias, train)
        x = nn.RMSNorm(epsilon=self.norm_epsilon, name="norm")(x)
        return {"last_hidden": nn.Dropout(self.dropout, deterministic=not train)(x)}


class ModernBert(nn.Module):
    """ModernBERT: pre-norm, rotary positions, gated feed-forward; some layers have a window.

    Attributes:
      windows: per layer, how far a position sees to each side; None means everywhere.
      ropes: per layer, radians per position of each pair of channels.
      pools_mean: whether the classifier reads the mean of the tokens instead of the first.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    windows: tuple[int | None, ...]
    ropes: tuple[tuple[float, ...], ...]
    classes: int | None = None
    token_classes: int | None = None
    has_language_head: bool = False
    is_tied: bool = True
    pools_mean: bool = False
    activation: Activation = gelu
    head_activation: Activation = gelu
    norm_epsilon: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    decoder_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    head_dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs, self.vocabulary)
        length = tokens.shape[1]
        table = nn.Embed(self.vocabulary, self.width, name="tokens")
        norm = partial(layer_norm, self.norm_epsilon, use_bias=self.norm_bias)

        def drop(rate: float, y: Array) -> Array:
            return nn.Dropout(rate, deterministic=not train)(y)

        x = drop(self.dropout, norm("tokens_norm")(table(tokens)))
        layer = share_fields(self, ModernBertLayer)
        for i in range(self.layers):
            where = _window_mask(length, self.windows[i], mask)
            fields = {"has_attention_norm": i > 0, "rope": self.ropes[i]}
            x = layer(**fields, name=f"layers_{i}")(x, where, train)
        x = norm("norm")(x)
        outputs = {"last_hidden": x}
        if self.has_language_head:
            language = share_fields(self, LanguageHead)(
                activation=self.head_activation,
                has_bias=self.decoder_bias,
                dense_bias=self.head_bias,
                name="language",
            )
            outputs["logits"] = language(x, table)
        classes = self.classes if self.token_classes is None else self.token_classes
        if classes is not None:
            y = x
            if self.classes is not None:
                y = mean_pool(x, mask).astype(x.dtype) if self.pools_mean else x[:, 0]
            y = self.head_activation(nn.Dense(self.width, self.head_bias, name="pooler")(y))
            y = drop(self.head_dropout, norm("pooler_norm")(y))
            outputs["logits"] = nn.Dense(classes, name="head")(y)
        return outputs


class ModernBertLayer(nn.Module):
    """Pre-norm attention (without a norm in the first layer) and gated feed-forward."""

    heads: int
    hidden: int
    has_attention_norm: bool
    activation: Activation
    norm_epsilon: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    attention_dropout: float
    mlp_dropout: float
    rope: tuple[float, ...]

    @nn.compact
    def __call__(self, x: Array, where: Array | None, train: bool) -> Array:
        norm = partial(layer_norm, self.norm_epsilon, use_bias=self.norm_bias)
        attention = SelfAttention(
            self.heads,
            use_bias=self.attention_bias,
            out_bias=self.attention_bias,
            dropout=self.attention_dropout,
            is_fused=True,
            name="attention",
        )
        y = norm("attention_norm")(x) if self.has_attention_norm else x
        y = attention(y, where, train, rotate=rotary(x.shape[1], self.rope))
        x = x + nn.Dropout(self.attention_dropout, deterministic=not train)(y)
        mlp = FeedForward(
            self.hidden, self.activation, self.mlp_bias, self.mlp_dropout, "fused", name="mlp"
        )
        return x + mlp(norm("mlp_norm")(x), train)


class ClipText(nn.Module):
    """CLIP's text tower: causal attention, pooled at the end token.

    Outputs also have `pooled` `[B, width]`, and with a projection `text_embedding`.

    Attributes:
      end: the token whose first position is pooled; None means the largest token, as in old files.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int
    end: int | None = None
    projection: int | None = None
    activation: Activation = quick_gelu
    norm_epsilon: float = 1e-5
    attention_dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs, self.vocabulary)
        where = causal(tokens.shape[1])
        where = where if mask is None else where & mask[:, None, None, :]
        x = layer_norm(self.norm_epsilon, "norm")(_text_tower(self, tokens, where, train))
        last = jnp.argmax(tokens if self.end is None else tokens == self.end, axis=1)
        pooled = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        outputs = {"last_hidden": x, "pooled": pooled}
        if self.projection is not None:
            project = nn.Dense(self.projection, use_bias=False, name="projection")
            outputs["text_embedding"] = project(pooled)
        return outputs


class SiglipText(nn.Module):
    """SigLIP's text tower: pools by projecting the last position, even if it is padding.

    Outputs also have `pooled` `[B, projection]`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int
    projection: int
    activation: Activation = gelu_tanh
    norm_epsilon: float = 1e-6
    attention_dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs, self.vocabulary)
        where = None if mask is None else mask[:, None, None, :]
        x = layer_norm(self.norm_epsilon, "norm")(_text_tower(self, tokens, where, train))
        pooled = nn.Dense(self.projection, name="pooler")(x[:, -1])
        return {"last_hidden": x, "pooled": pooled}


def _text_tower(
    module: ClipText | SiglipText, tokens: Array, where: Array | None, train: bool
) -> Array:
    length = tokens.shape[1]
    check_length(tokens, module.positions)
    x = nn.Embed(module.vocabulary, module.width, name="tokens")(tokens)
    positions = nn.Embed(module.positions, module.width, name="positions")
    x = x + positions(jnp.arange(length))[None]
    return run_layers(share_fields(module, ViTLayer), module.layers, x, train, where)


def _window_mask(length: int, window: int | None, mask: Array | None) -> Array | None:
    """Which keys a query sees: those within the window that are tokens."""
    where = None if mask is None else mask[:, None, None, :]
    if window is None:
        return where
    position = np.arange(length)
    is_near = jnp.asarray(np.abs(position[:, None] - position[None, :]) <= window)[None, None]
    return is_near if where is None else is_near & where
