"""Makes decoders narrower: keeps a pretrained one's most important heads, units and channels.

    narrow, kept = pruning.narrow(teacher, width=384, heads=6, key_heads=3, hidden=1024)
    print(kept)

Layers are dropped by `decoders.student`; both together give a student of any smaller shape that
starts from its teacher.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, models, transforms, trees
from kdtl_jax._types import Params
from kdtl_jax.interop import _hf_decoders
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.models import DecoderConfig
from kdtl_jax.transforms import Axis

KEYS = {  # names of a size in config.json, the first that the family reads
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "key_heads": ("num_key_value_heads",),
    "hidden": ("intermediate_size", "n_inner"),
}
# Fused matrices, with their parts in order.
FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}


class KeptParts(NamedTuple):
    """The parts of the wide decoder that a narrower one keeps, by position.

    `channels` is `[width]`; `heads`, `key_heads` and `hidden` have a row per layer, `[layers, *]`.
    `shares` are the fractions of the summed importance that were kept, by name.
    """

    channels: np.ndarray
    heads: np.ndarray
    key_heads: np.ndarray
    hidden: np.ndarray
    shares: dict[str, float]

    def __str__(self) -> str:
        sizes = {"width": len(self.channels)} | {
            name: getattr(self, name).shape[1] for name in ("heads", "key_heads", "hidden")
        }
        return ", ".join(f"{n} {sizes[n]} ({100 * x:.0f}%)" for n, x in self.shares.items())


def narrow(
    source: PretrainedDecoder,
    *,
    width: int | None = None,
    heads: int | None = None,
    key_heads: int | None = None,
    hidden: int | None = None,
    tokens: Array | None = None,
) -> tuple[PretrainedDecoder, KeptParts]:
    """A decoder with fewer channels, heads and hidden units, which keep their order.

    Without a text, the importance of a hidden unit is the product of the norms of its weights,
    `||up_j|| ||gate_j|| ||down_j||`, and that of a head is the norm of its values times that of its
    output, `||value_h|| ||out_h||`. With a text, it is `transforms.importance_by_activation` of the
    outputs of the unit or head. Each layer chooses its own, and the importance of a key head is the
    sum over the heads that share it. Channels are chosen for all layers together, by the norm of
    all weights that read or write them, or with a text by the mean of `|x_c| / rms(x)` in the
    residual stream.

    Args:
      source: the wide decoder.
      width: number of channels of the residual stream; None keeps all.
      heads: number of query heads; each key head has the same number.
      key_heads: number of key and value heads; None keeps all, or as many as there are heads.
      hidden: number of units of the feed-forward layers.
      tokens: int `[B, L]`, a text in B pieces without padding, on which all importances are
        measured; None measures them by the weights.

    Returns:
      The decoder, and the parts of the wide one that were kept.

    Raises:
      ValueError: if a size is larger than the source's or does not divide, or its config.json
        cannot express the shape (GPT-2's heads share the width; Llama's width is a multiple of its
        heads).

    References:
      Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024
      (2407.14679), Minitron, which measures all importances by activations.
    """
    _checks.instance(PretrainedDecoder, source=source)
    wide = source.model.config
    if key_heads is None:
        key_heads = wide.key_heads if heads is None else min(wide.key_heads, heads)
    requested = {"width": width, "heads": heads, "key_heads": key_heads, "hidden": hidden}
    sizes = {n: getattr(wide, n) if size is None else size for n, size in requested.items()}
    for name, size in sizes.items():
        if not 0 < size <= getattr(wide, name):
            raise ValueError(f"{name} must lie in 1..{getattr(wide, name)}, got {size}.")
    most = wide.heads // wide.key_heads
    if sizes["heads"] % key_heads or sizes["heads"] // key_heads > most:
        raise ValueError(
            f"heads must be a multiple of key_heads, at most {most} to each, got {sizes['heads']} "
            f"and {key_heads}."
        )
    config = _config(source.config, sizes, wide)
    narrow_config = _hf_decoders.decoder(config)[0]
    built_sizes = {name: getattr(narrow_config, name) for name in (*sizes, "head_width")}
    if built_sizes != {**sizes, "head_width": wide.head_width}:
        raise ValueError(
            f"config.json of a {config['model_type']!r} model cannot express {sizes} with heads "
            f"of width {wide.head_width}."
        )
    _hf_decoders.check_heads(config)
    split_params = _split_fused(source.params, wide)
    kept = _select(source, split_params, sizes, tokens)
    params = _fuse(_slice_params(split_params, wide, kept), wide)
    model = models.decoder(narrow_config._replace(is_tied=wide.is_tied))
    target = jax.eval_shape(model.init, jax.random.key(0))
    _, report = transforms.transfer(params, target)
    return PretrainedDecoder(model, params, source.rules, config, report), kept


def _config(config: dict[str, Any], sizes: dict[str, int], wide: DecoderConfig) -> dict[str, Any]:
    out, known_keys = dict(config), _hf_decoders.FAMILIES[config["model_type"]].reads
    keys = {name: next((k for k in of if k in known_keys), None) for name, of in KEYS.items()}
    for name, key in keys.items():
        if key and (out.get(key) is not None or sizes[name] != getattr(wide, name)):
            out[key] = sizes[name]
    if sizes["width"] != sizes["heads"] * wide.head_width or "head_dim" in out:
        out |= {"head_dim": wide.head_width} if "head_dim" in known_keys else {}
    narrow_config = _hf_decoders.decoder(out)[0]
    for name, key in keys.items():  # a default that follows from another size
        if key and getattr(narrow_config, name) != sizes[name]:
            out[key] = sizes[name]
    return out


def _split_fused(params: Params, wide: DecoderConfig) -> Params:
    """The parameters with query, key and value, and gate and up, as separate matrices."""
    q, kv = wide.heads * wide.head_width, wide.key_heads * wide.head_width
    cuts = {"qkv": (q, q + kv), "gate_up": (wide.hidden,)}

    def split(part: Params) -> Params:
        out = {name: weights for name, weights in part.items() if name not in FUSED}
        for name in FUSED.keys() & part.keys():
            arrays_by_key = {k: jnp.split(x, cuts[name], axis=-1) for k, x in part[name].items()}
            for i, piece_name in enumerate(FUSED[name]):
                out[piece_name] = {k: arrays[i] for k, arrays in arrays_by_key.items()}
        return out

    return _over_parts(params, split)


def _fuse(params: Params, wide: DecoderConfig) -> Params:
    """The inverse of `_split_fused`."""
    names = {"qkv": wide.fuses_qkv, "gate_up": wide.fuses_gate}

    def fuse(part: Params) -> Params:
        out = dict(part)
        for name, is_fused in names.items():
            if is_fused and out.keys() >= set(FUSED[name]):
                pieces = [out.pop(piece_name) for piece_name in FUSED[name]]
                out[name] = jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *pieces)
        return out

    return _over_parts(params, fuse)


def _over_parts(params: Params, change: Callable[[Params], Params]) -> Params:
    return {
        name: {n: change(x) if n in ("attention", "mlp") else x for n, x in part.items()}
        if name.startswith("layers_")
        else part
        for name, part in params.items()
    }


def _select(
    source: PretrainedDecoder, params: Params, sizes: dict[str, int], tokens: Array | None
) -> KeptParts:
    """Selects the most important units, ascending: groups of heads, then heads in each group.

    `params` are the source's with fused matrices split.
    """
    wide = source.model.config
    chosen: dict[str, list[tuple[np.ndarray, np.ndarray]]]  # scores, and the positions kept
    chosen = {"heads": [], "key_heads": [], "hidden": []}
    group_size = wide.heads // wide.key_heads
    if tokens is None:
        layers = [_weight_importance(wide, params[f"layers_{i}"]) for i in range(wide.layers)]
        channels = _channel_importance(params, wide.layers)
    else:
        layers, channels = _activation_importance(source, tokens)
    for head_scores, unit_scores in layers:
        head_scores = head_scores.reshape(wide.key_heads, group_size)
        groups = _top(head_scores.sum(axis=1), sizes["key_heads"])
        count = sizes["heads"] // sizes["key_heads"]
        heads = [_top(head_scores[g], count) + g * group_size for g in groups]
        chosen["heads"].append((head_scores.ravel(), np.concatenate(heads)))
        chosen["key_heads"].append((head_scores.sum(axis=1), groups))
        chosen["hidden"].append((unit_scores, _top(unit_scores, sizes["hidden"])))
    index = _top(channels, sizes["width"])
    shares = {
        name: sum(float(scores[kept].sum()) for scores, kept in pairs)
        / (sum(float(scores.sum()) for scores, _ in pairs) or 1)
        for name, pairs in {"width": [(channels, index)], **chosen}.items()
    }
    stacked = {name: np.stack([kept for _, kept in pairs]) for name, pairs in chosen.items()}
    return KeptParts(channels=index, shares=shares, **stacked)


def _weight_importance(wide: DecoderConfig, layer: Params) -> tuple[np.ndarray, np.ndarray]:
    """Importance of a layer's heads `[heads]` and hidden units `[hidden]`."""
    mlp, attention = layer["mlp"], layer["attention"]
    units = _norm(mlp["down"]["kernel"], 0) * _norm(mlp["up"]["kernel"], 1)
    if "gate" in mlp:
        units = units * _norm(mlp["gate"]["kernel"], 1)
    outputs = _norm(attention["out"]["kernel"], 0).reshape(wide.heads, wide.head_width)
    values = _norm(attention["value"]["kernel"], 1).reshape(wide.key_heads, wide.head_width)
    value_norms = np.repeat(np.sqrt((values**2).sum(-1)), wide.heads // wide.key_heads)
    return np.sqrt((outputs**2).sum(-1)) * value_norms, units


def _activation_importance(
    source: PretrainedDecoder, tokens: Array
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Importance on a text of every layer's heads and hidden units, and of the channels."""
    config = source.model.config
    units, stream = models.unit_names(config), models.tap_names(config)
    inner_sizes = (config.head_width, 1) * config.layers

    def row_scores(params: Params, row: Array) -> tuple[list[Array], Array]:
        hidden, activations = source.model.tap((*units, *stream), params, row[None])
        residual = jnp.stack([*(activations[name] for name in stream), hidden])
        scale = jnp.sqrt(jnp.mean(jnp.square(residual), axis=-1, keepdims=True))
        residual = residual / jnp.where(scale > 0, scale, 1)
        pairs = zip(units, inner_sizes, strict=True)
        squares = [
            transforms.importance_by_activation(activations[n], inner=size) for n, size in pairs
        ]
        return squares, jnp.mean(jnp.abs(residual), axis=(0, 1, 2))

    @jax.jit
    def scores(params: Params, tokens: Array) -> tuple[list[Array], Array]:
        # One row at a time, because the outputs of all layers are in memory.
        squares, channels = jax.lax.map(lambda row: row_scores(params, row), tokens)
        norms = [jnp.sqrt(jnp.sum(jnp.square(x), axis=0)) for x in squares]
        return norms, jnp.mean(channels, axis=0)

    squares, channels = jax.device_get(scores(source.params, tokens))
    return list(zip(squares[::2], squares[1::2], strict=True)), channels


def _channel_importance(params: Params, layers: int) -> np.ndarray:
    """Importance of every channel `[width]`, from the weights that read or write it."""
    squares = _norm(params["tokens"]["embedding"], 1) ** 2
    for i in range(layers):
        layer = params[f"layers_{i}"]
        for part in ("attention", "mlp"):
            for name, weights in layer[part].items():
                if "kernel" in weights:
                    is_output = name in ("out", "down")
                    squares = squares + _norm(weights["kernel"], 1 if is_output else 0) ** 2
    return np.sqrt(squares)


def _slice_params(params: Params, wide: DecoderConfig, kept: KeptParts) -> Params:
    indices = {"width": kept.channels}
    for i in range(wide.layers):
        rows = {"heads": kept.heads, "key_heads": kept.key_heads, "hidden": kept.hidden}
        indices |= {f"layers_{i}/{name}": row[i] for name, row in rows.items()}
    spec = [
        (re.escape(path), _axes(path, leaf.ndim, wide))
        for path, leaf in trees.flatten(params).items()
    ]
    return transforms.select_width(params, spec, indices)


def _axes(path: str, rank: int, wide: DecoderConfig) -> tuple[str | Axis | None, ...]:
    """The names of a leaf's axes; heads and hidden units are each layer's own."""
    segments = path.split("/")
    layer, part = segments[0], segments[-2]
    hidden = f"{layer}/hidden"
    heads, key_heads = (Axis(f"{layer}/{n}", inner=wide.head_width) for n in ("heads", "key_heads"))
    axes = {
        **dict.fromkeys(("tokens", "positions"), (None, "width")),
        "head": ("width", None),
        "query": ("width", heads),
        **dict.fromkeys(("key", "value"), ("width", key_heads)),
        "out": (heads, "width"),
        **dict.fromkeys(("up", "gate"), ("width", hidden)),
        "down": (hidden, "width"),
        "query_norm": (None if wide.has_head_norms else heads,),
        "key_norm": (None if wide.has_head_norms else key_heads,),
    }.get(part, ("width",))
    return axes[-rank:]  # a bias has a kernel's last axis


def _norm(kernel: Array, axis: int) -> np.ndarray:
    """Norms of a kernel's rows (`axis=0`) or columns (`axis=1`)."""
    return np.sqrt(np.square(np.asarray(kernel, np.float32)).sum(axis=1 - axis))


def _top(scores: np.ndarray | Sequence[float], count: int) -> np.ndarray:
    """The positions of the largest scores, ascending; among equal scores, the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])
