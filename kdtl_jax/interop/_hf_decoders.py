"""From the `config.json` of a published decoder to a `models.DecoderConfig`, and its tensor names.

One table per family says which keys of the configuration are read and which of them must have
a certain value. A key that is neither read nor known to change no output is refused by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from kdtl_jax import models
from kdtl_jax.interop.naming import Axes, Rule, linear, same
from kdtl_jax.models import DecoderConfig, Norm, Rope

Config = Mapping[str, Any]

# Keys that change no output: bookkeeping, generation defaults, training only.
HARMLESS = frozenset(
    "architectures attention_dropout auto_map bos_token_id cache_implementation classifier_dropout "
    "chunk_size_feed_forward dtype embd_pdrop eos_token_id finetuning_task gradient_checkpointing "
    "hidden_dropout id2label initializer_range keys_to_ignore_at_inference label2id model_type "
    "max_position_embeddings n_ctx n_positions num_labels output_attentions output_hidden_states "
    "pad_token_id "
    "embd_pdrop resid_pdrop attn_pdrop pretraining_tp problem_type reorder_and_upcast_attn "
    "return_dict return_dict_in_generate rope_theta scale_attn_by_inverse_layer_idx "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "task_specific_params tie_encoder_decoder torch_dtype transformers_version unk_token_id "
    "use_cache vocab_size_per_layer_input _name_or_path _attn_implementation "
    "_attn_implementation_autoset _sliding_window_pattern attn_implementation is_encoder_decoder "
    "resid_pdrop sep_token_id use_bfloat16 decoder_start_token_id rope_interleaved "
    "is_llama_config transformers.js_config".split()
)


class Family(NamedTuple):
    """What a family's configuration means.

    `build` reads it; `reads` names the keys it looks at; `requires` lists the values that are
    built, by key, where a key has others.
    """

    build: Callable[[Config], DecoderConfig]
    rules: tuple[Rule, ...]
    reads: frozenset[str]
    requires: Mapping[str, tuple[Any, ...]] = {}
    prefix: str = "model."


def decoder(config: Config) -> tuple[DecoderConfig, tuple[Rule, ...]]:
    """The decoder of a configuration, and the rules that name its tensors.

    Raises:
      ValueError: for an unknown family, a key that is not understood, a value whose computation is
        not built here, or numbers that are no sizes.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"model_type {name!r} is no decoder that is built here; known are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[name]
    unknown = sorted(config.keys() - family.reads - family.requires.keys() - HARMLESS)
    if unknown:
        raise ValueError(
            f"config.json of a {name!r} model has keys that are not understood here: "
            f"{', '.join(unknown)}. They may change the outputs; remove them only if they do not."
        )
    for key, allowed in family.requires.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"{key} = {config[key]!r} of a {name!r} model is not built here (only "
                f"{' or '.join(map(repr, allowed))})."
            )
    return family.build(config), family.rules


def _size(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"config.json: {key} must be a positive whole number, got {value!r}.")
    return value


def _number(config: Config, key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"config.json: {key} must be a finite number, got {value!r}.")
    return float(value)


def _optional(config: Config, key: str, default: float | None = None) -> float | None:
    return None if config.get(key, default) is None else _number(config, key, default or 0.0)


def _layers(config: Config, key: str = "num_hidden_layers") -> int:
    layers = _size(config, key)
    if layers > 10_000:
        raise ValueError(f"config.json: {key} = {layers} is more layers than any model has.")
    return layers


def _activation(config: Config, key: str, default: str) -> Callable[..., Any]:
    known = {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "gelu": models.gelu,
        "gelu_new": models.gelu_tanh,
        "gelu_pytorch_tanh": models.gelu_tanh,
        "gelu_fast": models.gelu_tanh,
        "relu": jax.nn.relu,
    }
    name = config.get(key) or default
    if name not in known:
        raise ValueError(f"{key} = {name!r} is not built here (only {', '.join(known)}).")
    return known[name]


