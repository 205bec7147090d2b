"""Decoders of every published family, against outputs recorded from transformers.

The folders in tests/data/decoders hold tiny random weights written by transformers 5.24 (torch
2.13) with that model's logits on 24 and on 12 tokens, and its greedy continuation of 8 tokens.
"""

import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import retensored

from kdtl_jax import language, losses, models, transforms
from kdtl_jax.interop import _hf_decoders, _hf_rope, decoders, safetensors

FOLDERS = Path(__file__).parent / "data" / "decoders"
FAMILIES = sorted(folder.name for folder in FOLDERS.iterdir())
KINDS = ["gemma2", "phi3", "smollm3"]  # soft caps and windows, fused matrices, resting positions


@cache
def loaded(name: str) -> decoders.PretrainedDecoder:
    return decoders.load(FOLDERS / name)


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDERS / name / "expected.npz") as file:
        return dict(file)


def logits(name: str, tokens: Any, params: Any = None, **more: Any) -> np.ndarray:
    params = loaded(name).params if params is None else params
    return np.asarray(compiled(name)(params, jnp.asarray(tokens), **more))


@cache
def compiled(name: str) -> Any:
    """Logits in one program per shape, which compiles sooner than its operations one by one."""
    model = loaded(name).model

    def whole(params: Any, tokens: Any, segments: Any = None) -> jax.Array:
        hidden, _ = model.apply(params, tokens, segments=segments)
        return losses.head_logits(hidden, model.head(params))

    return jax.jit(whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str):
    known = recorded(name)
    for tokens, expected in (
        (known["tokens"], known["logits"]),
        (known["tokens"][:, :12], known["short"]),
    ):
        np.testing.assert_allclose(logits(name, tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_continuations_are_those_of_transformers(name: str):
    source, known = loaded(name), recorded(name)
    prompts, keys = jnp.asarray(known["tokens"][:1, :8]), jax.random.split(jax.random.key(0), 1)
    run = jax.jit(
        lambda params: language.sample(
            source.model, params, prompts, keys=keys, length=40, temperature=0.0
        )
    )
    # Keys in a cache keep the rotary table they were turned by; transformers starts its cache anew
    # where a text outgrows the short one, so only the texts within it are alike.
    alike = 9 if name == "phi3" else 40
    np.testing.assert_array_equal(run(source.params).tokens[0, :alike], known["greedy"][:alike])


@pytest.mark.parametrize("name", FAMILIES)
def test_folders_come_back_bit_for_bit(name: str, tmp_path: Path):
    source = loaded(name)
    decoders.save(tmp_path, source.params, source.rules, config=source.config)
    written, stored = safetensors.load(tmp_path), safetensors.load(FOLDERS / name)
    assert written.keys() == stored.keys() - set(source.report.unused)
    for tensor, array in written.items():
        assert array.dtype == stored[tensor].dtype
        np.testing.assert_array_equal(array, stored[tensor], err_msg=tensor)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again | {"tie_word_embeddings": None} == source.config | {"tie_word_embeddings": None}


@pytest.mark.usefixtures("standard_promotion")
def test_tensors_keep_their_dtypes_where_they_differ(tmp_path: Path):
    """As after training in half precision with norms in float32."""

    def halved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        half = jnp.bfloat16
        return {name: x if "norm" in name else x.astype(half) for name, x in tensors.items()}

    folder = retensored(edited(tmp_path, "phi3"), halved)
    source, stored = decoders.load(folder), safetensors.load(folder)
    small = decoders.student(source, layers=[0])
    for each, name in ((source, "whole"), (small, "small")):
        decoders.save(tmp_path / name, each.params, each.rules, config=each.config)
        for tensor, array in safetensors.load(tmp_path / name).items():
            assert array.dtype == stored[tensor].dtype
            np.testing.assert_array_equal(array, stored[tensor], err_msg=tensor)
    hidden, _ = jax.jit(small.model.apply)(small.params, jnp.asarray([[1, 2, 3]]))
    assert hidden.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(decoders.load(folder, dtype=jnp.float32).params)} == {
        jnp.dtype(jnp.float32)
    }


@pytest.mark.parametrize("name", KINDS)
def test_stacked_layers_give_the_numbers_of_separate_ones(name: str):
    source, tokens = loaded(name), recorded(name)["tokens"]
    stacked = transforms.stack_layers(source.params, r"layers_(\d+)/.*")
    np.testing.assert_allclose(
        logits(name, tokens, stacked), logits(name, tokens), atol=3e-6, rtol=1e-5
    )


def test_rotary_frequencies_are_rounded_as_transformers_rounds_them():
    """Where one rounding of `10000 ** (-2 i / 64)` gives another float32: bits from torch 2.13."""
    actual = np.asarray(_hf_rope.frequencies(10_000.0, 64), np.float32)
    bits = {5: 1047712803, 9: 1033475085, 12: 1023510243, 20: 995049016, 28: 967166816}
    assert {i: int(actual[i].view(np.uint32)) for i in bits} == bits


def test_taps_are_what_runs_along_the_layers():
    source, tokens = loaded("gemma2"), jnp.asarray(recorded("gemma2")["tokens"])
    config, params = source.model.config, source.params
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)
    names = models.tap_names(config)
    assert names == ("tokens", *(f"layers_{i}" for i in range(config.layers)))
    run = jax.jit(source.model.tap, static_argnums=0)
    hidden, taps = run(names, params, tokens)
    close(hidden, jax.jit(source.model.apply)(params, tokens)[0])
    assert taps.keys() == set(names)
    # A decoder that ends after the first layer says that layer's output behind its last norm.
    first = decoders.student(source, layers=[0])
    inner = taps["layers_0"]
    inner *= jax.lax.rsqrt(jnp.mean(jnp.square(inner), -1, keepdims=True) + config.norm.epsilon)
    close(
        jax.jit(first.model.apply)(first.params, tokens)[0],
        inner * (1 + params["norm"]["scale"])[None, None],
    )
    stacked = transforms.stack_layers(params, r"layers_(\d+)/.*")
    chosen = (names[-1], names[0], names[1])
    for path, result in run(chosen, stacked, tokens)[1].items():
        close(result, taps[path], err_msg=path)
    with pytest.raises(ValueError, match=r"the taps \['tokens', .*, got \['layers_99'\]"):
        source.model.tap(["layers_99"], params, tokens)


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_gives_the_numbers_of_one_pass(name: str):
    source = loaded(name)
    tokens = jnp.asarray(recorded(name)["tokens"][:, :12])  # within the short rotary table
    apply = jax.jit(source.model.apply)
    whole, none = apply(source.params, tokens)
    memory, parts = models.init_cache(source.model.config, 2, 16), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        part, memory = apply(source.params, tokens[:, start:stop], cache=memory)
        parts.append(part)
    assert none is None and memory is not None and int(memory.length) == 12
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_number(name: str, side: str):
    tokens = recorded(name)["tokens"][:1, :10]
    alone = logits(name, tokens)
    amounts = ((0, 0), (3, 0)) if side == "left" else ((0, 0), (0, 3))
    padded = np.pad(tokens, amounts, constant_values=7)
    segments = jnp.asarray(np.pad(np.ones((1, 10), np.int32), amounts))
    real = slice(3, 13) if side == "left" else slice(0, 10)
    actual = logits(name, padded, segments=segments)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual[:, real], alone, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [*KINDS, "gpt2"])
