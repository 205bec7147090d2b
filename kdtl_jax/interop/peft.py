"""Adapters as PEFT saves them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    found = peft.load("adapter/")        # understood key by key and tensor by tensor, or refused
    params = peft.merge(tensors, found)  # {torch name: array}: what merge_and_unload gives
    peft.save("copy/", found)

Understood: LoRA (rank and alpha patterns, rsLoRA, DoRA, `lora_bias`, embeddings, convolutions),
IA3, VeRA with its projections saved, OFT; trained biases, and `modules_to_save`. PiSSA, OLoRA,
CorDA, LoftQ and LoRA-GA moved part of the base into the adapter when training began, and what is
saved does not hold that part: they are refused, as is everything unknown. Names are torch's,
kernels `[out, in]`; `naming.to_torch` and `naming.from_torch` translate whole trees.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _files, transforms, trees
from kdtl_jax._types import Array
from kdtl_jax.interop import safetensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Keys that no merged weight depends on, or that the tensors themselves answer.
_HARMLESS = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules lora_dropout vera_dropout module_dropout megatron_core
    layers_to_transform layers_pattern eva_config qalora_group_size projection_prng_key d_initial
    init_ia3_weights feedforward_modules oft_block_size eps runtime_config""".split()
)
# Keys that are read, and what they may say; None: anything of the right type.
_READ: dict[str, dict[str, Any]] = {
    "LORA": dict.fromkeys(
        "r lora_alpha use_rslora fan_in_fan_out modules_to_save rank_pattern alpha_pattern "
        "use_dora lora_bias".split()
    )
    | {
        "bias": ("none", "all", "lora_only"),
        "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    },
    "IA3": dict.fromkeys(("fan_in_fan_out", "modules_to_save")),
    "VERA": dict.fromkeys(("r", "fan_in_fan_out", "modules_to_save"))
    | {
        "bias": ("none", "all", "vera_only"),
        "save_projection": (True,),
        "init_weights": (True, False),
    },
    "OFT": dict.fromkeys(
        ("r", "fan_in_fan_out", "modules_to_save", "use_cayley_neumann", "num_cayley_neumann_terms")
    )
    | {"bias": ("none", "all", "oft_only"), "init_weights": (True, False)},
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def _are_patterns(value: Any) -> bool:
    """Regular expressions to numbers; a repeated group could take for ever to match."""
    return isinstance(value, dict) and all(
        _is_number(number)
        and len(text) < 500
        and not re.search(r"\)[*+{]", text)
        and _compiles(text)
        for text, number in value.items()
    )


def _compiles(text: str) -> bool:
    try:
        return re.compile(text) is not None
    except re.error:
        return False


_TYPES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("lora_alpha", "num_cayley_neumann_terms"), _is_number),
    "r": lambda value: type(value) is int and 0 <= value < 2**31,
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _are_patterns),
    **dict.fromkeys(
        ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias", "use_cayley_neumann"),
        lambda value: isinstance(value, bool),
    ),
    "modules_to_save": lambda value: (
        isinstance(value, list) and all(isinstance(each, str) for each in value)
    ),
}
_PARTS = {
    "LORA": ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"),
    "IA3": ("ia3_l",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "OFT": ("oft_R",),
}
# Modules that transformers builds as Conv1D, kernels [in, out], in the models that have it.
_CONV1D = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
_CONV1D_MODELS = frozenset(("gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"))


class Adapter(NamedTuple):
    """An adapter that was understood.

    `weights[module][part]`: `"model.layers.0.self_attn.q_proj"`, and PEFT's names of parts
    (`lora_A`, `lora_B.bias`, `ia3_l`, …). `replaced` are tensors of the base, by name: trained
    biases and `modules_to_save`. `shared` are VeRA's projections.
    """

    config: dict[str, Any]
    weights: dict[str, dict[str, Any]]
    replaced: dict[str, Any]
    shared: dict[str, Any]

    @property
    def kind(self) -> str:
        """`"LORA"`, `"IA3"`, `"VERA"` or `"OFT"`."""
        return self.config["peft_type"]


Edit = Callable[[Any], Array]


def load(folder: str | Path) -> Adapter:
    """Reads an adapter's configuration and weights (mapped, not copied).

    Args:
      folder: PEFT's folder, or its safetensors file with `adapter_config.json` beside it.

    Raises:
      ValueError: naming the first key or tensor that is not understood.
      FileNotFoundError: if either file is missing.
    """
    path = Path(folder)
    checkpoint = safetensors.index(path)
    home = path if path.is_dir() else path.parent
    config = check_config(safetensors.json_file(home / CONFIG))
    return _sorted(safetensors.views(checkpoint.tensors), config)


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, if every key is read here, harmless, or off (None, false, or empty).

    Raises:
      ValueError: naming the key.
    """
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in _READ:
        raise _refused(f"peft_type {kind!r}", f"known are {', '.join(_READ)}")
    allowed = _READ[kind]
    for key, value in config.items():
        if key in _HARMLESS or value is None or value is False or value in ({}, []):
            continue
        if key not in allowed:
            raise _refused(f"{key} = {str(value)[:80]}", "it may change the merged weights")
        known = allowed[key]
        if known is not None and not any(value is k or value == k != True for k in known):  # noqa: E712
            raise _refused(f"{key} = {str(value)[:80]}", f"known are {known}")
    for key, is_right in _TYPES.items():
        if config.get(key) is not None and not is_right(config[key]):
            raise _refused(f"{key} = {str(config[key])[:80]}", "it has another type")
    if kind == "VERA" and not config.get("save_projection", True):
        raise _refused("save_projection = false", "PyTorch's generator drew the projections")
    return {**config, "peft_type": kind}


def edits(
    adapter: Adapter, base: Mapping[str, Any], base_config: Mapping[str, Any] | None = None
) -> dict[str, Edit]:
    """`{name of a base tensor: function of that tensor}`, checked by name and shape.

    Args:
      adapter: from `load`.
      base: `{torch name: anything with a shape}`.
      base_config: the base's config.json, which tells a square kernel of a Conv1D, `[in, out]`.

    Raises:
      ValueError: if the base lacks a tensor, a shape does not fit, or a square kernel may be both.
    """
    out: dict[str, Edit] = {}
    for module, parts in adapter.weights.items():
        name = f"{module}.weight"
        if name not in base:
            raise ValueError(
                f"the adapter's {name!r} is not in the base; nearest: "
                f"{trees.nearest(name, list(base))}. Adapters belong to one architecture."
            )
        bias = f"{module}.bias"
        shape = tuple(base[name].shape)
        out[name], on_bias = _edits_of(adapter, module, parts, shape, base_config)
        if on_bias is not None:
            if bias in base:
                out[bias] = on_bias
            elif "lora_B.bias" in parts:
                raise ValueError(f"{bias!r} would be new: lora_bias needs a base with biases.")
    for name, value in adapter.replaced.items():
        if name not in base or tuple(base[name].shape) != tuple(value.shape):
            where = list(base[name].shape) if name in base else "nothing"
            raise ValueError(
                f"the adapter replaces {name!r} by {list(value.shape)}, the base has {where}."
            )
        out[name] = _composed(out.get(name), value)
    return out


def merge(
    tensors: Mapping[str, Any], adapter: Adapter, base_config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The base's tensors with the adapter merged: PEFT's `merge_and_unload`.

    Arguments and errors as `edits`; each tensor keeps its dtype.
    """
    changed = edits(adapter, tensors, base_config)
    return {
        name: changed[name](x).astype(x.dtype) if name in changed else x
        for name, x in tensors.items()
    }


def save(folder: str | Path, adapter: Adapter) -> None:
    """Writes a new folder that PEFT reads.

    Raises:
      FileExistsError: if the folder exists and is not empty.
    """
    tensors = {
        f"{PREFIX}{module}.{_stored(part)}": value
        for module, parts in adapter.weights.items()
        for part, value in parts.items()
    }
    for name, value in adapter.replaced.items():
        module, _, last = name.rpartition(".")
        inside = ".base_layer" if module in adapter.weights else ""
        tensors[f"{PREFIX}{module}{inside}.{last}"] = value
    tensors |= {f"base_model.{name}": value for name, value in adapter.shared.items()}
    with _files.new_folder(Path(folder)) as part:
        with _files.atomic_file(part / CONFIG) as file:
            file.write(json.dumps(adapter.config, indent=2).encode())
        safetensors.save(part / WEIGHTS, tensors, metadata={"format": "pt"})


def to_lora(adapter: Adapter) -> dict[str, Any]:
    """`{kernel's torch name: transforms.LoraWeights or DoraWeights}`, for kernels of two axes.

    Scales are multiplied into `b`: use them with an alpha of 1 and `scaling=lambda alpha, rank: 1`.

    Raises:
      ValueError: if the adapter holds anything else.
    """
    if adapter.kind != "LORA" or adapter.replaced:
        raise ValueError(
            f"a {adapter.kind} adapter with {sorted(adapter.replaced)} is no LoRA alone."
        )
    out: dict[str, Any] = {}
    for module, parts in adapter.weights.items():
        if {"lora_embedding_A", "lora_B.bias"} & parts.keys() or np.ndim(parts["lora_A"]) != 2:
            raise ValueError(f"{module!r} has {sorted(parts)}, not the pair of a kernel.")
        a, b = (jnp.asarray(parts[part]).T for part in ("lora_A", "lora_B"))
        b = b * jnp.asarray(_scale(adapter.config, module, a.shape[-1]), b.dtype)
        magnitude = parts.get("lora_magnitude_vector")
        out[f"{module}.weight"] = (
            transforms.LoraWeights(a, b)
            if magnitude is None
            else transforms.DoraWeights(a, b, jnp.ravel(jnp.asarray(magnitude)))
        )
    return out


def from_lora(
    weights: Mapping[str, Any], *, alpha: float, is_root_rank: bool = False, **config: Any
) -> Adapter:
    """An adapter for PEFT from `{kernel's torch name: transforms.LoraWeights or DoraWeights}`.

    Args:
      weights: of kernels of two axes; `a [in, r]`, `b [r, out]`.
      alpha: as given to `transforms.lora`.
      is_root_rank: for `transforms.scale_by_root_rank` (rsLoRA).
      **config: further keys of the configuration, such as `base_model_name_or_path`.

    Raises:
      ValueError: if a name is no kernel's, or a key is not understood.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, pair in weights.items():
        if not name.endswith(".weight"):
            raise ValueError(f"{name!r} must be a kernel's torch name, 'module.weight'.")
        module = name.removesuffix(".weight")
        parts[module] = {"lora_A": pair.a.T, "lora_B": pair.b.T}
        if isinstance(pair, transforms.DoraWeights):
            parts[module]["lora_magnitude_vector"] = pair.magnitude
    ranks = {module: int(each["lora_A"].shape[0]) for module, each in parts.items()}
    rank = next(iter(ranks.values()), 1)
    made = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "lora_alpha": alpha,
        "use_rslora": is_root_rank,
        "use_dora": any("lora_magnitude_vector" in each for each in parts.values()),
        "target_modules": sorted(parts),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return Adapter(check_config(made | config), parts, {}, {})


# --- reading -------------------------------------------------------------------------------------


def _sorted(tensors: Mapping[str, Any], config: dict[str, Any]) -> Adapter:
    kind = config["peft_type"]
    names = "|".join(map(re.escape, _PARTS[kind]))
    part = re.compile(rf"(?P<module>.+)\.(?P<part>{names})(?P<rest>(\.\w+){{0,2}})")
    weights: dict[str, dict[str, Any]] = {}
    replaced: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    adapters: set[str] = set()
    for name, value in tensors.items():
        short = name.removeprefix(PREFIX)
        match = part.fullmatch(short)
        if match is not None:
            *adapter, last = match["rest"].split(".")[1:] or [""]
            if last not in ("", "weight", "bias"):
                adapter, last = [*adapter, last], ""
            if len(adapter) > 1 or (last == "bias" and match["part"] != "lora_B"):
                raise _refused(f"the tensor {name!r}", "it is no part of a known adapter")
            adapters |= set(adapter)
            key = match["part"] + (".bias" if last == "bias" else "")
            weights.setdefault(match["module"], {})[key] = value
        elif kind == "VERA" and re.fullmatch(r"(base_model\.)?vera_[AB](\.\w+)?", name):
            shared[re.search(r"vera_[AB]", name)[0]] = value  # type: ignore[index]
        elif _replaces(short, config):
            if ".original_module." not in short:  # the base's own, beside the trained copy
                replaced[_plain(short)] = value
        else:
            raise _refused(f"the tensor {name!r}", "it is no part of a known adapter")
    if len(adapters) > 1:
        raise _refused(f"a file with the adapters {sorted(adapters)}", "save one of them")
    _check_parts(kind, weights, shared, config)
    return Adapter(config, weights, replaced, shared)


def _plain(name: str) -> str:
    """The base's name of a tensor that PEFT has wrapped."""
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)


