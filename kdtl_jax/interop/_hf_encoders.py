"""Text encoders: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet."""

from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop import _hf_config as field
from kdtl_jax.interop._hf_family import (
    OWN_BIAS,
    POOLER_PATHS,
    UNUSED_POOLER,
    Contents,
    Family,
    HeadFamily,
    Values,
    attention,
    dense,
    embedding,
    norm,
)
from kdtl_jax.interop.naming import Rule, linear

_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)  # fits any number of positions


def tokens(values: Values) -> Any:
    """An abstract batch of tokens."""
    return _TOKENS


def token_head(stem: str) -> HeadFamily:
    """A classifier for each token; there is no pooler below it."""
    rules = dense("classifier", "head")
    name = f"{stem}ForTokenClassification"
    return HeadFamily("token", (name,), rules, False, POOLER_PATHS, "classifier.weight")


def two_layer_head(
    stem: str, first: str = "classifier.dense", last: str = "classifier.out_proj"
) -> HeadFamily:
    """A classifier of texts, with a first layer of its own in place of the pooler."""
    rules = (*dense(first, "pooler"), *dense(last, "head"))
    name = f"{stem}ForSequenceClassification"
    return HeadFamily("sequence", (name,), rules, None, POOLER_PATHS, f"{last}.weight")


def _language_head(
    architectures: tuple[str, ...],
    transform: str,
    transform_norm: str,
    decoder: str,
    bias: str,
    *,
    has_own_bias: bool = False,
) -> HeadFamily:
    rules = (
        *dense(transform, "language/dense"),
        *norm(transform_norm, "language/norm"),
        Rule(f"{decoder}.weight", "language/decoder/kernel", linear),
        Rule(bias, "language/bias"),
    )
    own = (Rule(f"{decoder}.bias", OWN_BIAS),) if has_own_bias else ()
    return HeadFamily("language", architectures, rules, optional=own)


def bert_language_head(*architectures: str) -> HeadFamily:
    """BERT's head for masked tokens."""
    names = ("transform.dense", "transform.LayerNorm", "decoder", "bias")
    paths = (f"cls.predictions.{name}" for name in names)
    return _language_head(architectures, *paths, has_own_bias=True)


def _roberta_heads(stem: str) -> tuple[HeadFamily, ...]:
    paths = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
    language = _language_head((f"{stem}ForMaskedLM",), *paths, has_own_bias=True)
    return two_layer_head(stem), token_head(stem), language


_ROBERTA_COPIES = {
    "lm_head.decoder.weight": "embeddings/tokens/embedding",
    "lm_head.decoder.bias": "language/bias",
}
_SIDES = {
    "vocab_size": ("embeddings/tokens/embedding", 0),
    "max_position_embeddings": ("embeddings/positions/embedding", 0),
    "intermediate_size": ("layers_0/mlp/up/kernel", 1),
}
_BERT_SIDES = {**_SIDES, "type_vocab_size": ("embeddings/types/embedding", 0)}
_BUFFERS = (r"(.*\.)?embeddings\.(position_ids|token_type_ids)",)

_layer = "encoder.layer.{i}"
_embeddings = (
    *embedding("embeddings.word_embeddings", "embeddings/tokens"),
    *embedding("embeddings.position_embeddings", "embeddings/positions"),
    *norm("embeddings.LayerNorm", "embeddings/norm"),
)
_feed_forward = (
    *dense(f"{_layer}.intermediate.dense", "layers_{i}/mlp/up"),
    *dense(f"{_layer}.output.dense", "layers_{i}/mlp/down"),
    *norm(f"{_layer}.output.LayerNorm", "layers_{i}/mlp_norm"),
)
after_attention = (
    *norm(f"{_layer}.attention.output.LayerNorm", "layers_{i}/attention_norm"),
    *_feed_forward,
)
_bert_body = (
    *_embeddings,
    *embedding("embeddings.token_type_embeddings", "embeddings/types"),
    *attention(f"{_layer}.attention", "self.query", "self.key", "self.value", "output.dense"),
    *after_attention,
    *dense("pooler.dense", "pooler"),
)

