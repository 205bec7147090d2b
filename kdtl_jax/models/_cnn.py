"""Small convolutional networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class CNN(nn.Module):
    """3x3 convolutions with ReLU and 2x2 max-pooling, global average pooling, linear head.

    A side of one is not pooled any further, so every image size works with every depth.

    Inputs: images `[B, H, W, C]`.
    Outputs: `block_0` … (after the ReLU, before pooling) `[B, h, w, channels]`, `pooled`
    `[B, channels]`, `logits` `[B, classes]`.
    """

    channels: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        if inputs.ndim != 4:
            raise ValueError(
                f"CNN: images must be [B, H, W, C], got {list(inputs.shape)}. "
                "Gray images need a last axis of one: images[..., None]."
            )
        x, outputs = inputs, {}
        for i, channels in enumerate(self.channels):
            if i:
                x = _max_pool(x)
            conv = nn.Conv(channels, (3, 3), padding="SAME", name=f"conv_{i}")
            x = outputs[f"block_{i}"] = jax.nn.relu(conv(x))
        pooled = jnp.mean(x, axis=(1, 2))
        head = nn.Dense(self.classes, name="head")
        return {**outputs, "pooled": pooled, "logits": head(pooled)}


def cnn(channels: Sequence[int], classes: int) -> CNN:
    """A `CNN` with one convolution per entry of `channels`.

    Raises:
      ValueError: if there are no channels, or a number is not positive.
    """
    if not channels or classes < 1 or any(c < 1 for c in channels):
        raise ValueError(
            "cnn: needs at least one layer, channels and classes of at least 1, got "
            f"{list(channels)} and {classes}."
        )
    return CNN(tuple(channels), classes)


def _max_pool(x: Array) -> Array:
    window = tuple(min(2, side) for side in x.shape[1:3])
    return nn.max_pool(x, window, strides=window)
