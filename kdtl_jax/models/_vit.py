"""Vision Transformers as Linen modules: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    FusedGatedFeedForward,
    SelfAttention,
    attend,
    gelu,
    gelu_tanh,
    layer_norm,
    quick_gelu,
)


class ViTEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token (DeiT has two tokens), learned positions."""

    width: int
    patch: tuple[int, int]
    has_distillation_token: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        window = self.patch
        x = nn.Conv(self.width, window, window, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        for name in ("distillation", "cls") if self.has_distillation_token else ("cls",):
            token = self.param(name, nn.initializers.zeros_init(), (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        return x + self.param("positions", nn.initializers.normal(0.02), shape)


class ViTLayer(nn.Module):
    """Pre-norm attention and feed-forward."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool, where: Array | None = None) -> Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        attention = SelfAttention(
            self.heads, use_bias=self.qkv_bias, dropout=self.attention_dropout, name="attention"
        )
        y = layer_norm(self.norm_epsilon, "attention_norm")(x)
        x = x + drop(attention(y, where, train=train))
        y = layer_norm(self.norm_epsilon, "mlp_norm")(x)
        return x + drop(FeedForward(self.hidden, self.activation, name="mlp")(y))


def in_turn(
    layer: Callable[..., nn.Module], count: int, x: Array, train: bool, where: Array | None = None
) -> Array:
    """Runs `layers_0` to the last, one after another; `layer(name=)` makes each of them."""
    for i in range(count):
        x = layer(name=f"layers_{i}")(x, train, where)
    return x


class ViT(nn.Module):
    """A Vision Transformer with a class token: ViT and DeiT.

    Inputs: images `[B, H, W, C]`, sides divisible by `patch`.
    Outputs: `last_hidden` `[B, 1 + patches, width]` (after the last norm), `pooled` with a
    pooler, `logits` `[B, classes]` with a head. Taps: `embeddings`, `layers_0` …,
    `layers_0/attention/probs`. With two heads, `logits` is the mean of `class_logits` and
    `distillation_logits`.

    Attributes:
      patch: side of a patch, or its height and width.
      grid: patches per column and per row for which the positions were learned; an image with
        another grid is refused, even with as many patches. None takes that of the first image.
      unseen: rows at the bottom and columns at the right that no patch covers (SigLIP cuts 27
        patches of 14 out of 384 pixels).
      pooler_width: width of the pooler; None means `width`.
      has_distillation_token: DeiT's second token, after the class token.
      has_distillation_head: a second classifier, which reads that token.
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
    unseen: tuple[int, int] = (0, 0)
    pooled_activation: Activation = jnp.tanh
    pooler_width: int | None = None
    has_distillation_token: bool = False
    has_distillation_head: bool = False

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        patch = check_images(inputs, self.patch, self.grid, self.unseen)
        embeddings = ViTEmbeddings(
            self.width, patch, self.has_distillation_token, name="embeddings"
        )
        x = embeddings(inputs)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        layer = partial(
            ViTLayer,
            self.heads,
            self.hidden,
            self.activation,
            self.norm_epsilon,
            self.qkv_bias,
            self.dropout,
            self.attention_dropout,
        )
        x = layer_norm(self.norm_epsilon, "norm")(in_turn(layer, self.layers, x, train))
        outputs = {"last_hidden": x}
        pooled = x[:, 0]
        if self.has_pooler:
            dense = nn.Dense(self.pooler_width or self.width, name="pooler")
            pooled = outputs["pooled"] = self.pooled_activation(dense(pooled))
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(pooled)
        if self.classes is not None and self.has_distillation_head:
            outputs["class_logits"] = outputs["logits"]
            second = nn.Dense(self.classes, name="distillation_head")(x[:, 1])
            outputs["distillation_logits"] = second
            outputs["logits"] = (outputs["class_logits"] + second) / 2
        return outputs


class Dinov2Layer(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled per channel."""

    heads: int
    hidden: int
    is_gated: bool
    activation: Activation
    norm_epsilon: float
    qkv_bias: bool
    dropout: float
    attention_dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, x: Array, train: bool, where: Array | None = None) -> Array:
        def scaled(name: str, y: Array) -> Array:
            shape = (x.shape[-1],)
            y = y * self.param(name, nn.initializers.ones_init(), shape)[None, None]
            return nn.Dropout(self.drop_path, (1, 2), deterministic=not train)(y)

        attention = SelfAttention(
            self.heads, use_bias=self.qkv_bias, dropout=self.attention_dropout, name="attention"
        )
        y = layer_norm(self.norm_epsilon, "attention_norm")(x)
        y = nn.Dropout(self.dropout, deterministic=not train)(attention(y, where, train=train))
        x = x + scaled("attention_scale", y)
        y = layer_norm(self.norm_epsilon, "mlp_norm")(x)
        if self.is_gated:
            mlp = FusedGatedFeedForward(self.hidden, jax.nn.silu, name="gated_mlp")
        else:
            mlp = FeedForward(self.hidden, self.activation, name="mlp")
        return x + scaled("mlp_scale", mlp(y))


class Dinov2(nn.Module):
    """DINOv2: a ViT with scaled branches; its classifier reads the class token and the mean patch.

    Inputs and outputs are those of `ViT`; `pooled` is the class token after the last norm. Between
    the class token and the patches are `registers` tokens without positions. In training, each
    branch is dropped for a share `drop_path` of the images.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int | tuple[int, int]
    classes: int | None = None
    is_gated: bool = False
    activation: Activation = gelu
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    grid: tuple[int, int] | None = None
    unseen: tuple[int, int] = (0, 0)
    registers: int = 0
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        patch = check_images(inputs, self.patch, self.grid, self.unseen)
        x = ViTEmbeddings(self.width, patch, name="embeddings")(inputs)
        if self.registers:
            shape = (1, self.registers, self.width)
            tokens = self.param("registers", nn.initializers.zeros_init(), shape)
            tokens = jnp.broadcast_to(tokens, (x.shape[0], *shape[1:]))
            x = jnp.concatenate([x[:, :1], tokens, x[:, 1:]], axis=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        layer = partial(
            Dinov2Layer,
            self.heads,
            self.hidden,
            self.is_gated,
            self.activation,
            self.norm_epsilon,
            self.qkv_bias,
            self.dropout,
            self.attention_dropout,
            self.drop_path,
        )
        x = layer_norm(self.norm_epsilon, "norm")(in_turn(layer, self.layers, x, train))
        outputs = {"last_hidden": x, "pooled": x[:, 0]}
        if self.classes is not None:
            patches = x[:, 1 + self.registers :]
            both = jnp.concatenate([x[:, 0], jnp.mean(patches, axis=1)], axis=-1)
            outputs["logits"] = nn.Dense(self.classes, name="head")(both)
        return outputs


class TowerEmbeddings(nn.Module):
    """The embeddings of CLIP and SigLIP: patches, an optional class token, positions."""

    width: int
    patch: tuple[int, int]
    has_class: bool

    @nn.compact
    def __call__(self, images: Array) -> Array:
        convolve = nn.Conv(
            self.width,
            self.patch,
            self.patch,
            padding="VALID",
            use_bias=not self.has_class,
            name="patches",
        )
        x = convolve(images)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.has_class:
            cls = self.param("cls", nn.initializers.normal(0.02), (self.width,))
            first = jnp.broadcast_to(cls[None, None], (x.shape[0], 1, self.width))
            x = jnp.concatenate([first, x], axis=1)
        positions = nn.Embed(x.shape[1], self.width, name="positions")
        return x + positions(jnp.arange(x.shape[1]))[None]


class ClipVision(nn.Module):
    """CLIP's vision tower.

    Inputs are those of `ViT`. Outputs: `last_hidden` `[B, 1 + patches, width]` before the last
    norm, `pooled` `[B, width]` (the class token after it), and with a projection `image_embedding`.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int | tuple[int, int]
    projection: int | None = None
    activation: Activation = quick_gelu
    norm_epsilon: float = 1e-5
    attention_dropout: float = 0.0
    grid: tuple[int, int] | None = None
    unseen: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        patch = check_images(inputs, self.patch, self.grid, self.unseen)
        x = TowerEmbeddings(self.width, patch, True, name="embeddings")(inputs)
        x = layer_norm(self.norm_epsilon, "first_norm")(x)
        x = in_turn(pre_norm(self), self.layers, x, train)
        pooled = layer_norm(self.norm_epsilon, "norm")(x[:, 0])
        outputs = {"last_hidden": x, "pooled": pooled}
        if self.projection is not None:
            project = nn.Dense(self.projection, use_bias=False, name="projection")
            outputs["image_embedding"] = project(pooled)
        return outputs


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to all patches, then a feed-forward layer."""

    heads: int
    hidden: int
    activation: Activation
    norm_epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width))
        # One matrix, as it is stored; the query only uses its first third.
        project = nn.Dense(3 * width, name="qkv")
        query = jnp.split(project(probe), 3, axis=-1)[0]
        _, key, value = jnp.split(project(x), 3, axis=-1)
        query, key, value = (
            part.reshape(*part.shape[:2], self.heads, -1) for part in (query, key, value)
        )
        probs, mix = attend(query, key, value, None)
        y = nn.Dense(width, name="out")(mix(probs))
        mlp = FeedForward(self.hidden, self.activation, name="mlp")
        return (y + mlp(layer_norm(self.norm_epsilon, "norm")(y)))[:, 0]


class SiglipVision(nn.Module):
    """SigLIP's vision tower: no class token, attention pooling.

    Inputs are those of `ViT`. Outputs: `last_hidden` `[B, patches, width]` after the last norm, and
    `pooled`.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    patch: int | tuple[int, int]
    has_pooler: bool = True
    activation: Activation = gelu_tanh
    norm_epsilon: float = 1e-6
    attention_dropout: float = 0.0
    grid: tuple[int, int] | None = None
    unseen: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        patch = check_images(inputs, self.patch, self.grid, self.unseen)
        x = TowerEmbeddings(self.width, patch, False, name="embeddings")(inputs)
        x = layer_norm(self.norm_epsilon, "norm")(in_turn(pre_norm(self), self.layers, x, train))
        outputs = {"last_hidden": x}
        if self.has_pooler:
            pool = AttentionPool(
                self.heads, self.hidden, self.activation, self.norm_epsilon, name="pooler"
            )
            outputs["pooled"] = pool(x)
        return outputs


def pre_norm(module: Any) -> Callable[..., nn.Module]:
    """The layers of an image or text tower of CLIP or SigLIP."""
    widths = module.heads, module.hidden, module.activation, module.norm_epsilon
    return partial(ViTLayer, *widths, attention_dropout=module.attention_dropout)


def check_images(
    images: Array,
    patch: int | tuple[int, int],
    grid: tuple[int, int] | None,
    unseen: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """The patch's height and width; raises ValueError unless images divide into the grid.

    The last `unseen` rows and columns are not covered.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    rest = tuple(images.shape[i + 1] - unseen[i] for i in (0, 1)) if images.ndim == 4 else ()
    if not rest or rest[0] % height or rest[1] % width:
        sides = f"{height}" if height == width else f"{height} and {width}"
        less = f" after {unseen[0]} and {unseen[1]} pixels are left out" if any(unseen) else ""
        raise ValueError(
            f"images must be [B, H, W, C] with sides divisible by {sides}{less}, got "
            f"{list(images.shape)}. Resize them, or resample the patch embedding."
        )
    came = (rest[0] // height, rest[1] // width)
    if grid is not None and came != tuple(grid):
        raise ValueError(
            f"images {list(images.shape)} have a grid of {came[0]} x {came[1]} patches, but the "
            f"positions belong to {grid[0]} x {grid[1]}. Resize the images, or the positions "
            "(transforms.resize_positions_bicubic) and clone the module with the new grid."
        )
    return height, width
