"""Decoders of text as Linen modules: GPT-2, Llama, Mistral, Qwen2."""

import math
from collections.abc import Mapping
from typing import Any

from kdtl_jax import _text, models
from kdtl_jax.interop._hf_config import (
    Config,
    Field,
    Limits,
    activation,
    as_given,
    choice,
    count,
    epsilon,
    flag,
    layers,
    optional,
    share,
)
from kdtl_jax.interop._hf_encoders import check_heads, tokens
from kdtl_jax.interop._hf_family import Family, Found, Head, dense, embedding, norm
from kdtl_jax.interop._hf_rope import frequencies
from kdtl_jax.interop.naming import Rule, linear, same

_HEAD = (Rule("lm_head.weight", "head/kernel", linear),)


def _gpt2(v: dict[str, Any], found: Found) -> models.GPT2:
    width = v["n_embd"]
    return models.GPT2(
        vocabulary=v["vocab_size"],
        width=width,
        layers=v["n_layer"],
        heads=check_heads(width, v["n_head"], "n_head"),
        hidden=v["n_inner"] or 4 * width,
        positions=v["n_positions"],
        activation=v["activation_function"],
        norm_epsilon=v["layer_norm_epsilon"],
        dropout=v["resid_pdrop"],
        attention_dropout=v["attn_pdrop"],
        embedding_dropout=v["embd_pdrop"],
        has_head=found.is_tied or found.has("lm_head.weight"),
        is_tied=found.is_tied,
    )


gpt2 = Family(
    ("gpt2",),
    "GPT2Model",
    "transformer.",
    (
        count("vocab_size"),
        count("n_embd"),
        layers("n_layer"),
        count("n_head"),
        optional(count("n_inner")),
        count("n_positions"),
        activation("activation_function", "gelu_new"),
        epsilon("layer_norm_epsilon", 1e-5),
        share("resid_pdrop", 0.1),
        share("attn_pdrop", 0.1),
        share("embd_pdrop", 0.1),
        flag("tie_word_embeddings", True),
        choice("scale_attn_weights", True),
        choice("scale_attn_by_inverse_layer_idx", False),
        choice("add_cross_attention", False),
    ),
    (
        *embedding("wte", "tokens"),
        *embedding("wpe", "positions"),
        # GPT-2's Conv1D keeps [in, out], as Flax does.
        *dense("h.{i}.attn.c_attn", "layers_{i}/attention/qkv", same),
        *dense("h.{i}.attn.c_proj", "layers_{i}/attention/out", same),
        *norm("h.{i}.ln_1", "layers_{i}/attention_norm"),
        *dense("h.{i}.mlp.c_fc", "layers_{i}/mlp/up", same),
        *dense("h.{i}.mlp.c_proj", "layers_{i}/mlp/down", same),
        *norm("h.{i}.ln_2", "layers_{i}/mlp_norm"),
        *norm("ln_f", "norm"),
    ),
    _gpt2,
    tokens,
    heads=(Head("causal", ("GPT2LMHeadModel", "GPT2DoubleHeadsModel"), _HEAD),),
    copies={"lm_head.weight": "tokens/embedding"},
    # Upcasting changes no float32 number; the summary belongs to heads that are not built here.
    harmless="n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj",
    buffers=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),
    other_heads=(r"(score|multiple_choice_head|classifier|qa_outputs)\..*",),
    depth="n_layer",
    sides={"vocab_size": ("tokens/embedding", 0), "n_positions": ("positions/embedding", 0)},
)


