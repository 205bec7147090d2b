"""Fake quantization: weights are rounded to a low-precision grid, gradients pass straight through.

Quantization-aware distillation trains the model that will be deployed: the student computes with
rounded weights, the teacher with its own, and the gradient updates the unrounded ones.

    rounded = fake_quantize(params, partial(int_by_group, bits=4, group=32), where=r".*kernel")

A quantizer is any function `weight -> weight`. Those here compute in float32 or wider and keep the
dtype. Kernels are `[..., in, out]`: a scale is shared along `axis=-2`, by all inputs of one output
channel or by groups of them (the last group may be shorter). A block of zeros stays zero.

The gradient is that of the identity, and 0 where a given `amax` clips a weight. Scales are treated
as constants. ValueError: bits outside 2..16, or a group or block below 1. TypeError: a weight that
is not floating point.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks, _numerics, trees
from kdtl_jax._types import Params
from kdtl_jax.transforms import _leaves

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def fake_quantize(
    params: Params, quantizer: Callable[[Array], Array], *, where: trees.Selector
) -> Params:
    """Applies the quantizer to the selected floating-point leaves; all others pass through.

    Args:
      quantizer: `weight -> weight` of the same shape and dtype, e.g. `int_per_channel`, `nvfp4`.
      where: the weights to quantize: usually kernels, not norms and biases.

    Raises:
      ValueError: if `where` matches nothing, a selected leaf holds quantized integer codes, or the
        quantizer changes a shape or dtype.
    """

    def quantize(path: str, leaf: Array, is_selected: bool) -> Array:
        if not is_selected:
            return leaf
        rounded = quantizer(leaf)
        if (rounded.shape, rounded.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"the quantizer made {rounded.dtype}{list(rounded.shape)} of {path!r}, "
                f"{leaf.dtype}{list(leaf.shape)}; it must keep shape and dtype."
            )
        return rounded

    return trees.map_with_path(quantize, params, _leaves.select_inexact(params, where))


def int_per_channel(
    weight: Array,
    *,
    bits: int = 8,
    axis: int = -2,
    amax: Array | None = None,
    narrow: bool = True,
) -> Array:
    """Integers of `bits` bits with one scale per channel: `round(w M / amax) amax / M`.

    `M = 2^(bits - 1) - 1`; halves round to even.

    Args:
      weight: `[..., in, out]`, at least one axis.
      bits: 2 to 16.
      axis: the axis along which the scale is shared.
      amax: the value that code M represents, broadcastable to the weight; by default the largest
        absolute value along `axis`. Weights beyond it are clipped, with gradient 0. A channel with
        an amax of at most 2^-24 becomes zero.
      narrow: if true, codes are -M to M; otherwise -M - 1 is a code too.

    References:
      Wu et al., Integer Quantization for Deep Learning Inference, 2020 (2004.09602);
      Model-Optimizer's `FakeTensorQuantFunction`.
    """
    upcast = _weight(weight)
    _checks.count(2, bits=bits)
    if bits > 16:
        raise ValueError(f"bits must lie in 2..16, got {bits}: float32 holds no finer integers.")
    largest_code = 2 ** (bits - 1) - 1
    if amax is None:
        amax = jnp.max(jnp.abs(upcast), axis=axis, keepdims=True)
    amax = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(amax, upcast.dtype), upcast.shape))
    is_nonzero = amax > 2.0**-24
    scale = largest_code / jnp.where(is_nonzero, amax, 1)
    codes = jnp.clip(
        jnp.round(upcast * scale), -largest_code if narrow else -largest_code - 1, largest_code
    )
    rounded = jnp.where(is_nonzero, codes / scale, 0)
    return _straight_through(weight, upcast, rounded, jnp.abs(upcast) <= amax)


def int_by_group(weight: Array, *, bits: int = 4, group: int = 128, axis: int = -2) -> Array:
    """`int_per_channel` with one scale per `group` consecutive inputs of a channel.

    The weight is `[..., in, out]`, with inputs along `axis`; the result has its shape and dtype.

    References:
      Lin et al., AWQ, 2023 (2306.00978), without its rescaling.
    """
    return _by_blocks(weight, partial(int_per_channel, bits=bits, axis=-1), group, axis)


def mxfp4(weight: Array, *, block: int = 32, axis: int = -2) -> Array:
    """MXFP4: E2M1 numbers with a power-of-two scale per block of 32.

    The weight is `[..., in, out]`, with blocks along `axis`; the result has its shape and dtype.
    The exponent is `floor(log2 max|w|) - 2`, so the largest weight may saturate at 6.

    References:
      Open Compute Project, Microscaling Formats Specification 1.0, 2023. Model-Optimizer uses
      `ceil(log2(max|w| / 6))`, which never saturates, and rounds halves toward zero.
    """

    def quantize_blocks(blocks: Array) -> Array:
        largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        exponent = jnp.maximum(jnp.frexp(jnp.where(largest > 0, largest, 1))[1] - 3, -127)
        return e2m1(blocks, jnp.ldexp(jnp.ones_like(largest), exponent))

    return _by_blocks(weight, quantize_blocks, block, axis)


def nvfp4(weight: Array, *, block: int = 16, axis: int = -2) -> Array:
    """NVFP4: E2M1 numbers, an E4M3 scale per block of 16, and one scale for the whole tensor.

    The weight is `[..., in, out]`, with blocks along `axis`; the result has its shape and dtype.

    References:
      NVIDIA, Pretraining Large Language Models with NVFP4, 2025 (2509.25149); quantization-aware
      distillation, 2026 (2601.20088). Model-Optimizer's `NVFP4QTensor`.
    """
    tensor_scale = jnp.max(jnp.abs(_weight(weight))) / (E2M1_MAX * E4M3_MAX)
    tensor_scale = jax.lax.stop_gradient(jnp.where(tensor_scale > 0, tensor_scale, 1))

    def quantize_blocks(blocks: Array) -> Array:
        scale = tensor_scale.reshape((1,) * blocks.ndim)
        block_scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / (E2M1_MAX * scale)
        block_scale = jnp.clip(jnp.where(block_scale > 0, block_scale, 1), 2.0**-9, E4M3_MAX)
        return e2m1(blocks, _minifloat(block_scale, 3, -6, E4M3_MAX) * scale)

    return _by_blocks(weight, quantize_blocks, block, axis)


def e2m1(weight: Array, scale: Array) -> Array:
    """The nearest of `scale * {0, .5, 1, 1.5, 2, 3, 4, 6}` and their negatives; halves to even.

    Args:
      weight: any shape.
      scale: > 0, broadcastable to the weight.
    """
    upcast = _weight(weight)
    scale = jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(scale, upcast.dtype), upcast.shape))
    magnitude = _minifloat(jnp.abs(upcast) / scale, 1, 0, E2M1_MAX)
    return _straight_through(
        weight, upcast, jnp.sign(upcast) * magnitude * scale, jnp.ones_like(upcast) > 0
    )


def _weight(weight: Array) -> Array:
    _checks.floating(weight=weight)
    _checks.rank(1, weight=weight)
    _checks.nonempty(weight=weight)
    return _numerics.upcast(weight)


def _straight_through(weight: Array, upcast: Array, rounded: Array, passes: Array) -> Array:
    """Returns exactly the rounded value, with the weight's gradient where `passes` is true."""
    identity = jnp.where(passes, upcast - jax.lax.stop_gradient(upcast), 0)
    return (jax.lax.stop_gradient(rounded) + identity).astype(weight.dtype)


