"""Single-layer connectors, and connectors made of connectors."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, _numerics, _pooling
from kdtl_jax._types import Params, PyTree
from kdtl_jax.connectors._connector import (
    Connector,
    Statistics,
    check_connector,
    check_params,
    run_step,
    with_statistics,
    zero_masked,
)

Size = int | Sequence[int]  # a side, or (height, width)


def floating(x: Any, width: int | None = None) -> None:
    """Refuses inputs that are not floating point, or not of the width that `init` saw."""
    _checks.floating(x=x)
    _checks.rank(1, x=x)
    if not np.shape(x)[-1]:
        raise ValueError(f"x must have features on its last axis, got {_checks.described(x=x)}.")
    if width is not None and x.shape[-1] != width:
        raise ValueError(
            f"x must have the width {width} that the connector's parameters were made for, "
            f"got {_checks.described(x=x)}. Run init again with an input of this shape."
        )


def param_dtype(x: Any) -> Any:
    """The dtype of `x`, but at least float32."""
    return jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype


def _init_affine(key: Array, shape: tuple[int, ...], dtype: Any, bias: bool) -> Params:
    """He initialization: a normal kernel with variance `2 / fan_in`, and a bias of 0."""
    _checks.key(key=key)
    scale = math.sqrt(2 / math.prod(shape[:-1]))
    params = {"kernel": jax.random.normal(key, shape, dtype) * scale}
    return params | ({"bias": jnp.zeros(shape[-1:], dtype)} if bias else {})


def _without_params(apply: Callable[[Any], Any]) -> Connector:
    """A connector without parameters."""

    def checked(params: Params, x: Any, *, where: Array | None = None) -> Any:
        _checks.arrays(x=x)
        return apply(zero_masked(x, where))

    return Connector(lambda key, x: {}, checked)


def activation(fn: Callable[[Array], Array]) -> Connector:
    """`fn(x)`, e.g. `activation(jax.nn.relu)`; any shape."""
    if not callable(fn):
        raise TypeError(f"fn must be a function such as jax.nn.relu, got {fn!r:.80}.")
    return _without_params(fn)


def identity() -> Connector:
    """`x`."""
    return _without_params(lambda x: x)


def unit_norm() -> Connector:
    """`x / ||x||` over the last axis, 0 for zeros; the last layer of contrastive embeddings."""
    return _without_params(_numerics.normalize)


def pool(size: Size) -> Connector:
    """Adaptive average pooling of `[B, H, W, C]` to `size`, with torch's cells at any size."""
    cells = pair(size)
    return _without_params(lambda x: _pooling.pool_to(feature_map(x), cells))


def resize_nearest(size: Size) -> Connector:
    """`[B, H, W, C]` to `size` from pixel `floor(i h / H)`, the default of torch and ReviewKD."""
    cells = pair(size)
    return _without_params(lambda x: nearest(feature_map(x), cells))


