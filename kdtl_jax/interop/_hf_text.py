"""Text encoders with relative positions: T5, ModernBERT, DeBERTa-v2."""

from typing import Any

from kdtl_jax import _text, models
from kdtl_jax.interop._hf_config import (
    activation,
    activation_named,
    as_given,
    choice,
    count,
    epsilon,
    flag,
    layers,
    number,
    optional,
    share,
)
from kdtl_jax.interop._hf_encoders import check_heads, tokens
from kdtl_jax.interop._hf_family import OWN_BIAS, Contents, Family, Head, dense, embedding, norm
from kdtl_jax.interop._hf_rope import rope
from kdtl_jax.interop.naming import Rule, conv1d, linear


def _t5(v: dict[str, Any], contents: Contents) -> models.T5Encoder:
    kind = v["feed_forward_proj"]
    is_gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name
    if v["dense_act_fn"] not in (None, name) or v["is_gated_act"] not in (None, is_gated):
        raise ValueError(
            f"config.json: feed_forward_proj = {kind!r} contradicts dense_act_fn or is_gated_act."
        )
    return models.T5Encoder(
        vocabulary=v["vocab_size"],
        width=v["d_model"],
        layers=v["num_layers"],
        heads=v["num_heads"],
        head_width=v["d_kv"],
        hidden=v["d_ff"],
        buckets=v["relative_attention_num_buckets"],
        most=v["relative_attention_max_distance"],
        is_gated=is_gated,
        activation=activation_named(name),
        norm_epsilon=v["layer_norm_epsilon"],
        dropout=v["dropout_rate"],
    )


_T5_KINDS = ("relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu")
_T5_PREFIXES = ("", "transformer.")  # the latter below a classifier
_block = "encoder.block.{i}.layer"
_attention = f"{_block}.0.SelfAttention"


def _kernel(torch: str, jax: str) -> Rule:
    return Rule(f"{torch}.weight", f"{jax}/kernel", linear)


t5 = Family(
    ("t5",),
    "T5EncoderModel",
    "transformer.",
    (
        count("vocab_size"),
        count("d_model"),
        count("d_kv"),
        count("d_ff"),
        layers("num_layers"),
        count("num_heads"),
        count("relative_attention_num_buckets", 32, least=4),
        count("relative_attention_max_distance", 128, most=1 << 20),
        share("dropout_rate", 0.1),
        epsilon("layer_norm_epsilon", 1e-6),
        choice("feed_forward_proj", *_T5_KINDS),
        as_given("dense_act_fn"),
        as_given("is_gated_act"),
        choice("is_decoder", False),
    ),
    (
        *embedding("shared", "tokens"),
        *embedding(f"{_attention}.relative_attention_bias".replace("{i}", "0"), "relative"),
        _kernel(f"{_attention}.q", "layers_{i}/attention/query"),
        _kernel(f"{_attention}.k", "layers_{i}/attention/key"),
        _kernel(f"{_attention}.v", "layers_{i}/attention/value"),
        _kernel(f"{_attention}.o", "layers_{i}/attention/out"),
        Rule(f"{_block}.0.layer_norm.weight", "layers_{i}/attention_norm/scale"),
        _kernel(f"{_block}.1.DenseReluDense.wi_0", "layers_{i}/mlp/gate"),
        _kernel(f"{_block}.1.DenseReluDense.wi_1", "layers_{i}/mlp/up"),
        _kernel(f"{_block}.1.DenseReluDense.wi", "layers_{i}/mlp/up"),
        _kernel(f"{_block}.1.DenseReluDense.wo", "layers_{i}/mlp/down"),
        Rule(f"{_block}.1.layer_norm.weight", "layers_{i}/mlp_norm/scale"),
        Rule("encoder.final_layer_norm.weight", "norm/scale"),
    ),
    _t5,
    tokens,
    copies={f"{prefix}encoder.embed_tokens.weight": "tokens/embedding" for prefix in _T5_PREFIXES},
    harmless="num_decoder_layers scale_decoder_outputs tie_word_embeddings classifier_dropout "
    "n_positions",
    other_heads=(r"((transformer\.)?decoder|lm_head|classification_head|classifier)\..*",),
    depth="num_layers",
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "num_heads": ("relative/embedding", 1),
        "d_ff": ("layers_0/mlp/down/kernel", 0),
    },
)


