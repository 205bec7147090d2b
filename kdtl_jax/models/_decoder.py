"""Decoder-only language models: one pure function, with the published families as data.

A `DecoderConfig` holds the differences between GPT-2, Llama, Mistral, Qwen, Gemma, Phi, SmolLM and
OLMo: norms and their places, rotary tables and windows by layer, grouped keys, biases, soft caps.
`decoder(config)` gives the functions:

    model = models.decoder(config)
    params = model.init(jax.random.key(0))
    hidden, _ = model.apply(params, tokens)              # [B, L] -> [B, L, width]
    logits = losses.head_logits(hidden, model.head(params))

The head is separate, as `losses.Head`, so logits are computed only where they are needed: the
chunked losses never hold `[B, L, vocabulary]`. Parameters are a plain dict. Its layers are
`layers_0`, `layers_1`, …, run one after another, or, after `transforms.stack_layers`, `layers` with
a leading axis, run by `jax.lax.scan` at the compile time of one layer; the outputs are the same.

`segments` `[B, L]` says which text a position belongs to, 0 for padding. Positions only see earlier
ones of their own segment, so padding and packing do not change the numbers of a text. Decoders have
no dropout here, as is usual in fine-tuning and distillation.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from kdtl_jax import _checks
from kdtl_jax._types import Params
from kdtl_jax.losses import Head
from kdtl_jax.models import _decoder_layer
from kdtl_jax.models._blocks import known_ids
from kdtl_jax.models._decoder_config import Cache, DecoderConfig
from kdtl_jax.models._decoder_layer import Layer, LayerConstants, Slots, layer_constants, normalize

# The axis along which devices share each weight: heads, hidden units, or the vocabulary. Fused
# kernels are split by their inputs, so their parts need no special care.
TENSOR_AXES = (
    (r"attention/(query|key|value)/(kernel|bias)", -1),
    (r"mlp/(up|gate)/(kernel|bias)", -1),
    (r"(attention/(out|qkv)|mlp/(down|gate_up))/kernel", 0),
    (r"tokens/embedding", 0),
    (r"head/(kernel|bias)", -1),
)


class Apply(Protocol):
    """`apply(params, tokens, positions, segments, cache) -> (hidden, cache)`.

    Args of the call:
      params: from `Decoder.init`, or with stacked layers.
      tokens: int `[B, L]`; an id outside the vocabulary is NaN, unless it is padding.
      positions: int `[B, L]`; None counts within each segment, continuing from the cache.
      segments: int `[B, L]`, 0 for padding; None means one text per row, without padding.
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


class Tap(Protocol):
    """`tap(names, params, tokens, positions, segments) -> (hidden, {name: array})`.

    For losses on features and for draft models. `"tokens"` is the input of the first layer, and
    `"layers_3"` the output of the fourth, before the last norm, `[B, L, width]`.
    `"layers_3/attention/probs"` are its attention probabilities, `[B, heads, L, L]` in float32.
    `"layers_3/attention/heads"` are its heads' outputs, `[B, L, heads * head_width]`, and
    `"layers_3/mlp/units"` its hidden units, `[B, L, hidden]`, both as inputs of the output
    projections. Names are static; the other arguments and `hidden` are those of `apply`.

    Raises:
      ValueError: if the decoder does not have a name.
    """

    def __call__(
        self,
        names: Sequence[str],
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]: ...


class Decoder(NamedTuple):
    """A decoder's functions: `init(key) -> params`, `apply`, `tap`, and `head(params) -> Head`."""

    config: DecoderConfig
    init: Callable[[Array], Params]
    apply: Apply
    head: Callable[[Params], Head]
    tap: Tap


