"""Merges a PEFT adapter into the base's weights, one tensor at a time."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _text, transforms, trees
from kdtl_jax._types import Array
from kdtl_jax.interop._peft_files import Adapter, not_understood

Edit = Callable[[Any], Array]
# Modules that are Conv1D in transformers, with kernels [in, out], in the models that have them.
_CONV1D = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
_TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|shared)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(\w*lm_head|decoder|vocab_projector|embed_out)\.weight$")
_LANGUAGE = re.compile("CausalLM|LMHead|MaskedLM|ConditionalGeneration|PreTraining|DoubleHeads")
_CONV1D_MODELS = frozenset(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"))


class _Site(NamedTuple):
    """A module that an adapter changes, with the shape of the base's weight."""

    module: str
    parts: Mapping[str, Any]
    shape: tuple[int, ...]
    config: Mapping[str, Any]  # the adapter's
    base_config: Mapping[str, Any] | None


def edits(
    adapter: Adapter, base: Mapping[str, Any], base_config: Mapping[str, Any] | None = None
) -> dict[str, Edit]:
    """`{name of a base tensor: function of that tensor}`, checked by name and shape.

    Args:
      adapter: from `load`.
      base: `{torch name: anything with a shape}`.
      base_config: the base's config.json, which shows whether a square kernel is a Conv1D's
        `[in, out]`.

    Raises:
      ValueError: if the base lacks a tensor, a shape does not fit, or a square kernel is ambiguous.
    """
    _refuse_tied_embedding(adapter, base, base_config or {})
    out: dict[str, Edit] = {}
    for module, parts in adapter.weights.items():
        name = f"{module}.weight"
        if name not in base:
            raise ValueError(
                f"the adapter's {_text.quoted(name)} is not in the base; nearest: "
                f"{trees.nearest(name, list(base))}. Adapters belong to one architecture."
            )
        bias = f"{module}.bias"
        site = _Site(module, parts, tuple(base[name].shape), adapter.config, base_config)
        out[name], bias_edit = _module_edits(adapter, site)
        if bias_edit is not None:
            if bias in base:
                out[bias] = bias_edit
            elif "lora_B.bias" in parts:
                raise ValueError(
                    f"{_text.quoted(bias)} would be new: lora_bias needs a base with biases."
                )
    for name, value in adapter.replaced.items():
        if name not in base or tuple(base[name].shape) != tuple(value.shape):
            base_shape = list(base[name].shape) if name in base else "nothing"
            raise ValueError(
                f"the adapter replaces {_text.quoted(name)} by {list(value.shape)}, the base has "
                f"{base_shape}."
            )
        out[name] = _compose(out.get(name), value)
    return out


def _refuse_tied_embedding(
    adapter: Adapter, base: Mapping[str, Any], base_config: Mapping[str, Any]
) -> None:
    """Refuses to adapt an embedding that is also the output layer, which would change with it."""
    names = [f"{module}.weight" for module in adapter.weights] + list(adapter.replaced)
    embeddings = [name for name in names if _TABLE.search(name)]
    classes = base_config.get("architectures") or []
    is_tied = base_config.get("tie_word_embeddings", False) is True
    if classes:  # a class without an output layer ties nothing
        is_tied = base_config.get("tie_word_embeddings", True) is True
        is_tied &= any(_LANGUAGE.search(str(name)) is not None for name in classes)
    if embeddings and is_tied and not any(_OUTPUT.search(name) for name in base):
        raise not_understood(
            f"an adapter of {_text.quoted(embeddings[0])}",
            "the base's output layer is the same tensor and would change with it: store the base "
            "with a head of its own and tie_word_embeddings false",
        )


