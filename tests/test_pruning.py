"""Narrower decoders: what matters is kept, and the rest is as if it had never been."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax import losses, models
from kdtl_jax.interop import decoders, pruning

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20,
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-9, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)


@functools.cache
def initialized() -> decoders.PretrainedDecoder:
    return decoders.initialized(CONFIG, jax.random.key(0))


def wide(**silent: list[int]) -> decoders.PretrainedDecoder:
    """A random decoder in which some channels, heads and hidden units say nothing."""
    source = initialized()
    params: Any = jax.tree.map(lambda x: 5 * np.asarray(x), source.params)
    channels, units = (silent.get(n, []) for n in ("channels", "hidden"))
    heads = [4 * h + i for h in silent.get("heads", []) for i in range(4)]
    for i in range(2):
        layer = params[f"layers_{i}"]
        down, out = layer["mlp"]["down"]["kernel"], layer["attention"]["out"]["kernel"]
        down[units], down[:, channels] = 0, 0
        out[heads], out[:, channels] = 0, 0
    params["tokens"]["embedding"][:, channels] = 0
    return source._replace(params=params)


@functools.partial(jax.jit, static_argnums=0)
def run(model: Any, params: Any) -> jax.Array:
    hidden, _ = model.apply(params, TOKENS)
    return losses.head_logits(hidden, model.head(params))


def logits(of: decoders.PretrainedDecoder, params: Any = None) -> jax.Array:
    return run(of.model, of.params if params is None else params)


def test_heads_and_units_that_say_nothing_are_dropped_and_nothing_changes(tmp_path: Path):
    source = wide(heads=[0, 3], hidden=[1, 2, 5, 11])
    narrow, kept = pruning.narrow(source, heads=2, key_heads=2, hidden=8)
    assert kept.heads.tolist() == [[1, 2]] * 2
    assert kept.hidden.tolist() == [[0, 3, 4, 6, 7, 8, 9, 10]] * 2
    assert kept.shares["heads"] == pytest.approx(1) and "hidden 8 (100%)" in str(kept)
    np.testing.assert_allclose(logits(narrow), logits(source), atol=1e-5)
    # A head of its own width is written to config.json, and read again.
    decoders.save(tmp_path / "n", narrow.params, narrow.rules, config=narrow.config)
    again = decoders.load(tmp_path / "n")
    assert again.model.config.heads == 2 and again.model.config.head_width == 4
    np.testing.assert_array_equal(logits(again), logits(narrow))
    # One key head alone, with both of its heads.
    one, kept = pruning.narrow(wide(heads=[0, 1]), heads=2, key_heads=1)
    assert kept.key_heads.tolist() == [[1]] * 2 and kept.heads.tolist() == [[2, 3]] * 2
    np.testing.assert_allclose(logits(one), logits(wide(heads=[0, 1])), atol=1e-5)


PHI3 = {k: v for k, v in CONFIG.items() if k != "architectures"} | {
    "model_type": "phi3", "tie_word_embeddings": False, "original_max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 20, "n_embd": 16, "n_head": 4, "n_layer": 2,
    "n_positions": 16, "activation_function": "gelu_new",
}  # fmt: skip


@pytest.mark.parametrize("config", [PHI3, GPT2], ids=["phi3", "gpt2"])
def test_fused_matrices_are_narrowed_part_by_part(config: dict[str, Any], tmp_path: Path):
    source = decoders.initialized(config, jax.random.key(1))
    params: Any = jax.tree.map(lambda x: 5 * np.asarray(x), source.params)
    for i in range(2):
        params[f"layers_{i}"]["mlp"]["down"]["kernel"][[0, 2, 3, 7]] = 0
        params[f"layers_{i}"]["attention"]["out"]["kernel"][:8] = 0  # the first two heads
    source = source._replace(params=params)
    units = source.model.config.hidden - 4
    # GPT-2's heads fill the width.
    heads: dict[str, Any] = {"heads": 2, "key_heads": 1} if config is PHI3 else {}
    narrow, kept = pruning.narrow(source, hidden=units, **heads)
    assert narrow.params.keys() == params.keys() and kept.hidden.shape == (2, units)
    attention = narrow.params["layers_0"]["attention"]
    assert attention["qkv"]["kernel"].shape == (16, 16 if heads else 48)
    np.testing.assert_allclose(logits(narrow), logits(source), atol=1e-5)
    decoders.save(tmp_path / "n", narrow.params, narrow.rules, config=narrow.config)
    np.testing.assert_array_equal(logits(decoders.load(tmp_path / "n")), logits(narrow))
    if config is GPT2:
        with pytest.raises(ValueError, match="of a 'gpt2' model cannot express"):
            pruning.narrow(source, heads=2)
        both, _ = pruning.narrow(source, heads=2, width=8)
        assert both.params["layers_0"]["attention"]["qkv"]["bias"].shape == (24,)
        assert both.config["n_head"] == 2 and both.config["n_embd"] == 8


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["by weights", "by activations"])
def test_silent_channels_are_dropped(tokens: Any):
    source = wide(channels=[0, 7, 8, 15])
    if tokens is None:  # what is written to them is 0, what is read from them need not be
        for layer in (source.params["layers_0"], source.params["layers_1"]):
            for part, name in (("attention", "query"), ("mlp", "up")):
                layer[part][name]["kernel"][[0, 7, 8, 15]] = 0
    narrow, kept = pruning.narrow(source, width=12, tokens=tokens)
    assert kept.channels.tolist() == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14]
    # A norm's mean is over fewer channels now.
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, x: x * (16 / 12) ** 0.5 if "scale" in str(path[-1]) else x, narrow.params
    )
    np.testing.assert_allclose(logits(narrow, scaled), logits(source), atol=1e-4)


def test_channels_of_small_tokens_count_as_much():
    """Every token's stream is divided by its own size, however small it is."""
    source = wide()
    for layer in (source.params["layers_0"], source.params["layers_1"]):  # the embedding alone
        for part, name in (("attention", "out"), ("mlp", "down")):
            layer[part][name]["kernel"][:] = 0
    table = source.params["tokens"]["embedding"]
    table[:9, :8], table[:9, 8:] = 1e-9, 0
    table[9:16, :8], table[9:16, 8:] = 0, 1
    _, kept = pruning.narrow(source, width=8, heads=2, key_heads=2, tokens=TOKENS)
    assert kept.channels.tolist() == list(range(8))