_KINDS = ("full_attention", "sliding_attention")


def _modern_kinds(v: dict[str, Any]) -> list[str]:
    every = v["global_attn_every_n_layers"]
    return [_KINDS[i % every > 0] for i in range(v["num_hidden_layers"])]


def _modernbert(v: dict[str, Any], contents: Contents) -> models.ModernBert:
    depth = v["num_hidden_layers"]
    heads = check_heads(v["hidden_size"], v["num_attention_heads"])
    head_width = v["hidden_size"] // heads
    names, kinds = _KINDS, v["layer_types"] or _modern_kinds(v)
    if not isinstance(kinds, list) or len(kinds) != depth or any(k not in names for k in kinds):
        raise ValueError(
            f"config.json: layer_types = {_text.shown(kinds)}; expected {' or '.join(names)} for "
            f"each of the {depth} layers."
        )
    parameters = v["rope_parameters"] or {}
    if not isinstance(parameters, dict) or parameters.keys() - set(names):
        raise ValueError(
            f"config.json: rope_parameters = {_text.shown(parameters)}; expected an object with "
            f"{' and '.join(names)}."
        )
    thetas = dict(zip(names, (v["global_rope_theta"], v["local_rope_theta"]), strict=True))
    ropes = {
        kind: rope({"rope_theta": theta, "rope_parameters": parameters.get(kind)}, head_width)
        for kind, theta in thetas.items()
    }
    if any(table != models.Rope(table.frequencies) for table in ropes.values()):
        raise ValueError("config.json: rope types that scale attention are not supported.")
    return models.ModernBert(
        vocabulary=v["vocab_size"],
        width=v["hidden_size"],
        layers=depth,
        heads=heads,
        hidden=v["intermediate_size"],
        windows=tuple(None if k == names[0] else v["local_attention"] // 2 for k in kinds),
        ropes=tuple(ropes[kind].frequencies for kind in kinds),
        **contents.text_heads(),
        pools_mean=v["classifier_pooling"] == "mean",
        activation=v["hidden_activation"],
        head_activation=v["classifier_activation"],
        norm_epsilon=v["norm_eps"],
        norm_bias=v["norm_bias"],
        attention_bias=v["attention_bias"],
        mlp_bias=v["mlp_bias"],
        head_bias=v["classifier_bias"],
        decoder_bias=v["decoder_bias"],
        dropout=v["embedding_dropout"],
        attention_dropout=v["attention_dropout"],
        mlp_dropout=v["mlp_dropout"],
        head_dropout=v["classifier_dropout"],
    )


def _modern_head(task: str, name: str) -> Head:
    # Biases of the head's own layers exist if the config says so.
    rules = (
        _kernel("head.dense", "pooler"),
        Rule("head.norm.weight", "pooler_norm/scale"),
        *dense("classifier", "head"),
    )
    biases = (Rule("head.dense.bias", "pooler/bias"), Rule("head.norm.bias", "pooler_norm/bias"))
    return Head(task, (name,), rules, classes="classifier.weight", optional=biases)


modernbert = Family(
    ("modernbert",),
    "ModernBertModel",
    "model.",
    (
        count("vocab_size"),
        count("hidden_size"),
        layers("num_hidden_layers"),
        count("num_attention_heads"),
        count("intermediate_size"),
        activation("hidden_activation", "gelu"),
        activation("classifier_activation", "gelu"),
        choice("classifier_pooling", "cls", "mean"),
        epsilon("norm_eps", 1e-5),
        flag("norm_bias", False),
        flag("attention_bias", False),
        flag("mlp_bias", False),
        flag("classifier_bias", False),
        flag("decoder_bias", True),
        share("embedding_dropout", 0.0),
        share("attention_dropout", 0.0),
        share("mlp_dropout", 0.0),
        share("classifier_dropout", 0.0),
        count("local_attention", 128, most=1 << 31),
        count("global_attn_every_n_layers", 3, most=1 << 20),
        number("global_rope_theta", 160_000.0),
        number("local_rope_theta", 10_000.0),
        as_given("layer_types"),
        as_given("rope_parameters"),
        flag("tie_word_embeddings", True),
    ),
    (
        *embedding("embeddings.tok_embeddings", "tokens"),
        *norm("embeddings.norm", "tokens_norm"),
        *norm("layers.{i}.attn_norm", "layers_{i}/attention_norm"),
        *dense("layers.{i}.attn.Wqkv", "layers_{i}/attention/qkv"),
        *dense("layers.{i}.attn.Wo", "layers_{i}/attention/out"),
        *norm("layers.{i}.mlp_norm", "layers_{i}/mlp_norm"),
        *dense("layers.{i}.mlp.Wi", "layers_{i}/mlp/gate_up"),
        *dense("layers.{i}.mlp.Wo", "layers_{i}/mlp/down"),
        *norm("final_norm", "norm"),
    ),
    _modernbert,
    tokens,
    heads=(
        _modern_head("sequence", "ModernBertForSequenceClassification"),
        _modern_head("token", "ModernBertForTokenClassification"),
        Head(
            "language",
            ("ModernBertForMaskedLM",),
            (
                _kernel("head.dense", "language/dense"),
                Rule("head.norm.weight", "language/norm/scale"),
                _kernel("decoder", "language/decoder"),
            ),
            optional=(
                Rule("head.dense.bias", "language/dense/bias"),
                Rule("head.norm.bias", "language/norm/bias"),
                Rule("decoder.bias", "language/bias"),
            ),
        ),
    ),
    copies={"decoder.weight": "tokens/embedding"},
    # The norms read norm_eps; the other keys concern training and kernels.
    harmless="max_position_embeddings layer_norm_eps position_embedding_type reference_compile "
    "repad_logits_with_grad deterministic_flash_attn sparse_prediction sparse_pred_ignore_index",
    other_heads=(r"(head|decoder|classifier|qa_outputs)\..*",),
    depth="num_hidden_layers",
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "intermediate_size": ("layers_0/mlp/down/kernel", 0),
    },
    per_layer=("layer_types",),
    layer_kinds=_modern_kinds,
)


