"""Text encoders with relative positions: T5, ModernBERT, DeBERTa-v2."""

from kdtl_jax import _text, models
from kdtl_jax.interop import _hf_config as field
from kdtl_jax.interop._hf_encoders import (
    SIZES,
    after_attention,
    bert_language_head,
    token_head,
    tokens,
    two_layer_head,
)
from kdtl_jax.interop._hf_family import (
    Contents,
    Family,
    HeadFamily,
    Values,
    attention,
    dense,
    embedding,
    norm,
)
from kdtl_jax.interop._hf_rope import rope
from kdtl_jax.interop.naming import Rule, conv1d, linear


def _t5(fields: Values, v: Values, contents: Contents) -> models.T5Encoder:
    kind = v["feed_forward_proj"]
    is_gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
    name = "gelu_new" if kind == "gated-gelu" else name
    if v["dense_act_fn"] not in (None, name) or v["is_gated_act"] not in (None, is_gated):
        raise ValueError(
            f"config.json: feed_forward_proj = {kind!r} contradicts dense_act_fn or is_gated_act."
        )
    activation = field.activation_named(name)
    return models.T5Encoder(**fields, is_gated=is_gated, activation=activation)


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
        *field.into(
            vocabulary=field.count("vocab_size"),
            width=field.count("d_model"),
            head_width=field.count("d_kv"),
            hidden=field.count("d_ff"),
            layers=field.layers("num_layers"),
            heads=field.count("num_heads"),
            buckets=field.count("relative_attention_num_buckets", 32, least=4),
            most=field.count("relative_attention_max_distance", 128, most=1 << 20),
            dropout=field.share("dropout_rate", 0.1),
            norm_epsilon=field.epsilon("layer_norm_epsilon", 1e-6),
        ),
        field.choice("feed_forward_proj", *_T5_KINDS),
        field.as_given("dense_act_fn"),
        field.as_given("is_gated_act"),
        field.choice("is_decoder", False),
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


def _modern_kinds(v: Values) -> list[str]:
    every = v["global_attn_every_n_layers"]
    return [_KINDS[i % every > 0] for i in range(v["num_hidden_layers"])]


def _modernbert(fields: Values, v: Values, contents: Contents) -> models.ModernBert:
    depth, head_width = fields["layers"], fields["width"] // fields["heads"]
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
        **fields,
        **contents.text_heads(),
        windows=tuple(None if k == names[0] else v["local_attention"] // 2 for k in kinds),
        ropes=tuple(ropes[kind].frequencies for kind in kinds),
        pools_mean=v["classifier_pooling"] == "mean",
    )


def _modern_head(task: str, name: str) -> HeadFamily:
    # Biases of the head's own layers exist if the config says so.
    rules = (
        _kernel("head.dense", "pooler"),
        Rule("head.norm.weight", "pooler_norm/scale"),
        *dense("classifier", "head"),
    )
    biases = (Rule("head.dense.bias", "pooler/bias"), Rule("head.norm.bias", "pooler_norm/bias"))
    return HeadFamily(task, (name,), rules, classes="classifier.weight", optional=biases)


