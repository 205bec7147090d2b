"""Connectors from published methods: projectors, generators, paraphrasers, fusions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks
from kdtl_jax._types import Params, PyTree
from kdtl_jax.connectors import _layers
from kdtl_jax.connectors._connector import (
    Connector,
    check_params,
    run_step,
    with_statistics,
    zero_masked,
)
from kdtl_jax.connectors._layers import Size


def check_pair(x: Any, description: str) -> None:
    """Refuses inputs that are not a pair."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"x must be a pair, {description}, got {type(x).__name__}.")


def simkd_projector(features: int, *, factor: int = 2, eps: float = 1e-5) -> Connector:
    """SimKD's bottleneck 1x1, 3x3, 1x1 of width `features / factor`, each with norm and ReLU.

    It remains part of the student: carry `running_init`, and predict with `evaluate` or after
    folding.
    """
    _checks.count(1, features=features, factor=factor)
    width = features // factor
    steps = (
        _layers.conv1x1(width, bias=False),
        _layers.conv3x3(width, bias=False),
        _layers.conv1x1(features, bias=False),
    )
    norm_and_activation = (_layers.batch_norm(eps=eps), _layers.activation(jax.nn.relu))
    return _layers.chain(*(part for step in steps for part in (step, *norm_and_activation)))


def generator(features: int) -> Connector:
    """MGD's and ViTKD's generator: 3x3, ReLU, 3x3. The caller masks its input."""
    return _layers.chain(
        _layers.conv3x3(features), _layers.activation(jax.nn.relu), _layers.conv3x3(features)
    )


def mask_token() -> Connector:
    """`(x, replaced) -> x` with one learned token in place of the tokens where `replaced` holds.

    x is `[B, L, D]`, `replaced` bool `[B, L]`; the token starts at 0. ViTKD, masked autoencoders.
    """

    def init(key: Array, x: tuple[Any, Any]) -> Params:
        check_pair(x, "the tokens and where they are replaced")
        _layers.floating(x[0])
        return {"token": jnp.zeros(x[0].shape[-1:], _layers.param_dtype(x[0]))}

    def apply(params: Params, x: tuple[Array, Array], *, where: Array | None = None) -> Array:
        check_params(params, "token")
        check_pair(x, "the tokens and where they are replaced")
        tokens, replaced = zero_masked(x, where)
        _layers.floating(tokens, params["token"].shape[0])
        _checks.mask(replaced, tokens.shape[:-1])
        token = jnp.broadcast_to(params["token"].astype(tokens.dtype), tokens.shape)
        return jnp.where(replaced[..., None], token, tokens)

    return Connector(init, apply)


def _factor_convs(sizes: Sequence[int]) -> Connector:
    """3x3 convolutions, each with batch statistics and a leaky ReLU of slope .1."""
    leaky = _layers.activation(lambda x: jax.nn.leaky_relu(x, 0.1))
    return _layers.chain(
        *(part for n in sizes for part in (_layers.conv3x3(n), _layers.batch_norm(), leaky))
    )


def translator(channels: int, features: int) -> Connector:
    """FT's student side: three 3x3 convolutions from `channels` to the factor's `features`."""
    return _factor_convs((channels, features, features))


def paraphraser(channels: int, *, rate: float = 0.5) -> Connector:
    """FT's teacher side, an autoencoder: `x -> (factor, reconstruction)`.

    The factor has `rate * channels` channels. Train it first, with `losses.mse` on the
    reconstruction; distill with the factor alone.
    """
    _checks.count(1, channels=channels)
    _checks.scalar(rate=rate)
    _checks.positive(rate=rate)
    width = max(int(rate * channels), 1)
    encode = _factor_convs((channels, width, width))
    decode = _factor_convs((width, channels, channels))

    def init(key: Array, x: Any) -> Params:
        _checks.key(key=key)
        encoder = encode.init(jax.random.fold_in(key, 0), x)
        factor = jax.eval_shape(encode.apply, encoder, x)
        return {"encoder": encoder, "decoder": decode.init(jax.random.fold_in(key, 1), factor)}

    def run(
        params: Params, x: Array, statistics: PyTree | None, where: Array | None, /
    ) -> tuple[tuple[Array, Array], PyTree]:
        check_params(params, "encoder", "decoder")
        by_part = statistics or {"encoder": None, "decoder": None}
        check_params(by_part, "encoder", "decoder")
        factor, encoder = run_step(encode, params["encoder"], x, by_part["encoder"], where)
        rebuilt, decoder = run_step(decode, params["decoder"], factor, by_part["decoder"], where)
        return (factor, rebuilt), {"encoder": encoder, "decoder": decoder}

    return with_statistics(init, run)


def abf(width: int, features: int, *, size: Size | None = None, eps: float = 1e-5) -> Connector:
    """ReviewKD's attention-based fusion: `(x, residual) -> (features, next residual)`.

    Run it from the deepest level up and pass each level's residual to the next; the deepest takes
    `residual=None`. The residual is resized to x's size by nearest neighbor and mixed in by two
    sigmoid maps; `size` is the next level's height and width, by default those of x.

    Args:
      width: channels of the residual stream (mdistiller: 512 at most).
      features: channels of the output, the teacher's.
      size: of the output.
      eps: of both batch normalizations.
    """
    sides = None if size is None else _layers.pair(size)
    reduce = _layers.chain(_layers.conv1x1(width, bias=False), _layers.batch_norm(eps=eps))
    expand = _layers.chain(_layers.conv3x3(features, bias=False), _layers.batch_norm(eps=eps))
    attention = _layers.conv1x1(2)

    def init(key: Array, x: tuple[Any, Any]) -> Params:
        check_pair(x, "the features and the residual or None")
        _checks.key(key=key)
        keys = jax.random.split(key, 3)
        reduce_params = reduce.init(keys[0], x[0])
        mixed = jax.eval_shape(reduce.apply, reduce_params, x[0])
        params = {"reduce": reduce_params, "expand": expand.init(keys[1], mixed)}
        if x[1] is None:
            return params
        concatenated = jax.ShapeDtypeStruct((*mixed.shape[:-1], 2 * width), mixed.dtype)
        return params | {"attention": attention.init(keys[2], concatenated)}

    def run(
        params: Params,
        x: tuple[Array, Array | None],
        statistics: PyTree | None,
        where: Array | None,
        /,
    ) -> tuple[tuple[Array, Array], PyTree]:
        check_pair(x, "the features and the residual or None")
        check_params(params, "reduce", "expand")
        by_part = statistics or {"reduce": None, "expand": None}
        check_params(by_part, "reduce", "expand")
        mixed, reduced = run_step(reduce, params["reduce"], x[0], by_part["reduce"], where)
        residual = x[1]
        if residual is not None:
            check_params(params, "attention")
            residual = _layers.nearest(_layers.feature_map(residual), mixed.shape[1:3])
            concatenated = jnp.concatenate([mixed, residual], axis=-1)
            weights = jax.nn.sigmoid(attention.apply(params["attention"], concatenated))
            mixed = mixed * weights[..., :1] + residual * weights[..., 1:]
        if sides is not None:
            mixed = _layers.nearest(mixed, sides)
        features, expanded = run_step(expand, params["expand"], mixed, by_part["expand"], where)
        return (features, mixed), {"reduce": reduced, "expand": expanded}

    return with_statistics(init, run)
