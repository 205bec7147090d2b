"""Converts a published decoder's `config.json` to a `models.DecoderConfig` and its tensor names.

One table per family says which keys of the configuration are read and which of them must have
certain values. A key that is neither read nor known to change no output is refused by name
(ValueError), as is a number that is no valid size.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kdtl_jax import _text, models
from kdtl_jax.interop import _hf_decoder_names as rules
from kdtl_jax.interop._hf_config import HARMLESS, Config, activation_named
from kdtl_jax.interop._hf_rope import (
    epsilon,
    number,
    optional,
    rope,
    scaling,
    size,
    windows,
    windows_if_used,
)
from kdtl_jax.interop.naming import Rule
from kdtl_jax.models import DecoderConfig, Norm

# Keys for training only, or that repeat other keys.
_HARMLESS = HARMLESS | frozenset(
    "attention_dropout attn_pdrop classifier_dropout embd_pdrop hidden_dropout resid_pdrop "
    "cache_implementation max_position_embeddings n_ctx n_positions pretraining_tp "
    "reorder_and_upcast_attn rope_interleaved rope_theta summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj _sliding_window_pattern".split()
)


class DecoderFamily(NamedTuple):
    """The rules for reading a family's configuration.

    `build` reads it; `reads` names the keys that it uses; `requires` lists, by key, the supported
    values of keys that have other values too.
    """

    build: Callable[[Config], DecoderConfig]
    rules: tuple[Rule, ...]
    reads: frozenset[str]
    requires: Mapping[str, tuple[Any, ...]] = {}
    prefix: str = "model."


def decoder(config: Config) -> tuple[DecoderConfig, tuple[Rule, ...]]:
    """The decoder of a configuration, and the rules that name its tensors."""
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {_text.quoted(name)} is not a supported decoder; expected one of "
            f"{', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[name]
    known_keys = family.reads | family.requires.keys() | _HARMLESS
    set_keys = {key for key, value in config.items() if not any(value == e for e in (None, {}, []))}
    unknown = sorted(map(str, set_keys - known_keys))
    if unknown:
        raise ValueError(
            f"config.json of a {name!r} model has keys that are not understood here: "
            f"{_text.listed(unknown)}. They may change the outputs; remove them only if they do "
            "not."
        )
    for key, supported_values in family.requires.items():
        if config.get(key, supported_values[0]) not in supported_values:
            raise ValueError(
                f"{key} = {_text.quoted(config[key])} of a {name!r} model is not supported (only "
                f"{' or '.join(map(repr, supported_values))})."
            )
    try:
        return family.build({**_DEFAULTS.get(name, {}), **config}), family.rules
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"config.json of a {name!r} model cannot be read: {type(error).__name__}: "
            f"{_text.shown(str(error), 100)}."
        ) from None


def check_heads(config: Config) -> None:
    """Raises ValueError if transformers refuses to open this width with this many heads."""
    if config["model_type"] not in ("llama", "gemma2", "gemma3_text"):
        return
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if width % heads:
        raise ValueError(
            f"transformers cannot open a {config['model_type']!r} model of hidden_size = {width} "
            f"with num_attention_heads = {heads}: the width must be a multiple of the heads."
        )


def _layers(config: Config, key: str = "num_hidden_layers") -> int:
    layers = size(config, key)
    if layers > 10_000:
        raise ValueError(f"config.json: {key} = {layers} is more layers than any model has.")
    return layers


def _activation(config: Config, key: str, default: str) -> models.Activation:
    name = config.get(key) or default
    try:
        return activation_named(name)
    except ValueError as expected:
        raise ValueError(f"config.json: {key} = {_text.quoted(name)}; {expected}.") from None


def _common(config: Config, **changes: Any) -> DecoderConfig:
    """The config from the keys shared by Llama-like models, with a family's changes."""
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_width = size(config, "head_dim", width // heads)
    layers = _layers(config)
    bias = bool(config.get("attention_bias", False))
    decoder_config = DecoderConfig(
        vocabulary=size(config, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        key_heads=size(config, "num_key_value_heads", heads),
        head_width=head_width,
        hidden=size(config, "intermediate_size"),
        norm=Norm(epsilon(config, "rms_norm_eps", 1e-6)),
        activation=_activation(config, "hidden_act", "silu"),
        has_qkv_bias=bias,
        has_out_bias=bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )
    if "ropes" not in changes:
        changes["ropes"] = (rope(config, head_width),) * layers
    return decoder_config._replace(**changes)


def _mistral(config: Config) -> DecoderConfig:
    return _common(config, windows=windows(config, _layers(config), lambda i: True))


def _qwen2(config: Config) -> DecoderConfig:
    return _common(config, windows=_qwen_windows(config), has_qkv_bias=True, has_out_bias=False)


def _qwen3(config: Config) -> DecoderConfig:
    head_width = size(config, "head_dim", 128)
    config = {**config, "head_dim": head_width}
    return _common(config, windows=_qwen_windows(config), has_head_norms=True)


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    first = config.get("max_window_layers", 28)
    return windows_if_used(config, _layers(config), lambda i: i >= first)


def _smollm3(config: Config) -> DecoderConfig:
    layers = _layers(config)
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    rotary = rope(config, size(config, "head_dim", width // heads))
    rotates = config.get("no_rope_layers")  # 1 if a layer rotates, despite the name
    if rotates is None:
        interval = config.get("no_rope_layer_interval", 4)
        rotates = [int((i + 1) % interval != 0) for i in range(layers)]
    no_rotation = rotary._replace(frequencies=(0.0,) * len(rotary.frequencies), scale=1.0)
    spans = windows_if_used(config, layers, lambda i: not rotates[i], None)
    return _common(
        config, ropes=tuple(rotary if r else no_rotation for r in rotates), windows=spans
    )


def _gemma(config: Config) -> DecoderConfig:
    return _common(
        config,
        norm=Norm(epsilon(config, "rms_norm_eps", 1e-6), has_unit_offset=True),
        activation=_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=math.sqrt(size(config, "hidden_size")),
    )


def _gemma1(config: Config) -> DecoderConfig:
    """Reads Gemma's configuration; its successors only read `hidden_activation`.

    Files of early 2024 say `hidden_act: gelu` and mean the tanh approximation.
    """
    legacy = config.get("hidden_act") in (None, "gelu")
    legacy_name = "gelu_pytorch_tanh" if legacy else config["hidden_act"]
    name = legacy_name if config.get("hidden_activation") is None else config["hidden_activation"]
    names = {"hidden_act": legacy_name, "hidden_activation": name}
    activation, newer_activation = (_activation(names, key, "") for key in names)
    if activation is not newer_activation:
        raise ValueError(f"hidden_act and hidden_activation contradict each other: {names}.")
    return _gemma({**config, "hidden_activation": name})


def _gemma2(config: Config) -> DecoderConfig:
    return _gemma(config)._replace(
        windows=windows(config, _layers(config), lambda i: i % 2 == 0),
        has_post_norms=True,
        attention_scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=optional(config, "attn_logit_softcapping", 50.0),
        final_softcap=optional(config, "final_logit_softcapping", 30.0),
    )


def _gemma3(config: Config) -> DecoderConfig:
    interval = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    spans = windows(config, _layers(config), lambda i: (i + 1) % interval != 0)
    if not spans:
        raise ValueError("config.json: sliding_window = null of a 'gemma3_text' model.")
    head_width = size(config, "head_dim", 256)
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:
        full_rope = rope(config, head_width, parameters["full_attention"], 1_000_000.0)
        sliding_rope = rope(config, head_width, parameters["sliding_attention"], 10_000.0)
    else:
        parameters = scaling(config)
        full_rope = rope(config, head_width, parameters, number(config, "rope_theta", 1_000_000.0))
        sliding_rope = rope(
            config, head_width, {}, number(config, "rope_local_base_freq", 10_000.0)
        )
    other_keys = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
    return _gemma({**other_keys, "head_dim": head_width})._replace(
        windows=spans,
        ropes=tuple(full_rope if w is None else sliding_rope for w in spans),
        has_post_norms=True,
        has_head_norms=True,
        attention_scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=optional(config, "final_logit_softcapping"),
    )


# Code that was published with the first weights, and that transformers took over.
_PHI3_CODE = re.compile(r"(.+--)?(configuration_phi3\.Phi3Config|modeling_phi3\.Phi3ForCausalLM)")


def _phi3(config: Config) -> DecoderConfig:
    code = config.get("auto_map") or {}
    if not all(_PHI3_CODE.fullmatch(str(name)) for name in code.values()):
        raise ValueError(f"config.json: auto_map = {_text.shown(code)} refers to custom code.")
    return _common(
        config,
        windows=windows(config, _layers(config), lambda i: True, None),
        norm=Norm(epsilon(config, "rms_norm_eps", 1e-5)),
        fuses_qkv=True,
        fuses_gate=True,
        has_qkv_bias=False,
        has_out_bias=False,
    )


def _olmo2(config: Config) -> DecoderConfig:
    return _common(
        config,
        norm=Norm(epsilon(config, "rms_norm_eps", 1e-5)),
        has_pre_norms=False,
        has_post_norms=True,
        has_projection_norms=True,
    )


def _gpt2(config: Config) -> DecoderConfig:
    width, heads = size(config, "n_embd"), size(config, "n_head")
    return DecoderConfig(
        vocabulary=size(config, "vocab_size"),
        width=width,
        layers=_layers(config, "n_layer"),
        heads=heads,
        key_heads=heads,
        head_width=width // heads,
        hidden=size(config, "n_inner", 4 * width),
        learned_positions=size(config, "n_positions", 1024),
        norm=Norm(epsilon(config, "layer_norm_epsilon", 1e-5), is_centered=True),
        has_norm_bias=True,
        activation=_activation(config, "activation_function", "gelu_new"),
        is_gated=False,
        fuses_qkv=True,
        has_qkv_bias=True,
        has_out_bias=True,
        has_mlp_bias=True,
        is_tied=bool(config["tie_word_embeddings"]),
    )


_sizes = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters "
    "max_position_embeddings attention_bias "
)


def _keys(more: str = "") -> frozenset[str]:
    return frozenset((_sizes + more).split())


_windowed = "sliding_window layer_types "
_gemma_keys = "hidden_activation hidden_act "
_qwen_keys = _keys("hidden_act use_sliding_window max_window_layers " + _windowed)
_TIED = {"tie_word_embeddings": True}
# Values that a config may lack and that cannot be derived from the others.
_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, **_TIED},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256, **_TIED},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, **_TIED},
    "gemma3_text": {"num_key_value_heads": 4, **_TIED},
    "gpt2": _TIED,
}
_CAUSAL_ONLY = {"use_bidirectional_attention": (None, False)}
FAMILIES: Mapping[str, DecoderFamily] = {
    "llama": DecoderFamily(_common, rules.llama, _keys("hidden_act mlp_bias")),
    "mistral": DecoderFamily(_mistral, rules.llama, _keys("hidden_act " + _windowed)),
    "qwen2": DecoderFamily(_qwen2, rules.llama, _qwen_keys, {"use_mrope": (False,)}),
    "qwen3": DecoderFamily(_qwen3, (*rules.llama, *rules.query_key_norms), _qwen_keys),
    "smollm3": DecoderFamily(
        _smollm3,
        rules.llama,
        _keys(
            "hidden_act mlp_bias no_rope_layers no_rope_layer_interval use_sliding_window "
            "max_window_layers " + _windowed
        ),
    ),
    "gemma": DecoderFamily(_gemma1, rules.llama, _keys(_gemma_keys), _CAUSAL_ONLY),
    "gemma2": DecoderFamily(
        _gemma2,
        (*rules.outside, *rules.separate, *rules.down, *rules.both_norms),
        _keys(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            + _gemma_keys
            + _windowed
        ),
        _CAUSAL_ONLY,
    ),
    "gemma3_text": DecoderFamily(
        _gemma3,
        (*rules.outside, *rules.separate, *rules.down, *rules.both_norms, *rules.query_key_norms),
        _keys(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            "sliding_window_pattern rope_local_base_freq " + _gemma_keys + _windowed
        ),
        # transformers does not read Gemma 3's softcapping of attention.
        {"use_bidirectional_attention": (False, None), "attn_logit_softcapping": (None,)},
    ),
    "phi3": DecoderFamily(
        _phi3,
        (*rules.outside, *rules.fused, *rules.down, *rules.pre_norms),
        _keys(
            "hidden_act partial_rotary_factor original_max_position_embeddings sliding_window "
            "auto_map"
        ),
        # All layers have the window; the rest belongs to code published with the first weights.
        {
            "layer_types": (None,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
    ),
    "olmo2": DecoderFamily(
        _olmo2,
        (*rules.outside, *rules.separate, *rules.down, *rules.post_norms, *rules.query_key_norms),
        _keys("hidden_act"),
    ),
    "gpt2": DecoderFamily(
        _gpt2,
        rules.gpt2,
        frozenset(
            "vocab_size n_embd n_head n_layer n_inner n_positions layer_norm_epsilon "
            "activation_function tie_word_embeddings".split()
        ),
        {
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        prefix="transformer.",
    ),
}
_CAUSAL = "Llama Mistral Qwen2 Qwen3 SmolLM3 Gemma Gemma2 Phi3 Olmo2".split()
ARCHITECTURES = {name.lower(): f"{name}ForCausalLM" for name in _CAUSAL}
ARCHITECTURES |= {"gemma3_text": "Gemma3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