modernbert = Family(
    ("modernbert",),
    "ModernBertModel",
    "model.",
    (
        *SIZES,
        *field.into(
            activation=field.activation("hidden_activation", "gelu"),
            head_activation=field.activation("classifier_activation", "gelu"),
            norm_epsilon=field.epsilon("norm_eps", 1e-5),
            norm_bias=field.flag("norm_bias", False),
            attention_bias=field.flag("attention_bias", False),
            mlp_bias=field.flag("mlp_bias", False),
            head_bias=field.flag("classifier_bias", False),
            decoder_bias=field.flag("decoder_bias", True),
            dropout=field.share("embedding_dropout", 0.0),
            attention_dropout=field.share("attention_dropout", 0.0),
            mlp_dropout=field.share("mlp_dropout", 0.0),
            head_dropout=field.share("classifier_dropout", 0.0),
        ),
        field.choice("classifier_pooling", "cls", "mean"),
        field.count("local_attention", 128, most=1 << 31),
        field.count("global_attn_every_n_layers", 3, most=1 << 20),
        field.number("global_rope_theta", 160_000.0),
        field.number("local_rope_theta", 10_000.0),
        field.as_given("layer_types"),
        field.as_given("rope_parameters"),
        field.flag("tie_word_embeddings", True),
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
        HeadFamily(
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
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "intermediate_size": ("layers_0/mlp/down/kernel", 0),
    },
    per_layer=("layer_types",),
    layer_kinds=_modern_kinds,
)


def _deberta(fields: Values, v: Values, contents: Contents) -> models.Deberta:
    kinds = v["pos_att_type"] or []
    kinds = [k.strip() for k in kinds.lower().split("|")] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or any(kind not in ("c2p", "p2c") for kind in kinds):
        raise ValueError(
            f"config.json: pos_att_type = {_text.shown(kinds)}; expected 'c2p', 'p2c' or both."
        )
    if v["pooler_hidden_size"] not in (None, v["hidden_size"]):
        raise ValueError("config.json: pooler_hidden_size must be the hidden_size.")
    if v["attention_head_size"] not in (None, fields["width"] // fields["heads"]):
        raise ValueError("config.json: attention_head_size must be hidden_size / heads.")
    most = v["max_relative_positions"]
    most = v["max_position_embeddings"] if most < 1 else most
    span = v["position_buckets"] if v["position_buckets"] > 0 else most
    return models.Deberta(
        **fields,
        **contents.text_heads(),
        has_own_bias=contents.has_own_bias(),
        positions=v["max_position_embeddings"] if v["position_biased_input"] else None,
        span=span if v["relative_attention"] else None,
        most=most,
        by_key="c2p" in kinds,
        by_query="p2c" in kinds,
        norms_positions=v["norm_rel_ebd"] == "layer_norm",
    )


_self = "encoder.layer.{i}.attention"
deberta = Family(
    ("deberta-v2",),
    "DebertaV2Model",
    "deberta.",
    (
        *SIZES,
        *field.into(
            types=field.count("type_vocab_size", 0, least=0),
            embedding_width=field.optional(field.count("embedding_size")),
            activation=field.activation("hidden_act", "gelu"),
            norm_epsilon=field.epsilon("layer_norm_eps", 1e-7),
            dropout=field.share("hidden_dropout_prob", 0.1),
            attention_dropout=field.share("attention_probs_dropout_prob", 0.1),
            buckets=field.count("position_buckets", -1, least=-1, most=1 << 20),
            shares_projections=field.flag("share_att_key", False),
            window=field.count("conv_kernel_size", 0, least=0),
            window_activation=field.activation("conv_act", "tanh"),
            window_groups=field.count("conv_groups", 1),
            pooled_activation=field.activation("pooler_hidden_act", "gelu"),
            pooled_dropout=field.share("pooler_dropout", 0.0),
            head_dropout=field.optional(field.share("cls_dropout", None)),
        ),
        field.count("max_position_embeddings", 512, most=1 << 20),
        field.optional(field.count("attention_head_size")),
        field.flag("relative_attention", False),
        field.flag("position_biased_input", True),
        field.count("max_relative_positions", -1, least=-1, most=1 << 20),
        field.choice("norm_rel_ebd", "none", "layer_norm"),
        field.as_given("pos_att_type"),
        field.optional(field.count("pooler_hidden_size")),
        field.choice("legacy", True),
        field.flag("tie_word_embeddings", True),
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
        *attention(_self, "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        *dense(f"{_self}.self.pos_key_proj", "layers_{i}/attention/place_key"),
        *dense(f"{_self}.self.pos_query_proj", "layers_{i}/attention/place_query"),
        *after_attention,
    ),
    _deberta,
    tokens,
    heads=(
        two_layer_head("DebertaV2", "pooler.dense", "classifier"),
        token_head("DebertaV2"),
        bert_language_head("DebertaV2ForMaskedLM"),
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
    sides={
        "vocab_size": ("tokens/embedding", 0),
        "intermediate_size": ("layers_0/mlp/up/kernel", 1),
    },
)
