"""Residual networks, for CIFAR-sized images and for photographs.

The small ones are those used to compare distillation methods: basic blocks, projection shortcuts
(1x1 convolution and norm) where the shape changes, and no bias before a norm. The large ones match
published checkpoints: a 7x7 stem, max pooling, and basic or bottleneck blocks. Padding is explicit
and equal on all sides even if the stride is two (`"SAME"` would pad differently). Parameter counts
are those of the published models.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax.models._blocks import Activation, check_images, share_fields

_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=_fan_out)
_conv1x1 = partial(
    nn.Conv, kernel_size=(1, 1), padding="VALID", use_bias=False, kernel_init=_fan_out
)
_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, add; the last ReLU is applied by the caller."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        norm = partial(_norm, use_running_average=not train)
        strides = (self.stride, self.stride)
        y = _conv3x3(self.channels, strides=strides, name="conv1")(x)
        y = _conv3x3(self.channels, name="conv2")(jax.nn.relu(norm(name="norm1")(y)))
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = _conv1x1(self.channels, strides=strides, name="shortcut_conv")(x)
            x = norm(name="shortcut_norm")(x)
        return x + y


class ResNet(nn.Module):
    """A CIFAR ResNet: stem, three stages of basic blocks, average pooling, head.

    Inputs: images `[B, H, W, C]`.
    Outputs: `stem`, `stage1` … `stage3` (after the ReLU) and `stage1_preact` … (before it), maps
    `[B, h, w, channels]`; `pooled` `[B, channels]`; `logits` `[B, classes]`.
    """

    blocks: int  # per stage
    channels: Sequence[int]  # of the stem and of the three stages
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        check_images("ResNet", inputs)
        x = _conv3x3(self.channels[0], name="stem_conv")(inputs)
        x = jax.nn.relu(_norm(use_running_average=not train, name="stem_norm")(x))
        outputs = {"stem": x}
        for stage, channels in enumerate(self.channels[1:], start=1):
            for i in range(self.blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                y = BasicBlock(channels, stride, name=f"stage{stage}_block{i}")(x, train)
                outputs[f"stage{stage}_preact"] = y
                x = outputs[f"stage{stage}"] = jax.nn.relu(y)
        pooled = jnp.mean(x, axis=(1, 2))
        head = nn.Dense(self.classes, name="head")
        return {**outputs, "pooled": pooled, "logits": head(pooled)}


class WideBlock(nn.Module):
    """norm, ReLU, conv, norm, ReLU, conv, add; the shortcut starts after the first ReLU."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        norm = partial(_norm, use_running_average=not train)
        strides = (self.stride, self.stride)
        active = jax.nn.relu(norm(name="norm1")(x))
        y = _conv3x3(self.channels, strides=strides, name="conv1")(active)
        y = _conv3x3(self.channels, name="conv2")(jax.nn.relu(norm(name="norm2")(y)))
        if x.shape[-1] != self.channels:
            x = _conv1x1(self.channels, strides=strides, name="shortcut_conv")(active)
        return x + y


