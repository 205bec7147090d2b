"""Connectors: trainable glue between a student's features and a teacher's.

A `Connector(init, apply)` has parameters and no loss. `init(key, x)` looks at shapes and dtypes
only, so `x` may be a `jax.ShapeDtypeStruct` (or a pytree of them); `apply(params, x)` is pure.
Feature maps are channel-last; linear maps and 1x1 convolutions are matrices `[in, out]`, larger
kernels `[kh, kw, in, out]`. Parameters are float32 (float64 for float64 inputs) and cast to the
input's dtype where they meet it.

There is no state: `batch_norm` always uses the statistics of the current batch, as the published
distillers do in training. That is right for glue that is thrown away; where a connector stays in
the model (SimKD's projector) evaluate with large batches, or fold measured statistics into it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics
from kdtl_jax._types import Params

Size = int | Sequence[int]  # a side, or (height, width)


class Connector(NamedTuple):
    """`init(key, x) -> params` from shapes alone; `apply(params, x) -> y`."""

    init: Callable[[Array, Any], Params]
    apply: Callable[[Params, Any], Any]


def _floating(fn: str, x: Any, width: int | None = None) -> None:
    """Refuses, naming the connector, what is not floating or not of the width `init` saw."""
    _checks.floating(x=x)
    _checks.rank(1, x=x)
    if width is not None and x.shape[-1] != width:
        raise ValueError(
            f"connectors.{fn}: x must have the width {width} that its parameters were made for, "
            f"got {_checks.described(x=x)}. Run init again with an input of this shape."
        )


def _dtype(x: Any) -> Any:
    return jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype


def _he(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal with variance `2 / fan_in`."""
    return jax.random.normal(key, shape, dtype) * math.sqrt(2 / math.prod(shape[:-1]))


def _plain(apply: Callable[[Any], Any]) -> Connector:
    """A connector without parameters."""
    return Connector(lambda key, x: {}, lambda params, x: apply(x))


def activation(fn: Callable[[Array], Array]) -> Connector:
    """`fn(x)`, e.g. `activation(jax.nn.relu)`."""
    return _plain(fn)


def identity() -> Connector:
    """`x`."""
    return _plain(lambda x: x)


def unit_norm(*, eps: float = 1e-12) -> Connector:
    """`x / max(||x||, eps)` over the last axis; the end of every contrastive embedding."""
    return _plain(lambda x: _numerics.normalize(x, eps=eps))


def pool(size: Size) -> Connector:
    """Adaptive average pooling of `[B, H, W, C]` to `size`, torch's cells at any size."""
    return _plain(lambda x: _numerics.pool_to(_map("pool", x), _pair(size)))


def resize_nearest(size: Size) -> Connector:
    """`[B, H, W, C]` to `size` by pixel `floor(i h / H)`: torch's default and ReviewKD's."""
    return _plain(lambda x: _nearest(_map("resize_nearest", x), _pair(size)))


