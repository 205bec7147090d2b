"""Tensor names of published checkpoints, family by family, as tables of `naming.Rule`.

Only data. A table is written for the bare model; `huggingface.load` puts the prefix of the file at
hand (`bert.`, `model.`, …) before every name except those of heads.
"""

from typing import NamedTuple

from kdtl_jax.interop.naming import Axes, Rule, conv2d, linear, same


class Names(NamedTuple):
    """A family's names.

    `body` lies under `prefix` in checkpoints that have a head; `heads` never do. `buffers` are
    regular expressions of tensors that are no weights, `other_heads` of heads that are not
    built here (language-model heads of encoders): both are reported, not imported.
    """

    prefix: str
    body: tuple[Rule, ...]
    heads: tuple[Rule, ...] = ()
    buffers: tuple[str, ...] = ()
    other_heads: tuple[str, ...] = ()


def _dense(torch: str, jax: str, axes: Axes = linear) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{jax}/kernel", axes), Rule(f"{torch}.bias", f"{jax}/bias")


def _norm(torch: str, jax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{jax}/scale"), Rule(f"{torch}.bias", f"{jax}/bias")


def _embedding(torch: str, jax: str) -> tuple[Rule]:
    return (Rule(f"{torch}.weight", f"{jax}/embedding"),)


_bert_layer = "encoder.layer.{i}"
_bert_body = (
    *_embedding("embeddings.word_embeddings", "embeddings/tokens"),
    *_embedding("embeddings.position_embeddings", "embeddings/positions"),
    *_embedding("embeddings.token_type_embeddings", "embeddings/types"),
    *_norm("embeddings.LayerNorm", "embeddings/norm"),
    *_dense(f"{_bert_layer}.attention.self.query", "layers_{i}/attention/query"),
    *_dense(f"{_bert_layer}.attention.self.key", "layers_{i}/attention/key"),
    *_dense(f"{_bert_layer}.attention.self.value", "layers_{i}/attention/value"),
    *_dense(f"{_bert_layer}.attention.output.dense", "layers_{i}/attention/out"),
    *_norm(f"{_bert_layer}.attention.output.LayerNorm", "layers_{i}/attention_norm"),
    *_dense(f"{_bert_layer}.intermediate.dense", "layers_{i}/mlp/up"),
    *_dense(f"{_bert_layer}.output.dense", "layers_{i}/mlp/down"),
    *_norm(f"{_bert_layer}.output.LayerNorm", "layers_{i}/mlp_norm"),
    *_dense("pooler.dense", "pooler"),
)

bert = Names(
    prefix="bert.",
    body=_bert_body,
    heads=_dense("classifier", "head"),
    buffers=(r"(.*\.)?embeddings\.(position_ids|token_type_ids)",),
    other_heads=(r"cls\..*", r"qa_outputs\..*"),
)

roberta = Names(
    prefix="roberta.",
    body=_bert_body,
    heads=(*_dense("classifier.dense", "pooler"), *_dense("classifier.out_proj", "head")),
    buffers=bert.buffers,
    other_heads=(r"lm_head\..*", r"qa_outputs\..*"),
)

# With a classifier, RoBERTa's pooled layer is part of the head and has the head's name.
roberta_classifier = roberta._replace(
    body=tuple(rule for rule in _bert_body if not rule.jax.startswith("pooler/"))
)

_distil_layer = "transformer.layer.{i}"
distilbert = Names(
    prefix="distilbert.",
    body=(
        *_embedding("embeddings.word_embeddings", "embeddings/tokens"),
        *_embedding("embeddings.position_embeddings", "embeddings/positions"),
        *_norm("embeddings.LayerNorm", "embeddings/norm"),
        *_dense(f"{_distil_layer}.attention.q_lin", "layers_{i}/attention/query"),
        *_dense(f"{_distil_layer}.attention.k_lin", "layers_{i}/attention/key"),
        *_dense(f"{_distil_layer}.attention.v_lin", "layers_{i}/attention/value"),
        *_dense(f"{_distil_layer}.attention.out_lin", "layers_{i}/attention/out"),
        *_norm(f"{_distil_layer}.sa_layer_norm", "layers_{i}/attention_norm"),
        *_dense(f"{_distil_layer}.ffn.lin1", "layers_{i}/mlp/up"),
        *_dense(f"{_distil_layer}.ffn.lin2", "layers_{i}/mlp/down"),
        *_norm(f"{_distil_layer}.output_layer_norm", "layers_{i}/mlp_norm"),
    ),
    heads=(*_dense("pre_classifier", "pooler"), *_dense("classifier", "head")),
    buffers=bert.buffers,
    other_heads=(r"vocab_(transform|layer_norm|projector)\..*", r"qa_outputs\..*"),
)

gpt2 = Names(
    prefix="transformer.",
    body=(
        *_embedding("wte", "tokens"),
        *_embedding("wpe", "positions"),
        # GPT-2's Conv1D keeps [in, out], as Flax does.
        *_dense("h.{i}.attn.c_attn", "layers_{i}/attention/qkv", same),
        *_dense("h.{i}.attn.c_proj", "layers_{i}/attention/out", same),
        *_norm("h.{i}.ln_1", "layers_{i}/attention_norm"),
        *_dense("h.{i}.mlp.c_fc", "layers_{i}/mlp/up", same),
        *_dense("h.{i}.mlp.c_proj", "layers_{i}/mlp/down", same),
        *_norm("h.{i}.ln_2", "layers_{i}/mlp_norm"),
        *_norm("ln_f", "norm"),
    ),
    heads=(Rule("lm_head.weight", "head/kernel", linear),),
    buffers=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),
    other_heads=(r"score\..*",),
)

