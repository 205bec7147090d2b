"""Numbers of a decoder's config.json, and the rotary tables and sliding windows of its layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdtl_jax import _text
from kdtl_jax.interop._hf_config import Config, is_number
from kdtl_jax.models import Rope

_ORIGINAL = "factor original_max_position_embeddings "
_READS = {  # the keys that each kind of table reads; "su" is longrope's first name
    "default": "",
    "linear": "factor",
    "llama3": _ORIGINAL + "low_freq_factor high_freq_factor",
    "yarn": _ORIGINAL + "attention_factor mscale mscale_all_dim beta_fast beta_slow truncate "
    "finetuned",
    "longrope": _ORIGINAL + "attention_factor short_factor long_factor",
    "su": _ORIGINAL + "attention_factor short_factor long_factor",
}


def size(config: Config, key: str, default: int | None = None) -> int:
    """A positive whole number of the configuration."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(
            f"config.json: {key} must be a positive whole number, got {_text.quoted(value)}."
        )
    return value


def number(config: Config, key: str, default: float | None) -> float:
    """A finite number of the configuration; required if there is no default."""
    value = config.get(key, default)
    if not is_number(value):
        raise ValueError(f"config.json: {key} must be a finite number, got {_text.quoted(value)}.")
    return float(value)


def epsilon(config: Config, key: str, default: float) -> float:
    """The epsilon that a norm adds to a variance."""
    value = number(config, key, default)
    if not 0 < value <= 1:
        raise ValueError(f"config.json: {key} must be a number above 0, at most 1, got {value}.")
    return value


def optional(config: Config, key: str, default: float | None = None) -> float | None:
    """A finite number, or null."""
    return None if config.get(key, default) is None else number(config, key, default or 0.0)


def rope(
    config: Config, width: int, parameters: Config | None = None, theta: float | None = None
) -> Rope:
    """Computes rotary tables as transformers does: default, linear, llama3, yarn, longrope.

    Args:
      config: the whole configuration.
      width: width of a head.
      parameters: those of this kind of layer; None reads `rope_parameters` (transformers 5) or
        `rope_scaling`.
      theta: the base if the parameters have none; None reads `rope_theta`.
    """
    parameters = scaling(config) if parameters is None else parameters
    theta = _positive(parameters, "rope_theta", theta or _positive(config, "rope_theta", 10_000.0))
    partial = _positive(config, "partial_rotary_factor", 1.0)
    partial = _positive(parameters, "partial_rotary_factor", partial)
    if partial > 1:
        raise ValueError(f"config.json: partial_rotary_factor must be at most 1, got {partial}.")
    if partial < 1 and config.get("model_type") != "phi3":  # elsewhere transformers ignores it
        raise ValueError(
            f"config.json: partial_rotary_factor = {partial} is supported only for phi3; other "
            "families rotate whole heads."
        )
    head_width, width = width, int(width * partial)
    if width > 1 << 16:
        raise ValueError(f"config.json: heads of {width} channels are wider than any model has.")
    unscaled = frequencies(theta, width)
    if 2 * len(unscaled) > head_width:
        raise ValueError(f"config.json: heads of {head_width} channels cannot rotate in pairs.")
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _READS:
        raise ValueError(
            f"rope type {_text.quoted(kind)} is not supported (only {', '.join(_READS)})."
        )
    known_keys = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_READS[kind].split()}
    if unknown := sorted(map(str, parameters.keys() - known_keys)):
        raise ValueError(
            f"config.json: the rope type {kind!r} does not read {_text.listed(unknown)}."
        )
    if kind == "default":
        return Rope(tuple(unscaled))
    max_positions = size(config, "max_position_embeddings", 2048)
    original = size(config, "original_max_position_embeddings", max_positions)
    original = size(parameters, "original_max_position_embeddings", original)
    if kind in ("longrope", "su"):
        return _longrope(parameters, unscaled, max_positions, original)
    factor = _positive(parameters, "factor", None)
    if kind == "linear":
        return Rope(tuple(f / factor for f in unscaled))
    if kind == "llama3":
        low, high = (_positive(parameters, f"{name}_freq_factor", None) for name in ("low", "high"))
        if high <= low:
            raise ValueError("config.json: high_freq_factor must be above low_freq_factor.")

        def interpolate(frequency: float) -> float:
            turns = original * frequency / (2 * math.pi)
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            return share * frequency + (1 - share) * frequency / factor

        return Rope(tuple(interpolate(f) for f in unscaled))
    return _yarn(parameters, unscaled, theta, width, factor, original)


