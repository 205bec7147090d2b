"""One layer of a decoder: attention, rotary positions, feed-forward, norms."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax._types import Params
from kdtl_jax.models._decoder_config import NO_WINDOW, Cache, DecoderConfig, Norm, Rope


class LayerConstants(NamedTuple):
    """Constants that differ between layers, as arrays, so that layers can be scanned."""

    frequencies: Array  # [pairs]
    long_frequencies: Array  # [pairs]
    original_length: Array
    scale: Array
    window: Array


def layer_constants(config: DecoderConfig) -> LayerConstants:
    """The `LayerConstants` of every layer, as rows `[layers, ...]`."""
    ropes = config.ropes or (Rope(),) * config.layers
    windows = config.windows or (None,) * config.layers
    long = [r.frequencies if r.long_frequencies is None else r.long_frequencies for r in ropes]
    lengths = [NO_WINDOW if r.original_length is None else r.original_length for r in ropes]
    return LayerConstants(
        jnp.asarray([r.frequencies for r in ropes], jnp.float32),
        jnp.asarray(long, jnp.float32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray([r.scale for r in ropes], jnp.float32),
        jnp.asarray([NO_WINDOW if w is None else w for w in windows], jnp.int32),
    )


class Layer(NamedTuple):
    """A layer: the decoder's description, and the layer's parameters and constants."""

    config: DecoderConfig
    weights: Params
    constants: LayerConstants


class Positions(NamedTuple):
    """The positions of queries and keys."""

    queries: Array  # positions [B, L]
    distance: Array  # query position minus key position [B, L, S]
    visible: Array  # bool [B, L, S]: the key is real, of the same segment, and not later
    ends: Array  # length of the query's own text so far [B, L, 1]


class Slots(NamedTuple):
    """The cached keys and values, as in `Cache`; the layer, and the next slot to fill."""

    keys: Array
    values: Array
    layer: Array
    start: Array


def token_positions(positions: Array, segments: Array, cache: Cache | None) -> Positions:
    """The positions of queries `[B, L]` and keys `[B, L]`, or the keys of the cache `[B, S]`."""
    keys = (positions, segments) if cache is None else (cache.positions, cache.segments)
    distance = positions[:, :, None] - keys[0][:, None, :]
    is_same_text = (segments[:, :, None] == keys[1][:, None, :]) & (keys[1][:, None, :] > 0)
    is_same_segment = segments[:, :, None] == segments[:, None, :]
    ends = jnp.max(jnp.where(is_same_segment, positions[:, None, :], 0), axis=2, keepdims=True) + 1
    return Positions(positions, distance, is_same_text & (distance >= 0), ends)


def apply(
    layer: Layer, x: Array, positions: Positions, slots: Slots | None
) -> tuple[Array, Slots | None]:
    """Attention, then feed-forward, each with its residual."""
    y, slots_out = _attention(layer, _pre_norm(layer, x, "attention"), positions, slots)
    x = _add_residual(layer, x, y, "attention")
    return _add_residual(layer, x, _units(layer, _pre_norm(layer, x, "mlp")), "mlp"), slots_out


def inner_values(layer: Layer, x: Array, positions: Positions) -> dict[str, Array]:
    """The attention probabilities and the inputs of both output projections, for an input `x`."""
    y = _pre_norm(layer, x, "attention")
    query, key, _ = _project(layer, y, positions)
    probs = _probs(layer.config, query, key, _visible(layer, positions))
    heads, _ = _attention(layer, y, positions, None)
    x = _add_residual(layer, x, heads, "attention")
    return {
        "attention/probs": probs.reshape(len(x), layer.config.heads, *probs.shape[-2:]),
        "attention/heads": heads,
        "mlp/units": _units(layer, _pre_norm(layer, x, "mlp")),
    }


OUTPUTS = {"attention": "out", "mlp": "down"}


def _pre_norm(layer: Layer, x: Array, part: str) -> Array:
    if not layer.config.has_pre_norms:
        return x
    return normalize(layer.config.norm, x, layer.weights[f"{part}_norm"])


def _add_residual(layer: Layer, x: Array, y: Array, part: str) -> Array:
    """The input of a part's output projection, projected and added to the residual."""
    y = _dense(y, layer.weights[part][OUTPUTS[part]])
    if layer.config.has_post_norms:
        y = normalize(layer.config.norm, y, layer.weights[f"{part}_post_norm"])
    return x + y


def _visible(layer: Layer, positions: Positions) -> Array:
    """Which keys a query sees, bool `[B, L, S]`: those in the layer's window."""
    return positions.visible & (positions.distance < layer.constants.window)


def _attention(
    layer: Layer, x: Array, positions: Positions, slots: Slots | None
) -> tuple[Array, Slots | None]:
    """The heads' outputs side by side, before the projection."""
    batch, length, _ = x.shape
    query, key, value = _project(layer, x, positions)
    if slots is not None:
        # Written to the array of all layers, which a loop updates in place, and read from it.
        start = (slots.layer, jnp.int32(0), jnp.int32(0), slots.start, jnp.int32(0))
        keys, values = (
            jax.lax.dynamic_update_slice(
                all_layers, jnp.swapaxes(new, 1, 2)[None].astype(all_layers.dtype), start
            )
            for all_layers, new in ((slots.keys, key), (slots.values, value))
        )
        slots = slots._replace(keys=keys, values=values)
        key, value = (
            jnp.swapaxes(jax.lax.dynamic_index_in_dim(a, slots.layer, keepdims=False), 1, 2)
            for a in (keys, values)
        )
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    y = _attend(layer.config, query, key, value, _visible(layer, positions))
    return y.reshape(batch, length, -1), slots