llama = Names(
    prefix="model.",
    body=(
        *_embedding("embed_tokens", "tokens"),
        *_dense("layers.{i}.self_attn.q_proj", "layers_{i}/attention/query"),
        *_dense("layers.{i}.self_attn.k_proj", "layers_{i}/attention/key"),
        *_dense("layers.{i}.self_attn.v_proj", "layers_{i}/attention/value"),
        *_dense("layers.{i}.self_attn.o_proj", "layers_{i}/attention/out"),
        Rule("layers.{i}.input_layernorm.weight", "layers_{i}/attention_norm/scale"),
        *_dense("layers.{i}.mlp.gate_proj", "layers_{i}/mlp/gate"),
        *_dense("layers.{i}.mlp.up_proj", "layers_{i}/mlp/up"),
        *_dense("layers.{i}.mlp.down_proj", "layers_{i}/mlp/down"),
        Rule("layers.{i}.post_attention_layernorm.weight", "layers_{i}/mlp_norm/scale"),
        Rule("norm.weight", "norm/scale"),
    ),
    heads=(Rule("lm_head.weight", "head/kernel", linear),),
    buffers=(r"(.*\.)?rotary_emb\.inv_freq",),
    other_heads=(r"score\..*",),
)

_vit_layer = "encoder.layer.{i}"
vit = Names(
    prefix="vit.",
    body=(
        Rule("embeddings.cls_token", "embeddings/cls"),
        Rule("embeddings.position_embeddings", "embeddings/positions"),
        *_dense("embeddings.patch_embeddings.projection", "embeddings/patches", conv2d),
        *_dense(f"{_vit_layer}.attention.attention.query", "layers_{i}/attention/query"),
        *_dense(f"{_vit_layer}.attention.attention.key", "layers_{i}/attention/key"),
        *_dense(f"{_vit_layer}.attention.attention.value", "layers_{i}/attention/value"),
        *_dense(f"{_vit_layer}.attention.output.dense", "layers_{i}/attention/out"),
        *_norm(f"{_vit_layer}.layernorm_before", "layers_{i}/attention_norm"),
        *_dense(f"{_vit_layer}.intermediate.dense", "layers_{i}/mlp/up"),
        *_dense(f"{_vit_layer}.output.dense", "layers_{i}/mlp/down"),
        *_norm(f"{_vit_layer}.layernorm_after", "layers_{i}/mlp_norm"),
        *_norm("layernorm", "norm"),
        *_dense("pooler.dense", "pooler"),
    ),
    heads=_dense("classifier", "head"),
    other_heads=(r"decoder\..*", r"(.*\.)?embeddings\.mask_token"),
)


def _conv_norm(torch: str, jax: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{torch}.convolution.weight", f"{jax}/conv/kernel", conv2d),
        *_norm(f"{torch}.normalization", f"{jax}/norm"),
        Rule(f"{torch}.normalization.running_mean", f"batch_stats/{jax}/norm/mean"),
        Rule(f"{torch}.normalization.running_var", f"batch_stats/{jax}/norm/var"),
    )


_resnet_block = "encoder.stages.{s}.layers.{i}"
resnet = Names(
    prefix="resnet.",
    body=(
        *_conv_norm("embedder.embedder", "stem"),
        *_conv_norm(f"{_resnet_block}.shortcut", "stage{s}_block{i}/shortcut"),
        *_conv_norm(f"{_resnet_block}.layer.{{j}}", "stage{s}_block{i}/conv{j}"),
    ),
    heads=_dense("classifier.1", "head"),
    buffers=(r".*\.num_batches_tracked",),
)