def _nearest(x: Array, size: tuple[int, int]) -> Array:
    for axis, wanted in zip((1, 2), size, strict=True):
        if x.shape[axis] != wanted:
            x = jnp.take(x, np.arange(wanted) * x.shape[axis] // wanted, axis=axis)
    return x


def resize_bilinear(size: Size) -> Connector:
    """`[B, H, W, C]` to `size`: half-pixel centers, clamped borders, no antialiasing."""

    def apply(x: Array) -> Array:
        shape = (x.shape[0], *_pair(size), x.shape[-1])
        return jax.image.resize(_map("resize_bilinear", x), shape, "bilinear", antialias=False)

    return _plain(apply)


def _map(fn: str, x: Any) -> Any:
    _checks.rank(4, 4, x=x)
    return x


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def linear(features: int, *, bias: bool = True) -> Connector:
    """`x W + b` over the last axis: tokens, vectors, and maps as a 1x1 convolution.

    Raises:
      ValueError: if there are no features; when run, if x has another width than `init` saw.
      TypeError: when run, if x is not floating point.
    """
    _checks.count(1, features=features)

    def init(key: Array, x: Any) -> Params:
        _floating("linear", x)
        params = {"kernel": _he(key, (x.shape[-1], features), _dtype(x))}
        return params | ({"bias": jnp.zeros((features,), _dtype(x))} if bias else {})

    def apply(params: Params, x: Array) -> Array:
        _floating("linear", x, params["kernel"].shape[0])
        return _biased(jnp.matmul(x, params["kernel"].astype(x.dtype)), params)

    return Connector(init, apply)


conv1x1 = linear  # the same map under the name that papers use for it


def conv(
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
) -> Connector:
    """A `kernel x kernel` convolution of `[B, H, W, C]`, zero padding on every side.

    `padding` defaults to `kernel // 2`, as in torch; note that "SAME" pads differently at stride 2.

    Raises:
      ValueError: if a size is not positive; when run, as `linear`, or if x has not four axes.
      TypeError: when run, if x is not floating point.
    """
    _checks.count(1, features=features, kernel=kernel, stride=stride)
    edge = kernel // 2 if padding is None else padding
    _checks.count(0, padding=edge)

    def init(key: Array, x: Any) -> Params:
        _floating("conv", _map("conv", x))
        params = {"kernel": _he(key, (kernel, kernel, x.shape[-1], features), _dtype(x))}
        return params | ({"bias": jnp.zeros((features,), _dtype(x))} if bias else {})

    def apply(params: Params, x: Array) -> Array:
        _floating("conv", _map("conv", x), params["kernel"].shape[2])
        weights = params["kernel"].astype(x.dtype)
        if x.shape[1:3] == (1, 1) and kernel == 2 * edge + 1:
            # A single position meets the middle of the kernel alone.
            return _biased(jnp.matmul(x, weights[edge, edge]), params)
        y = jax.lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            ((edge, edge), (edge, edge)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _biased(y, params)

    return Connector(init, apply)


def conv3x3(features: int, *, stride: int = 1, bias: bool = True) -> Connector:
    """`conv` with a 3x3 kernel and padding 1."""
    return conv(features, kernel=3, stride=stride, bias=bias)


def _biased(y: Array, params: Params) -> Array:
    if "bias" not in params:
        return y
    return y + jnp.broadcast_to(params["bias"].astype(y.dtype), y.shape)


def batch_norm(*, eps: float = 1e-5) -> Connector:
    """Normalization per channel by the statistics of this very batch, then scale and offset.

    Biased variance over all axes but the last, in float32 or wider. No running averages: the
    output of one example depends on its batch.
    """

    def init(key: Array, x: Any) -> Params:
        _floating("batch_norm", x)
        shape, dtype = (x.shape[-1],), _dtype(x)
        return {"scale": jnp.ones(shape, dtype), "offset": jnp.zeros(shape, dtype)}

    def apply(params: Params, x: Array) -> Array:
        _floating("batch_norm", x, params["scale"].shape[0])
        wide, axes = _numerics.upcast(x), tuple(range(x.ndim - 1))
        centered = wide - jnp.mean(wide, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=axes, keepdims=True)
        unit = centered * jax.lax.rsqrt(variance + eps)
        scale, offset = (
            jnp.broadcast_to(params[name].astype(unit.dtype), unit.shape)
            for name in ("scale", "offset")
        )
        return (unit * scale + offset).astype(x.dtype)

    return Connector(init, apply)


def mlp(
    sizes: Sequence[int],
    *,
    activate: Callable[[Array], Array] = jax.nn.relu,
    bias: bool = True,
) -> Connector:
    """Linear maps over the last axis with an activation between: an embedding head.

    `mlp((width, width, teacher_width), bias=False)` is VID's regressor, three 1x1 convolutions.
    """
    layers = [linear(size, bias=bias) for size in sizes]
    steps = [step for layer in layers for step in (layer, activation(activate))]
    return chain(*steps[:-1])


def chain(*connectors: Connector) -> Connector:
    """One connector after another; its parameters are a list with one entry each."""

    def init(key: Array, x: Any) -> Params:
        params = []
        for position, step in enumerate(connectors):
            params.append(step.init(jax.random.fold_in(key, position), x))
            x = jax.eval_shape(step.apply, params[-1], x)
        return params

    def apply(params: Params, x: Any) -> Any:
        for own, step in zip(params, connectors, strict=True):
            x = step.apply(own, x)
        return x

    return Connector(init, apply)


def group(connectors: Mapping[str, Connector]) -> Connector:
    """Connectors side by side: a dict in, a dict out, parameters by the same names.

    Entries of the input without a connector are left out of the output.
    """
    names = sorted(connectors)

    def init(key: Array, x: Mapping[str, Any]) -> Params:
        _named(x)
        return {
            name: connectors[name].init(jax.random.fold_in(key, position), x[name])
            for position, name in enumerate(names)
        }

    def apply(params: Params, x: Mapping[str, Any]) -> dict[str, Any]:
        _named(x)
        return {name: connectors[name].apply(params[name], x[name]) for name in names}

    def _named(x: Mapping[str, Any]) -> None:
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"no input named {missing}, got {sorted(x)}.")

    return Connector(init, apply)


def variance(*, initial: float = 5.0, eps: float = 1e-5) -> Connector:
    """VID's variance head: `softplus(raw_c) + eps` per channel of x, `[C]`, `initial` at first."""

    def init(key: Array, x: Any) -> Params:
        _floating("variance", x)
        raw = math.log(math.expm1(initial - eps))
        return {"raw": jnp.full((x.shape[-1],), raw, _dtype(x))}

    return Connector(init, lambda params, x: jax.nn.softplus(params["raw"]) + eps)


def simkd_projector(features: int, *, factor: int = 2, eps: float = 1e-5) -> Connector:
    """SimKD's bottleneck 1x1, 3x3, 1x1 of width `features / factor`, each with norm and ReLU."""
    width = features // factor
    steps = (conv1x1(width, bias=False), conv3x3(width, bias=False), conv1x1(features, bias=False))
    after = (batch_norm(eps=eps), activation(jax.nn.relu))
    return chain(*(part for step in steps for part in (step, *after)))


def generator(features: int) -> Connector:
    """MGD's and ViTKD's generator: 3x3, ReLU, 3x3. Its input is masked by the caller."""
    return chain(conv3x3(features), activation(jax.nn.relu), conv3x3(features))


def mask_token() -> Connector:
    """`(x, where) -> x` with one learned token in place of the tokens where `where` holds.

    x is `[B, L, D]`, `where` bool `[B, L]`; the token starts at 0. ViTKD, masked autoencoders.
    """

    def init(key: Array, x: tuple[Any, Any]) -> Params:
        _floating("mask_token", x[0])
        return {"token": jnp.zeros(x[0].shape[-1:], _dtype(x[0]))}

    def apply(params: Params, x: tuple[Array, Array]) -> Array:
        tokens, where = x
        _floating("mask_token", tokens, params["token"].shape[0])
        _checks.mask(where, tokens.shape[:-1])
        token = jnp.broadcast_to(params["token"].astype(tokens.dtype), tokens.shape)
        return jnp.where(where[..., None], token, tokens)

    return Connector(init, apply)


def _factor_convs(sizes: Sequence[int]) -> Connector:
    """3x3 convolutions, each with batch statistics and a leaky ReLU of slope .1."""
    leaky = activation(lambda x: jax.nn.leaky_relu(x, 0.1))
    return chain(*(part for n in sizes for part in (conv3x3(n), batch_norm(), leaky)))


def translator(channels: int, features: int) -> Connector:
    """FT's student side: three 3x3 convolutions from `channels` to the factor's `features`."""
    return _factor_convs((channels, features, features))


def paraphraser(channels: int, *, rate: float = 0.5) -> Connector:
    """FT's teacher side, an autoencoder: `x -> (factor, reconstruction)`.

    The factor has `rate * channels` channels. Train it first, by `losses.mse` of the
    reconstruction; distill with the factor alone.
    """
    width = max(int(rate * channels), 1)
    encode = _factor_convs((channels, width, width))
    decode = _factor_convs((width, channels, channels))

    def init(key: Array, x: Any) -> Params:
        encoder = encode.init(jax.random.fold_in(key, 0), x)
        factor = jax.eval_shape(encode.apply, encoder, x)
        return {"encoder": encoder, "decoder": decode.init(jax.random.fold_in(key, 1), factor)}

    def apply(params: Params, x: Array) -> tuple[Array, Array]:
        factor = encode.apply(params["encoder"], x)
        return factor, decode.apply(params["decoder"], factor)

    return Connector(init, apply)


def abf(width: int, features: int, *, size: Size | None = None, eps: float = 1e-5) -> Connector:
    """ReviewKD's attention-based fusion: `(x, residual) -> (features, next residual)`.

    Run from the deepest level up, handing each level's residual to the next; the deepest takes
    `residual=None`. The residual is brought to x's size by nearest neighbor and mixed in by two
    sigmoid maps; `size` is the next level's height and width, x's own by default.

    Args:
      width: channels of the residual stream (mdistiller: 512 at most).
      features: channels of the output, the teacher's.
      size: of the output.
      eps: of both batch normalizations.
    """
    reduce = chain(conv1x1(width, bias=False), batch_norm(eps=eps))
    expand = chain(conv3x3(features, bias=False), batch_norm(eps=eps))
    attention = conv1x1(2)

    def init(key: Array, x: tuple[Any, Any]) -> Params:
        keys = jax.random.split(key, 3)
        own = reduce.init(keys[0], x[0])
        mixed = jax.eval_shape(reduce.apply, own, x[0])
        params = {"reduce": own, "expand": expand.init(keys[1], mixed)}
        if x[1] is None:
            return params
        both = jax.ShapeDtypeStruct((*mixed.shape[:-1], 2 * width), mixed.dtype)
        return params | {"attention": attention.init(keys[2], both)}

    def apply(params: Params, x: tuple[Array, Array | None]) -> tuple[Array, Array]:
        mixed, residual = reduce.apply(params["reduce"], x[0]), x[1]
        if residual is not None:
            residual = _nearest(_map("abf", residual), mixed.shape[1:3])
            both = jnp.concatenate([mixed, residual], axis=-1)
            weights = jax.nn.sigmoid(attention.apply(params["attention"], both))
            mixed = mixed * weights[..., :1] + residual * weights[..., 1:]
        if size is not None:
            mixed = _nearest(mixed, _pair(size))
        return expand.apply(params["expand"], mixed), mixed

    return Connector(init, apply)
