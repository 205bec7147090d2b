"""Vision Transformers as Linen modules: ViT, DeiT, DINOv2, and the towers of CLIP and SigLIP."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import (
    Activation,
    FeedForward,
    SelfAttention,
    attention_probs,
    gelu,
    gelu_tanh,
    layer_norm,
    mix_values,
    quick_gelu,
    run_layers,
    share_fields,
)


class ViTEmbeddings(nn.Module):
    """Patches by a strided convolution, a class token (DeiT has two tokens), learned positions."""

    width: int
    patch: tuple[int, int]
    has_distillation_token: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        convolve = nn.Conv(self.width, self.patch, self.patch, padding="VALID", name="patches")
        x = convolve(images)
        x = x.reshape(x.shape[0], -1, self.width)
        for name in ("distillation", "cls") if self.has_distillation_token else ("cls",):
            token = self.param(name, nn.initializers.zeros_init(), (1, 1, self.width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        return x + self.param("positions", nn.initializers.normal(0.02), shape, jnp.float32)


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
        patch = check_grid(inputs, self.patch, self.grid, self.unseen)
        embeddings = ViTEmbeddings(
            self.width, patch, self.has_distillation_token, name="embeddings"
        )
        x = embeddings(inputs)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = run_layers(share_fields(self, ViTLayer), self.layers, x, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
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
    def __call__(self, x: Array, train: bool) -> Array:
        def scale(name: str, y: Array) -> Array:
            scale = self.param(name, nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
            y = y * scale[None, None]
            return nn.Dropout(self.drop_path, (1, 2), deterministic=not train)(y)

        attention = SelfAttention(
            self.heads, use_bias=self.qkv_bias, dropout=self.attention_dropout, name="attention"
        )
        y = layer_norm(self.norm_epsilon, "attention_norm")(x)
        y = nn.Dropout(self.dropout, deterministic=not train)(attention(y, None, train=train))
        x = x + scale("attention_scale", y)
        y = layer_norm(self.norm_epsilon, "mlp_norm")(x)
        if self.is_gated:
            mlp = FeedForward(self.hidden, jax.nn.silu, gate="fused", name="gated_mlp")
        else:
            mlp = FeedForward(self.hidden, self.activation, name="mlp")
        return x + scale("mlp_scale", mlp(y))


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
        patch = check_grid(inputs, self.patch, self.grid, self.unseen)
        x = ViTEmbeddings(self.width, patch, name="embeddings")(inputs)
        if self.registers:
            shape = (1, self.registers, self.width)
            tokens = self.param("registers", nn.initializers.zeros_init(), shape, jnp.float32)
            tokens = jnp.broadcast_to(tokens, (x.shape[0], *shape[1:]))
            x = jnp.concatenate([x[:, :1], tokens, x[:, 1:]], axis=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = run_layers(share_fields(self, Dinov2Layer), self.layers, x, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
        outputs = {"last_hidden": x, "pooled": x[:, 0]}
        if self.classes is not None:
            patches = x[:, 1 + self.registers :]
            features = jnp.concatenate([x[:, 0], jnp.mean(patches, axis=1)], axis=-1)
            outputs["logits"] = nn.Dense(self.classes, name="head")(features)
        return outputs


class TowerEmbeddings(nn.Module):
    """The embeddings of CLIP and SigLIP: patches, an optional class token, positions."""

    width: int
    patch: tuple[int, int]
    has_class: bool

    @nn.compact
    def __call__(self, images: Array) -> Array:
        convolve = partial(nn.Conv, padding="VALID", use_bias=not self.has_class, name="patches")
        x = convolve(self.width, self.patch, self.patch)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.has_class:
            cls = self.param("cls", nn.initializers.normal(0.02), (self.width,), jnp.float32)
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
        patch = check_grid(inputs, self.patch, self.grid, self.unseen)
        x = TowerEmbeddings(self.width, patch, True, name="embeddings")(inputs)
        x = layer_norm(self.norm_epsilon, "first_norm")(x)
        x = run_layers(share_fields(self, ViTLayer), self.layers, x, train)
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
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, width), jnp.float32)
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, width))
        # One matrix, as it is stored; the query only uses its first third.
        project = nn.Dense(3 * width, name="qkv")
        query = jnp.split(project(probe), 3, axis=-1)[0]
        _, key, value = jnp.split(project(x), 3, axis=-1)
        query, key, value = (
            part.reshape(*part.shape[:2], self.heads, -1) for part in (query, key, value)
        )
        mixed = mix_values(attention_probs(query, key, None), value)
        y = nn.Dense(width, name="out")(mixed)
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
        patch = check_grid(inputs, self.patch, self.grid, self.unseen)
        x = TowerEmbeddings(self.width, patch, False, name="embeddings")(inputs)
        x = run_layers(share_fields(self, ViTLayer), self.layers, x, train)
        x = layer_norm(self.norm_epsilon, "norm")(x)
        outputs = {"last_hidden": x}
        if self.has_pooler:
            outputs["pooled"] = share_fields(self, AttentionPool)(name="pooler")(x)
        return outputs


def check_grid(
    images: Array,
    patch: int | tuple[int, int],
    grid: tuple[int, int] | None,
    unseen: tuple[int, int] = (0, 0),
) -> tuple[int, int]:
    """The patch's height and width; raises ValueError unless images divide into the grid.

    The last `unseen` rows and columns are not covered.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    covered = tuple(images.shape[i + 1] - unseen[i] for i in (0, 1)) if images.ndim == 4 else ()
    if not covered or covered[0] % height or covered[1] % width:
        sides = f"{height}" if height == width else f"{height} and {width}"
        less = f" after {unseen[0]} and {unseen[1]} pixels are left out" if any(unseen) else ""
        raise ValueError(
            f"images must be [B, H, W, C] with sides divisible by {sides}{less}, got "
            f"{list(images.shape)}. Resize them, or resample the patch embedding."
        )
    image_grid = (covered[0] // height, covered[1] // width)
    if grid is not None and image_grid != tuple(grid):
        raise ValueError(
            f"images {list(images.shape)} have a grid of {image_grid[0]} x {image_grid[1]} "
            f"patches, but the positions belong to {grid[0]} x {grid[1]}. Resize the images, or "
            "the positions (transforms.resize_positions_bicubic) and clone the module with the new "
            "grid."
        )
    return height, width