def test_packed_texts_do_not_see_each_other(name: str):
    tokens = recorded(name)["tokens"]
    first, second = tokens[:1, :18], tokens[1:, :5]  # Phi-3's rotary table is another from 17 on
    packed = np.concatenate([first, second], axis=1)
    segments = jnp.asarray([[1] * 18 + [2] * 5])
    actual = logits(name, packed, segments=segments)
    alone = np.concatenate([logits(name, first), logits(name, second)], axis=1)
    np.testing.assert_allclose(actual, alone, atol=3e-6, rtol=1e-5)


def test_positions_count_real_tokens_of_each_segment():
    segments = jnp.asarray([[0, 0, 1, 1, 1, 2, 2], [1, 1, 0, 0, 1, 1, 0], [3, 3, 3, 1, 1, 1, 0]])
    result = models.segment_positions(segments)
    at = np.where(np.asarray(segments) > 0, result, -1)
    expected = [[-1, -1, 0, 1, 2, 0, 1], [0, 1, -1, -1, 2, 3, -1], [0, 1, 2, 0, 1, 2, -1]]
    np.testing.assert_array_equal(at, expected)


@pytest.mark.usefixtures("x64")
def test_new_weights_are_float32_where_jax_has_float64():
    config = models.DecoderConfig(13, 8, layers=1, heads=2, key_heads=2, head_width=4, hidden=8)
    weights = jax.eval_shape(models.decoder(config).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(jnp.float32)}


def test_rematerialized_gradients_are_the_same():
    source, tokens = loaded("llama"), jnp.asarray(recorded("llama")["short"].argmax(-1))
    again = models.decoder(
        source.model.config, remat_policy=jax.checkpoint_policies.nothing_saveable
    )

    def loss(model: models.Decoder, params: Any) -> jax.Array:
        hidden, _ = model.apply(params, tokens)
        return jnp.mean(jnp.square(losses.head_logits(hidden, model.head(params))))

    plain = jax.jit(jax.grad(lambda p: loss(source.model, p)))(source.params)
    remade = jax.jit(jax.grad(lambda p: loss(again, p)))(source.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), remade, plain)


@pytest.mark.usefixtures("standard_promotion")  # jax's own attention mixes dtypes
def test_half_precision_stays_near_and_keeps_its_dtype():
    source, known = loaded("qwen3"), recorded("qwen3")
    half = models.decoder(source.model.config, dtype=jnp.bfloat16)
    hidden, _ = jax.jit(half.apply)(source.params, jnp.asarray(known["tokens"]))
    actual = losses.head_logits(hidden, half.head(source.params))
    assert hidden.dtype == jnp.bfloat16 and actual.dtype == jnp.float32
    assert 0 < np.abs(actual - known["logits"]).max() < 0.05 * np.abs(known["logits"]).max()