SIZES = field.into(
    vocabulary=field.count("vocab_size"),
    width=field.count("hidden_size"),
    layers=field.layers("num_hidden_layers"),
    heads=field.count("num_attention_heads"),
    hidden=field.count("intermediate_size"),
)
_FIELDS = (
    *SIZES,
    *field.into(
        positions=field.count("max_position_embeddings"),
        activation=field.activation("hidden_act", "gelu"),
        norm_epsilon=field.epsilon("layer_norm_eps", 1e-12),
        dropout=field.share("hidden_dropout_prob", 0.1),
        attention_dropout=field.share("attention_probs_dropout_prob", 0.1),
    ),
    field.flag("tie_word_embeddings", True),
)
_BERT_FIELDS = (
    *_FIELDS,
    *field.into(
        types=field.count("type_vocab_size", 2, least=0),
        head_dropout=field.optional(field.share("classifier_dropout", None)),
    ),
    field.choice("position_embedding_type", "absolute"),
    field.choice("is_decoder", False),
    field.choice("add_cross_attention", False),
)


def _bert(fields: Values, v: Values, contents: Contents) -> models.Bert:
    return models.Bert(
        **{"types": 0, **fields},
        **contents.text_heads(),
        has_own_bias=contents.has_own_bias(),
        has_pooler=contents.has_pooler(),
        language_activation=v["hidden_act"],
    )


def _roberta(fields: Values, v: Values, contents: Contents) -> models.Bert:
    module = _bert(fields, v, contents)
    padding = v.get("pad_token_id", 1)
    module = module.clone(first_position=padding + 1, language_activation=models.gelu)
    return _with_two_layers(module, v, contents)


def _with_two_layers(module: models.Bert, v: Values, contents: Contents) -> models.Bert:
    if contents.classes("sequence") is None:
        return module
    rate = v.get("classifier_dropout")
    rate = v["hidden_dropout_prob"] if rate is None else rate
    return module.clone(has_pooler=True, pooled_dropout=rate)


def _electra(fields: Values, v: Values, contents: Contents) -> models.Bert:
    module = _bert(fields, v, contents)
    module = module.clone(pooled_activation=models.gelu, language_activation=models.gelu)
    return _with_two_layers(module, v, contents)


def _distilbert(fields: Values, v: Values, contents: Contents) -> models.Bert:
    classes = contents.classes("sequence")
    return models.Bert(
        **fields,
        **contents.text_heads(),
        types=0,
        has_pooler=classes is not None,
        language_activation=v["activation"],
        pooled_activation=jax.nn.relu,
        head_dropout=v["dropout"] if classes is None else v["seq_classif_dropout"],
    )


bert = Family(
    ("bert",),
    "BertModel",
    "bert.",
    _BERT_FIELDS,
    _bert_body,
    _bert,
    tokens,
    heads=(
        HeadFamily(
            "sequence",
            ("BertForSequenceClassification",),
            dense("classifier", "head"),
            has_pooler=True,
            classes="classifier.weight",
        ),
        token_head("Bert"),
        bert_language_head("BertForMaskedLM", "BertForPreTraining"),
    ),
    copies={
        "cls.predictions.decoder.weight": "embeddings/tokens/embedding",
        "cls.predictions.decoder.bias": "language/bias",
    },
    buffers=_BUFFERS,
    other_heads=(r"(cls|qa_outputs|classifier)\..*", UNUSED_POOLER),
    sides=_BERT_SIDES,
)


def _roberta_family(model_type: str, stem: str) -> Family:
    return bert._replace(
        model_types=(model_type,),
        base=f"{stem}Model",
        prefix="roberta.",
        fields=(*_BERT_FIELDS, field.count("pad_token_id", 1, least=0)),
        build=_roberta,
        heads=_roberta_heads(stem),
        copies=_ROBERTA_COPIES,
        other_heads=(r"(lm_head|qa_outputs|classifier)\..*", UNUSED_POOLER),
    )