def _by_blocks(weight: Array, fn: Callable[[Array], Array], size: int, axis: int) -> Array:
    """`fn` of the weight as `[..., blocks, size]` along an axis; zeros fill the last block."""
    upcast = _weight(weight)
    _checks.count(1, block=size)
    if not -upcast.ndim <= axis < upcast.ndim:
        raise ValueError(
            f"axis {axis} is outside of {_checks.described(weight=weight)}. Vectors have axis=-1; "
            "select matrices with where=."
        )
    rows = jnp.moveaxis(upcast, axis, -1)
    length = rows.shape[-1]
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -length % size)])
    result = fn(rows.reshape(*rows.shape[:-1], -1, size)).reshape(rows.shape)[..., :length]
    return jnp.moveaxis(result, -1, axis).astype(weight.dtype)


def _minifloat(x: Array, mantissa_bits: int, least_exponent: int, largest: float) -> Array:
    """Rounds x >= 0 to a small float, halves to the even code, saturating."""
    exponent = jnp.frexp(jnp.where(x > 0, x, 1))[1] - 1
    top = jnp.frexp(jnp.asarray(largest, x.dtype))[1] - 1
    exponent = jnp.clip(exponent, least_exponent, top) - mantissa_bits
    step = jnp.ldexp(jnp.ones_like(x), exponent)
    return jnp.minimum(jnp.round(x / step) * step, largest)