def _llama(v: dict[str, Any], found: Found) -> models.Llama:
    width, heads = v["hidden_size"], v["num_attention_heads"]
    if v["head_dim"] is None:
        check_heads(width, heads)
    head_width = v["head_dim"] or width // heads
    key_heads = v["num_key_value_heads"] or heads
    check_heads(heads, key_heads, "num_key_value_heads")
    bias = v.get("attention_bias", False)
    return models.Llama(
        vocabulary=v["vocab_size"],
        width=width,
        layers=v["num_hidden_layers"],
        heads=heads,
        key_heads=key_heads,
        hidden=v["intermediate_size"],
        rope_frequencies=rope_frequencies(v, head_width),
        head_width=head_width,
        activation=v["hidden_act"],
        norm_epsilon=v["rms_norm_eps"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=v.get("mlp_bias", False),
        window=v.get("sliding_window"),
        attention_dropout=v["attention_dropout"],
        has_head=found.is_tied or found.has("lm_head.weight"),
        is_tied=found.is_tied,
    )


def _qwen2(v: dict[str, Any], found: Found) -> models.Llama:
    kinds = v["layer_types"]
    if kinds is not None and kinds != ["full_attention"] * v["num_hidden_layers"]:
        raise ValueError(
            f"config.json: layer_types = {_text.shown(kinds)} is not built here (only one "
            "'full_attention' per layer); the outputs would be wrong."
        )
    return _llama(v, found).clone(qkv_bias=True)


def rope_frequencies(config: Config, head_width: int) -> tuple[float, ...]:
    """Radians per position of each channel pair: plain, linearly scaled, or Llama 3's blend.

    Llama 3 divides the frequency of long waves by `factor`, leaves short waves alone, and blends
    between `original / low_freq_factor` and `original / high_freq_factor` positions per turn.
    """
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        entry = {} if config.get(key) is None else config[key]
        if not isinstance(entry, Mapping):
            raise ValueError(f"config.json: {key} = {_text.shown(entry)}; expected an object.")
        clash = [name for name in entry if name in rope and rope[name] != entry[name]]
        if clash:
            raise ValueError(
                f"config.json: rope_scaling and rope_parameters differ in {_text.listed(clash)}."
            )
        rope |= entry
    rope.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}
    if kind not in known or not isinstance(kind, str):
        raise ValueError(
            f"rope type {_text.quoted(kind)} is not built here (only default, linear and llama3)."
        )
    strange = rope.keys() - {"rope_theta", "rope_type", "type", *known[kind]}
    if rope.get("partial_rotary_factor") == 1:
        strange -= {"partial_rotary_factor"}
    if strange:
        named = _text.listed(sorted(map(str, strange)))
        raise ValueError(f"config.json: the rope type {kind!r} does not read {named}.")
    numbers = {key: _positive(key, rope.get(key)) for key in ("rope_theta", *known[kind])}
    theta = numbers["rope_theta"]
    plain = frequencies(theta, head_width)
    if kind == "default":
        return tuple(plain)
    factor = numbers["factor"]
    if kind == "linear":
        return tuple(f / factor for f in plain)
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    original = numbers["original_max_position_embeddings"]
    if high <= low:
        raise ValueError("config.json: high_freq_factor must be above low_freq_factor.")

    def blended(frequency: float) -> float:
        turns = original * frequency / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        return share * frequency + (1 - share) * frequency / factor

    return tuple(blended(f) for f in plain)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _positive(key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1e15:
        raise ValueError(f"config.json: {key} = {_text.shown(value)}; expected a positive number.")
    return float(value)


_LLAMA_FIELDS = (
    count("vocab_size"),
    count("hidden_size"),
    layers("num_hidden_layers"),
    count("num_attention_heads"),
    optional(count("num_key_value_heads")),
    count("intermediate_size"),
    optional(count("head_dim")),
    activation("hidden_act", "silu"),
    epsilon("rms_norm_eps", 1e-6),
    share("attention_dropout", 0.0),
    as_given("rope_scaling"),
    as_given("rope_parameters"),
    as_given("rope_theta", 10_000.0),
    choice("partial_rotary_factor", 1.0, 1),
    flag("tie_word_embeddings", False),
)
llama = Family(
    ("llama",),
    "LlamaModel",
    "model.",
    (*_LLAMA_FIELDS, flag("attention_bias", False), flag("mlp_bias", False)),
    (
        *embedding("embed_tokens", "tokens"),
        *dense("layers.{i}.self_attn.q_proj", "layers_{i}/attention/query"),
        *dense("layers.{i}.self_attn.k_proj", "layers_{i}/attention/key"),
        *dense("layers.{i}.self_attn.v_proj", "layers_{i}/attention/value"),
        *dense("layers.{i}.self_attn.o_proj", "layers_{i}/attention/out"),
        Rule("layers.{i}.input_layernorm.weight", "layers_{i}/attention_norm/scale"),
        *dense("layers.{i}.mlp.gate_proj", "layers_{i}/mlp/gate"),
        *dense("layers.{i}.mlp.up_proj", "layers_{i}/mlp/up"),
        *dense("layers.{i}.mlp.down_proj", "layers_{i}/mlp/down"),
        Rule("layers.{i}.post_attention_layernorm.weight", "layers_{i}/mlp_norm/scale"),
        Rule("norm.weight", "norm/scale"),
    ),
    _llama,
    tokens,
    heads=(Head("causal", ("LlamaForCausalLM",), _HEAD),),
    copies={"lm_head.weight": "tokens/embedding"},
    # Tensor-parallel pretraining sliced its products; positions need no table.
    harmless="pretraining_tp max_position_embeddings",
    buffers=(r"(.*\.)?rotary_emb\.inv_freq",),
    other_heads=(r"(score|classifier|qa_outputs|transformer\.qa_outputs)\..*",),
    depth="num_hidden_layers",
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "intermediate_size": ("layers_0/mlp/up/kernel", 1),
    },
)
mistral = llama._replace(
    model_types=("mistral",),
    base="MistralModel",
    fields=(*_LLAMA_FIELDS, optional(count("sliding_window", 4096, most=1 << 31))),
    heads=(Head("causal", ("MistralForCausalLM",), _HEAD),),
)


def _no_windows(value: Any, limits: Limits) -> bool:
    if value is not False:
        raise ValueError(
            "windows of Qwen2 are not built as a Linen module; interop.decoders.load reads them"
        )
    return False


qwen2 = llama._replace(
    model_types=("qwen2",),
    base="Qwen2Model",
    fields=(
        *_LLAMA_FIELDS,
        Field("use_sliding_window", _no_windows, False),
        as_given("layer_types"),
    ),
    build=_qwen2,
    heads=(Head("causal", ("Qwen2ForCausalLM",), _HEAD),),
    # Windows are not used where use_sliding_window is false.
    harmless="max_position_embeddings sliding_window max_window_layers",
    per_layer=("layer_types",),
)
