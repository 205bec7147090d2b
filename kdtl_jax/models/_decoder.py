"""Decoder-only language models: one pure function, the published families as data.

A `DecoderConfig` says what GPT-2, Llama, Mistral, Qwen, Gemma, Phi, SmolLM and OLMo differ in:
norms and where they stand, rotary tables and windows by layer, grouped keys, biases, soft caps.
`decoder(config)` gives the functions:

    model = models.decoder(config)
    params = model.init(jax.random.key(0))
    hidden, _ = model.apply(params, tokens)              # [B, L] -> [B, L, width]
    logits = losses.head_logits(hidden, model.head(params))

The head is apart, as `losses.Head`, so that only those who want logits make them: the chunked
losses never hold `[B, L, vocabulary]`. Parameters are a plain dict. Its layers are
`layers_0`, `layers_1`, …, run one after another, or, after `transforms.stack_layers`, `layers` with
a leading axis, run by `jax.lax.scan` at the compile time of one layer; the outputs are the same.

`segments` `[B, L]` says which text a position belongs to, 0 for padding: positions see earlier ones
of their own segment and nothing else, so padding and packing change no number of a text. Decoders
have no dropout here, as is the practice in fine-tuning and distillation.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks
from kdtl_jax._types import Params
from kdtl_jax.losses import Head

NO_WINDOW = 2**30


class Rope(NamedTuple):
    """Rotary positions of one kind of layer: radians per position of each pair of channels.

    Channel `i` turns with channel `i + n` where `n = len(frequencies)`; channels from `2 n` on
    stay (partial rotation); a frequency of 0 turns nothing. Cosine and sine are multiplied by
    `scale`. Sequences longer than `original_length` use `long_frequencies`, where there are any.
    """

    frequencies: tuple[float, ...] = ()
    scale: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    original_length: int | None = None


class Norm(NamedTuple):
    """`(x - mean) / sqrt(var + epsilon)` if centered, else `x / sqrt(mean(x^2) + epsilon)`.

    Times `scale`, or `1 + scale` with a unit offset (Gemma), plus `bias` where there is one.
    """

    epsilon: float = 1e-6
    is_centered: bool = False
    has_unit_offset: bool = False


class DecoderConfig(NamedTuple):
    """What a decoder computes.

    Attributes:
      ropes: one per layer; empty for learned positions.
      windows: positions that a layer sees, itself included; None sees all before it. One per layer,
        or empty for none at all.
      learned_positions: rows of the table of positions (GPT-2), 0 for none.
      fuses_qkv, fuses_gate: whether query, key and value (gate and up) are one matrix.
      has_pre_norms, has_post_norms: norms before attention and feed-forward, and after them.
      has_head_norms: whether queries and keys are normalized head by head (Qwen3, Gemma 3).
      has_projection_norms: whether they are normalized before they are split into heads (OLMo 2).
      attention_scale: of `q k^T`; None is `1 / sqrt(head_width)`.
      attention_softcap, final_softcap: `cap tanh(z / cap)` of scores and of logits.
      embedding_scale: factor of the token embeddings (Gemma: `sqrt(width)`).
      logit_scale: factor of the logits.
      is_tied: whether the head is the token embedding.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    hidden: int
    ropes: tuple[Rope, ...] = ()
    windows: tuple[int | None, ...] = ()
    learned_positions: int = 0
    norm: Norm = Norm()
    has_norm_bias: bool = False
    has_pre_norms: bool = True
    has_post_norms: bool = False
    has_head_norms: bool = False
    has_projection_norms: bool = False
    activation: Callable[[Array], Array] = jax.nn.silu
    is_gated: bool = True
    fuses_qkv: bool = False
    fuses_gate: bool = False
    has_qkv_bias: bool = False
    has_out_bias: bool = False
    has_mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    is_tied: bool = False
    has_head_bias: bool = False


class Cache(NamedTuple):
    """Keys and values of the positions read so far; arrays only.

    `keys`, `values` `[layers, B, S, key_heads, head_width]`; `positions` and `segments` int32
    `[B, S]` of the `S` slots (segment 0: empty or padding); `length` int32 `[]`, slots in use.
    """

    keys: Array
    values: Array
    positions: Array
    segments: Array
    length: Array