def rope(
    config: Config, width: int, given: Config | None = None, theta: float | None = None
) -> Rope:
    """Rotary tables as transformers computes them: default, linear, llama3, yarn, longrope.

    Args:
      config: the whole configuration.
      width: of a head.
      given: the parameters of this kind of layer; None reads `rope_parameters` (transformers 5) or
        `rope_scaling`.
      theta: the base where the parameters have none; None reads `rope_theta`.

    Raises:
      ValueError: for another kind.
    """
    if given is None:
        given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = _number(given, "rope_theta", theta or _number(config, "rope_theta", 10_000.0))
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    width = int(width * partial)
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind == "default":
        return Rope(tuple(plain))
    longest = _size(config, "max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings", longest
    )
    if kind in ("longrope", "su"):
        stretch = given.get("factor") or longest / original
        scale = given.get("attention_factor")
        if scale is None:
            scale = 1.0
            if stretch > 1:
                scale = math.sqrt(1 + math.log(stretch) / math.log(original))
        short = tuple(f / s for f, s in zip(plain, given["short_factor"], strict=True))
        long = tuple(f / s for f, s in zip(plain, given["long_factor"], strict=True))
        return Rope(short, scale, long, original)
    factor = _number(given, "factor", 1.0)
    if kind == "linear":
        return Rope(tuple(f / factor for f in plain))
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]

        def blended(frequency: float) -> float:
            turns = original * frequency / (2 * math.pi)
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            return share * frequency + (1 - share) * frequency / factor

        return Rope(tuple(blended(f) for f in plain))
    if kind == "yarn":
        return _yarn(given, plain, theta, width, factor, original)
    raise ValueError(
        f"rope type {kind!r} is not built here (only default, linear, llama3, yarn and longrope)."
    )


def _yarn(
    given: Config, plain: Sequence[float], theta: float, width: int, factor: float, original: int
) -> Rope:
    """YaRN: short waves as they are, long ones stretched, a ramp between (2309.00071)."""

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1

    attention = given.get("attention_factor")
    if attention is None:
        m, m_all = given.get("mscale"), given.get("mscale_all_dim")
        attention = scale(m) / scale(m_all) if m and m_all else scale(1.0)

    def dimension(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(len(plain))]
    mixed = [r * f / factor + (1 - r) * f for r, f in zip(ramp, plain, strict=True)]
    return Rope(tuple(mixed), attention)


