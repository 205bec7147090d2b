"""The residual networks for CIFAR-sized images on which distillation methods are compared.

Basic blocks, projection shortcuts (1x1 convolution and norm) where the shape changes, no bias
before a norm, padding of one on every side also where the stride is two (`"SAME"` would pad
otherwise). Parameter counts are those of the published models.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_conv3x3 = partial(
    nn.Conv, kernel_size=(3, 3), padding=((1, 1), (1, 1)), use_bias=False, kernel_init=_fan_out
)
_conv1x1 = partial(
    nn.Conv, kernel_size=(1, 1), padding="VALID", use_bias=False, kernel_init=_fan_out
)
_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class BasicBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, add, and what comes before the last ReLU."""

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
        x = _conv3x3(self.channels[0], name="stem_conv")(_images("ResNet", inputs))
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
        x = _conv3x3(16, name="stem_conv")(_images("WideResNet", inputs))
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
      depth: layers with weights, shortcuts not counted.
      classes: outputs.
      channels: of the stem and of the three stages.

    Raises:
      ValueError: if the depth is not 6 n + 2.

    References:
      He et al., Deep Residual Learning for Image Recognition, 2015 (1512.03385), section 4.2.
    """
    return ResNet(_blocks("resnet", depth, 2), tuple(channels), classes)


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
      ValueError: if the depth is not 6 n + 4, or the width not positive.

    References:
      Zagoruyko and Komodakis, Wide Residual Networks, 2016 (1605.07146).
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}.")
    return WideResNet(_blocks("wide_resnet", depth, 4), width, classes)


def _blocks(fn: str, depth: int, extra: int) -> int:
    if depth < 6 + extra or (depth - extra) % 6:
        valid = [6 * n + extra for n in range(1, 6)]
        raise ValueError(f"depth must be 6 n + {extra} ({valid} …), got {depth}.")
    return (depth - extra) // 6


def _images(model: str, inputs: Array) -> Array:
    if inputs.ndim != 4:
        raise ValueError(
            f"{model}: images must be [B, H, W, C], got {list(inputs.shape)}. "
            "Gray images need a last axis of one: images[..., None]."
        )
    return inputs
