"""Text encoders: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA, MPNet."""

from typing import Any

import jax
import jax.numpy as jnp

from kdtl_jax import models
from kdtl_jax.interop._hf_config import (
    activation,
    choice,
    count,
    epsilon,
    flag,
    layers,
    optional,
    share,
)
from kdtl_jax.interop._hf_family import (
    OWN_BIAS,
    POOLER_PATHS,
    UNUSED_POOLER,
    Contents,
    Family,
    Head,
    dense,
    embedding,
    norm,
)
from kdtl_jax.interop.naming import Rule, linear

_TOKENS = jax.ShapeDtypeStruct((1, 1), jnp.int32)  # fits any number of positions


def tokens(values: dict[str, Any]) -> Any:
    """An abstract batch of tokens."""
    return _TOKENS


def _sequence_head(stem: str) -> Head:
    """A classifier on the pooled first token."""
    rules = dense("classifier", "head")
    name = f"{stem}ForSequenceClassification"
    return Head("sequence", (name,), rules, True, classes="classifier.weight")


def token_head(stem: str) -> Head:
    """A classifier for each token; there is no pooler below it."""
    rules = dense("classifier", "head")
    name = f"{stem}ForTokenClassification"
    return Head("token", (name,), rules, False, POOLER_PATHS, "classifier.weight")


def _two_layer_head(stem: str) -> Head:
    """RoBERTa's classifier, with a first layer in place of the pooler."""
    rules = (*dense("classifier.dense", "pooler"), *dense("classifier.out_proj", "head"))
    name, classes = f"{stem}ForSequenceClassification", "classifier.out_proj.weight"
    return Head("sequence", (name,), rules, None, POOLER_PATHS, classes)


def _language_rules(dense_name: str, norm_name: str, decoder: str, bias: str) -> tuple[Rule, ...]:
    return (
        *dense(dense_name, "language/dense"),
        *norm(norm_name, "language/norm"),
        Rule(decoder, "language/decoder/kernel", linear),
        Rule(bias, "language/bias"),
    )


def _roberta_language(stem: str) -> Head:
    rules = _language_rules(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.weight", "lm_head.bias"
    )
    optional = (Rule("lm_head.decoder.bias", OWN_BIAS),)
    return Head("language", (f"{stem}ForMaskedLM",), rules, optional=optional)


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
_types = embedding("embeddings.token_type_embeddings", "embeddings/types")
_feed_forward = (
    *dense(f"{_layer}.intermediate.dense", "layers_{i}/mlp/up"),
    *dense(f"{_layer}.output.dense", "layers_{i}/mlp/down"),
    *norm(f"{_layer}.output.LayerNorm", "layers_{i}/mlp_norm"),
)
_bert_body = (
    *_embeddings,
    *_types,
    *dense(f"{_layer}.attention.self.query", "layers_{i}/attention/query"),
    *dense(f"{_layer}.attention.self.key", "layers_{i}/attention/key"),
    *dense(f"{_layer}.attention.self.value", "layers_{i}/attention/value"),
    *dense(f"{_layer}.attention.output.dense", "layers_{i}/attention/out"),
    *norm(f"{_layer}.attention.output.LayerNorm", "layers_{i}/attention_norm"),
    *_feed_forward,
    *dense("pooler.dense", "pooler"),
)

_SIZES = (
    count("vocab_size"),
    count("hidden_size"),
    layers("num_hidden_layers"),
    count("num_attention_heads"),
    count("intermediate_size"),
    count("max_position_embeddings"),
    activation("hidden_act", "gelu"),
    epsilon("layer_norm_eps", 1e-12),
    share("hidden_dropout_prob", 0.1),
    share("attention_probs_dropout_prob", 0.1),
    flag("tie_word_embeddings", True),
)
_BERT_FIELDS = (
    *_SIZES,
    count("type_vocab_size", 2, least=0),
    optional(share("classifier_dropout", None)),
    choice("position_embedding_type", "absolute"),
    choice("is_decoder", False),
    choice("add_cross_attention", False),
)


def check_heads(width: int, heads: int, key: str = "num_attention_heads") -> int:
    """The number of heads; raises unless it divides the width."""
    if width % heads:
        raise ValueError(f"config.json: {key} = {heads} does not divide the width {width}.")
    return heads