def _replaces(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is a whole tensor of the base, as the configuration announces."""
    saved = config.get("modules_to_save") or []
    module, _, last = _plain(name).rpartition(".")
    if any(f".{module}.".find(f".{each}.") >= 0 for each in saved):
        return last in ("weight", "bias")
    return last == "bias" and config.get("bias", "none") != "none"


def _check_parts(
    kind: str,
    weights: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    if kind == "VERA" and set(shared) != {"vera_A", "vera_B"}:
        raise _refused(f"VeRA with the projections {sorted(shared)}", "expected vera_A and vera_B")
    for module, parts in weights.items():
        wanted = {"lora_A", "lora_B"} if kind == "LORA" else set(_PARTS[kind])
        if "lora_embedding_A" in parts:
            wanted = {"lora_embedding_A", "lora_embedding_B"}
        optional = {"lora_magnitude_vector"} if config.get("use_dora") else set()
        optional |= {"lora_B.bias"} if config.get("lora_bias") else set()
        if not wanted <= parts.keys() <= wanted | optional:
            raise _refused(
                f"{module!r} with {sorted(parts)}", f"expected {sorted(wanted | optional)}"
            )
        if optional & {"lora_magnitude_vector"} and not optional <= parts.keys() | {"lora_B.bias"}:
            raise _refused(f"{module!r} without lora_magnitude_vector", "the adapter is a DoRA")


def _refused(what: str, why: str) -> ValueError:
    return ValueError(
        f"PEFT adapter: {what} is not understood ({why}). Merge it where it was made, with "
        "merge_and_unload, or convert it to a plain LoRA."
    )


def _stored(part: str) -> str:
    """A part's name in a file."""
    alone = ("lora_embedding", "lora_magnitude", "ia3", "vera")
    return part if part.startswith(alone) or part.endswith(".bias") else f"{part}.weight"


# --- merging -------------------------------------------------------------------------------------


def _edits_of(
    adapter: Adapter,
    module: str,
    parts: Mapping[str, Any],
    shape: tuple[int, ...],
    base_config: Mapping[str, Any] | None,
) -> tuple[Edit, Edit | None]:
    """What becomes of a module's weight, and of its bias."""
    config = adapter.config
    if "lora_embedding_A" in parts:
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        _fits(module, shape, (a.shape[-1], b.shape[0]), parts)
        scale = _scale(config, module, a.shape[0])
        return lambda w: _wide(w) + scale * (_wide(b) @ _wide(a)).T, None
    if adapter.kind == "LORA":
        return _lora_edits(config, module, parts, shape, base_config)
    if adapter.kind == "IA3":
        vector = parts["ia3_l"]
        is_input = vector.shape[0] == 1 and vector.size > 1
        sides = (vector.size, None) if not is_input else (None, vector.size)
        flips = _is_flipped(config, module, shape, sides, base_config)
        along = (lambda w: jnp.ravel(_wide(vector))[:, None]) if is_input == flips else (
            lambda w: jnp.ravel(_wide(vector))[None]
        )  # fmt: skip
        on_bias = None if is_input else (lambda b: _wide(b) * jnp.ravel(_wide(vector)))
        return lambda w: _wide(w) * along(w), on_bias
    if adapter.kind == "VERA":
        b, d = parts["vera_lambda_b"], parts["vera_lambda_d"]
        first, second = adapter.shared["vera_A"], adapter.shared["vera_B"]
        flips = _is_flipped(config, module, shape, (b.size, None), base_config)
        fan_in = shape[0] if flips else shape[1]
        _fits(module, shape[::-1] if flips else shape, (b.size, fan_in), parts)
        if first.shape != (d.size, first.shape[1]) or first.shape[1] < fan_in:
            raise ValueError(f"{module!r} does not fit vera_A {list(first.shape)}.")
        left = _wide(b)[:, None] * _wide(second[: b.size])
        delta = left @ (_wide(d)[:, None] * _wide(first[:, :fan_in]))
        return lambda w: _wide(w) + (delta.T if flips else delta), None
    return _oft_edit(config, module, parts["oft_R"], shape, base_config), None


def _lora_edits(
    config: Mapping[str, Any],
    module: str,
    parts: Mapping[str, Any],
    shape: tuple[int, ...],
    base_config: Mapping[str, Any] | None,
) -> tuple[Edit, Edit | None]:
    a, b = parts["lora_A"], parts["lora_B"]
    rank, out = int(a.shape[0]), int(b.shape[0])
    flips = len(shape) == 2 and _is_flipped(config, module, shape, (out, a.shape[1]), base_config)
    fits = len(shape) >= 2 and b.size == out * rank and (
        shape == (a.shape[1], out) if flips else shape == (out, *a.shape[1:])
    )  # fmt: skip
    if not fits:
        raise ValueError(
            f"the adapter of {module!r} does not fit: kernel {list(shape)}, lora_A "
            f"{list(a.shape)}, lora_B {list(b.shape)}. Is it another architecture's?"
        )
    scale = _scale(config, module, rank)
    magnitude = parts.get("lora_magnitude_vector")
    make = transforms.lora if magnitude is None else transforms.dora
    sides = {"in_axis": -2, "out_axis": -1} if flips else {"in_axis": -1, "out_axis": -2}
    kind = make(alpha=scale, scaling=lambda alpha, rank: alpha, **sides)
    pair = [_wide(a).reshape(rank, -1).T, _wide(b).reshape(out, rank).T]
    weights: Any = transforms.LoraWeights(*pair)
    if magnitude is not None:
        weights = transforms.DoraWeights(*pair, jnp.ravel(_wide(magnitude)))

    def edit(w: Any) -> Array:
        matrix = _wide(w) if flips else _wide(w).reshape(out, -1)
        return kind.merge({"w": matrix}, {"w": weights})["w"].reshape(shape)

    extra = parts.get("lora_B.bias")
    return edit, None if extra is None else (lambda bias: _wide(bias) + scale * _wide(extra))


def _oft_edit(
    config: Mapping[str, Any],
    module: str,
    skew: Any,
    shape: tuple[int, ...],
    base_config: Mapping[str, Any] | None,
) -> Edit:
    """`W^T <- R W^T` with R block-diagonal, from PEFT's series or its exact solution."""
    blocks, count = skew.shape
    size = int((1 + (1 + 8 * count) ** 0.5) / 2)
    flips = _is_flipped(config, module, shape, (None, blocks * size), base_config)
    if len(shape) != 2 or shape[0 if flips else 1] != blocks * size:
        raise ValueError(f"{module!r}: {blocks} blocks of {size} do not rotate {list(shape)}.")
    upper = jnp.zeros((blocks, size, size), jnp.float32)
    upper = upper.at[:, *np.triu_indices(size, 1)].set(_wide(skew))
    q = upper - jnp.swapaxes(upper, -1, -2)
    eye = jnp.eye(size, dtype=q.dtype)[None]
    if config.get("use_cayley_neumann", True):
        terms = int(config.get("num_cayley_neumann_terms", 5))
        terms = 4 if terms == 3 else terms  # as PEFT's loop has it
        turn, power = eye + (2 * q if terms > 1 else 0 * q), q
        for term in range(2, terms):
            power = power @ q
            turn = turn + (1 if term == terms - 1 and term > 2 else 2) * power
    else:
        turn = jnp.linalg.solve(eye + q, eye - q)

    def edit(w: Any) -> Array:
        rows = _wide(w) if flips else _wide(w).T
        turned = (turn @ rows.reshape(blocks, size, -1)).reshape(rows.shape)
        return turned if flips else turned.T

    return edit


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """`alpha / r` or `alpha / sqrt(r)`; the patterns decide, and the rank must be theirs."""

    def pattern(key: str, default: float) -> float:
        found = (
            value
            for text, value in (config.get(key) or {}).items()
            if re.match(rf"(.*\.)?({text})$", module)
        )
        return next(found, default)

    wanted = pattern("rank_pattern", config.get("r", rank))
    if wanted != rank:
        raise _refused(f"{module!r} of rank {rank}", f"the configuration says {wanted}")
    alpha = pattern("alpha_pattern", config.get("lora_alpha", 8))
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _is_flipped(
    config: Mapping[str, Any],
    module: str,
    shape: tuple[int, ...],
    sides: tuple[int | None, int | None],
    base_config: Mapping[str, Any] | None,
) -> bool:
    """Whether a kernel is `[in, out]`; the configuration's one flag is only its last module's.

    Raises:
      ValueError: if the kernel is square and nothing says which it is.
    """
    if len(shape) != 2:
        return False
    out, fan_in = sides
    straight = out in (None, shape[0]) and fan_in in (None, shape[1])
    flipped = out in (None, shape[1]) and fan_in in (None, shape[0])
    if straight != flipped:
        return flipped
    may_be = module.rpartition(".")[2] in _CONV1D
    if base_config is not None and "model_type" in base_config:
        return may_be and base_config["model_type"] in _CONV1D_MODELS
    if may_be or config.get("fan_in_fan_out"):
        raise _refused(
            f"fan_in_fan_out of {module!r} {list(shape)}",
            "the kernel is square; the base's config.json would say which side is the input",
        )
    return False


def _fits(
    module: str, shape: tuple[int, ...], wanted: tuple[int, ...], parts: Mapping[str, Any]
) -> None:
    if tuple(shape) != tuple(wanted):
        shapes = {part: list(value.shape) for part, value in parts.items()}
        raise ValueError(f"{module!r} {list(shape)} does not fit the adapter's {shapes}.")


def _composed(edit: Edit | None, value: Any) -> Edit:
    """The replaced tensor, then what the adapter does to it."""
    return (lambda w: jnp.asarray(value)) if edit is None else (lambda w: edit(value))


def _wide(x: Any) -> Array:
    """As an array of float32 or wider."""
    array = jnp.asarray(x)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