def _deberta(v: dict[str, Any], contents: Contents) -> models.Deberta:
    kinds = v["pos_att_type"] or []
    kinds = [k.strip() for k in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in ("c2p", "p2c") for kind in kinds):
        raise ValueError(
            f"config.json: pos_att_type = {_text.shown(kinds)}; expected 'c2p', 'p2c' or both."
        )
    if v["pooler_hidden_size"] not in (None, v["hidden_size"]):
        raise ValueError("config.json: pooler_hidden_size must be the hidden_size.")
    heads = check_heads(v["hidden_size"], v["num_attention_heads"])
    if v["attention_head_size"] not in (None, v["hidden_size"] // heads):
        raise ValueError("config.json: attention_head_size must be hidden_size / heads.")
    most = v["max_relative_positions"]
    most = v["max_position_embeddings"] if most < 1 else most
    span = v["position_buckets"] if v["position_buckets"] > 0 else most
    return models.Deberta(
        vocabulary=v["vocab_size"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=heads,
        hidden=v["intermediate_size"],
        positions=v["max_position_embeddings"] if v["position_biased_input"] else None,
        types=v["type_vocab_size"],
        span=span if v["relative_attention"] else None,
        buckets=v["position_buckets"],
        most=most,
        by_key="c2p" in kinds,
        by_query="p2c" in kinds,
        shares_projections=v["share_att_key"],
        norms_positions=v["norm_rel_ebd"] == "layer_norm",
        window=v["conv_kernel_size"],
        window_activation=v["conv_act"],
        window_groups=v["conv_groups"],
        embedding_width=v["embedding_size"],
        **contents.text_heads(),
        has_own_bias=contents.has_own_bias(),
        activation=v["hidden_act"],
        pooled_activation=v["pooler_hidden_act"],
        norm_epsilon=v["layer_norm_eps"],
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
        pooled_dropout=v["pooler_dropout"],
        head_dropout=v["cls_dropout"],
    )


_layer = "encoder.layer.{i}"
deberta = Family(
    ("deberta-v2",),
    "DebertaV2Model",
    "deberta.",
    (
        count("vocab_size"),
        count("hidden_size"),
        layers("num_hidden_layers"),
        count("num_attention_heads"),
        count("intermediate_size"),
        count("max_position_embeddings", 512, most=1 << 20),
        count("type_vocab_size", 0, least=0),
        optional(count("embedding_size")),
        activation("hidden_act", "gelu"),
        epsilon("layer_norm_eps", 1e-7),
        share("hidden_dropout_prob", 0.1),
        share("attention_probs_dropout_prob", 0.1),
        optional(count("attention_head_size")),
        flag("relative_attention", False),
        flag("position_biased_input", True),
        flag("share_att_key", False),
        count("max_relative_positions", -1, least=-1, most=1 << 20),
        count("position_buckets", -1, least=-1, most=1 << 20),
        choice("norm_rel_ebd", "none", "layer_norm"),
        as_given("pos_att_type"),
        count("conv_kernel_size", 0, least=0),
        activation("conv_act", "tanh"),
        count("conv_groups", 1),
        activation("pooler_hidden_act", "gelu"),
        optional(count("pooler_hidden_size")),
        share("pooler_dropout", 0.0),
        optional(share("cls_dropout", None)),
        choice("legacy", True),
        flag("tie_word_embeddings", True),
    ),
    (
        *embedding("embeddings.word_embeddings", "tokens"),
        *embedding("embeddings.position_embeddings", "positions"),
        *embedding("embeddings.token_type_embeddings", "types"),
        _kernel("embeddings.embed_proj", "project"),
        *norm("embeddings.LayerNorm", "tokens_norm"),
        *embedding("encoder.rel_embeddings", "relative"),
        *norm("encoder.LayerNorm", "relative_norm"),
        *dense("encoder.conv.conv", "conv", conv1d),
        *norm("encoder.conv.LayerNorm", "conv_norm"),
        *dense(f"{_layer}.attention.self.query_proj", "layers_{i}/attention/query"),
        *dense(f"{_layer}.attention.self.key_proj", "layers_{i}/attention/key"),
        *dense(f"{_layer}.attention.self.value_proj", "layers_{i}/attention/value"),
        *dense(f"{_layer}.attention.self.pos_key_proj", "layers_{i}/attention/place_key"),
        *dense(f"{_layer}.attention.self.pos_query_proj", "layers_{i}/attention/place_query"),
        *dense(f"{_layer}.attention.output.dense", "layers_{i}/attention/out"),
        *norm(f"{_layer}.attention.output.LayerNorm", "layers_{i}/attention_norm"),
        *dense(f"{_layer}.intermediate.dense", "layers_{i}/mlp/up"),
        *dense(f"{_layer}.output.dense", "layers_{i}/mlp/down"),
        *norm(f"{_layer}.output.LayerNorm", "layers_{i}/mlp_norm"),
    ),
    _deberta,
    tokens,
    heads=(
        Head(
            "sequence",
            ("DebertaV2ForSequenceClassification",),
            (*dense("pooler.dense", "pooler"), *dense("classifier", "head")),
            classes="classifier.weight",
        ),
        Head(
            "token",
            ("DebertaV2ForTokenClassification",),
            dense("classifier", "head"),
            classes="classifier.weight",
        ),
        Head(
            "language",
            ("DebertaV2ForMaskedLM",),
            (
                *dense("cls.predictions.transform.dense", "language/dense"),
                *norm("cls.predictions.transform.LayerNorm", "language/norm"),
                _kernel("cls.predictions.decoder", "language/decoder"),
                Rule("cls.predictions.bias", "language/bias"),
            ),
            optional=(Rule("cls.predictions.decoder.bias", OWN_BIAS),),
        ),
    ),
    copies={
        "cls.predictions.decoder.weight": "tokens/embedding",
        "cls.predictions.decoder.bias": "language/bias",
    },
    buffers=(r"(.*\.)?embeddings\.position_ids",),
    other_heads=(
        r"(cls|lm_predictions|mask_predictions|qa_outputs|classifier)\..*",
        r"(deberta\.)?pooler\.dense\..*",
    ),
    depth="num_hidden_layers",
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "intermediate_size": ("layers_0/mlp/up/kernel", 1),
    },
)