roberta = _roberta_family("roberta", "Roberta")
xlm_roberta = _roberta_family("xlm-roberta", "XLMRoberta")
camembert = _roberta_family("camembert", "Camembert")

electra = bert._replace(
    model_types=("electra",),
    base="ElectraModel",
    prefix="electra.",
    fields=(*_BERT_FIELDS, *field.into(embedding_width=field.count("embedding_size", 128))),
    body=(*_bert_body[:-2], *dense("embeddings_project", "project")),
    build=_electra,
    heads=(
        two_layer_head("Electra"),
        token_head("Electra"),
        _language_head(
            ("ElectraForMaskedLM",),
            "generator_predictions.dense",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
            "generator_lm_head.bias",
        ),
    ),
    copies={"generator_lm_head.weight": "embeddings/tokens/embedding"},
    harmless="summary_activation summary_last_dropout summary_type summary_use_proj",
    other_heads=(
        r"(discriminator_predictions|generator_predictions|generator_lm_head)\..*",
        r"(classifier|qa_outputs|sequence_summary)\..*",
    ),
)

mpnet = roberta._replace(
    model_types=("mpnet",),
    base="MPNetModel",
    prefix="mpnet.",
    fields=(
        *_FIELDS,
        *field.into(relative_buckets=field.choice("relative_attention_num_buckets", 32)),
    ),
    body=(
        *_embeddings,
        *embedding("encoder.relative_attention_bias", "relative"),
        *attention(f"{_layer}.attention", "attn.q", "attn.k", "attn.v", "attn.o"),
        *norm(f"{_layer}.attention.LayerNorm", "layers_{i}/attention_norm"),
        *_feed_forward,
        *dense("pooler.dense", "pooler"),
    ),
    heads=_roberta_heads("MPNet"),
    sides=_SIDES,
)

_distil_layer = "transformer.layer.{i}"
distilbert = Family(
    ("distilbert",),
    "DistilBertModel",
    "distilbert.",
    (
        *field.into(
            vocabulary=field.count("vocab_size"),
            width=field.count("dim"),
            layers=field.layers("n_layers"),
            heads=field.count("n_heads"),
            hidden=field.count("hidden_dim"),
            positions=field.count("max_position_embeddings"),
            activation=field.activation("activation", "gelu"),
            dropout=field.share("dropout", 0.1),
            attention_dropout=field.share("attention_dropout", 0.1),
        ),
        field.share("seq_classif_dropout", 0.2),
        field.flag("tie_word_embeddings", True),
    ),
    (
        *_embeddings,
        *attention(f"{_distil_layer}.attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        *norm(f"{_distil_layer}.sa_layer_norm", "layers_{i}/attention_norm"),
        *dense(f"{_distil_layer}.ffn.lin1", "layers_{i}/mlp/up"),
        *dense(f"{_distil_layer}.ffn.lin2", "layers_{i}/mlp/down"),
        *norm(f"{_distil_layer}.output_layer_norm", "layers_{i}/mlp_norm"),
    ),
    _distilbert,
    tokens,
    heads=(
        two_layer_head("DistilBert", "pre_classifier", "classifier"),
        token_head("DistilBert"),
        _language_head(
            ("DistilBertForMaskedLM",),
            "vocab_transform",
            "vocab_layer_norm",
            "vocab_projector",
            "vocab_projector.bias",
        ),
    ),
    copies={"vocab_projector.weight": "embeddings/tokens/embedding"},
    # Sinusoidal positions are stored in the same way as learned ones.
    harmless="sinusoidal_pos_embds qa_dropout",
    buffers=_BUFFERS,
    other_heads=(
        r"vocab_(transform|layer_norm|projector)\..*",
        r"(qa_outputs|pre_classifier|classifier)\..*",
    ),
    depth="n_layers",
    sides={
        "vocab_size": _SIDES["vocab_size"],
        "max_position_embeddings": _SIDES["max_position_embeddings"],
        "hidden_dim": _SIDES["intermediate_size"],
    },
)
