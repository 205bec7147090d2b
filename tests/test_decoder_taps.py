"""Hidden states and attention of decoders, against those recorded from transformers.

The folders in tests/data/decoder_taps hold tiny random weights written by transformers 5.23 (torch
2.13), each with the outputs of that model on fixed tokens in expected.npz.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import edited, retensored

from kdtl_jax import language, losses, models, transforms, trees
from kdtl_jax.interop import _hf_rope, decoders, huggingface, naming, safetensors
from kdtl_jax.models import DecoderConfig, Rope

FOLDERS = Path(__file__).parent / "data" / "decoder_taps"
FAMILIES = sorted(folder.name for folder in FOLDERS.iterdir())
WHERE = {"hidden_1": "layers_0", "attention_0": "layers_0/attention/probs"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_hidden_states_and_attention_are_those_of_transformers(family: str):
    source = decoders.load(FOLDERS / family)
    with np.load(FOLDERS / family / "expected.npz") as file:
        known = dict(file)
    tokens, mask = jnp.asarray(known.pop("tokens")), known.pop("mask", None)
    taps = [WHERE[name] for name in known if name in WHERE]
    model = language.model(source.model, taps=taps)

    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        outputs: Any = model(params, None, inputs)[0]
        return {**outputs, "logits": losses.head_logits(outputs["hidden"], outputs["head"])}

    outputs = run(source.params, {"tokens": tokens})
    if mask is not None:
        masked = run(source.params, {"tokens": tokens, "segments": jnp.asarray(mask, jnp.int32)})
        actual = np.asarray(masked["logits"])[mask]
        np.testing.assert_allclose(actual, known.pop("masked_logits")[mask], atol=1e-5)
    for name, value in known.items():
        scale = max(1.0, float(np.abs(value).max()))
        ours = outputs[WHERE.get(name, name)]
        np.testing.assert_allclose(ours, value, atol=3e-6 * scale, err_msg=name)


def test_attention_of_grouped_soft_capped_windowed_and_stacked_layers():
    """What attention mixes is the values, so the probabilities predict the layer's output."""
    config = DecoderConfig(
        9, 8, 2, 4, 2, 4, 8, windows=(None, 3), ropes=(Rope((1.0, 0.1)),) * 2, attention_softcap=2.0
    )
    model = models.decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6], [7, 8, 1, 2, 3, 0]])
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 0]])
    names = models.attention_names(config)
    assert names == ("layers_0/attention/probs", "layers_1/attention/probs")
    run = jax.jit(partial(model.tap, names))
    _, probs = run(params, tokens, None, segments)
    visible = np.tril(np.ones((6, 6), bool)) & (
        np.asarray(segments)[:, :, None] == np.asarray(segments)[:, None]
    )
    near = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) < 3
    for name, where in zip(names, (visible, visible & near), strict=True):
        actual = np.asarray(probs[name])
        assert actual.shape == (2, 4, 6, 6)
        np.testing.assert_allclose(actual[:, :, :5].sum(-1), 1, rtol=1e-6)
        assert not actual[:, :, :5][~np.broadcast_to(where[:, None, :5], (2, 4, 5, 6))].any()
        assert (actual[:, :, :5][np.broadcast_to(where[:, None, :5], (2, 4, 5, 6))] > 0).all()
    weights = params["layers_0"]["attention"]
    x = params["tokens"]["embedding"][tokens]
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + config.norm.epsilon)
    value = (y @ weights["value"]["kernel"]).reshape(2, 6, 2, 4)
    mixed = jnp.einsum("bhls,bshd->blhd", probs[names[0]], jnp.repeat(value, 2, 2))
    want = x + mixed.reshape(2, 6, 16) @ weights["out"]["kernel"]
    silent = jax.tree.map(lambda a: a, params)
    silent["layers_0"]["mlp"] = jax.tree.map(jnp.zeros_like, params["layers_0"]["mlp"])
    _, hidden = jax.jit(partial(model.tap, ("layers_0",)))(silent, tokens, None, segments)
    np.testing.assert_allclose(hidden["layers_0"][:, :5], want[:, :5], atol=1e-6)
    stacked = transforms.stack_layers(params, r"layers_(\d+)/.*")
    for name, actual in run(stacked, tokens, None, segments)[1].items():
        np.testing.assert_allclose(actual, probs[name], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_imported_and_named_again(family: str, tmp_path: Path):
    source = decoders.load(FOLDERS / family)
    report, stored = source.report, safetensors.load(FOLDERS / family)
    assert report.fraction == 1 and not report.missing and not report.extra and not report.unused
    assert len(report.copied) == len(stored)
    assert len(naming.to_torch(source.params, source.rules)) == len(trees.flatten(source.params))
    decoders.save(tmp_path, source.params, source.rules, config=source.config)
    written = safetensors.load(tmp_path)
    assert written.keys() == stored.keys()
    for name, array in written.items():
        assert array.dtype == stored[name].dtype
        np.testing.assert_array_equal(array, stored[name], err_msg=name)
    assert safetensors.index(tmp_path).metadata == {"format": "pt"}
    again = decoders.load(tmp_path)
    assert again.model.config == source.model.config and again.config == source.config


def test_dtypes_are_kept_or_converted(tmp_path: Path):
    folder = edited(FOLDERS / "llama", tmp_path)
    retensored(folder, lambda t: {k: jnp.asarray(v, jnp.bfloat16) for k, v in t.items()})
    kept = decoders.load(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(kept.params)} == {"bfloat16"}
    wide = decoders.load(folder, dtype=jnp.float32)
    assert {str(x.dtype) for x in jax.tree.leaves(wide.params)} == {"float32"}
    assert len(wide.report.cast) == len(jax.tree.leaves(wide.params))


def test_a_tied_head_stored_twice_is_tied_and_reported(tmp_path: Path):
    def with_copy(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    def with_other(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    folder = edited(FOLDERS / "llama_tied", tmp_path)
    source = decoders.load(retensored(folder, with_copy))
    assert source.report.unused == ("lm_head.weight",)
    assert source.model.config == decoders.load(FOLDERS / "llama_tied").model.config
    source = decoders.load(retensored(folder, with_other))
    assert "head" in source.params and not source.report.unused
    decoders.save(tmp_path / "out", source.params, source.rules, config=source.config)
    assert decoders.load(tmp_path / "out").config["tie_word_embeddings"] is False


def test_a_head_equal_to_the_embedding_is_not_tied_unless_the_config_says_so(tmp_path: Path):
    folder = edited(FOLDERS / "llama", tmp_path, tie_word_embeddings=False)
    retensored(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    source = decoders.load(folder)
    assert not source.model.config.is_tied and not source.report.unused
    decoders.save(tmp_path / "out", source.params, source.rules, config=source.config)
    assert "lm_head.weight" in safetensors.load(tmp_path / "out")
    assert decoders.load(tmp_path / "out").config["tie_word_embeddings"] is False


def test_a_head_beside_the_language_head_is_left_out_and_reported(tmp_path: Path):
    name = "multiple_choice_head.summary.weight"

    def with_choice(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {name: np.zeros((1, 12), np.float32)}

    folder = edited(FOLDERS / "gpt2", tmp_path, architectures=["GPT2DoubleHeadsModel"])
    source = decoders.load(retensored(folder, with_choice))
    assert source.report.extra == (name,)
    decoders.save(folder, source.params, source.rules, config=source.config)
    assert decoders.load(folder).config["architectures"] == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("head", ["score.weight", "classifier.weight", "qa_outputs.bias"])
def test_a_classifier_is_no_language_model(family: str, head: str, tmp_path: Path):
    """A tied head is the embedding, but nothing was trained to answer with it."""
    folder = edited(FOLDERS / family, tmp_path, tie_word_embeddings=True)

    def classifying(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        body = {name: x for name, x in tensors.items() if name != "lm_head.weight"}
        return body | {head: np.zeros((3, 12), np.float32)}

    with pytest.raises(ValueError, match=f"'{head}': it classifies texts .* no language head"):
        decoders.load(retensored(folder, classifying))
    # As it says, without the head it is a body.
    tensors = safetensors.load(folder)
    del tensors[head]
    config = json.loads((folder / "config.json").read_text())
    assert decoders.from_tensors(config, tensors).model.config.is_tied


def test_layers_may_repeat_and_what_is_said_by_layer_goes_with_them(tmp_path: Path):
    source = decoders.load(FOLDERS / "llama")
    student = decoders.student(source, layers=(1, 0, 1))
    for new, old in enumerate((1, 0, 1)):
        for ours, theirs in zip(
            jax.tree.leaves(student.params[f"layers_{new}"]),
            jax.tree.leaves(source.params[f"layers_{old}"]),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(student.params["head"]["kernel"], source.params["head"]["kernel"])
    decoders.save(tmp_path, student.params, student.rules, config=student.config)
    assert decoders.load(tmp_path).model.config == student.model.config
    small = decoders.student(decoders.load(FOLDERS / "qwen2"), layers=(1,))
    assert small.config["layer_types"] == ["full_attention"]


def test_readers_name_each_other():
    with pytest.raises(ValueError, match=r"'gpt2' is a decoder: interop\.decoders\.load reads it"):
        huggingface.load(FOLDERS / "gpt2")


def test_rope_frequencies():
    config = {"model_type": "llama", "rope_theta": 100.0}
    np.testing.assert_allclose(_hf_rope.rope(config, 4).frequencies, [1.0, 0.1])
    linear = {**config, "rope_scaling": {"type": "linear", "factor": 2.0}}
    np.testing.assert_allclose(_hf_rope.rope(linear, 4).frequencies, [0.5, 0.05])


SIZES = {
    "gpt2": ["n_embd", "n_layer", "n_head", "n_positions"],
    "llama": ["intermediate_size", "num_key_value_heads", "head_dim"],
}
HOSTILE = [0, -1, 10**9, 10**400, 1.5, True, "8", float("nan"), {}, [[1]], [10**9]]


@pytest.mark.parametrize(("family", "key"), [(f, k) for f, keys in SIZES.items() for k in keys])
def test_hostile_sizes_are_one_clear_error(tmp_path: Path, family: str, key: str):
    source = edited(FOLDERS / family, tmp_path)
    config = json.loads((source / "config.json").read_text())
    for value in HOSTILE:
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json: ({key}|\d+ layers)") as error:
            decoders.load(source)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("family", "key"), [("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps")]
)
def test_hostile_numbers_are_one_clear_error(tmp_path: Path, family: str, key: str):
    source = edited(FOLDERS / family, tmp_path)
    config = json.loads((source / "config.json").read_text())
    for value in [-1e-6, 2.0, float("nan"), float("inf"), 10**400, True, "x", [1], {"a": 1}]:
        (source / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=rf"config.json: {key} must be a .*number"):
            decoders.load(source)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "is not supported"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"sliding_window": 4}, "sliding_window"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta must be a finite"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor must be above",
        ),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "factor must be .* got None"),
        ("llama", {"rope_parameters": {"rope_type": "ntk"}}, "rope type 'ntk' is not supported"),
        ("llama", {"rope_parameters": {"mscale": 1.0}}, "does not read .mscale"),
        ("llama", {"rope_parameters": [1]}, r"rope_parameters = \[1\]; expected an object"),
        ("llama", {"rope_scaling": {"rope_theta": 7.0}}, "rope_scaling and rope_parameters differ"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must be 2 times"),
    ],
)
def test_what_changes_outputs_and_is_not_built_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], says: str
):
    with pytest.raises(ValueError, match=f"(?s){says}"):
        decoders.load(edited(FOLDERS / family, tmp_path, **changes))


