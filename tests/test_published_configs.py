"""config.json of published checkpoints, with the keys that they have: every one is read."""

import json
from pathlib import Path

import pytest

from kdtl_jax.interop import _hf_build, _hf_decoders, _hf_towers
from kdtl_jax.interop._hf_config import Config, Limits, read
from kdtl_jax.interop._hf_family import Contents, module_of

CONFIGS = json.loads((Path(__file__).parent / "data" / "published_configs.json").read_text())
BODY = Contents(None, {}, True)


def check(config: Config) -> None:
    """Raises if a key is not understood, or what it says is not built."""
    if config["model_type"] in _hf_decoders.FAMILIES:
        built, _ = _hf_decoders.decoder(config)
        assert built.layers == config.get("num_hidden_layers", config.get("n_layer"))
        ties = ("gpt2", "gemma", "gemma2", "gemma3_text", "smollm3")  # where nothing is said
        default = config["model_type"] in ties
        assert built.is_tied == config.get("tie_word_embeddings", default)
        return
    family = _hf_build.family_of(config)
    values = read(config, family.fields, family.harmless, Limits(1 << 20, 1 << 10))
    assert module_of(family, values, BODY) is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_read_or_harmless(name: str) -> None:
    config = CONFIGS[name]
    if config["model_type"] not in ("clip", "siglip"):
        check(config)
        return
    for tower in ("vision", "text"):
        check(_hf_towers.one_tower(config, tower)[0])


def test_configs_of_towers_leave_out_what_the_base_model_has() -> None:
    """transformers writes only what differs from its defaults, within another config."""
    for kind, width in (("clip", 512), ("siglip", 768)):
        folder = {"model_type": kind, "text_config": {}, "vision_config": {}}
        for tower in ("text", "vision"):
            config, _ = _hf_towers.one_tower(folder, tower)
            family = _hf_build.family_of(config)
            values = read(config, family.fields, family.harmless, Limits(1 << 20, 1 << 10))
            assert values["hidden_size"] == (width if tower == "text" else 768)
            assert module_of(family, values, BODY) is not None


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("bert-base-uncased", {"auto_map": {"AutoModel": "org/x--m.JinaBert"}}, "auto_map"),
        ("Phi-3-mini-4k", {"auto_map": {"AutoModel": "modeling_own.Own"}}, "custom code"),
        ("Phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod = 2"),
        ("Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope = True"),
        ("clip-vit-base-patch32", {"text_config": {"is_decoder": True}}, "is_decoder"),
        ("Llama-3.2-1B", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bert-base-uncased", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_changes_outputs_is_refused(name: str, changes: Config, says: str) -> None:
    config = {**CONFIGS[name], **changes}
    with pytest.raises(ValueError, match=says):
        check(_hf_towers.one_tower(config, "text")[0] if "clip" in name else config)


@pytest.mark.parametrize(
    ("name", "key", "means"),
    [
        ("Mistral-7B-v0.3", "num_key_value_heads", 8),
        ("Qwen2.5-0.5B", "num_key_value_heads", 32),
        ("Qwen3-0.6B", "num_key_value_heads", 32),
        ("SmolLM3-3B", "num_key_value_heads", 4),
        ("gemma-2b", "num_key_value_heads", 16),
        ("gemma-2-2b", "num_key_value_heads", 4),
        ("gemma-3-1b", "num_key_value_heads", 4),
        ("gemma-2b", "head_dim", 256),
        ("gemma-2-2b", "head_dim", 256),
        ("gemma-3-1b", "head_dim", 256),
        ("Qwen3-0.6B", "head_dim", 128),
        ("Llama-3.2-1B", "num_key_value_heads", 32),
        ("OLMo-2-1B", "num_key_value_heads", 16),
    ],
)
def test_a_missing_size_is_transformers_default(name: str, key: str, means: int) -> None:
    """transformers 5.24, read by `AutoConfig`; null means what the other sizes say."""
    config = CONFIGS[name] | {"hidden_size": 2304, "num_attention_heads": 32 if means > 4 else 8}
    config |= {"num_attention_heads": 16} if name == "OLMo-2-1B" else {}
    config["head_dim"] = config.get("head_dim", 128)
    missing = {k: v for k, v in config.items() if k != key}
    built, _ = _hf_decoders.decoder(missing)
    field = {"num_key_value_heads": "key_heads", "head_dim": "head_width"}[key]
    assert getattr(built, field) == means
    assert built == _hf_decoders.decoder(config | {key: means})[0]
    if key == "num_key_value_heads":
        built, _ = _hf_decoders.decoder(config | {key: None})
        assert built.key_heads == config["num_attention_heads"]