class WideResNet(nn.Module):
    """A wide ResNet (pre-activation): stem, three stages, norm, average pooling, head.

    Inputs: images `[B, H, W, C]`.
    Outputs: `stem`, `stage1` … `stage3` (sums, before any ReLU, except the last, which is after the
    final norm and ReLU), `pooled`, `logits`.
    """

    blocks: int  # per stage
    width: int
    classes: int

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> dict[str, Array]:
        check_images("WideResNet", inputs)
        x = _conv3x3(16, name="stem_conv")(inputs)
        outputs = {"stem": x}
        for stage in (1, 2, 3):
            channels = 16 * self.width * 2 ** (stage - 1)
            for i in range(self.blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                x = WideBlock(channels, stride, name=f"stage{stage}_block{i}")(x, train)
            outputs[f"stage{stage}"] = x
        x = jax.nn.relu(_norm(use_running_average=not train, name="final_norm")(x))
        outputs["stage3"] = x
        pooled = jnp.mean(x, axis=(1, 2))
        head = nn.Dense(self.classes, name="head")
        return {**outputs, "pooled": pooled, "logits": head(pooled)}


def resnet(depth: int, classes: int, *, channels: Sequence[int] = (16, 16, 32, 64)) -> ResNet:
    """ResNet of `depth` = 6 n + 2 layers: 8, 14, 20, 32, 44, 56, 110.

    Args:
      depth: number of layers with weights, not counting shortcuts.
      classes: number of outputs.
      channels: channels of the stem and of the three stages.

    Raises:
      ValueError: if the depth is not 6 n + 2.

    References:
      He et al., Deep Residual Learning for Image Recognition, 2015 (1512.03385), section 4.2.
    """
    return ResNet(_blocks(depth, 2), tuple(channels), classes)


def resnet_x4(depth: int, classes: int) -> ResNet:
    """`resnet8x4` and `resnet32x4` of the distillation literature: four times wider stages.

    The stem is twice as wide, 32 channels.

    References:
      Tian et al., Contrastive Representation Distillation, 2020 (1910.10699), appendix.
    """
    return resnet(depth, classes, channels=(32, 64, 128, 256))


def wide_resnet(depth: int, width: int, classes: int) -> WideResNet:
    """`wrn-depth-width` with depth = 6 n + 4: wrn-16-2, wrn-40-1, wrn-40-2, wrn-28-10.

    Raises:
      ValueError: if the depth is not 6 n + 4, or the width is not positive.

    References:
      Zagoruyko and Komodakis, Wide Residual Networks, 2016 (1605.07146).
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    return WideResNet(_blocks(depth, 4), width, classes)


def _blocks(depth: int, extra: int) -> int:
    if depth < 6 + extra or (depth - extra) % 6:
        valid = [6 * n + extra for n in range(1, 6)]
        raise ValueError(f"depth must be 6 n + {extra} ({valid} …), got {depth}.")
    return (depth - extra) // 6


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation."""

    features: int
    window: int = 3
    stride: int = 1
    activation: Activation | None = jax.nn.relu

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        window, strides = (self.window,) * 2, (self.stride,) * 2
        pad = self.window // 2
        x = nn.Conv(self.features, window, strides, padding=pad, use_bias=False, name="conv")(x)
        x = _norm(use_running_average=not train, name="norm")(x)
        return x if self.activation is None else self.activation(x)


class ImageResNetBlock(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1, with ReLU between; then shortcut and activation."""

    features: int
    stride: int
    is_bottleneck: bool
    downsample_in_first_conv: bool
    activation: Activation

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        act, stride = jax.nn.relu, self.stride
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
        return self.activation(x + y)


class ImageResNet(nn.Module):
    """ResNet-18 … ResNet-152 and similar networks.

    Inputs: images `[B, H, W, C]`.
    Outputs: `stem`, `stage0` … maps `[B, h, w, features]`, `pooled` `[B, features]`, and with
    a head `logits` `[B, classes]`.

    Attributes:
      downsample_first: whether the first stage halves the resolution too.
      downsample_in_first_conv: whether a bottleneck's stride is in its first 1x1 convolution (v1)
        instead of its 3x3 (v1.5).
      activation: used in the stem and after every block; inside blocks it is ReLU, as in
        transformers.
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
        check_images("ImageResNet", inputs)
        x = ConvNorm(self.stem, 7, 2, self.activation, name="stem")(inputs, train)
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)
        outputs = {"stem": x}
        block = share_fields(self, ImageResNetBlock)
        for stage, (features, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            for i in range(depth):
                halves = i == 0 and (stage > 0 or self.downsample_first)
                name, stride = f"stage{stage}_block{i}", 2 if halves else 1
                x = block(features=features, stride=stride, name=name)(x, train)
            outputs[f"stage{stage}"] = x
        outputs["pooled"] = jnp.mean(x, axis=(1, 2))
        if self.classes is not None:
            outputs["logits"] = nn.Dense(self.classes, name="head")(outputs["pooled"])
        return outputs