def test_missing_keys_mean_what_transformers_takes_them_for(tmp_path: Path):
    mistral = edited(
        FOLDERS / "llama", tmp_path, model_type="mistral", attention_bias=..., mlp_bias=...,
        architectures=["MistralForCausalLM"],
    )  # fmt: skip
    assert set(decoders.load(mistral).model.config.windows) == {4096}
    config = json.loads((mistral / "config.json").read_text())
    (mistral / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert decoders.load(mistral).model.config.windows == ()
    gemma = json.loads((FOLDERS.parent / "decoders" / "gemma2" / "config.json").read_text())
    del gemma["sliding_window"]
    windows = decoders.initialized(gemma, jax.random.key(0)).model.config.windows
    assert windows == (4096, None, 4096, None)


@pytest.mark.parametrize("window", [None, 3])
def test_decoders_do_not_look_ahead_or_beyond_their_window(window: int | None):
    ropes, windows = (Rope((1.0, 0.1)),), (window,)
    model = models.decoder(DecoderConfig(30, 8, 1, 2, 1, 4, 8, ropes=ropes, windows=windows))
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jax.jit(lambda tokens: model.apply(params, tokens)[0])
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    base = hidden(tokens)
    for changed in (2, 6):
        other = hidden(tokens.at[0, changed].set(20))
        differs = np.abs(np.asarray(base - other)).max(axis=(0, 2)) > 1e-6
        reach = 8 if window is None else min(8, changed + window)
        assert differs.tolist() == [changed <= i < reach for i in range(8)]