def nearest(x: Array, size: tuple[int, int]) -> Array:
    """`[B, H, W, C]` to `[B, *size, C]`, each cell from the nearest one before it."""
    for axis, length in zip((1, 2), size, strict=True):
        if x.shape[axis] != length:
            x = jnp.take(x, np.arange(length) * x.shape[axis] // length, axis=axis)
    return x


def resize_bilinear(size: Size) -> Connector:
    """`[B, H, W, C]` to `size`: half-pixel centers, clamped borders, no antialiasing."""

    cells = pair(size)

    def apply(x: Array) -> Array:
        shape = (feature_map(x).shape[0], *cells, x.shape[-1])
        return jax.image.resize(x, shape, "bilinear", antialias=False)

    return _without_params(apply)


def feature_map(x: Any) -> Any:
    """`x`, checked to be `[B, H, W, C]`."""
    _checks.rank(4, 4, x=x)
    return x


def pair(size: Size) -> tuple[int, int]:
    """Height and width; a single number is used for both."""
    sides = [size] * 2 if isinstance(size, (int, str)) else list(size)
    if len(sides) != 2:
        raise ValueError(f"size must be one side or (height, width), got {size!r:.80}.")
    height, width = sides
    _checks.count(1, **{"the height of size": height, "the width of size": width})
    return height, width


def linear(features: int, *, bias: bool = True) -> Connector:
    """`x W + b` over the last axis: tokens, vectors, and maps as a 1x1 convolution."""
    _checks.count(1, features=features)

    def init(key: Array, x: Any) -> Params:
        floating(x)
        return _init_affine(key, (x.shape[-1], features), param_dtype(x), bias)

    def apply(params: Params, x: Array, *, where: Array | None = None) -> Array:
        check_params(params, "kernel")
        floating(x, params["kernel"].shape[0])
        x = zero_masked(x, where)
        return _add_bias(jnp.matmul(x, params["kernel"].astype(x.dtype)), params)

    return Connector(init, apply)


conv1x1 = linear  # the same map under the name used in papers


def conv(
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | None = None,
    bias: bool = True,
) -> Connector:
    """A `kernel x kernel` convolution of `[B, H, W, C]`, with zero padding on every side.

    `padding` defaults to `kernel // 2`, as in torch; note that "SAME" pads differently at stride 2.
    """
    _checks.count(1, features=features, kernel=kernel, stride=stride)
    edge = kernel // 2 if padding is None else padding
    _checks.count(0, padding=edge)

    def init(key: Array, x: Any) -> Params:
        floating(feature_map(x))
        shape = (kernel, kernel, x.shape[-1], features)
        return _init_affine(key, shape, param_dtype(x), bias)

    def apply(params: Params, x: Array, *, where: Array | None = None) -> Array:
        check_params(params, "kernel")
        floating(feature_map(x), params["kernel"].shape[2])
        x, weights = zero_masked(x, where), params["kernel"].astype(x.dtype)
        if x.shape[1:3] == (1, 1) and kernel == 2 * edge + 1:
            # A single position only meets the middle of the kernel.
            return _add_bias(jnp.matmul(x, weights[edge, edge]), params)
        y = jax.lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            ((edge, edge), (edge, edge)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _add_bias(y, params)

    return Connector(init, apply)


def conv3x3(features: int, *, stride: int = 1, bias: bool = True) -> Connector:
    """`conv` with a 3x3 kernel and padding 1."""
    return conv(features, kernel=3, stride=stride, bias=bias)


def _add_bias(y: Array, params: Params) -> Array:
    if "bias" not in params:
        return y
    return y + jnp.broadcast_to(params["bias"].astype(y.dtype), y.shape)


def batch_norm(*, eps: float = 1e-5) -> Connector:
    """Normalizes each channel, then scales and shifts it.

    It uses the mean and the biased variance of this batch over all axes but the last (without
    padding), in float32 or wider, or running statistics (`Connector.evaluate`). `eps` is added to
    the variance, so it is in squared feature units, as everywhere; 1e-5 is torch's default. With 0,
    a channel that does not vary becomes its offset.
    """
    _checks.scalar(eps=eps)
    _checks.non_negative(eps=eps)

    def init(key: Array, x: Any) -> Params:
        floating(x)
        shape, dtype = (x.shape[-1],), param_dtype(x)
        return {"scale": jnp.ones(shape, dtype), "offset": jnp.zeros(shape, dtype)}

    def run(
        params: Params, x: Array, statistics: Statistics | None, where: Array | None, /
    ) -> tuple[Array, Any]:
        if isinstance(params, Mapping) and not params:
            return x, {}  # folded into the preceding map
        check_params(params, "scale")
        floating(x, params["scale"].shape[0])
        if statistics is not None and not isinstance(statistics, Statistics):
            raise TypeError(
                "statistics must be those of this connector, from running_init or "
                f"Connector.measure, got {type(statistics).__name__}."
            )
        if statistics is None:
            centered, variance, statistics = _batch_statistics(_numerics.upcast(x), where, eps)
            unit = centered * _numerics.safe_rsqrt(variance + eps)
        else:
            upcast = _numerics.upcast(x)
            mean, variance = (
                jnp.broadcast_to(v.astype(upcast.dtype), upcast.shape) for v in statistics[:2]
            )
            epsilon = statistics.eps.astype(upcast.dtype)
            unit = (upcast - mean) * _numerics.safe_rsqrt(variance + epsilon)
        scale, offset = (
            jnp.broadcast_to(params[name].astype(unit.dtype), unit.shape)
            for name in ("scale", "offset")
        )
        return (unit * scale + offset).astype(x.dtype), statistics

    return with_statistics(init, run)


def _batch_statistics(x: Array, where: Array | None, eps: float) -> tuple[Array, Array, Statistics]:
    """Centered values, biased variance, and the statistics of the values that take part."""
    axes = tuple(range(x.ndim - 1))
    count = jnp.asarray(math.prod(x.shape[:-1]), x.dtype)
    if where is not None:
        _checks.mask(where, x.shape[: jnp.ndim(where)])
        x = _numerics.kept(x, where)
        count = jnp.sum(where, dtype=x.dtype) * math.prod(x.shape[jnp.ndim(where) : -1])
    divisor = jnp.maximum(count, 1)
    mean = jnp.sum(x, axis=axes, keepdims=True) / divisor
    centered = _numerics.kept(x - mean, where)
    variance = jnp.sum(jnp.square(centered), axis=axes, keepdims=True) / divisor
    unbiased = variance * (count / jnp.maximum(count - 1, 1))
    statistics = Statistics(
        mean.reshape(-1), unbiased.reshape(-1), count, jnp.asarray(eps, x.dtype)
    )
    return centered, variance, jax.lax.stop_gradient(statistics)


def mlp(
    sizes: Sequence[int],
    *,
    activate: Callable[[Array], Array] = jax.nn.relu,
    bias: bool = True,
) -> Connector:
    """Linear maps over the last axis with an activation in between: an embedding head.

    `[..., width]` to `[..., sizes[-1]]`.

    `mlp((width, width, teacher_width), bias=False)` is VID's regressor, three 1x1 convolutions.
    """
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        repair = f"write [{sizes}]" if isinstance(sizes, int) else "write [64, 10], for example"
        raise TypeError(f"sizes must be a list of widths, got {sizes!r:.80}: {repair}.")
    if not sizes:
        raise ValueError("sizes must hold at least one width, got none.")
    layers = [linear(size, bias=bias) for size in sizes]
    steps = [step for layer in layers for step in (layer, activation(activate))]
    return chain(*steps[:-1])


def chain(*connectors: Connector) -> Connector:
    """Applies connectors in sequence; the parameters are a list with one entry per connector."""
    for number, step in enumerate(connectors):
        check_connector(**{f"connector {number}": step})

    def check_each(entries: Any, name: str) -> None:
        is_list = isinstance(entries, Sequence) and not isinstance(entries, (str, Statistics))
        if not is_list or len(entries) != len(connectors):
            raise ValueError(
                f"{name} must be what this chain made, a list of {len(connectors)}, got "
                f"{len(entries) if is_list else type(entries).__name__}."
            )

    def init(key: Array, x: Any) -> Params:
        params = []
        _checks.key(key=key)
        for position, step in enumerate(connectors):
            params.append(step.init(jax.random.fold_in(key, position), x))
            x = jax.eval_shape(step.apply, params[-1], x)
        return params

    def run(
        params: Params, x: Any, statistics: PyTree | None, where: Array | None, /
    ) -> tuple[Any, PyTree]:
        check_each(params, "params")
        per_step = [None] * len(connectors) if statistics is None else statistics
        check_each(per_step, "statistics")
        new_statistics = []
        for step_params, step, step_statistics in zip(params, connectors, per_step, strict=True):
            x, step_result = run_step(step, step_params, x, step_statistics, where)
            new_statistics.append(step_result)
        return x, new_statistics

    return with_statistics(init, run)


def group(connectors: Mapping[str, Connector]) -> Connector:
    """Connectors side by side: a dict in, a dict out, parameters by the same names.

    Input entries without a connector are omitted from the output.
    """
    if not isinstance(connectors, Mapping):
        raise TypeError(f"connectors must be a dict by name, got {type(connectors).__name__}.")
    names = sorted(connectors)
    check_connector(**{f"connectors[{name!r}]": connectors[name] for name in names})

    def init(key: Array, x: Mapping[str, Any]) -> Params:
        _check_inputs(x)
        _checks.key(key=key)
        return {
            name: connectors[name].init(jax.random.fold_in(key, position), x[name])
            for position, name in enumerate(names)
        }

    def run(
        params: Params, x: Mapping[str, Any], statistics: PyTree | None, where: Array | None, /
    ) -> tuple[dict[str, Any], PyTree]:
        _check_inputs(x)
        check_params(params, *names)
        if statistics is not None:
            check_params(statistics, *names)
        results = {
            name: run_step(
                connectors[name],
                params[name],
                x[name],
                None if statistics is None else statistics[name],
                where,
            )
            for name in names
        }
        return {name: y for name, (y, _) in results.items()}, {
            n: s for n, (_, s) in results.items()
        }

    def _check_inputs(x: Mapping[str, Any]) -> None:
        if not isinstance(x, Mapping):
            raise TypeError(f"x must be a dict of inputs by name, got {type(x).__name__}.")
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"no input named {missing}, got {sorted(x)}.")

    return with_statistics(init, run)


def variance(*, initial: float = 5.0, eps: float = 1e-5) -> Connector:
    """VID's variance head: `softplus(raw_c) + eps` per channel of x, `[C]`, starting at `initial`.

    Both are in squared feature units.
    """
    _checks.scalar(initial=initial, eps=eps)
    _checks.non_negative(eps=eps)
    _checks.positive(**{"initial - eps": initial - eps})

    def init(key: Array, x: Any) -> Params:
        floating(x)
        raw = math.log(math.expm1(initial - eps))
        return {"raw": jnp.full((x.shape[-1],), raw, param_dtype(x))}

    def apply(params: Params, x: Any, *, where: Array | None = None) -> Array:
        check_params(params, "raw")
        return jax.nn.softplus(params["raw"]) + eps

    return Connector(init, apply)
