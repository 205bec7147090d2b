"""Narrower decoders: the most important heads, hidden units and channels of a pretrained one.

    narrow, kept = pruning.narrow(teacher, width=384, heads=6, key_heads=3, hidden=1024)
    print(kept)

Layers are dropped by `decoders.student`; both together give a student of any smaller shape that
starts from its teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import models, transforms
from kdtl_jax._types import Params
from kdtl_jax.interop import _hf_decoders
from kdtl_jax.interop.decoders import PretrainedDecoder
from kdtl_jax.models import DecoderConfig

# Normalizations of a decoder's layer.
NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")
KEYS = {  # names of a size in config.json, the first that the family reads
    "width": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "key_heads": ("num_key_value_heads",),
    "hidden": ("intermediate_size", "n_inner"),
}
# Matrices that hold more than one part side by side, with the parts in their order.
FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}


class Kept(NamedTuple):
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
) -> tuple[PretrainedDecoder, Kept]:
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
      heads: number of query heads, equally many for every key head.
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
    whole = source.model.config
    if key_heads is None:
        key_heads = whole.key_heads if heads is None else min(whole.key_heads, heads)
    given = {"width": width, "heads": heads, "key_heads": key_heads, "hidden": hidden}
    asked = {n: getattr(whole, n) if size is None else size for n, size in given.items()}
    for name, size in asked.items():
        if not 0 < size <= getattr(whole, name):
            raise ValueError(f"{name} must lie in 1..{getattr(whole, name)}, got {size}.")
    per = whole.heads // whole.key_heads
    if asked["heads"] % key_heads or asked["heads"] // key_heads > per:
        raise ValueError(
            f"heads must be a multiple of key_heads, at most {per} to each, got {asked['heads']} "
            f"and {key_heads}."
        )
    config = _config(source.config, asked, whole)
    built = _hf_decoders.decoder(config)[0]
    sizes = {name: getattr(built, name) for name in (*asked, "head_width")}
    if sizes != {**asked, "head_width": whole.head_width}:
        raise ValueError(
            f"config.json of a {config['model_type']!r} model cannot express {asked} with heads "
            f"of width {whole.head_width}."
        )
    _hf_decoders.check_heads(config)
    apart = _apart(source.params, whole)
    kept = _chosen(source, apart, asked, tokens)
    params = _fused(_narrowed(apart, whole, kept), whole)
    model = models.decoder(built._replace(is_tied=whole.is_tied))
    target = jax.eval_shape(model.init, jax.random.key(0))
    _, report = transforms.transfer(params, target)
    return PretrainedDecoder(model, params, source.rules, config, report), kept


def _config(config: dict[str, Any], asked: dict[str, int], whole: DecoderConfig) -> dict[str, Any]:
    new, read = dict(config), _hf_decoders.FAMILIES[config["model_type"]].reads
    keys = {name: next((k for k in of if k in read), None) for name, of in KEYS.items()}
    for name, key in keys.items():
        if key and (new.get(key) is not None or asked[name] != getattr(whole, name)):
            new[key] = asked[name]
    if asked["width"] != asked["heads"] * whole.head_width or "head_dim" in new:
        new |= {"head_dim": whole.head_width} if "head_dim" in read else {}
    built = _hf_decoders.decoder(new)[0]
    for name, key in keys.items():  # a default that follows from another size
        if key and getattr(built, name) != asked[name]:
            new[key] = asked[name]
    return new


def _apart(params: Params, whole: DecoderConfig) -> Params:
    """The parameters with query, key and value, and gate and up, as separate matrices."""
    q, kv = whole.heads * whole.head_width, whole.key_heads * whole.head_width
    cuts = {"qkv": (q, q + kv), "gate_up": (whole.hidden,)}

    def split(part: Params) -> Params:
        out = {name: weights for name, weights in part.items() if name not in FUSED}
        for name in FUSED.keys() & part.keys():
            pieces = {k: jnp.split(x, cuts[name], axis=-1) for k, x in part[name].items()}
            for i, own in enumerate(FUSED[name]):
                out[own] = {k: each[i] for k, each in pieces.items()}
        return out

    return _over_parts(params, split)


def _fused(params: Params, whole: DecoderConfig) -> Params:
    """The inverse of `_apart`."""
    names = {"qkv": whole.fuses_qkv, "gate_up": whole.fuses_gate}

    def joined(part: Params) -> Params:
        out = dict(part)
        for name in [name for name, is_fused in names.items() if is_fused]:
            if not out.keys() >= set(FUSED[name]):
                continue
            pieces = [out.pop(own) for own in FUSED[name]]
            out[name] = {
                k: jnp.concatenate([each[k] for each in pieces], axis=-1) for k in pieces[0]
            }
        return out

    return _over_parts(params, joined)


def _over_parts(params: Params, change: Callable[[Params], Params]) -> Params:
    return {
        name: {n: change(x) if n in ("attention", "mlp") else x for n, x in part.items()}
        if name.startswith("layers_")
        else part
        for name, part in params.items()
    }


def _chosen(
    source: PretrainedDecoder, params: Params, asked: dict[str, int], tokens: Array | None
) -> Kept:
    """The most important units, ascending; groups of heads first, then heads within their group.

    `params` are the source's with fused matrices split.
    """
    whole = source.model.config
    rows: dict[str, list[np.ndarray]] = {"heads": [], "key_heads": [], "hidden": []}
    whole_sum, kept_sum = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0)
    per = whole.heads // whole.key_heads
    if tokens is None:
        layers = [_of_weights(whole, params[f"layers_{i}"]) for i in range(whole.layers)]
        channels = _channels(params, whole.layers)
    else:
        layers, channels = _of_text(source, tokens)
    for each, units in layers:
        each = each.reshape(whole.key_heads, per)
        groups = _top(each.sum(axis=1), asked["key_heads"])
        inside = [_top(each[g], asked["heads"] // asked["key_heads"]) + g * per for g in groups]
        found = {
            "heads": (each.ravel(), np.concatenate(inside)),
            "key_heads": (each.sum(axis=1), groups),
            "hidden": (units, _top(units, asked["hidden"])),
        }
        for name, (scores, own) in found.items():
            rows[name].append(own)
            whole_sum[name] += float(scores.sum())
            kept_sum[name] += float(scores[own].sum())
    own = _top(channels, asked["width"])
    shares = {"width": float(channels[own].sum() / (channels.sum() or 1))}
    shares |= {name: kept_sum[name] / (whole_sum[name] or 1) for name in rows}
    stacked = {name: np.stack(found) for name, found in rows.items()}
    return Kept(channels=own, shares=shares, **stacked)


def _of_weights(whole: DecoderConfig, layer: Params) -> tuple[np.ndarray, np.ndarray]:
    """Importance of a layer's heads `[heads]` and hidden units `[hidden]`."""
    mlp, attention = layer["mlp"], layer["attention"]
    units = _norm(mlp["down"]["kernel"], 0) * _norm(mlp["up"]["kernel"], 1)
    if "gate" in mlp:
        units = units * _norm(mlp["gate"]["kernel"], 1)
    out = _norm(attention["out"]["kernel"], 0).reshape(whole.heads, whole.head_width)
    value = _norm(attention["value"]["kernel"], 1).reshape(whole.key_heads, whole.head_width)
    of_value = np.repeat(np.sqrt((value**2).sum(-1)), whole.heads // whole.key_heads)
    return np.sqrt((out**2).sum(-1)) * of_value, units


def _of_text(
    source: PretrainedDecoder, tokens: Array
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """The same for every layer, and for the channels, by the outputs on a text."""
    config = source.model.config
    units, stream = models.unit_names(config), models.tap_names(config)
    inner = (config.head_width, 1) * config.layers

    def of_row(params: Params, row: Array) -> tuple[list[Array], Array]:
        hidden, found = source.model.tap((*units, *stream), params, row[None])
        whole = jnp.stack([*(found[name] for name in stream), hidden])
        scale = jnp.sqrt(jnp.mean(jnp.square(whole), axis=-1, keepdims=True))
        whole = whole / jnp.where(scale > 0, scale, 1)
        pairs = zip(units, inner, strict=True)
        each = [transforms.importance_by_activation(found[n], inner=size) for n, size in pairs]
        return each, jnp.mean(jnp.abs(whole), axis=(0, 1, 2))

    @jax.jit
    def scores(params: Params, tokens: Array) -> tuple[list[Array], Array]:
        # One row at a time, since the outputs of all its layers are held in memory.
        each, channels = jax.lax.map(lambda row: of_row(params, row), tokens)
        return [jnp.sqrt(jnp.sum(jnp.square(x), axis=0)) for x in each], jnp.mean(channels, axis=0)

    each, channels = jax.device_get(scores(source.params, tokens))
    return list(zip(each[::2], each[1::2], strict=True)), channels


def _channels(params: Params, layers: int) -> np.ndarray:
    """Importance of every channel by its weights, `[width]`."""
    squares = _norm(params["tokens"]["embedding"], 1) ** 2
    for i in range(layers):
        layer = params[f"layers_{i}"]
        for part in ("attention", "mlp"):
            for name, weights in layer[part].items():
                if "kernel" in weights:
                    written = name in ("out", "down")
                    squares = squares + _norm(weights["kernel"], 1 if written else 0) ** 2
    return np.sqrt(squares)


def _narrowed(params: Params, whole: DecoderConfig, kept: Kept) -> Params:
    size = whole.head_width

    def take(leaf: Array, *axes: np.ndarray | None) -> Array:
        for axis, index in enumerate(axes):
            leaf = leaf if index is None else jnp.take(leaf, jnp.asarray(index), axis=axis)
        return leaf

    def columns(heads: np.ndarray) -> np.ndarray:
        return (heads[:, None] * size + np.arange(size)).ravel()

    def dense(weights: Params, rows: np.ndarray, cols: np.ndarray) -> Params:
        found = {"kernel": take(weights["kernel"], rows, cols)}
        return found | ({"bias": take(weights["bias"], cols)} if "bias" in weights else {})

    w = kept.channels

    def layer(i: int, part: Params) -> Params:
        q, k = columns(kept.heads[i]), columns(kept.key_heads[i])
        sides = {"query": (w, q), "key": (w, k), "value": (w, k), "out": (q, w)}
        sides |= {"up": (w, kept.hidden[i]), "gate": (w, kept.hidden[i])}
        sides |= {"down": (kept.hidden[i], w)}
        new: dict[str, Any] = {}
        for kind in ("attention", "mlp"):
            new[kind] = {n: dense(x, *sides[n]) for n, x in part[kind].items() if n in sides}
        for n, x in part["attention"].items():
            if n in ("query_norm", "key_norm"):
                own = None if whole.has_head_norms else {"query_norm": q, "key_norm": k}[n]
                new["attention"][n] = {m: take(y, own) for m, y in x.items()}
        norms = {n: {m: take(y, w) for m, y in part[n].items()} for n in NORMS if n in part}
        return new | norms

    new: dict[str, Any] = {}
    for name, part in params.items():
        if name.startswith("layers_"):
            new[name] = layer(int(name.removeprefix("layers_")), part)
        elif name in ("tokens", "positions"):
            new[name] = {"embedding": take(part["embedding"], None, w)}
        elif name == "norm":
            new[name] = {m: take(y, w) for m, y in part.items()}
        else:
            new[name] = {m: take(y, w) if m == "kernel" else y for m, y in part.items()}
    return new


def _norm(kernel: Array, of: int) -> np.ndarray:
    """Norms of a kernel's rows (`of=0`) or columns (`of=1`)."""
    return np.sqrt(np.square(np.asarray(kernel, np.float32)).sum(axis=1 - of))


def _top(scores: np.ndarray | Sequence[float], count: int) -> np.ndarray:
    """The positions of the largest scores, ascending; among equal scores, the first."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])
