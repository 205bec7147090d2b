"""Causal language models as Linen modules: GPT-2 and Llama with its kin (Mistral, Qwen2)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    FusedSelfAttention,
    GatedFeedForward,
    SelfAttention,
    causal,
    check_length,
    gelu_tanh,
    layer_norm,
    rotary,
    token_inputs,
)


class GPT2Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x: Array, where: Array, train: bool) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = FusedSelfAttention(self.heads, self.attention_dropout, name="attention")
        y = layer_norm(self.norm_epsilon, "attention_norm")(x)
        x = x + drop(attention(y, where, train))
        y = layer_norm(self.norm_epsilon, "mlp_norm")(x)
        return x + drop(FeedForward(self.hidden, self.activation, name="mlp")(y))


class GPT2(nn.Module):
    """GPT-2: learned positions, pre-norm, output tied to the token embedding.

    Inputs: int32 tokens `[B, L]`, or a dict with `tokens` and `mask` (padding on the right).
    Outputs: `last_hidden` `[B, L, width]` (after the last norm) and `logits`
    `[B, L, vocabulary]`, float32; without `has_head` only the former.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int = 1024
    activation: Activation = gelu_tanh
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    has_head: bool = True
    is_tied: bool = True

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs)
        check_length(tokens, self.positions)
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        position = nn.Embed(self.positions, self.width, name="positions")
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = embed(tokens) + position(index)
        x = nn.Dropout(self.embedding_dropout, deterministic=not train)(x)
        where = _visible(tokens.shape[1], mask, None)
        for i in range(self.layers):
            x = GPT2Layer(
                self.heads,
                self.hidden,
                self.activation,
                self.norm_epsilon,
                self.dropout,
                self.attention_dropout,
                name=f"layers_{i}",
            )(x, where, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
        return _with_logits(x, embed, self.vocabulary, self.has_head, self.is_tied)


class LlamaLayer(nn.Module):
    """Pre-norm rotary attention with grouped keys, and a gated feed-forward."""

    heads: int
    key_heads: int
    head_width: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    attention_dropout: float

    @nn.compact
    def __call__(
        self, x: Array, where: Array, rotate: Callable[[Array], Array], train: bool
    ) -> Array:
        attention = SelfAttention(
            self.heads,
            self.key_heads,
            self.head_width,
            self.qkv_bias,
            self.out_bias,
            self.attention_dropout,
            name="attention",
        )
        y = nn.RMSNorm(epsilon=self.norm_epsilon, name="attention_norm")(x)
        x = x + attention(y, where, rotate, train)
        y = nn.RMSNorm(epsilon=self.norm_epsilon, name="mlp_norm")(x)
        return x + GatedFeedForward(self.hidden, self.activation, self.mlp_bias, name="mlp")(y)


class Llama(nn.Module):
    """Llama and its kin: RMSNorm, rotary positions, grouped keys, gated feed-forward.

    Inputs and outputs as `GPT2`, with as many positions as one likes.

    Attributes:
      rope_frequencies: radians per position of each pair of channels, `head_width / 2` numbers:
        `theta ** (-2 i / head_width)`, or a scaled form of it.
      window: positions seen by each position (Mistral's sliding window); None: all before it.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    hidden: int
    rope_frequencies: tuple[float, ...]
    head_width: int | None = None
    activation: Activation = jax.nn.silu
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    attention_dropout: float = 0.0
    has_head: bool = True
    is_tied: bool = False

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, _ = token_inputs(inputs)
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        x = embed(tokens)
        rotate = rotary(tokens.shape[1], self.rope_frequencies)
        where = _visible(tokens.shape[1], mask, self.window)
        for i in range(self.layers):
            x = LlamaLayer(
                self.heads,
                self.key_heads,
                self.head_width or self.width // self.heads,
                self.hidden,
                self.activation,
                self.norm_epsilon,
                self.qkv_bias,
                self.out_bias,
                self.mlp_bias,
                self.attention_dropout,
                name=f"layers_{i}",
            )(x, where, rotate, train)
        x = nn.RMSNorm(epsilon=self.norm_epsilon, name="norm")(x)
        return _with_logits(x, embed, self.vocabulary, self.has_head, self.is_tied)


def _visible(length: int, mask: Array | None, window: int | None) -> Array:
    seen = causal(length, window)
    return seen if mask is None else seen & mask[:, None, None, :]


def _with_logits(
    x: Array, embed: nn.Embed, vocabulary: int, has_head: bool, is_tied: bool
) -> dict[str, Array]:
    outputs = {"last_hidden": x}
    if has_head:
        logits = embed.attend(x) if is_tied else nn.Dense(vocabulary, False, name="head")(x)
        outputs["logits"] = logits.astype(jnp.float32)
    return outputs
