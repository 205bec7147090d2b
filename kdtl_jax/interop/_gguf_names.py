"""The Hugging Face names of a GGUF file's tensors, and how the converter changed the tensors."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kdtl_jax import _text

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CHANGED = {
    "gemma2": {"ffn_norm": "pre_feedforward_layernorm"},
    "gemma3": {"ffn_norm": "pre_feedforward_layernorm"},
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
_GPT2_NAMES = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_GPT2_IN_LAYER = {
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
Undo = Callable[[np.ndarray], np.ndarray]  # undoes what llama.cpp's converter did to a tensor


def place(architecture: str, name: str, config: Mapping[str, Any]) -> tuple[str, Undo]:
    """A tensor's Hugging Face name, and the function that undoes the converter's change to it."""
    is_gpt2 = architecture == "gpt2"
    outside, inside = (_GPT2_NAMES, _GPT2_IN_LAYER) if is_gpt2 else (_NAMES, _IN_LAYER)
    inside = inside | _CHANGED.get(architecture, {})
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
    if name in outside:
        torch_name = outside[name]
    elif match and match[2] in inside:
        layer = "transformer.h" if is_gpt2 else "model.layers"
        torch_name = f"{layer}.{match[1]}.{inside[match[2]]}.{match[3]}"
    else:
        raise ValueError(
            f"tensor {_text.quoted(name)} of a {architecture!r} file has no place here."
        )
    part = match[2] if match else ""
    if architecture in ("llama", "smollm3") and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads"]
        if part == "attn_k":
            heads = config.get("num_key_value_heads", heads)
        return torch_name, lambda array: _pairs_to_halves(name, array, heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return torch_name, lambda array: array - 1
    if is_gpt2 and match and match[3] == "weight" and not part.endswith("norm"):
        return torch_name, lambda array: array.T
    return torch_name, lambda array: array


def _pairs_to_halves(name: str, array: np.ndarray, heads: Any) -> np.ndarray:
    """Reorders each head's rows from adjacent pairs (llama.cpp's rotation) to two halves."""
    if not isinstance(heads, int) or heads < 1 or array.shape[0] % (2 * heads):
        raise ValueError(
            f"{name} has {array.shape[0]} rows, which are not those of {_text.quoted(heads)} heads."
        )
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
