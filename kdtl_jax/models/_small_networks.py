"""Multilayer perceptrons and small convolutional networks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import check_images


class MLP(nn.Module):
    """ReLU layers of any widths, then a linear head; positively homogeneous in its parameters.

    Inputs: `[B, ...]`, flattened.
    Outputs: `hidden_0` … (after the ReLU), `logits` `[B, classes]`.
    """

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        x = inputs.reshape(inputs.shape[0], -1)
        outputs = {}
        for i, width in enumerate(self.widths):
            x = outputs[f"hidden_{i}"] = jax.nn.relu(nn.Dense(width, name=f"dense_{i}")(x))
        return {**outputs, "logits": nn.Dense(self.classes, name="head")(x)}


def mlp(widths: Sequence[int], classes: int) -> MLP:
    """An `MLP` with hidden layers of the given widths.

    Raises:
      ValueError: if a width or the number of classes is not positive.
    """
    if classes < 1 or any(width < 1 for width in widths):
        raise ValueError(
            f"widths and classes must be at least 1, got {list(widths)} and {classes}."
        )
    return MLP(tuple(widths), classes)


class Conv3x3(nn.Module):
    """A 3x3 convolution with bias and zero padding; parameters have `nn.Conv`'s names and shapes.

    In training on a CPU it runs as patches times kernel. XLA compiles convolution gradients slowly
    there, and runs them single-threaded inside a loop. With few channels, the matrix product takes
    less time per step (`python benchmarks/step_time.py`), and far less in a scan or a vmapped
    sweep. For the forward pass only, and on all other back ends, the convolution is faster.
    """

    channels: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,), jnp.float32)
        convolve = _as_matmul if train and jax.default_backend() == "cpu" else _as_convolution
        return convolve(x, kernel) + bias[None, None, None]


class CNN(nn.Module):
    """3x3 convolutions with ReLU, 2x2 max-pooling between them, global average pooling, head.

    A side of length one is not pooled further, so every image size works with every depth.

    Inputs: images `[B, H, W, C]`.
    Outputs: `block_0` … (after the ReLU, before pooling) `[B, h, w, channels]`, `pooled`
    `[B, channels]`, `logits` `[B, classes]`.
    """

    channels: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        check_images("CNN", inputs)
        x, outputs = inputs, {}
        for i, channels in enumerate(self.channels):
            if i:
                x = _max_pool(x)
            x = jax.nn.relu(Conv3x3(channels, name=f"conv_{i}")(x, train))
            outputs[f"block_{i}"] = x
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
            "needs at least one layer, channels and classes of at least 1, got "
            f"{list(channels)} and {classes}."
        )
    return CNN(tuple(channels), classes)


def _as_convolution(x: Array, kernel: Array) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def _as_matmul(x: Array, kernel: Array) -> Array:
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(b * h * w, 9 * c)
    return (patches @ kernel.reshape(9 * c, -1)).reshape(b, h, w, -1)


def _max_pool(x: Array) -> Array:
    """Halves each side, dropping an odd last row; its reshape has a cheap gradient on a CPU."""
    b, h, w, c = x.shape
    u, v = min(2, h), min(2, w)
    x = x[:, : h // u * u, : w // v * v].reshape(b, h // u, u, w // v, v, c)
    return jnp.max(x, axis=(2, 4))