def _project(layer: Layer, x: Array, positions: Positions) -> tuple[Array, Array, Array]:
    """Queries, keys and values `[B, L, heads, width]`, normalized and rotated by position."""
    config, weights = layer.config, layer.weights["attention"]
    batch, length, _ = x.shape
    count, width = config.key_heads, config.head_width
    if config.fuses_qkv:
        split_points = (config.heads * width, (config.heads + count) * width)
        query, key, value = jnp.split(_dense(x, weights["qkv"]), split_points, axis=-1)
    else:
        query, key, value = (_dense(x, weights[name]) for name in ("query", "key", "value"))
    if config.has_projection_norms:
        query = normalize(config.norm, query, weights["query_norm"])
        key = normalize(config.norm, key, weights["key_norm"])
    query = query.reshape(batch, length, config.heads, width)
    key, value = (a.reshape(batch, length, count, width) for a in (key, value))
    if config.has_head_norms:
        query = normalize(config.norm, query, weights["query_norm"])
        key = normalize(config.norm, key, weights["key_norm"])
    return *_rotate((query, key), layer.constants, positions), value


def _attend(config: DecoderConfig, query: Array, key: Array, value: Array, visible: Array) -> Array:
    """`softmax(q k^T scale) v` over visible keys; the heads of a group share one key."""
    if config.attention_softcap is None:
        mask, scale = visible[:, None], _scale(config)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
    probs = _probs(config, query, key, visible).astype(value.dtype)
    return jnp.einsum("bkgls,bskd->blkgd", probs, value).reshape(query.shape)


def _probs(config: DecoderConfig, query: Array, key: Array, visible: Array) -> Array:
    """`softmax(q k^T scale)` in float32, `[B, key_heads, heads / key_heads, L, S]`."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, config.key_heads, heads // config.key_heads, width)
    scores = _scale(config) * jnp.einsum(
        "blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32
    )
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _scale(config: DecoderConfig) -> float:
    return config.head_width**-0.5 if config.attention_scale is None else config.attention_scale


def _rotate(
    arrays: tuple[Array, Array], constants: LayerConstants, positions: Positions
) -> tuple[Array, Array]:
    """Queries and keys `[B, L, heads, width]`, rotated by position; angles in float32."""
    pairs = constants.frequencies.shape[-1]
    if not pairs:
        return arrays
    is_long = positions.ends > constants.original_length
    choices = (
        _expand_vector(constants.long_frequencies, is_long),
        _expand_vector(constants.frequencies, is_long),
    )
    frequencies = jnp.where(is_long, *choices)
    frequencies = jnp.broadcast_to(frequencies, (*positions.queries.shape, pairs))
    angle = positions.queries[:, :, None].astype(jnp.float32) * frequencies
    cos, sin = (constants.scale * f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))

    def rotate(x: Array) -> Array:
        float32_x = x.astype(jnp.float32)
        first, second, rest = jnp.split(float32_x, (pairs, 2 * pairs), axis=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        return jnp.concatenate([*rotated, rest], axis=-1).astype(x.dtype)

    return rotate(arrays[0]), rotate(arrays[1])


def _units(layer: Layer, x: Array) -> Array:
    """The hidden units `[B, L, hidden]`."""
    config, weights = layer.config, layer.weights["mlp"]
    if config.fuses_gate:
        gate, up = jnp.split(_dense(x, weights["gate_up"]), 2, axis=-1)
    elif config.is_gated:
        gate, up = _dense(x, weights["gate"]), _dense(x, weights["up"])
    else:
        return config.activation(_dense(x, weights["up"]))
    return config.activation(gate) * up


def _dense(x: Array, weights: Mapping[str, Array]) -> Array:
    # As a matrix: with two row axes, the kernel's gradient would copy both of its factors.
    rows = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(rows, weights["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)
    y = y.reshape(*x.shape[:-1], -1)
    if "bias" in weights:
        y = y + _expand_vector(weights["bias"], y)
    return y.astype(x.dtype)


def normalize(norm: Norm, x: Array, weights: Mapping[str, Array]) -> Array:
    """RMS norm, or layer norm if it is centered, of `[..., D]` over the last axis.

    `scale x / sqrt(mean(x^2) + epsilon) + bias`, with `1 + scale` if the norm has a unit offset and
    without bias if `weights`, `[D]` each, have none. Computed in float32; has the dtype of `x`.
    """
    y = x.astype(jnp.float32)
    if norm.is_centered:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm.epsilon)
    scale = _expand_vector(weights["scale"], y)
    y = y * (1 + scale if norm.has_unit_offset else scale)
    if "bias" in weights:
        y = y + _expand_vector(weights["bias"], y)
    return y.astype(x.dtype)


def write_slots(slots: Array, new: Array, start: Array) -> Array:
    """`slots` `[B, S]` with `new` `[B, L]` from slot `start` on."""
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (jnp.int32(0), start))


def _expand_vector(vector: Array, x: Array) -> Array:
    """A float32 vector along the last axis of `x`."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)