def test_a_student_of_some_layers_is_a_folder_of_its_own(tmp_path: Path):
    source, tokens = loaded("gemma2"), recorded("gemma2")["tokens"]
    small = decoders.student(source, layers=(0, 3))
    assert small.config["num_hidden_layers"] == 2 and len(small.config["layer_types"]) == 2
    decoders.save(tmp_path, small.params, small.rules, config=small.config)
    again = decoders.load(tmp_path)
    assert again.model.config == small.model.config
    hidden, _ = again.model.apply(again.params, jnp.asarray(tokens))
    expected, _ = small.model.apply(small.params, jnp.asarray(tokens))
    np.testing.assert_array_equal(hidden, expected)
    with pytest.raises(ValueError, match="layers must lie in 0..3"):
        decoders.student(source, layers=(4,))


def edited(tmp_path: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(FOLDERS / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"model_type": "bert"}, "not a supported decoder"),
        ("llama", {"strange_key": 1}, "strange_key"),
        ("llama", {"num_hidden_layers": 10**9}, "more layers than any model"),
        ("llama", {"rms_norm_eps": float("nan")}, "finite number"),
        ("llama", {"hidden_size": None}, "hidden_size must be a positive whole number"),
        ("llama", {"hidden_act": "mish"}, "'mish' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "factor must be a finite number"),
        ("llama", {"rope_parameters": [1]}, "expected an object"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "supported only for phi3"),
        ("llama", {"vocab_size": 41}, "tokens/embedding"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must be 4 times"),
        ("gemma3", {"attn_logit_softcapping": 0.5}, "is not supported"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not supported"),
        ("gemma3", {"sliding_window": None, "layer_types": None}, "sliding_window = null"),
        (
            "smollm3",
            {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
            "if use_sliding_window is false",
        ),
    ],
)
def test_what_is_not_understood_is_refused(
    name: str, changes: dict[str, Any], says: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=says):
        decoders.load(edited(tmp_path, name, **changes))


def test_gemma_reads_hidden_act_and_its_kin_do_not():
    """transformers: `gelu` of early files is tanh's; Gemma 2 and 3 read `hidden_activation`."""
    kin = {name: dict(loaded(name).config) for name in ("llama", "gemma2")}
    kin["gemma"] = kin["llama"] | {"model_type": "gemma", "head_dim": 8}
    for key in ("hidden_act", "mlp_bias"):
        kin["gemma"].pop(key, None)

    def activation(name: str, **changes: Any) -> Any:
        return _hf_decoders.decoder(kin[name] | changes)[0].activation

    assert activation("gemma") is activation("gemma", hidden_act="gelu") is models.gelu_tanh
    assert activation("gemma", hidden_act="relu") is jax.nn.relu
    assert activation("gemma", hidden_activation="gelu_pytorch_tanh") is models.gelu_tanh
    assert activation("gemma2", hidden_act="relu") is models.gelu_tanh
    with pytest.raises(ValueError, match="contradict each other"):
        activation("gemma", hidden_act="relu", hidden_activation="gelu_pytorch_tanh")


def test_a_head_that_differs_from_the_embedding_is_kept_and_said(tmp_path: Path):
    source = loaded("llama3")
    table = source.params["tokens"]["embedding"]
    params = {**source.params, "head": {"kernel": np.asarray(table).T + 1}}
    decoders.save(tmp_path, params, source.rules, config=source.config)
    again = decoders.load(tmp_path)
    assert again.config["tie_word_embeddings"] is False and not again.model.config.is_tied
    np.testing.assert_array_equal(again.params["head"]["kernel"], params["head"]["kernel"])


def test_configs_whose_numbers_do_not_fit_are_refused():
    config = loaded("llama").model.config
    for changed, says in (
        ({"windows": (4,)}, "windows must have one entry per layer"),
        ({"key_heads": 3}, "heads must be a multiple"),
        ({"has_head_norms": True, "has_projection_norms": True}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=says):
            models.decoder(config._replace(**changed))


def test_windows_of_smollm3_without_layer_types_are_those_of_layers_that_do_not_rotate():
    config = {k: v for k, v in loaded("smollm3").config.items() if k != "layer_types"}
    config |= {"use_sliding_window": True, "sliding_window": 3, "no_rope_layers": [1, 0, 1, 0]}
    assert _hf_decoders.decoder(config)[0].windows == (None, 3, None, 3)


def test_an_odd_number_of_rotating_channels_is_rounded_up_to_pairs():
    """transformers: `arange(0, int(partial * width), 2)`; phi3's table was one pair short."""
    config = {"model_type": "phi3", "partial_rotary_factor": 0.5, "rope_theta": 1000.0}
    actual = _hf_rope.rope(config, 6).frequencies
    np.testing.assert_allclose(actual, [1, 1000 ** (-2 / 3)], rtol=1e-6)
    with pytest.raises(ValueError, match="5 channels cannot rotate in pairs"):
        _hf_rope.rope({"model_type": "llama"}, 5)
