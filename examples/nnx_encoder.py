"""A BERT-like encoder with a classification head in Flax NNX: a model you already have.

Nothing here depends on kdtl_jax. `shape` is anything with the sizes as attributes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Embeddings(nnx.Module):
    """Tokens, positions and the first token type, summed and normalized."""

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(shape.vocabulary, shape.width, rngs=rngs)
        self.positions = nnx.Embed(shape.positions, shape.width, rngs=rngs)
        self.types = nnx.Embed(shape.types, shape.width, rngs=rngs)
        self.norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_epsilon, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        position = jnp.arange(tokens.shape[1])[None]
        return self.norm(
            self.tokens(tokens) + self.positions(position) + self.types(jnp.zeros_like(tokens))
        )


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.heads = shape.heads
        self.query = nnx.Linear(shape.width, shape.width, rngs=rngs)
        self.key = nnx.Linear(shape.width, shape.width, rngs=rngs)
        self.value = nnx.Linear(shape.width, shape.width, rngs=rngs)
        self.out = nnx.Linear(shape.width, shape.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        mixed = jax.nn.dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x))
        )
        return self.out(mixed.reshape(x.shape))


class FeedForward(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(shape.width, shape.hidden, rngs=rngs)
        self.down = nnx.Linear(shape.hidden, shape.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Layer(nnx.Module):
    """Attention and feed-forward, each followed by its residual and norm."""

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.attention = Attention(shape, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_epsilon, rngs=rngs)
        self.mlp = FeedForward(shape, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(shape.width, epsilon=shape.norm_epsilon, rngs=rngs)
        self.drop = nnx.Dropout(shape.dropout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.attention_norm(x + self.drop(self.attention(x)))
        return self.mlp_norm(x + self.drop(self.mlp(x)))


class Encoder(nnx.Module):
    """Token ids `[B, L]` (no padding) to logits `[B, classes]`."""

    def __init__(self, shape: Any, *, rngs: nnx.Rngs):
        self.embeddings = Embeddings(shape, rngs=rngs)
        self.layers = nnx.List([Layer(shape, rngs=rngs) for _ in range(shape.layers)])
        self.pooler = nnx.Linear(shape.width, shape.width, rngs=rngs)
        self.head = nnx.Linear(shape.width, shape.classes, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(jnp.tanh(self.pooler(x[:, 0])))