def _module_edits(adapter: Adapter, site: _Site) -> tuple[Edit, Edit | None]:
    """The edits of a module's weight and bias."""
    parts, shape = site.parts, site.shape
    if "lora_embedding_A" in parts:
        return _embedding_edit(site), None
    if adapter.kind == "LORA":
        return _lora_edits(site)
    if adapter.kind == "IA3":
        vector = parts["ia3_l"]
        if len(shape) != 2 or vector.size == 1:
            raise not_understood(
                f"ia3_l {list(vector.shape)} of {_text.quoted(site.module)} {list(shape)}",
                "it does not say which side it scales; only kernels of two axes are supported",
            )
        is_input = vector.shape[0] == 1
        out, fan_in = (None, vector.size) if is_input else (vector.size, None)
        scale = jnp.ravel(_upcast(vector))
        scale_w = scale[:, None] if is_input == _is_flipped(site, out, fan_in) else scale[None]
        bias_edit = None if is_input else (lambda b: _upcast(b) * scale)
        return lambda w: _upcast(w) * scale_w, bias_edit
    if adapter.kind == "VERA":
        b, d = parts["vera_lambda_b"], parts["vera_lambda_d"]
        vera_a, vera_b = adapter.shared["vera_A"], adapter.shared["vera_B"]
        flips = _is_flipped(site, b.size, None)
        fan_in = shape[0] if flips else shape[1]
        _check_fits(site, (fan_in, b.size) if flips else (b.size, fan_in))
        if vera_a.shape != (d.size, vera_a.shape[1]) or vera_a.shape[1] < fan_in:
            raise ValueError(
                f"{_text.quoted(site.module)} does not fit vera_A {list(vera_a.shape)}."
            )
        scaled_b = _upcast(b)[:, None] * _upcast(vera_b[: b.size])
        delta = scaled_b @ (_upcast(d)[:, None] * _upcast(vera_a[:, :fan_in]))
        return lambda w: _upcast(w) + (delta.T if flips else delta), None
    return _oft_edit(site), None


def _lora_edits(site: _Site) -> tuple[Edit, Edit | None]:
    a, b, shape = site.parts["lora_A"], site.parts["lora_B"], site.shape
    rank, out = int(a.shape[0]), int(b.shape[0])
    flips = len(shape) == 2 and _is_flipped(site, out, a.shape[1])
    fits = len(shape) >= 2 and b.size == out * rank and (
        shape == (a.shape[1], out) if flips else shape == (out, *a.shape[1:])
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"the adapter of {_text.quoted(site.module)} does not fit: kernel {list(shape)}, "
            f"lora_A {list(a.shape)}, lora_B {list(b.shape)}. Is it another architecture's?"
        )
    scale = scale_of(site.config, site.module, rank)
    lora_a, lora_b = _upcast(a).reshape(rank, -1).T, _upcast(b).reshape(out, rank).T
    merge = _low_rank_merge(site, lora_a, lora_b, scale, (-2, -1) if flips else (-1, -2))

    def edit(w: Any) -> Array:
        return merge(_upcast(w) if flips else _upcast(w).reshape(out, -1)).reshape(shape)

    bias_update = site.parts.get("lora_B.bias")
    return edit, None if bias_update is None else (
        lambda bias: _upcast(bias) + scale * _upcast(bias_update)
    )


def _embedding_edit(site: _Site) -> Edit:
    """`W + s A^T B^T` for a table `[tokens, width]`; a DoRA normalizes its columns."""
    a, b = site.parts["lora_embedding_A"], site.parts["lora_embedding_B"]
    _check_fits(site, (a.shape[-1], b.shape[0]))
    scale = scale_of(site.config, site.module, a.shape[0])
    merge = _low_rank_merge(site, _upcast(a).T, _upcast(b).T, scale, (-2, -1))
    return lambda w: merge(_upcast(w))


def _low_rank_merge(site: _Site, a: Array, b: Array, scale: float, axes: tuple[int, int]) -> Edit:
    """Merges `a [in, r]` and `b [r, out]` into a matrix, with DoRA's magnitude if there is one.

    `axes` are the matrix's axes of inputs and outputs.
    """
    magnitude, (in_axis, out_axis) = site.parts.get("lora_magnitude_vector"), axes
    make = transforms.lora if magnitude is None else transforms.dora
    kind = make(alpha=scale, scaling=lambda alpha, rank: alpha, in_axis=in_axis, out_axis=out_axis)
    weights: Any = transforms.LoraWeights(a, b)
    if magnitude is not None:
        weights = transforms.DoraWeights(a, b, jnp.ravel(_upcast(magnitude)))
    return lambda w: kind.merge({"w": w}, {"w": weights})["w"]