def decoder(
    config: DecoderConfig, *, dtype: Any = None, remat_policy: Callable[..., Any] | None = None
) -> Decoder:
    """The functions of a decoder.

    Args:
      config: its description.
      dtype: dtype of the computation; None means that of the parameters. Matrix products
        accumulate in float32, and norms, rotations and the softmax are computed in it.
      remat_policy: recompute layers in the backward pass, except what this policy saves (one of
        `jax.checkpoint_policies`); None recomputes nothing.

    Raises:
      ValueError: if the numbers of the config are inconsistent.
    """
    _check(config)
    compute = partial(_compute, config, dtype, remat_policy)

    def apply(
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Array, Cache | None]:
        hidden, cache, _ = compute(params, tokens, positions, segments, cache)
        return hidden, cache

    def tap(
        names: Sequence[str],
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        streams = {name: i for i, name in enumerate(tap_names(config))}
        layers = {
            name: int(name.split("/")[0].removeprefix("layers_"))
            for name in (*attention_names(config), *unit_names(config))
        }
        if unknown := [name for name in names if name not in streams | layers]:
            raise ValueError(f"a decoder has the taps {[*streams, *layers]}, got {unknown}.")
        # Values inside a layer are computed from its input.
        indices = tuple((streams | layers)[name] for name in names)
        hidden, _, states = compute(params, tokens, positions, segments, taps=indices)
        outputs = dict(zip(names, states, strict=True))
        if outputs.keys() & layers.keys():
            pair = _positions_and_segments(tokens, positions, segments, None)
            visibility = _decoder_layer.token_positions(*pair, None)
            for name in outputs.keys() & layers.keys():
                layer = Layer(config, *_layer_params(config, params, layers[name]))
                values = _decoder_layer.inner_values(layer, outputs[name], visibility)
                outputs[name] = values[name.split("/", 1)[1]]
        return hidden, outputs

    def head(params: Params) -> Head:
        table = params["tokens"]["embedding"]
        kernel = table.T if config.is_tied else params["head"]["kernel"]
        bias = params["head"]["bias"] if config.has_head_bias else None
        return Head(kernel, bias, config.logit_scale, config.final_softcap)

    return Decoder(config, partial(_init, config), apply, head, tap)


def tap_names(config: DecoderConfig) -> tuple[str, ...]:
    """The residual stream's names: `"tokens"`, `"layers_0"`, … in order of computation."""
    return ("tokens", *(f"layers_{i}" for i in range(config.layers)))


def attention_names(config: DecoderConfig) -> tuple[str, ...]:
    """The attention probabilities of `Decoder.tap`: `"layers_0/attention/probs"`, …"""
    return tuple(f"layers_{i}/attention/probs" for i in range(config.layers))


def unit_names(config: DecoderConfig) -> tuple[str, ...]:
    """The units of `Decoder.tap`: `"layers_0/attention/heads"`, `"layers_0/mlp/units"`, …"""
    parts = ("attention/heads", "mlp/units")
    return tuple(f"layers_{i}/{part}" for i in range(config.layers) for part in parts)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache of `length` slots for `batch` rows."""
    shape = (config.layers, batch, config.key_heads, length, config.head_width)
    slots = jnp.zeros((batch, length), jnp.int32)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros((), jnp.int32)
    )


def segment_positions(segments: Array) -> Array:
    """int32 `[B, L]`: the index of each position within its segment, `[B, L] -> [B, L]`.

    Padding (segment 0) is not counted, even inside a segment: between a short prompt and its
    continuation, for example.
    """
    is_real = segments > 0
    count = jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - 1
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    latest = jax.lax.cummax(jnp.where(is_real, index, -1), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segments, jnp.maximum(before, 0), axis=1)
    begins = is_real & ((before < 0) | (previous != segments))
    return jnp.maximum(count - jax.lax.cummax(jnp.where(begins, count, 0), axis=1), 0)


def _compute(
    config: DecoderConfig,
    dtype: Any,
    remat_policy: Callable[..., Any] | None,
    params: Params,
    tokens: Array,
    positions: Array | None,
    segments: Array | None,
    cache: Cache | None = None,
    taps: tuple[int, ...] = (),
) -> tuple[Array, Cache | None, Sequence[Array]]:
    """Hidden states, cache, and the inputs of layers `taps[0]`, `taps[1]`, …"""
    _checks.integers(tokens=tokens)
    _checks.rank(2, 2, tokens=tokens)
    for name, array in (("positions", positions), ("segments", segments)):
        if array is not None:
            _checks.integers(**{name: array})
            _checks.same_shape(tokens=tokens, **{name: array})
    may_have_padding = segments is not None
    positions, segments = _positions_and_segments(tokens, positions, segments, cache)
    if cache is not None:
        cache = cache._replace(
            positions=_decoder_layer.write_slots(cache.positions, positions, cache.length),
            segments=_decoder_layer.write_slots(cache.segments, segments, cache.length),
        )
    visibility = _decoder_layer.token_positions(positions, segments, cache)

    table = params["tokens"]["embedding"]
    if may_have_padding:  # which may hold anything, and an id out of range would be NaN
        tokens, positions = (jnp.where(segments > 0, x, 0) for x in (tokens, positions))
    x = jnp.take(table, known_ids(tokens, len(table)), axis=0).astype(dtype or table.dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.learned_positions:
        x = x + jnp.take(params["positions"]["embedding"], positions, axis=0).astype(x.dtype)

    def layer(
        x: Array, weights: Params, constants: LayerConstants, slots: Slots | None
    ) -> tuple[Array, Slots | None]:
        return _decoder_layer.apply(Layer(config, weights, constants), x, visibility, slots)

    if remat_policy is not None:
        layer = jax.checkpoint(layer, policy=remat_policy)
    slots = None
    if cache is not None:
        slots = Slots(cache.keys, cache.values, jnp.int32(0), cache.length)
    if "layers" in params:
        # Only the requested layers' outputs are kept; the others are dropped at once.
        tapped = [x if tap == 0 else jnp.zeros_like(x) for tap in taps]

        def next_layer(carry: Any, each: Any) -> Any:
            (x, slots), (number, weights, constants) = carry[0], each
            if slots is not None:
                slots = slots._replace(layer=number - 1)
            x, slots = layer(x, weights, constants, slots)
            pairs = zip(taps, carry[1], strict=True)
            return ((x, slots), [jnp.where(number == tap, x, old) for tap, old in pairs]), None

        numbers = jnp.arange(1, config.layers + 1, dtype=jnp.int32)
        start = (x, slots), tapped
        scanned = (numbers, params["layers"], layer_constants(config))
        ((x, slots), tapped), _ = jax.lax.scan(next_layer, start, scanned)
    else:
        states = [x]
        for i in range(config.layers):
            if slots is not None:
                slots = slots._replace(layer=jnp.int32(i))
            x, slots = layer(x, *_layer_params(config, params, i), slots)
            states.append(x)
        tapped = [states[tap] for tap in taps]
    if cache is not None and slots is not None:
        length = cache.length + jnp.int32(tokens.shape[1])
        cache = cache._replace(keys=slots.keys, values=slots.values, length=length)
    return normalize(config.norm, x, params["norm"]), cache, tapped


def _positions_and_segments(
    tokens: Array, positions: Array | None, segments: Array | None, cache: Cache | None
) -> tuple[Array, Array]:
    """Position and segment of each token, int32 `[B, L]`."""
    segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
    segments = segments.astype(jnp.int32)
    if positions is not None:
        return positions.astype(jnp.int32), segments
    positions = segment_positions(segments)
    if cache is not None:
        cached = jnp.where(cache.segments > 0, cache.positions, -1)
        positions = positions + jnp.max(cached, axis=1, keepdims=True) + 1
    return positions, segments


def _layer_params(config: DecoderConfig, params: Params, i: int) -> tuple[Params, LayerConstants]:
    """A layer's parameters, stacked or not, and its `LayerConstants`."""
    constants = jax.tree.map(lambda a: a[i], layer_constants(config))
    if "layers" in params:
        return jax.tree.map(lambda a: a[i], params["layers"]), constants
    return params[f"layers_{i}"], constants


def _init(config: DecoderConfig, key: Array) -> Params:
    """Normal weights of deviation 0.02; `0.02 / sqrt(2 layers)` if they write to the residual."""
    key_tokens, key_positions, key_layers, key_head = jax.random.split(key, 4)
    width, small = config.width, 0.02 / math.sqrt(2 * config.layers)

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
        per_layer = getattr(config, name)
        if per_layer and len(per_layer) != config.layers:
            raise ValueError(
                f"{name} must have one entry per layer, got {len(per_layer)} for {config.layers} "
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