def _common(config: Config, **changes: Any) -> DecoderConfig:
    """What the keys shared by Llama and its kin say, and a family's changes to it."""
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_width = _size(config, "head_dim", width // heads)
    layers = _layers(config)
    bias = bool(config.get("attention_bias", False))
    built = DecoderConfig(
        vocabulary=_size(config, "vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        key_heads=_size(config, "num_key_value_heads", heads),
        head_width=head_width,
        hidden=_size(config, "intermediate_size"),
        norm=Norm(_number(config, "rms_norm_eps", 1e-6)),
        activation=_activation(config, "hidden_act", "silu"),
        has_qkv_bias=bias,
        has_out_bias=bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )
    if "ropes" not in changes:
        changes["ropes"] = (rope(config, head_width),) * layers
    return built._replace(**changes)


def _windows(config: Config, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of every layer: by `layer_types` where it is given, else by `sliding(layer)`."""
    window, layers = config.get("sliding_window"), _layers(config)
    if window is None:
        return ()
    window = _size(config, "sliding_window")
    types = config.get("layer_types")
    if types is None:
        return tuple(window if sliding(i) else None for i in range(layers))
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown or len(types) != layers:
        raise ValueError(
            f"layer_types must be {layers} times 'sliding_attention' or 'full_attention', got "
            f"{len(types)} entries{f' with {unknown}' if unknown else ''}."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _llama(config: Config) -> DecoderConfig:
    return _common(config)


def _mistral(config: Config) -> DecoderConfig:
    return _common(config, windows=_windows(config, lambda i: True))


def _qwen2(config: Config) -> DecoderConfig:
    return _common(
        config,
        windows=_qwen_windows(config),
        has_qkv_bias=True,
        has_out_bias=False,
    )


def _qwen3(config: Config) -> DecoderConfig:
    head_width = _size(config, "head_dim", 128)
    config = {**config, "head_dim": head_width}
    return _common(config, windows=_qwen_windows(config), has_head_norms=True)


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    if not config.get("use_sliding_window", False):
        return ()
    first = config.get("max_window_layers", 28)
    return _windows(config, lambda i: i >= first)


def _smollm3(config: Config) -> DecoderConfig:
    layers, head_width = (
        _layers(config),
        _size(config, "hidden_size") // _size(config, "num_attention_heads"),
    )
    own = rope(config, head_width)
    rotates = config.get("no_rope_layers")  # 1 where a layer rotates, despite the name
    if rotates is None:
        every = config.get("no_rope_layer_interval", 4)
        rotates = [int((i + 1) % every != 0) for i in range(layers)]
    still = own._replace(frequencies=(0.0,) * len(own.frequencies), scale=1.0)
    windows = _windows(config, lambda i: True) if config.get("use_sliding_window") else ()
    return _common(config, ropes=tuple(own if r else still for r in rotates), windows=windows)


def _gemma(config: Config) -> DecoderConfig:
    return _common(
        config,
        norm=Norm(_number(config, "rms_norm_eps", 1e-6), has_unit_offset=True),
        activation=_gemma_activation(config),
        embedding_scale=math.sqrt(_size(config, "hidden_size")),
        is_tied=bool(config.get("tie_word_embeddings", True)),
    )


def _gemma_activation(config: Config) -> Callable[..., Any]:
    """`hidden_activation`; Gemma's files of early 2024 say `hidden_act: gelu` and mean tanh's."""
    return _activation(config, "hidden_activation", "gelu_pytorch_tanh")


def _gemma2(config: Config) -> DecoderConfig:
    return _gemma(config)._replace(
        windows=_windows(config, lambda i: i % 2 == 0),
        has_post_norms=True,
        attention_scale=_number(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_optional(config, "attn_logit_softcapping", 50.0),
        final_softcap=_optional(config, "final_logit_softcapping", 30.0),
    )


def _gemma3(config: Config) -> DecoderConfig:
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    windows = _windows(config, lambda i: (i + 1) % every != 0)
    head_width = _size(config, "head_dim", 256)
    parameters = config.get("rope_parameters") or {}
    if "full_attention" in parameters:
        whole = rope(config, head_width, parameters["full_attention"], 1_000_000.0)
        near = rope(config, head_width, parameters["sliding_attention"], 10_000.0)
    else:
        scaling = {**(config.get("rope_scaling") or {}), **parameters}
        whole = rope(config, head_width, scaling, _number(config, "rope_theta", 1_000_000.0))
        near = rope(config, head_width, {}, _number(config, "rope_local_base_freq", 10_000.0))
    plain = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
    return _gemma({**plain, "head_dim": head_width})._replace(
        windows=windows,
        ropes=tuple(whole if w is None else near for w in windows),
        has_post_norms=True,
        has_head_norms=True,
        attention_scale=_number(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_optional(config, "attn_logit_softcapping"),
        final_softcap=_optional(config, "final_logit_softcapping"),
    )


def _phi3(config: Config) -> DecoderConfig:
    return _common(
        config,
        windows=_windows(config, lambda i: True),
        norm=Norm(_number(config, "rms_norm_eps", 1e-5)),
        fuses_qkv=True,
        fuses_gate=True,
        has_qkv_bias=False,
        has_out_bias=False,
    )


def _olmo2(config: Config) -> DecoderConfig:
    return _common(
        config,
        norm=Norm(_number(config, "rms_norm_eps", 1e-5)),
        has_pre_norms=False,
        has_post_norms=True,
        has_projection_norms=True,
    )


def _gpt2(config: Config) -> DecoderConfig:
    width, heads = _size(config, "n_embd"), _size(config, "n_head")
    return DecoderConfig(
        vocabulary=_size(config, "vocab_size"),
        width=width,
        layers=_layers(config, "n_layer"),
        heads=heads,
        key_heads=heads,
        head_width=width // heads,
        hidden=_size(config, "n_inner", 4 * width),
        learned_positions=_size(config, "n_positions", 1024),
        norm=Norm(_number(config, "layer_norm_epsilon", 1e-5), is_centered=True),
        has_norm_bias=True,
        activation=_activation(config, "activation_function", "gelu_new"),
        is_gated=False,
        fuses_qkv=True,
        has_qkv_bias=True,
        has_out_bias=True,
        has_mlp_bias=True,
        is_tied=bool(config.get("tie_word_embeddings", True)),
    )


def _dense(torch: str, jax: str, axes: Axes = linear) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{jax}/kernel", axes), Rule(f"{torch}.bias", f"{jax}/bias")


def _norm(torch: str, jax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{jax}/scale"), Rule(f"{torch}.bias", f"{jax}/bias")


_layer = "layers.{i}"
_own = "layers_{i}"
_outside = (
    Rule("embed_tokens.weight", "tokens/embedding"),
    Rule("norm.weight", "norm/scale"),
    *_dense("lm_head", "head"),
)
_separate = (
    *_dense(f"{_layer}.self_attn.q_proj", f"{_own}/attention/query"),
    *_dense(f"{_layer}.self_attn.k_proj", f"{_own}/attention/key"),
    *_dense(f"{_layer}.self_attn.v_proj", f"{_own}/attention/value"),
    *_dense(f"{_layer}.mlp.gate_proj", f"{_own}/mlp/gate"),
    *_dense(f"{_layer}.mlp.up_proj", f"{_own}/mlp/up"),
)
_fused = (
    *_dense(f"{_layer}.self_attn.qkv_proj", f"{_own}/attention/qkv"),
    *_dense(f"{_layer}.mlp.gate_up_proj", f"{_own}/mlp/gate_up"),
)
_down = (
    *_dense(f"{_layer}.self_attn.o_proj", f"{_own}/attention/out"),
    *_dense(f"{_layer}.mlp.down_proj", f"{_own}/mlp/down"),
)
_query_key_norms = (
    Rule(f"{_layer}.self_attn.q_norm.weight", f"{_own}/attention/query_norm/scale"),
    Rule(f"{_layer}.self_attn.k_norm.weight", f"{_own}/attention/key_norm/scale"),
)
_pre_norms = (
    Rule(f"{_layer}.input_layernorm.weight", f"{_own}/attention_norm/scale"),
    Rule(f"{_layer}.post_attention_layernorm.weight", f"{_own}/mlp_norm/scale"),
)
_post_norms = (
    Rule(f"{_layer}.post_attention_layernorm.weight", f"{_own}/attention_post_norm/scale"),
    Rule(f"{_layer}.post_feedforward_layernorm.weight", f"{_own}/mlp_post_norm/scale"),
)
_both_norms = (
    Rule(f"{_layer}.input_layernorm.weight", f"{_own}/attention_norm/scale"),
    Rule(f"{_layer}.pre_feedforward_layernorm.weight", f"{_own}/mlp_norm/scale"),
    *_post_norms,
)
_llama_rules = (*_outside, *_separate, *_down, *_pre_norms)
_gpt2_rules = (
    Rule("wte.weight", "tokens/embedding"),
    Rule("wpe.weight", "positions/embedding"),
    # GPT-2's Conv1D keeps [in, out], as Flax does.
    *_dense("h.{i}.attn.c_attn", f"{_own}/attention/qkv", same),
    *_dense("h.{i}.attn.c_proj", f"{_own}/attention/out", same),
    *_norm("h.{i}.ln_1", f"{_own}/attention_norm"),
    *_dense("h.{i}.mlp.c_fc", f"{_own}/mlp/up", same),
    *_dense("h.{i}.mlp.c_proj", f"{_own}/mlp/down", same),
    *_norm("h.{i}.ln_2", f"{_own}/mlp_norm"),
    *_norm("ln_f", "norm"),
    Rule("lm_head.weight", "head/kernel", linear),
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
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama, _llama_rules, _keys("hidden_act mlp_bias")),
    "mistral": Family(_mistral, _llama_rules, _keys("hidden_act " + _windowed)),
    "qwen2": Family(
        _qwen2, _llama_rules, _keys("hidden_act use_sliding_window max_window_layers " + _windowed)
    ),
    "qwen3": Family(
        _qwen3,
        (*_llama_rules, *_query_key_norms),
        _keys("hidden_act use_sliding_window max_window_layers " + _windowed),
    ),
    "smollm3": Family(
        _smollm3,
        _llama_rules,
        _keys(
            "hidden_act mlp_bias no_rope_layers no_rope_layer_interval use_sliding_window "
            "max_window_layers " + _windowed
        ),
    ),
    "gemma": Family(
        _gemma, _llama_rules, _keys(_gemma_keys), {"use_bidirectional_attention": (None, False)}
    ),
    "gemma2": Family(
        _gemma2,
        (*_outside, *_separate, *_down, *_both_norms),
        _keys(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            + _gemma_keys
            + _windowed
        ),
        {"use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": Family(
        _gemma3,
        (*_outside, *_separate, *_down, *_both_norms, *_query_key_norms),
        _keys(
            "query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping "
            "sliding_window_pattern rope_local_base_freq " + _gemma_keys + _windowed
        ),
        {"use_bidirectional_attention": (False, None)},
    ),
    "phi3": Family(
        _phi3,
        (*_outside, *_fused, *_down, *_pre_norms),
        _keys("hidden_act partial_rotary_factor original_max_position_embeddings " + _windowed),
    ),
    "olmo2": Family(
        _olmo2,
        (*_outside, *_separate, *_down, *_post_norms, *_query_key_norms),
        _keys("hidden_act"),
    ),
    "gpt2": Family(
        _gpt2,
        _gpt2_rules,
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