class Apply(Protocol):
    """`apply(params, tokens, positions, segments, cache) -> (hidden, cache)`.

    Args of the call:
      params: as `Decoder.init` makes them, or with stacked layers.
      tokens: int `[B, L]`.
      positions: int `[B, L]`; None counts within each segment, going on from the cache.
      segments: int `[B, L]`, 0 for padding; None is one text a row without padding.
      cache: a `Cache` with room for `L` more slots, or None.

    Returns:
      `hidden` `[B, L, width]` after the last norm, and the filled cache (None without one).
    """

    def __call__(
        self,
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]: ...


class Decoder(NamedTuple):
    """A decoder's functions: `init(key) -> params`, `apply`, and `head(params) -> losses.Head`."""

    config: DecoderConfig
    init: Callable[[Array], Params]
    apply: Apply
    head: Callable[[Params], Head]


def decoder(
    config: DecoderConfig,
    *,
    dtype: Any = None,
    remat_policy: Callable[..., Any] | None = None,
) -> Decoder:
    """The functions of a decoder.

    Args:
      config: what it computes.
      dtype: of the computation; None is the parameters'. Matrix products accumulate, and norms,
        rotations and the softmax are taken, in float32.
      remat_policy: recompute layers in the backward pass, keeping what the policy keeps (one of
        `jax.checkpoint_policies`); None recomputes nothing.

    Raises:
      ValueError: if the numbers of the config do not fit each other.
    """
    _check(config)

    def init(key: Array) -> Params:
        return _init(config, key)

    def apply(
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        return _apply(config, params, tokens, positions, segments, cache, dtype, remat_policy)

    def head(params: Params) -> Head:
        table = params["tokens"]["embedding"]
        kernel = table.T if config.is_tied else params["head"]["kernel"]
        bias = params["head"]["bias"] if config.has_head_bias else None
        return Head(kernel, bias, config.logit_scale, config.final_softcap)

    return Decoder(config, init, apply, head)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache of `length` slots for `batch` rows."""
    shape = (config.layers, batch, length, config.key_heads, config.head_width)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros((), jnp.int32)
    )


def segment_positions(segments: Array) -> Array:
    """int32 `[B, L]`: the place of each position within its segment, `[B, L] -> [B, L]`.

    Padding (segment 0) takes no place, also inside a segment: between a short prompt and its
    continuation, say.
    """
    is_real = segments > 0
    count = jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - 1
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    latest = jax.lax.cummax(jnp.where(is_real, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    begins = is_real & ((before < 0) | (previous != segments))
    return jnp.maximum(count - jax.lax.cummax(jnp.where(begins, count, 0), axis=1), 0)


class _Layer(NamedTuple):
    """What differs from layer to layer, beside the parameters; arrays, so that layers can scan."""

    frequencies: Array  # [pairs]
    long_frequencies: Array  # [pairs]
    original_length: Array
    scale: Array
    window: Array


def _layers(config: DecoderConfig) -> _Layer:
    """Rows of every layer, `[layers, ...]`."""
    ropes = config.ropes or (Rope(),) * config.layers
    windows = config.windows or (None,) * config.layers
    long = [r.frequencies if r.long_frequencies is None else r.long_frequencies for r in ropes]
    lengths = [NO_WINDOW if r.original_length is None else r.original_length for r in ropes]
    return _Layer(
        np.asarray([r.frequencies for r in ropes], np.float32),
        np.asarray(long, np.float32),
        np.asarray(lengths, np.int32),
        np.asarray([r.scale for r in ropes], np.float32),
        np.asarray([NO_WINDOW if w is None else w for w in windows], np.int32),
    )


class _Places(NamedTuple):
    """Where queries and keys stand."""

    queries: Array  # positions [B, L]
    distance: Array  # query position minus key position [B, L, S]
    visible: Array  # bool [B, L, S]: the key is real, of the same segment, and not later
    end: Array  # positions of the longest sequence


def _apply(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    positions: Array | None,
    segments: Array | None,
    cache: Cache | None,
    dtype: Any,
    remat_policy: Callable[..., Any] | None,
) -> tuple[Array, Cache | None]:
    _checks.integers(tokens=tokens)
    _checks.rank(2, 2, tokens=tokens)
    for name, given in (("positions", positions), ("segments", segments)):
        if given is not None:
            _checks.integers(**{name: given})
            _checks.same_shape(tokens=tokens, **{name: given})
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else jnp.int32(segments)
    if positions is None:
        positions = segment_positions(segments)
        if cache is not None:
            used = jnp.where(cache.segments > 0, cache.positions, -1)
            positions = positions + jnp.max(used, axis=1, keepdims=True) + 1
    positions = jnp.int32(positions)
    if cache is not None:
        cache = cache._replace(
            positions=_written(cache.positions, positions, cache.length),
            segments=_written(cache.segments, segments, cache.length),
        )
    keys = (positions, segments) if cache is None else (cache.positions, cache.segments)
    distance = positions[:, :, None] - keys[0][:, None, :]
    same = (segments[:, :, None] == keys[1][:, None, :]) & (keys[1][:, None, :] > 0)
    end = jnp.max(jnp.where(segments > 0, positions, 0)) + 1
    places = _Places(positions, distance, same & (distance >= 0), end)

    table = params["tokens"]["embedding"]
    x = jnp.take(table, tokens, axis=0).astype(dtype or table.dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.learned_positions:
        x = x + jnp.take(params["positions"]["embedding"], positions, axis=0).astype(x.dtype)

    def layer(
        x: Array, weights: Params, own: _Layer, memory: Any
    ) -> tuple[Array, tuple[Array, Array]]:
        start = None if cache is None else cache.length
        return _layer(config, x, weights, own, places, memory, start)

    if remat_policy is not None:
        layer = jax.checkpoint(layer, policy=remat_policy)
    rows = _layers(config)
    memories = None if cache is None else (cache.keys, cache.values)
    if "layers" in params:
        given = (params["layers"], jax.tree.map(jnp.asarray, rows), memories)
        x, filled = jax.lax.scan(lambda x, one: layer(x, *one), x, given)
    else:
        collected = []
        for i in range(config.layers):
            own = jax.tree.map(lambda a, i=i: a[i], (rows, memories))
            x, both = layer(x, params[f"layers_{i}"], *own)
            collected.append(both)
        filled = jax.tree.map(lambda *a: jnp.stack(a), *collected) if cache is not None else None
    if cache is not None:
        length = cache.length + jnp.int32(tokens.shape[1])
        cache = cache._replace(keys=filled[0], values=filled[1], length=length)
    return _normalized(config.norm, x, params["norm"]), cache


def _layer(
    config: DecoderConfig,
    x: Array,
    weights: Params,
    own: _Layer,
    places: _Places,
    memory: tuple[Array, Array] | None,
    start: Array | None,
) -> tuple[Array, tuple[Array, Array]]:
    """One layer: attention, then feed-forward, each with its residual."""
    pre = config.has_pre_norms
    y = _normalized(config.norm, x, weights["attention_norm"]) if pre else x
    y, filled = _attention(config, y, weights["attention"], own, places, memory, start)
    if config.has_post_norms:
        y = _normalized(config.norm, y, weights["attention_post_norm"])
    x = x + y
    y = _normalized(config.norm, x, weights["mlp_norm"]) if pre else x
    y = _feed_forward(config, y, weights["mlp"])
    if config.has_post_norms:
        y = _normalized(config.norm, y, weights["mlp_post_norm"])
    return x + y, filled


def _attention(
    config: DecoderConfig,
    x: Array,
    weights: Params,
    own: _Layer,
    places: _Places,
    memory: tuple[Array, Array] | None,
    start: Array | None,
) -> tuple[Array, tuple[Array, Array]]:
    batch, length, _ = x.shape
    count, width = config.key_heads, config.head_width
    if config.fuses_qkv:
        cuts = (config.heads * width, (config.heads + count) * width)
        query, key, value = jnp.split(_dense(x, weights["qkv"]), cuts, axis=-1)
    else:
        query, key, value = (_dense(x, weights[name]) for name in ("query", "key", "value"))
    if config.has_projection_norms:
        query = _normalized(config.norm, query, weights["query_norm"])
        key = _normalized(config.norm, key, weights["key_norm"])
    query = query.reshape(batch, length, config.heads, width)
    key, value = (a.reshape(batch, length, count, width) for a in (key, value))
    if config.has_head_norms:
        query = _normalized(config.norm, query, weights["query_norm"])
        key = _normalized(config.norm, key, weights["key_norm"])
    query, key = _rotated((query, key), own, places)
    if memory is not None and start is not None:
        key, value = (_written(a, b, start) for a, b in zip(memory, (key, value), strict=True))
    visible = places.visible & (places.distance < own.window)
    y = _attend(config, query, key.astype(query.dtype), value.astype(query.dtype), visible)
    return _dense(y.reshape(batch, length, -1), weights["out"]), (key, value)


def _attend(config: DecoderConfig, query: Array, key: Array, value: Array, visible: Array) -> Array:
    """`softmax(q k^T scale) v` over visible keys; heads in groups of one key."""
    scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
    visible = visible[:, None]
    if config.attention_softcap is None:
        return jax.nn.dot_product_attention(query, key, value, mask=visible, scale=scale)
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, config.key_heads, heads // config.key_heads, width)
    scores = scale * jnp.einsum(
        "blkgd,bskd->bkgls", grouped, key, preferred_element_type=jnp.float32
    )
    scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    scores = jnp.where(visible[:, :, None], scores, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgls,bskd->blkgd", shares, value).reshape(query.shape)


def _rotated(arrays: tuple[Array, Array], own: _Layer, places: _Places) -> tuple[Array, Array]:
    """Queries and keys `[B, L, heads, width]`, turned by their positions; angles in float32."""
    pairs = own.frequencies.shape[-1]
    if not pairs:
        return arrays
    is_long = places.end > own.original_length
    frequencies = jnp.where(is_long, own.long_frequencies, own.frequencies)
    angle = places.queries[:, :, None].astype(jnp.float32) * frequencies
    cos, sin = (own.scale * f(angle)[:, :, None, :] for f in (jnp.cos, jnp.sin))

    def turned(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        first, second, rest = jnp.split(wide, (pairs, 2 * pairs), axis=-1)
        both = first * cos - second * sin, second * cos + first * sin
        return jnp.concatenate([*both, rest], axis=-1).astype(x.dtype)

    return turned(arrays[0]), turned(arrays[1])


def _feed_forward(config: DecoderConfig, x: Array, weights: Params) -> Array:
    if config.fuses_gate:
        gate, up = jnp.split(_dense(x, weights["gate_up"]), 2, axis=-1)
    elif config.is_gated:
        gate, up = _dense(x, weights["gate"]), _dense(x, weights["up"])
    else:
        return _dense(config.activation(_dense(x, weights["up"])), weights["down"])
    return _dense(config.activation(gate) * up, weights["down"])


def _dense(x: Array, weights: Mapping[str, Array]) -> Array:
    y = jnp.matmul(x, weights["kernel"].astype(x.dtype), preferred_element_type=jnp.float32)
    if "bias" in weights:
        y = y + weights["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def _normalized(norm: Norm, x: Array, weights: Mapping[str, Array]) -> Array:
    y = x.astype(jnp.float32)
    if norm.is_centered:
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + norm.epsilon)
    scale = weights["scale"].astype(jnp.float32)
    y = y * (1 + scale if norm.has_unit_offset else scale)
    if "bias" in weights:
        y = y + weights["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def _written(slots: Array, new: Array, start: Array) -> Array:
    """`slots` `[B, S, ...]` with `new` `[B, L, ...]` from slot `start` on."""
    at = (jnp.int32(0), start) + (jnp.int32(0),) * (slots.ndim - 2)
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), at)


def _init(config: DecoderConfig, key: Array) -> Params:
    """Normal weights of deviation 0.02; what writes to the residual has `0.02 / sqrt(2 layers)`."""
    key_tokens, key_positions, key_layers, key_head = jax.random.split(key, 4)
    width, small = config.width, 0.02 / np.sqrt(2 * config.layers)

    def normal(key: Array, shape: tuple[int, ...], deviation: float = 0.02) -> Array:
        return deviation * jax.random.normal(key, shape, jnp.float32)

    def dense(key: Array, rows: int, columns: int, bias: bool, deviation: float = 0.02) -> Params:
        kernel = {"kernel": normal(key, (rows, columns), deviation)}
        return {**kernel, "bias": jnp.zeros(columns, jnp.float32)} if bias else kernel

    def norm(size: int = width, has_bias: bool = config.has_norm_bias) -> Params:
        one = jnp.full(size, 0.0 if config.norm.has_unit_offset else 1.0, jnp.float32)
        return {"scale": one, "bias": jnp.zeros(size, jnp.float32)} if has_bias else {"scale": one}

    def layer(key: Array) -> Params:
        keys = iter(jax.random.split(key, 7))
        q, kv = config.heads * config.head_width, config.key_heads * config.head_width
        bias, hidden = config.has_qkv_bias, config.hidden
        if config.fuses_qkv:
            attention = {"qkv": dense(next(keys), width, q + 2 * kv, bias)}
        else:
            sizes = {"query": q, "key": kv, "value": kv}
            attention = {n: dense(next(keys), width, size, bias) for n, size in sizes.items()}
        attention["out"] = dense(next(keys), q, width, config.has_out_bias, small)
        for name, size in (("query_norm", q), ("key_norm", kv)):
            if config.has_head_norms:
                attention[name] = norm(config.head_width, False)
            elif config.has_projection_norms:
                attention[name] = norm(size, False)
        bias = config.has_mlp_bias
        if config.fuses_gate:
            mlp = {"gate_up": dense(next(keys), width, 2 * hidden, bias)}
        else:
            mlp = {"up": dense(next(keys), width, hidden, bias)}
            if config.is_gated:
                mlp["gate"] = dense(next(keys), width, hidden, bias)
        mlp["down"] = dense(next(keys), hidden, width, bias, small)
        out: dict[str, Any] = {"attention": attention, "mlp": mlp}
        if config.has_pre_norms:
            out |= {"attention_norm": norm(), "mlp_norm": norm()}
        if config.has_post_norms:
            out |= {"attention_post_norm": norm(), "mlp_post_norm": norm()}
        return out

    params: dict[str, Any] = {
        "tokens": {"embedding": normal(key_tokens, (config.vocabulary, width))},
        "norm": norm(),
    }
    for i, key_layer in enumerate(jax.random.split(key_layers, config.layers)):
        params[f"layers_{i}"] = layer(key_layer)
    if config.learned_positions:
        table = normal(key_positions, (config.learned_positions, width))
        params["positions"] = {"embedding": table}
    if not config.is_tied:
        params["head"] = dense(key_head, width, config.vocabulary, config.has_head_bias)
    elif config.has_head_bias:
        params["head"] = {"bias": jnp.zeros(config.vocabulary, jnp.float32)}
    return params


def _check(config: DecoderConfig) -> None:
    for name in ("ropes", "windows"):
        given = getattr(config, name)
        if given and len(given) != config.layers:
            raise ValueError(
                f"{name} must have one entry per layer, got {len(given)} for {config.layers} "
                "layers; an empty tuple means none."
            )
    if config.heads % config.key_heads:
        raise ValueError(
            f"heads must be a multiple of key_heads, got {config.heads} and {config.key_heads}."
        )
    if len({len(rope.frequencies) for rope in config.ropes}) > 1:
        raise ValueError("every rope must have the same number of frequencies; pad with zeros.")
    if config.has_head_norms and config.has_projection_norms:
        raise ValueError("has_head_norms and has_projection_norms exclude each other.")