def _bert(v: dict[str, Any], contents: Contents) -> models.Bert:
    return models.Bert(
        vocabulary=v["vocab_size"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=check_heads(v["hidden_size"], v["num_attention_heads"]),
        hidden=v["intermediate_size"],
        positions=v["max_position_embeddings"],
        types=v.get("type_vocab_size", 0),
        **contents.text_heads(),
        has_own_bias=contents.has_own_bias(),
        has_pooler=contents.has_pooler(),
        activation=v["hidden_act"],
        language_activation=v["hidden_act"],
        norm_epsilon=v["layer_norm_eps"],
        dropout=v["hidden_dropout_prob"],
        attention_dropout=v["attention_probs_dropout_prob"],
        head_dropout=v.get("classifier_dropout"),
    )


def _roberta(v: dict[str, Any], contents: Contents) -> models.Bert:
    module = _bert(v, contents)
    padding = v.get("pad_token_id", 1)
    module = module.clone(first_position=padding + 1, language_activation=models.gelu)
    return _with_two_layers(module, v, contents)


def _with_two_layers(module: models.Bert, v: dict[str, Any], contents: Contents) -> models.Bert:
    if contents.classes("sequence") is None:
        return module
    rate = v.get("classifier_dropout")
    rate = v["hidden_dropout_prob"] if rate is None else rate
    return module.clone(has_pooler=True, pooled_dropout=rate)


def _electra(v: dict[str, Any], contents: Contents) -> models.Bert:
    module = _bert(v, contents).clone(
        embedding_width=v["embedding_size"],
        pooled_activation=models.gelu,
        language_activation=models.gelu,
    )
    return _with_two_layers(module, v, contents)


def _mpnet(v: dict[str, Any], contents: Contents) -> models.Bert:
    module = _roberta({**v, "pad_token_id": 1}, contents)
    return module.clone(relative_buckets=v["relative_attention_num_buckets"])


def _distilbert(v: dict[str, Any], contents: Contents) -> models.Bert:
    classes = contents.classes("sequence")
    return models.Bert(
        vocabulary=v["vocab_size"],
        width=v["dim"],
        layers=v["n_layers"],
        heads=check_heads(v["dim"], v["n_heads"], "n_heads"),
        hidden=v["hidden_dim"],
        positions=v["max_position_embeddings"],
        types=0,
        **contents.text_heads(),
        has_pooler=classes is not None,
        activation=v["activation"],
        language_activation=v["activation"],
        pooled_activation=jax.nn.relu,
        dropout=v["dropout"],
        attention_dropout=v["attention_dropout"],
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
        _sequence_head("Bert"),
        token_head("Bert"),
        Head(
            "language",
            ("BertForMaskedLM", "BertForPreTraining"),
            _language_rules(
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.decoder.weight",
                "cls.predictions.bias",
            ),
            optional=(Rule("cls.predictions.decoder.bias", OWN_BIAS),),
        ),
    ),
    copies={
        "cls.predictions.decoder.weight": "embeddings/tokens/embedding",
        "cls.predictions.decoder.bias": "language/bias",
    },
    buffers=_BUFFERS,
    other_heads=(r"(cls|qa_outputs|classifier)\..*", UNUSED_POOLER),
    depth="num_hidden_layers",
    sides=_BERT_SIDES,
)


def _roberta_family(model_type: str, stem: str) -> Family:
    return Family(
        (model_type,),
        f"{stem}Model",
        "roberta.",
        (*_BERT_FIELDS, count("pad_token_id", 1, least=0)),
        _bert_body,
        _roberta,
        tokens,
        heads=(_two_layer_head(stem), token_head(stem), _roberta_language(stem)),
        copies=_ROBERTA_COPIES,
        buffers=_BUFFERS,
        other_heads=(r"(lm_head|qa_outputs|classifier)\..*", UNUSED_POOLER),
        depth="num_hidden_layers",
        sides=_BERT_SIDES,
    )


roberta = _roberta_family("roberta", "Roberta")
xlm_roberta = _roberta_family("xlm-roberta", "XLMRoberta")
camembert = _roberta_family("camembert", "Camembert")

