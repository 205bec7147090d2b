"""BERT and its kin as Linen modules: MiniLM, DistilBERT, RoBERTa.

Post-norm encoders over absolute positions. The variants differ in data (a table of token types,
where positions start, the activation of the pooled head), not in code paths.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    SelfAttention,
    check_length,
    gelu,
    layer_norm,
    token_inputs,
)


class BertEmbeddings(nn.Module):
    """Token, position and type embeddings, summed and normalized."""

    vocabulary: int
    width: int
    positions: int
    types: int
    norm_epsilon: float
    first_position: int | None

    @nn.compact
    def __call__(self, tokens: Array, types: Array | None) -> Array:
        if self.first_position is None:
            position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        else:
            # RoBERTa counts from padding + 1 and leaves padding itself at the padding's row.
            present = (tokens != self.first_position - 1).astype(jnp.int32)
            position = jnp.cumsum(present, axis=1) * present + self.first_position - 1
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(tokens)
        x = x + nn.Embed(self.positions, self.width, name="positions")(position)
        if self.types:
            types = jnp.zeros_like(tokens) if types is None else types
            x = x + nn.Embed(self.types, self.width, name="types")(types)
        return layer_norm(self.norm_epsilon, "norm")(x)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by its residual and norm."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x: Array, where: Array | None, train: bool) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(self.heads, dropout=self.attention_dropout, name="attention")
        x = layer_norm(self.norm_epsilon, "attention_norm")(
            x + drop(attention(x, where, train=train))
        )
        mlp = FeedForward(self.hidden, self.activation, name="mlp")
        return layer_norm(self.norm_epsilon, "mlp_norm")(x + drop(mlp(x)))


class Bert(nn.Module):
    """A BERT-like encoder with optional pooler and classification head.

    Inputs: int32 tokens `[B, L]`, or a dict with `tokens` and optionally `mask` (bool, True where
    there is a token) and `types`.

    Outputs: `last_hidden` `[B, L, width]`; `pooled` `[B, width]` with a pooler; `logits`
    `[B, classes]` with a head. Taps: `embeddings`, `layers_0` … (hidden states),
    `layers_0/attention/probs`.

    Attributes:
      first_position: None counts positions from 0; RoBERTa counts from padding + 1.
      pooled_activation: tanh for BERT; ReLU makes the pooler DistilBERT's `pre_classifier`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int = 512
    types: int = 2
    classes: int | None = None
    has_pooler: bool = True
    activation: Activation = gelu
    pooled_activation: Activation = jnp.tanh
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    first_position: int | None = None

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, types = token_inputs("Bert", inputs)
        check_length("Bert", tokens, self.positions - (self.first_position or 0))
        where = None if mask is None else mask[:, None, None, :]
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = BertEmbeddings(
            self.vocabulary,
            self.width,
            self.positions,
            self.types,
            self.norm_epsilon,
            self.first_position,
            name="embeddings",
        )(tokens, types)
        x = drop(x)
        for i in range(self.layers):
            x = BertLayer(
                self.heads,
                self.hidden,
                self.activation,
                self.norm_epsilon,
                self.dropout,
                self.attention_dropout,
                name=f"layers_{i}",
            )(x, where, train)
        outputs = {"last_hidden": x}
        pooled = x[:, 0]
        if self.has_pooler:
            pooled = self.pooled_activation(nn.Dense(self.width, name="pooler")(pooled))
            outputs["pooled"] = pooled
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(drop(pooled))
        return outputs