def test_heads_and_units_are_kept_by_what_they_give_on_a_text():
    """Recomputed by hand from the residual stream, the attention and the kernels."""
    source = wide()
    config, params = source.model.config, source.params
    probs = "layers_1/attention/probs"
    names = ("layers_0", probs, *models.unit_names(config))
    taps = jax.jit(source.model.tap, static_argnums=0)(names, params, TOKENS)[1]
    layer = jax.tree.map(lambda x: np.asarray(x, np.float64), params["layers_1"])

    def normed(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-9)

    x = np.asarray(taps["layers_0"], np.float64)
    y = normed(x, layer["attention_norm"]["scale"])
    value = (y @ layer["attention"]["value"]["kernel"]).reshape(2, 8, 2, 4).repeat(2, axis=2)
    heads = np.einsum("bhls,bshd->blhd", np.asarray(taps[probs], np.float64), value)
    x = x + heads.reshape(2, 8, 16) @ layer["attention"]["out"]["kernel"]
    y = normed(x, layer["mlp_norm"]["scale"])
    gate, up = (y @ layer["mlp"][name]["kernel"] for name in ("gate", "up"))
    units = gate / (1 + np.exp(-gate)) * up

    def score(a: np.ndarray) -> np.ndarray:
        return np.sqrt((np.abs(a).mean(1) ** 2).sum(0))  # Minitron: positions, then the batch

    each = np.linalg.norm(score(heads), axis=-1)
    np.testing.assert_allclose(
        taps["layers_1/attention/heads"], heads.reshape(2, 8, 16), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(taps["layers_1/mlp/units"], units, rtol=1e-4, atol=1e-5)
    _, kept = pruning.narrow(source, heads=2, key_heads=2, hidden=5, tokens=TOKENS)
    best = [2 * g + int(np.argmax(each[2 * g : 2 * g + 2])) for g in range(2)]
    assert kept.heads[1].tolist() == best
    assert kept.hidden[1].tolist() == sorted(np.argsort(-score(units))[:5].tolist())
    _, kept = pruning.narrow(source, heads=2, key_heads=1, tokens=TOKENS)
    assert kept.key_heads[1].tolist() == [int(np.argmax(each.reshape(2, 2).sum(1)))]
    # A head whose values are 0 says nothing, whatever its output weights are.
    for name in ("layers_0", "layers_1"):
        params[name]["attention"]["value"]["kernel"][:, :4] = 0
    _, kept = pruning.narrow(source, heads=2, key_heads=1, tokens=TOKENS)
    assert kept.key_heads.tolist() == [[1], [1]] and kept.shares["heads"] == pytest.approx(1)


def test_shapes_that_cannot_be_taken_are_refused():
    source = initialized()
    for sizes, says in (
        ({"width": 17}, "width must lie in 1..16"),
        ({"heads": 3, "key_heads": 2}, "heads must be a multiple of key_heads"),
        ({"heads": 4, "key_heads": 1}, "at most 2 to each"),
        ({"hidden": 0}, "hidden must lie"),
    ):
        given: Any = sizes
        with pytest.raises(ValueError, match=says):
            pruning.narrow(source, **given)