electra = Family(
    ("electra",),
    "ElectraModel",
    "electra.",
    (*_BERT_FIELDS, count("embedding_size", 128)),
    (*_bert_body[:-2], *dense("embeddings_project", "project")),
    _electra,
    tokens,
    heads=(
        _two_layer_head("Electra"),
        token_head("Electra"),
        Head(
            "language",
            ("ElectraForMaskedLM",),
            _language_rules(
                "generator_predictions.dense",
                "generator_predictions.LayerNorm",
                "generator_lm_head.weight",
                "generator_lm_head.bias",
            ),
        ),
    ),
    copies={"generator_lm_head.weight": "embeddings/tokens/embedding"},
    harmless="summary_activation summary_last_dropout summary_type summary_use_proj",
    buffers=_BUFFERS,
    other_heads=(
        r"(discriminator_predictions|generator_predictions|generator_lm_head)\..*",
        r"(classifier|qa_outputs|sequence_summary)\..*",
    ),
    depth="num_hidden_layers",
    sides=_BERT_SIDES,
)

_mpnet_attention = "encoder.layer.{i}.attention"
mpnet = Family(
    ("mpnet",),
    "MPNetModel",
    "mpnet.",
    (*_SIZES, choice("relative_attention_num_buckets", 32)),
    (
        *_embeddings,
        *embedding("encoder.relative_attention_bias", "relative"),
        *dense(f"{_mpnet_attention}.attn.q", "layers_{i}/attention/query"),
        *dense(f"{_mpnet_attention}.attn.k", "layers_{i}/attention/key"),
        *dense(f"{_mpnet_attention}.attn.v", "layers_{i}/attention/value"),
        *dense(f"{_mpnet_attention}.attn.o", "layers_{i}/attention/out"),
        *norm(f"{_mpnet_attention}.LayerNorm", "layers_{i}/attention_norm"),
        *_feed_forward,
        *dense("pooler.dense", "pooler"),
    ),
    _mpnet,
    tokens,
    heads=(_two_layer_head("MPNet"), token_head("MPNet"), _roberta_language("MPNet")),
    copies=_ROBERTA_COPIES,
    buffers=_BUFFERS,
    other_heads=(r"(lm_head|qa_outputs|classifier)\..*", UNUSED_POOLER),
    depth="num_hidden_layers",
    sides=_SIDES,
)

_distil_layer = "transformer.layer.{i}"
distilbert = Family(
    ("distilbert",),
    "DistilBertModel",
    "distilbert.",
    (
        count("vocab_size"),
        count("dim"),
        layers("n_layers"),
        count("n_heads"),
        count("hidden_dim"),
        count("max_position_embeddings"),
        activation("activation", "gelu"),
        share("dropout", 0.1),
        share("attention_dropout", 0.1),
        share("seq_classif_dropout", 0.2),
        flag("tie_word_embeddings", True),
    ),
    (
        *_embeddings,
        *dense(f"{_distil_layer}.attention.q_lin", "layers_{i}/attention/query"),
        *dense(f"{_distil_layer}.attention.k_lin", "layers_{i}/attention/key"),
        *dense(f"{_distil_layer}.attention.v_lin", "layers_{i}/attention/value"),
        *dense(f"{_distil_layer}.attention.out_lin", "layers_{i}/attention/out"),
        *norm(f"{_distil_layer}.sa_layer_norm", "layers_{i}/attention_norm"),
        *dense(f"{_distil_layer}.ffn.lin1", "layers_{i}/mlp/up"),
        *dense(f"{_distil_layer}.ffn.lin2", "layers_{i}/mlp/down"),
        *norm(f"{_distil_layer}.output_layer_norm", "layers_{i}/mlp_norm"),
    ),
    _distilbert,
    tokens,
    heads=(
        Head(
            "sequence",
            ("DistilBertForSequenceClassification",),
            (*dense("pre_classifier", "pooler"), *dense("classifier", "head")),
            classes="classifier.weight",
        ),
        token_head("DistilBert"),
        Head(
            "language",
            ("DistilBertForMaskedLM",),
            _language_rules(
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector.weight",
                "vocab_projector.bias",
            ),
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
