"""The Vision Transformer as a Linen module."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import Activation, FeedForward, SelfAttention, gelu, layer_norm


class ViTEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token, learned positions."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, images: Array) -> Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        cls = self.param("cls", nn.initializers.zeros_init(), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        return x + self.param("positions", nn.initializers.normal(0.02), shape)


class ViTLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    qkv_bias: bool
    dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(self.heads, use_bias=self.qkv_bias, name="attention")
        y = layer_norm(self.norm_epsilon, "attention_norm")(x)
        x = x + drop(attention(y, None, train=train))
        y = layer_norm(self.norm_epsilon, "mlp_norm")(x)
        return x + drop(FeedForward(self.hidden, self.activation, name="mlp")(y))


class ViT(nn.Module):
    """A Vision Transformer with class token.

    Inputs: images `[B, H, W, C]`, sides divisible by `patch`.
    Outputs: `last_hidden` `[B, 1 + patches, width]` (after the last norm), `pooled` with a
    pooler, `logits` `[B, classes]` with a head. Taps: `embeddings`, `layers_0` …,
    `layers_0/attention/probs`.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int
    classes: int | None = None
    has_pooler: bool = False
    activation: Activation = gelu
    norm_epsilon: float = 1e-12
    qkv_bias: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        if inputs.ndim != 4 or inputs.shape[1] % self.patch or inputs.shape[2] % self.patch:
            raise ValueError(
                f"ViT: images must be [B, H, W, C] with sides divisible by {self.patch}, got "
                f"{list(inputs.shape)}. Resize them, or resample the patch embedding."
            )
        x = ViTEmbeddings(self.width, self.patch, name="embeddings")(inputs)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(self.layers):
            x = ViTLayer(
                self.heads,
                self.hidden,
                self.activation,
                self.norm_epsilon,
                self.qkv_bias,
                self.dropout,
                name=f"layers_{i}",
            )(x, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
        outputs = {"last_hidden": x}
        pooled = x[:, 0]
        if self.has_pooler:
            pooled = outputs["pooled"] = jnp.tanh(nn.Dense(self.width, name="pooler")(pooled))
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(pooled)
        return outputs
