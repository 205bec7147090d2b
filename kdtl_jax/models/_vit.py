"""The Vision Transformer as a Linen module."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import Activation, FeedForward, SelfAttention, gelu, layer_norm


class ViTEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token, learned positions."""

    width: int
    patch: tuple[int, int]

    @nn.compact
    def __call__(self, images: Array) -> Array:
        window = self.patch
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
    attention_dropout: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(
            self.heads, use_bias=self.qkv_bias, dropout=self.attention_dropout, name="attention"
        )
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

    Attributes:
      patch: side of a patch, or its height and width.
      grid: patches per column and per row that the positions were learned for; an image with
        another grid is refused, also where it has as many patches. None: the first image decides
        how many there are.
      pooler_width: None is `width`.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int | tuple[int, int]
    classes: int | None = None
    has_pooler: bool = False
    activation: Activation = gelu
    norm_epsilon: float = 1e-12
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    grid: tuple[int, int] | None = None
    pooled_activation: Activation = jnp.tanh
    pooler_width: int | None = None

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        patch = check_images(inputs, self.patch, self.grid)
        x = ViTEmbeddings(self.width, patch, name="embeddings")(inputs)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(self.layers):
            x = ViTLayer(
                self.heads,
                self.hidden,
                self.activation,
                self.norm_epsilon,
                self.qkv_bias,
                self.dropout,
                self.attention_dropout,
                name=f"layers_{i}",
            )(x, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
        outputs = {"last_hidden": x}
        pooled = x[:, 0]
        if self.has_pooler:
            dense = nn.Dense(self.pooler_width or self.width, name="pooler")
            pooled = outputs["pooled"] = self.pooled_activation(dense(pooled))
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(pooled)
        return outputs


def check_images(
    images: Array, patch: int | tuple[int, int], grid: tuple[int, int] | None
) -> tuple[int, int]:
    """The patch's height and width; raises ValueError unless images divide into the grid."""
    height, width = (patch, patch) if isinstance(patch, int) else patch
    if images.ndim != 4 or images.shape[1] % height or images.shape[2] % width:
        sides = f"{height}" if height == width else f"{height} and {width}"
        raise ValueError(
            f"images must be [B, H, W, C] with sides divisible by {sides}, got "
            f"{list(images.shape)}. Resize them, or resample the patch embedding."
        )
    came = (images.shape[1] // height, images.shape[2] // width)
    if grid is not None and came != tuple(grid):
        raise ValueError(
            f"images {list(images.shape)} have a grid of {came[0]} x {came[1]} patches, but the "
            f"positions belong to {grid[0]} x {grid[1]}. Resize the images, or the positions "
            "(transforms.resize_positions_bicubic) and clone the module with the new grid."
        )
    return height, width
