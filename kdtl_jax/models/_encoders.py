"""BERT-like encoders as Linen modules: MiniLM, DistilBERT, RoBERTa, CamemBERT, ELECTRA, MPNet.

They are post-norm encoders with absolute positions. The variants differ in data (a table of token
types, where positions start, the width of the embeddings, buckets of relative positions, the
heads), not in code paths.
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
    relative_bias,
    run_layers,
    share_fields,
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

    def setup(self) -> None:
        self.tokens = nn.Embed(self.vocabulary, self.width)
        self.position_table = nn.Embed(self.positions, self.width, name="positions")
        if self.types:
            self.type_table = nn.Embed(self.types, self.width, name="types")
        self.norm = layer_norm(self.norm_epsilon)

    def __call__(self, tokens: Array, types: Array | None) -> Array:
        if self.first_position is None:
            position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        else:
            # RoBERTa counts from padding + 1, and padding itself uses the padding's row.
            present = (tokens != self.first_position - 1).astype(jnp.int32)
            position = jnp.cumsum(present, axis=1) * present + self.first_position - 1
        x = self.tokens(tokens) + self.position_table(position)
        if self.types:
            x = x + self.type_table(jnp.zeros_like(tokens) if types is None else types)
        return self.norm(x)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by its residual and norm."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    dropout: float
    attention_dropout: float

    @nn.compact
    def __call__(self, x: Array, where: Array | None, train: bool, bias: Array | None) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(self.heads, dropout=self.attention_dropout, name="attention")
        x = layer_norm(self.norm_epsilon, "attention_norm")(
            x + drop(attention(x, where, train=train, bias=bias))
        )
        mlp = FeedForward(self.hidden, self.activation, name="mlp")
        return layer_norm(self.norm_epsilon, "mlp_norm")(x + drop(mlp(x)))


class LanguageHead(nn.Module):
    """Logits over the vocabulary: dense, activation, norm, then the token embeddings and a bias."""

    activation: Activation
    norm_epsilon: float
    is_tied: bool
    has_bias: bool = True
    dense_bias: bool = True
    norm_bias: bool = True
    has_own_bias: bool = False

    @nn.compact
    def __call__(self, x: Array, table: nn.Embed) -> Array:
        x = self.activation(nn.Dense(table.features, self.dense_bias, name="dense")(x))
        x = layer_norm(self.norm_epsilon, "norm", use_bias=self.norm_bias)(x)
        if self.is_tied:
            logits = table.attend(x)
        else:
            logits = nn.Dense(table.num_embeddings, self.has_own_bias, name="decoder")(x)
        if self.has_bias:
            size = (table.num_embeddings,)
            bias = self.param("bias", nn.initializers.zeros_init(), size, jnp.float32)
            # PyTorch's class keeps it beside an output layer with its own bias, and leaves it out.
            logits = logits if self.has_own_bias else logits + bias[None, None]
        return logits.astype(jnp.float32)


class Bert(nn.Module):
    """A BERT-like encoder with an optional pooler and one optional head.

    Inputs: int32 tokens `[B, L]`, or a dict with `tokens` and optionally `mask` (bool, True where
    there is a token) and `types`.

    Outputs: `last_hidden` `[B, L, width]`; `pooled` `[B, width]` with a pooler; `logits`:
    `[B, classes]`, `[B, L, token_classes]` or, with a language head, `[B, L, vocabulary]`.
    Taps: `embeddings`, `layers_0` … (hidden states), `layers_0/attention/probs`.

    Attributes:
      first_position: None counts positions from 0; RoBERTa counts from padding + 1.
      pooled_activation: tanh for BERT; ReLU makes the pooler DistilBERT's `pre_classifier`.
      pooled_dropout: dropout of the pooler's input (RoBERTa's classifier).
      head_dropout: dropout of a classifier's input; None means `dropout`.
      embedding_width: width of the tables, if it is not `width` (ELECTRA projects).
      relative_buckets: number of buckets of relative positions, each with its own bias (MPNet).
      is_tied: whether the language head multiplies by the token embeddings.
      has_own_bias: whether a language head that does not adds the bias of its own output layer, in
        place of the head's.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int = 512
    types: int = 2
    classes: int | None = None
    token_classes: int | None = None
    has_language_head: bool = False
    has_pooler: bool = True
    activation: Activation = gelu
    pooled_activation: Activation = jnp.tanh
    language_activation: Activation = gelu
    norm_epsilon: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pooled_dropout: float = 0.0
    head_dropout: float | None = None
    first_position: int | None = None
    embedding_width: int | None = None
    relative_buckets: int | None = None
    is_tied: bool = True
    has_own_bias: bool = False

    @nn.compact
    def __call__(self, inputs: object, *, train: bool = False) -> dict[str, Array]:
        tokens, mask, types = token_inputs(inputs, self.vocabulary)
        check_length(tokens, self.positions - (self.first_position or 0))
        where = None if mask is None else mask[:, None, None, :]

        def drop(rate: float, x: Array) -> Array:
            return nn.Dropout(rate, deterministic=not train)(x)

        width = self.embedding_width or self.width
        embeddings = share_fields(self, BertEmbeddings)(width=width, name="embeddings")
        x = drop(self.dropout, embeddings(tokens, types))
        if width != self.width:
            x = nn.Dense(self.width, name="project")(x)
        bias = None
        if self.relative_buckets is not None:
            bias = relative_bias(tokens.shape[1], self.heads, self.relative_buckets)
        x = run_layers(share_fields(self, BertLayer), self.layers, x, where, train, bias)
        outputs = {"last_hidden": x}
        pooled = x[:, 0]
        if self.has_pooler:
            dense = nn.Dense(self.width, name="pooler")
            pooled = self.pooled_activation(dense(drop(self.pooled_dropout, pooled)))
            outputs["pooled"] = pooled
        rate = self.dropout if self.head_dropout is None else self.head_dropout
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(drop(rate, pooled))
        if self.token_classes is not None:
            outputs["logits"] = nn.Dense(self.token_classes, name="head")(drop(rate, x))
        if self.has_language_head:
            language = share_fields(self, LanguageHead)
            language = language(activation=self.language_activation, name="language")
            outputs["logits"] = language(x, embeddings.tokens)
        return outputs