def scaling(config: Config) -> dict[str, Any]:
    """The content of `rope_scaling` and `rope_parameters`, which must agree."""
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        entry = {} if config.get(key) is None else config[key]
        if not isinstance(entry, Mapping):
            raise ValueError(f"config.json: {key} = {_text.shown(entry)}; expected an object.")
        clash = [name for name in entry if name in parameters and parameters[name] != entry[name]]
        if clash:
            raise ValueError(
                f"config.json: rope_scaling and rope_parameters differ in {_text.listed(clash)}."
            )
        parameters |= entry
    return parameters


def windows(
    config: Config, layers: int, sliding: Callable[[int], bool], default: int | None = 4096
) -> tuple[int | None, ...]:
    """The window of every layer: by `layer_types` if it is given, else by `sliding(layer)`.

    A config without `sliding_window` has the default; one with null has no windows.
    """
    if config.get("sliding_window", default) is None:
        return ()
    window = size(config, "sliding_window", default)
    types = config.get("layer_types")
    if types is None:
        return tuple(window if sliding(i) else None for i in range(layers))
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != layers:
        problem = f" with {_text.listed(sorted(map(str, unknown)))}" if unknown else ""
        raise ValueError(
            f"layer_types must be {layers} times 'sliding_attention' or 'full_attention', got "
            f"{len(types)} entries{problem}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def windows_if_used(
    config: Config, layers: int, sliding: Callable[[int], bool], default: int | None = 4096
) -> tuple[int | None, ...]:
    """`windows` of a family that has them only if `use_sliding_window` says so.

    If `layer_types` says otherwise, transformers' implementations of attention differ.
    """
    if config.get("use_sliding_window", False):
        return windows(config, layers, sliding, default)
    expected, types = ["full_attention"] * layers, config.get("layer_types")
    if types is not None and types != expected:
        raise ValueError(
            f"layer_types must be {len(expected)} times 'full_attention' if use_sliding_window "
            f"is false, got {_text.shown(types)}."
        )
    return ()


def frequencies(theta: float, width: int) -> list[float]:
    """`theta ** (-2 i / width)` for the pairs of a head, rounded as in transformers.

    Exponent, power and reciprocal are float32 there. A frequency that differs by one rounding step
    rotates a distant position by enough to change the logits.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    with np.errstate(over="ignore", divide="ignore"):
        powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
        return [float(f) for f in np.float32(1) / powers]


def _positive(config: Config, key: str, default: float | None) -> float:
    value = number(config, key, default)
    if value <= 0:
        raise ValueError(f"config.json: {key} must be above 0, got {value}.")
    return value


def _divided(parameters: Config, key: str, unscaled: Sequence[float]) -> tuple[float, ...]:
    """Divides each frequency by its number in the configuration."""
    divisors = parameters[key]
    fits = isinstance(divisors, list) and len(divisors) == len(unscaled)
    if not fits or not all(is_number(x) and x > 0 for x in divisors):
        raise ValueError(
            f"config.json: {key} must be {len(unscaled)} positive numbers, one per frequency, got "
            f"{_text.quoted(divisors)}."
        )
    return tuple(f / s for f, s in zip(unscaled, divisors, strict=True))


def _longrope(
    parameters: Config, unscaled: Sequence[float], max_positions: int, original: int
) -> Rope:
    """Phi-3's table: divisors of each frequency, for texts up to the original length and beyond."""
    stretch = max_positions / original
    if parameters.get("factor") is not None:
        stretch = _positive(parameters, "factor", 1.0)
    scale = 1.0
    if parameters.get("attention_factor") is not None:
        scale = number(parameters, "attention_factor", 1.0)
    elif stretch > 1:
        scale = math.sqrt(1 + math.log(stretch) / math.log(original))
    short_frequencies = _divided(parameters, "short_factor", unscaled)
    return Rope(short_frequencies, scale, _divided(parameters, "long_factor", unscaled), original)


def _yarn(
    parameters: Config,
    unscaled: Sequence[float],
    theta: float,
    width: int,
    factor: float,
    original: int,
) -> Rope:
    """YaRN: keeps short wavelengths, stretches long ones, with a ramp in between (2309.00071)."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1

    attention = parameters.get("attention_factor")
    if attention is None:
        m, m_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = scale(m) / scale(m_all) if m and m_all else scale(1.0)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(len(unscaled))]
    interpolated = [r * f / factor + (1 - r) * f for r, f in zip(ramp, unscaled, strict=True)]
    return Rope(tuple(interpolated), attention)
