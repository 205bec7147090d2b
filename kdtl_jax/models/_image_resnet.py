"""The residual networks for photographs: a 7x7 stem, max pooling, basic or bottleneck blocks.

The computation of published checkpoints, whose padding is explicit and equal on all sides
(`"SAME"` pads one side more where the stride is two).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import Activation


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation."""

    features: int
    window: int = 3
    stride: int = 1
    activation: Activation | None = jax.nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        pad = self.window // 2
        x = nn.Conv(
            self.features,
            (self.window, self.window),
            (self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            use_bias=False,
            name="conv",
        )(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")
        x = norm(x)
        return x if self.activation is None else self.activation(x)


class ImageResNetBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1; then the shortcut and the activation."""

    features: int
    stride: int
    is_bottleneck: bool
    downsample_in_first_conv: bool
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        act, stride = self.activation, self.stride
        if self.is_bottleneck:
            inner = self.features // 4
            first, second = (stride, 1) if self.downsample_in_first_conv else (1, stride)
            plan = [(inner, 1, first, act), (inner, 3, second, act), (self.features, 1, 1, None)]
        else:
            plan = [(self.features, 3, stride, act), (self.features, 3, 1, None)]
        y = x
        for i, layer in enumerate(plan):
            y = ConvNorm(*layer, name=f"conv{i}")(y, train)
        if stride != 1 or x.shape[-1] != self.features:
            x = ConvNorm(self.features, 1, stride, None, name="shortcut")(x, train)
        return act(x + y)


class ImageResNet(nn.Module):
    """ResNet-18 … ResNet-152 and their like.

    Inputs: images `[B, H, W, C]`.
    Outputs: `stem`, `stage0` … maps `[B, h, w, features]`, `pooled` `[B, features]`, and with
    a head `logits` `[B, classes]`.

    Attributes:
      downsample_first: whether the first stage halves the resolution too.
      downsample_in_first_conv: a bottleneck's stride sits in its first 1x1 convolution (v1)
        instead of its 3x3 (v1.5).
    """

    stem: int
    widths: Sequence[int]
    depths: Sequence[int]
    is_bottleneck: bool = True
    downsample_first: bool = False
    downsample_in_first_conv: bool = False
    classes: int | None = None
    activation: Activation = jax.nn.relu

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        if inputs.ndim != 4:
            raise ValueError(f"ImageResNet: images must be [B, H, W, C], got {list(inputs.shape)}.")
        x = ConvNorm(self.stem, 7, 2, self.activation, name="stem")(inputs, train)
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)
        outputs = {"stem": x}
        for stage, (features, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for i in range(depth):
                halves = i == 0 and (stage > 0 or self.downsample_first)
                x = ImageResNetBlock(
                    features,
                    2 if halves else 1,
                    self.is_bottleneck,
                    self.downsample_in_first_conv,
                    self.activation,
                    name=f"stage{stage}_block{i}",
                )(x, train)
            outputs[f"stage{stage}"] = x
        outputs["pooled"] = jnp.mean(x, axis=(1, 2))
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(outputs["pooled"])
        return outputs
