"""Parses a PEFT adapter's configuration and tensors; refuses unknown ones by name."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kdtl_jax import _text

# Keys that merged weights do not depend on, or that repeat information in the tensors.
_HARMLESS = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules lora_dropout vera_dropout module_dropout megatron_core
    layers_to_transform layers_pattern eva_config qalora_group_size projection_prng_key d_initial
    init_ia3_weights feedforward_modules oft_block_size eps runtime_config""".split()
)
# Keys that are read, and their allowed values; None means anything of the right type.
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
    """Whether it maps regular expressions to numbers; repeated groups may take exponential time."""
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
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
}
_PARTS = {
    "LORA": ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B"),
    "IA3": ("ia3_l",),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "OFT": ("oft_R",),
}
_SHARED = re.compile(r"(?:base_model\.)?(vera_[AB])(?:\.\w+)?")  # VeRA's projections


class Adapter(NamedTuple):
    """A parsed adapter.

    `weights[module][part]` is by module, `"model.layers.0.self_attn.q_proj"`, and by PEFT's name of
    the part (`lora_A`, `lora_B.bias`, `ia3_l`, …). `replaced` are tensors of the base, by name:
    trained biases and `modules_to_save`. `shared` are VeRA's projections.
    """

    config: dict[str, Any]
    weights: dict[str, dict[str, Any]]
    replaced: dict[str, Any]
    shared: dict[str, Any]

    @property
    def kind(self) -> str:
        """`"LORA"`, `"IA3"`, `"VERA"` or `"OFT"`."""
        return self.config["peft_type"]


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, if every key is read, harmless, or off (None, false, or empty).

    Raises:
      ValueError: naming the key.
    """
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in _READ:
        raise not_understood(
            f"peft_type {_text.quoted(kind)}", f"expected one of {', '.join(_READ)}"
        )
    supported = _READ[kind]
    for key, value in config.items():
        if key in _HARMLESS or value is None or value is False or value in ({}, []):
            continue
        if key not in supported:
            raise not_understood(
                f"{key} = {_text.shown(value)}", "it may change the merged weights"
            )
        values = supported[key]
        # 1 is not True here: for one key, a flag and a number mean different things.
        if values is not None and not any(type(value) is type(k) and value == k for k in values):
            raise not_understood(f"{key} = {_text.shown(value)}", f"expected one of {values}")
    for key, is_valid in _TYPES.items():
        if config.get(key) is not None and not is_valid(config[key]):
            raise not_understood(f"{key} = {_text.shown(config[key])}", "it has another type")
    if kind == "VERA" and not config.get("save_projection", True):
        raise not_understood("save_projection = false", "PyTorch's generator drew the projections")
    return {**config, "peft_type": kind}


def sort_tensors(tensors: Mapping[str, Any], config: dict[str, Any]) -> Adapter:
    """The adapter of a file's tensors, by module; refuses tensors without a place."""
    kind = config["peft_type"]
    names = "|".join(map(re.escape, _PARTS[kind]))
    part = re.compile(rf"(?P<module>.+)\.(?P<part>{names})(?P<rest>(\.\w+){{0,2}})")
    weights: dict[str, dict[str, Any]] = {}
    replaced: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    adapters: set[str] = set()
    for name, value in tensors.items():
        base_name = name.removeprefix("base_model.model.")
        match = part.fullmatch(base_name)
        if match is not None:
            *adapter, last = match["rest"].split(".")[1:] or [""]
            if last not in ("", "weight", "bias"):
                adapter, last = [*adapter, last], ""
            if len(adapter) > 1 or (last == "bias" and match["part"] != "lora_B"):
                raise not_understood(
                    f"the tensor {_text.quoted(name)}", "it is not part of a known adapter"
                )
            adapters |= set(adapter)
            key = match["part"] + (".bias" if last == "bias" else "")
            weights.setdefault(match["module"], {})[key] = value
        elif kind == "VERA" and (shared_match := _SHARED.fullmatch(name)):
            shared[shared_match[1]] = value
        elif _is_replaced(base_name, config):
            # An original module is the base's own tensor, beside the trained copy.
            if ".original_module." not in base_name:
                replaced[_base_name(base_name)] = value
        else:
            raise not_understood(
                f"the tensor {_text.quoted(name)}", "it is not part of a known adapter"
            )
    if len(adapters) > 1:
        raise not_understood(f"a file with the adapters {sorted(adapters)}", "save one of them")
    _check_parts(kind, weights, shared, config)
    return Adapter(config, weights, replaced, shared)


def _base_name(name: str) -> str:
    """The base's name for a tensor that PEFT has wrapped."""
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)


def _is_replaced(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is a whole tensor of the base, as the configuration announces."""
    saved = config.get("modules_to_save") or []
    module, _, last = _base_name(name).rpartition(".")
    if any(f".{module_name}." in f".{module}." for module_name in saved):
        return last in ("weight", "bias")
    return last == "bias" and config.get("bias", "none") != "none"


def _check_parts(
    kind: str,
    weights: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    if kind == "VERA" and set(shared) != {"vera_A", "vera_B"}:
        raise not_understood(
            f"VeRA with the projections {sorted(shared)}", "expected vera_A and vera_B"
        )
    for module, parts in weights.items():
        required = {"lora_A", "lora_B"} if kind == "LORA" else set(_PARTS[kind])
        if "lora_embedding_A" in parts:
            required = {"lora_embedding_A", "lora_embedding_B"}
        optional = {"lora_magnitude_vector"} if config.get("use_dora") else set()
        optional |= {"lora_B.bias"} if config.get("lora_bias") else set()
        if not required <= parts.keys() <= required | optional:
            raise not_understood(
                f"{_text.quoted(module)} with {sorted(parts)}",
                f"expected {sorted(required | optional)}",
            )
        if "lora_magnitude_vector" in optional - parts.keys():
            raise not_understood(
                f"{_text.quoted(module)} without lora_magnitude_vector", "the adapter is a DoRA"
            )


def not_understood(part: str, reason: str) -> ValueError:
    """The error for a part of an adapter that is not understood."""
    return ValueError(
        f"PEFT adapter: {part} is not understood ({reason}). Merge it where it was made, with "
        "merge_and_unload, or convert it to a plain LoRA."
    )
