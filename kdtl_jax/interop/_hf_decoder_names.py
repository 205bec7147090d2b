"""Tensor names of published decoders, as tables of `naming.Rule`; only data."""

from kdtl_jax.interop._hf_family import dense, norm
from kdtl_jax.interop.naming import Rule, linear, same

_layer = "layers.{i}"
_path = "layers_{i}"
outside = (
    Rule("embed_tokens.weight", "tokens/embedding"),
    Rule("norm.weight", "norm/scale"),
    *dense("lm_head", "head"),
)
separate = (
    *dense(f"{_layer}.self_attn.q_proj", f"{_path}/attention/query"),
    *dense(f"{_layer}.self_attn.k_proj", f"{_path}/attention/key"),
    *dense(f"{_layer}.self_attn.v_proj", f"{_path}/attention/value"),
    *dense(f"{_layer}.mlp.gate_proj", f"{_path}/mlp/gate"),
    *dense(f"{_layer}.mlp.up_proj", f"{_path}/mlp/up"),
)
fused = (
    *dense(f"{_layer}.self_attn.qkv_proj", f"{_path}/attention/qkv"),
    *dense(f"{_layer}.mlp.gate_up_proj", f"{_path}/mlp/gate_up"),
)
down = (
    *dense(f"{_layer}.self_attn.o_proj", f"{_path}/attention/out"),
    *dense(f"{_layer}.mlp.down_proj", f"{_path}/mlp/down"),
)
query_key_norms = (
    Rule(f"{_layer}.self_attn.q_norm.weight", f"{_path}/attention/query_norm/scale"),
    Rule(f"{_layer}.self_attn.k_norm.weight", f"{_path}/attention/key_norm/scale"),
)
pre_norms = (
    Rule(f"{_layer}.input_layernorm.weight", f"{_path}/attention_norm/scale"),
    Rule(f"{_layer}.post_attention_layernorm.weight", f"{_path}/mlp_norm/scale"),
)
post_norms = (
    Rule(f"{_layer}.post_attention_layernorm.weight", f"{_path}/attention_post_norm/scale"),
    Rule(f"{_layer}.post_feedforward_layernorm.weight", f"{_path}/mlp_post_norm/scale"),
)
both_norms = (
    Rule(f"{_layer}.input_layernorm.weight", f"{_path}/attention_norm/scale"),
    Rule(f"{_layer}.pre_feedforward_layernorm.weight", f"{_path}/mlp_norm/scale"),
    *post_norms,
)
llama = (*outside, *separate, *down, *pre_norms)
gpt2 = (
    Rule("wte.weight", "tokens/embedding"),
    Rule("wpe.weight", "positions/embedding"),
    # GPT-2's Conv1D keeps [in, out], as Flax does.
    *dense("h.{i}.attn.c_attn", f"{_path}/attention/qkv", same),
    *dense("h.{i}.attn.c_proj", f"{_path}/attention/out", same),
    *norm("h.{i}.ln_1", f"{_path}/attention_norm"),
    *dense("h.{i}.mlp.c_fc", f"{_path}/mlp/up", same),
    *dense("h.{i}.mlp.c_proj", f"{_path}/mlp/down", same),
    *norm("h.{i}.ln_2", f"{_path}/mlp_norm"),
    *norm("ln_f", "norm"),
    Rule("lm_head.weight", "head/kernel", linear),
)
