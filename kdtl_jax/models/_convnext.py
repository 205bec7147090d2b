"""ConvNeXt as a Linen module."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax.models._blocks import Activation, FeedForward, check_images, gelu, layer_norm


class ConvNextBlock(nn.Module):
    """A depthwise 7x7 convolution, a norm and a feed-forward layer, scaled per channel."""

    activation: Activation
    has_scale: bool
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), padding=3, feature_group_count=channels, name="conv")(x)
        y = layer_norm(1e-6, "norm")(y)
        y = FeedForward(4 * channels, self.activation, name="mlp")(y)
        if self.has_scale:
            scale = self.param("scale", nn.initializers.constant(1e-6), (channels,), jnp.float32)
            y = y * scale[None, None, None]
        return x + nn.Dropout(self.drop_path, (1, 2, 3), deterministic=not train)(y)


class ConvNext(nn.Module):
    """ConvNeXt: a strided stem, stages of depthwise convolutions, global average pooling.

    Inputs: images `[B, H, W, C]`.
    Outputs: `stage0` … and `last_hidden` (the last of them) `[B, h, w, features]`, `pooled`
    `[B, features]` after the last norm, and with a head `logits` `[B, classes]`. In training, a
    block's branch is dropped for some images; the rate rises to `drop_path` in the last block.
    """

    widths: Sequence[int]
    depths: Sequence[int]
    patch: tuple[int, int] = (4, 4)
    classes: int | None = None
    activation: Activation = gelu
    norm_epsilon: float = 1e-12
    has_scale: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        check_images("ConvNext", inputs)
        x = nn.Conv(self.widths[0], self.patch, self.patch, padding="VALID", name="stem")(inputs)
        x = layer_norm(1e-6, "stem_norm")(x)
        outputs, rates = {}, iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            if stage:
                x = layer_norm(1e-6, f"stage{stage}_norm")(x)
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID", name=f"stage{stage}_down")(x)
            for i in range(depth):
                block = ConvNextBlock(
                    self.activation, self.has_scale, next(rates), name=f"stage{stage}_block{i}"
                )
                x = block(x, train)
            outputs[f"stage{stage}"] = x
        pooled = layer_norm(self.norm_epsilon, "norm")(jnp.mean(x, axis=(1, 2)))
        outputs |= {"last_hidden": x, "pooled": pooled}
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(pooled)
        return outputs