def _oft_edit(site: _Site) -> Edit:
    """`W^T <- R W^T` with R block-diagonal, by PEFT's series or its exact solution."""
    skew, shape, config = site.parts["oft_R"], site.shape, site.config
    blocks, count = skew.shape
    size = int((1 + (1 + 8 * count) ** 0.5) / 2)
    flips = _is_flipped(site, None, blocks * size)
    if len(shape) != 2 or shape[0 if flips else 1] != blocks * size:
        raise ValueError(
            f"{_text.quoted(site.module)}: {blocks} blocks of {size} do not rotate {list(shape)}."
        )
    upper = jnp.zeros((blocks, size, size), jnp.float32)
    upper = upper.at[:, *np.triu_indices(size, 1)].set(_upcast(skew))
    q = upper - jnp.swapaxes(upper, -1, -2)
    eye = jnp.eye(size, dtype=q.dtype)[None]
    if config.get("use_cayley_neumann", True):
        terms = int(config.get("num_cayley_neumann_terms", 5))
        terms = 4 if terms == 3 else terms  # as in PEFT's loop
        rotation, power = eye + (2 * q if terms > 1 else 0 * q), q
        for term in range(2, terms):
            power = power @ q
            rotation = rotation + (1 if term == terms - 1 and term > 2 else 2) * power
    else:
        rotation = jnp.linalg.solve(eye + q, eye - q)

    def edit(w: Any) -> Array:
        rows = _upcast(w) if flips else _upcast(w).T
        rotated = (rotation @ rows.reshape(blocks, size, -1)).reshape(rows.shape)
        return rotated if flips else rotated.T

    return edit


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / r` or `alpha / sqrt(r)`; the patterns decide, and the rank must match them."""

    def pattern(key: str, default: float) -> float:
        matches = (
            value
            for text, value in (config.get(key) or {}).items()
            if re.match(rf"(.*\.)?({text})$", module)
        )
        return next(matches, default)

    expected = pattern("rank_pattern", config.get("r", rank))
    if expected != rank:
        raise not_understood(
            f"{_text.quoted(module)} of rank {rank}", f"the configuration says {expected}"
        )
    alpha = pattern("alpha_pattern", config.get("lora_alpha", 8))
    if alpha is None:
        raise not_understood("lora_alpha = None", "expected a number")
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _is_flipped(site: _Site, out: int | None, fan_in: int | None) -> bool:
    """Whether a kernel is `[in, out]`; the configuration's flag is that of its last module only."""
    if len(site.shape) != 2:
        return False
    rows, columns = site.shape
    fits = out in (None, rows) and fan_in in (None, columns)
    fits_flipped = out in (None, columns) and fan_in in (None, rows)
    if fits != fits_flipped:
        return fits_flipped
    is_conv1d_name = site.module.rpartition(".")[2] in _CONV1D
    if site.base_config is not None and "model_type" in site.base_config:
        return is_conv1d_name and str(site.base_config["model_type"]) in _CONV1D_MODELS
    if is_conv1d_name or site.config.get("fan_in_fan_out"):
        raise not_understood(
            f"fan_in_fan_out of {_text.quoted(site.module)} {list(site.shape)}",
            "the kernel is square; the base's config.json would say which side is the input",
        )
    return False


def _check_fits(site: _Site, expected: tuple[int, ...]) -> None:
    if site.shape != expected:
        shapes = {part: list(value.shape) for part, value in site.parts.items()}
        raise ValueError(
            f"{_text.quoted(site.module)} {list(site.shape)} does not fit the adapter's {shapes}."
        )


def _compose(edit: Edit | None, value: Any) -> Edit:
    """Replaces the tensor, then applies the adapter to it."""
    return (lambda w: jnp.asarray(value)) if edit is None else (lambda w: edit(value))


def _upcast(x: Any) -> Array:
    """The array as float32 or wider."""
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
