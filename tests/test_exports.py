"""The config.json of networks that were cut, grown or mixed says what is written."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdtl_jax.cli import main
from kdtl_jax.interop import _hf_decoders, decoders, huggingface, naming, pruning, safetensors

DATA = Path(__file__).parent / "data"
SMALL = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 6, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
GEMMA = SMALL | {"model_type": "gemma2", "sliding_window": 4}  # a pattern that no key says


def windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    return _hf_decoders.decoder(config)[0].windows


def tensors_of(model: decoders.PretrainedDecoder) -> dict[str, Any]:
    return naming.to_torch(model.params, model.rules)


def abstract(config: dict[str, Any]) -> decoders.PretrainedDecoder:
    """A decoder without numbers."""
    results: list[Any] = []

    def made(key: jax.Array) -> Any:
        source = decoders.initialized(config, key)
        results.append(source)
        return source.params

    shapes = jax.eval_shape(made, jax.random.key(0))
    return results[0]._replace(params=shapes)


def test_layers_out_of_their_pattern_are_listed():
    assert windows(GEMMA) == (4, None, 4, None)
    tensors = tensors_of(abstract(GEMMA))
    kept = {name: x for name, x in tensors.items() if ".2." not in name and ".3." not in name}
    actual = decoders.described(GEMMA, kept, layers=(1, 3))
    assert windows(actual) == (None, None) and actual["layer_types"] == ["full_attention"] * 2
    with pytest.raises(ValueError, match="2 layers are written, and the 4 .* differ in their"):
        decoders.described(GEMMA, kept)
    smol = SMALL | {"model_type": "smollm3", "no_rope_layer_interval": 2}
    actual = decoders.described(smol, kept_of(smol), layers=(1, 2))
    assert actual["no_rope_layers"] == [0, 1]
    mistral = SMALL | {"model_type": "mistral", "sliding_window": 4}
    assert "layer_types" not in decoders.described(mistral, kept_of(mistral), layers=(3, 1))


def kept_of(config: dict[str, Any]) -> dict[str, Any]:
    tensors = tensors_of(abstract(config | {"tie_word_embeddings": True}))
    return {name: x for name, x in tensors.items() if ".2." not in name and ".3." not in name} | {
        "lm_head.weight": tensors["model.embed_tokens.weight"]
    }


def test_sizes_are_those_of_the_tensors():
    llama = SMALL | {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    shapes = tensors_of(abstract(llama))
    cut = {"gate_proj": (0, 5), "up_proj": (0, 5), "down_proj": (1, 5), "embed_tokens": (0, 23)}

    def resized(name: str, x: Any) -> Any:
        shape = list(x.shape)
        for part, (axis, length) in cut.items():
            if part in name:
                shape[axis] = length
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float16)

    actual = decoders.described(llama, {name: resized(name, x) for name, x in shapes.items()})
    assert (actual["intermediate_size"], actual["vocab_size"]) == (5, 23)
    assert actual["torch_dtype"] == "float16" and actual["tie_word_embeddings"] is True
    short = {name: x for name, x in shapes.items() if ".3." not in name}
    assert decoders.described(llama, short)["num_hidden_layers"] == 3
    uneven = {**shapes, "model.layers.1.mlp.up_proj.weight": jax.ShapeDtypeStruct((5, 16), "f4")}
    with pytest.raises(ValueError, match="layers_1/mlp/up/kernel"):
        decoders.described(llama, uneven)


@pytest.mark.parametrize("ids", [17, [3, 17]])
def test_a_special_token_without_a_row_is_refused(ids: Any):
    llama = SMALL | {"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": ids}
    shapes = tensors_of(abstract(llama))
    table = "model.embed_tokens.weight"
    with pytest.raises(
        ValueError, match="eos_token_id = .*17.* has no row among the 17 remaining tokens"
    ):
        decoders.described(llama, {**shapes, table: jax.ShapeDtypeStruct((17, 16), "f4")})
    decoders.described(llama, {**shapes, table: jax.ShapeDtypeStruct((18, 16), "f4")})


def test_what_transformers_would_read_otherwise_is_refused():
    phi = SMALL | {"model_type": "phi3", "sliding_window": 4}
    with pytest.raises(ValueError, match="layer_types"):  # all of Phi-3's layers slide
        _hf_decoders.decoder(phi | {"layer_types": ["full_attention"] * 4})
    llama = abstract(SMALL | {"model_type": "llama", "num_attention_heads": 4})
    with pytest.raises(ValueError, match="hidden_size = 14 .* multiple of the heads"):
        pruning.narrow(llama, width=14, heads=4, key_heads=1)


def test_rotary_tables_are_as_wide_as_heads():
    built = _hf_decoders.decoder(SMALL | {"model_type": "smollm3", "hidden_size": 12})[0]
    assert {len(rope.frequencies) for rope in built.ropes} == {4}


def test_a_pruned_t5_says_its_heads_and_hidden_units():
    source = huggingface.load(DATA / "huggingface" / "t5")
    tensors = naming.to_torch(source.params, source.rules)
    width = source.config["d_kv"]

    def pruned(name: str, x: Any) -> Any:
        sides = {".q.": 0, ".k.": 0, ".v.": 0, ".o.": 1}
        axis = next((sides[part] for part in sides if part in name), None)
        if axis is not None:
            return np.take(x, range(width), axis)
        if "relative_attention_bias" in name:
            return x[:, :1]
        return x[:3] if ".wi." in name else x[:, :3] if ".wo." in name else x

    actual = huggingface.described(
        source.config, {name: pruned(name, np.asarray(x)) for name, x in tensors.items()}
    )
    assert (actual["num_heads"], actual["d_ff"], actual["d_kv"]) == (1, 3, width)


def test_a_new_head_says_nothing_of_the_old_ones_problem():
    source = huggingface.load(DATA / "huggingface" / "bert")
    config = {**source.config, "problem_type": "regression", "finetuning_task": "stsb"}
    small = huggingface.student(source._replace(config=config), layers=(1,), classes=3)
    assert not {"problem_type", "finetuning_task"} & small.config.keys()


def sliced(out: Path, *words: str) -> dict[str, Any]:
    assert main(["params", "slice", *words, "--write", str(out)]) == 0
    return json.loads((out / "config.json").read_text())


def test_slices_of_folders_say_what_they_are(tmp_path: Path, capsys: Any):
    folder = str(DATA / "decoders" / "gemma2")
    source = decoders.load(folder)
    layers = ("--layers", r"model\.layers\.(\d+)\..*", "--keep")
    plain = {key: x for key, x in source.config.items() if key != "layer_types"}
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(plain))
    (bare / "model.safetensors").write_bytes((Path(folder) / "model.safetensors").read_bytes())
    actual = sliced(tmp_path / "odd", str(bare), *layers, "3,1")
    assert windows(actual) == tuple(windows(plain)[i] for i in (3, 1)) == (None, None)
    rows = ("--take", r"model\.embed_tokens\.weight@0=first:30")
    actual = sliced(tmp_path / "rows", folder, *rows)
    assert actual["vocab_size"] == 30 and decoders.load(tmp_path / "rows").report.missing == ()
    assert main(["params", "slice", folder, *layers, "0,1", "--where", "glob:model.layers.*",
                 "--write", str(tmp_path / "part")]) == 0  # fmt: skip
    assert "no config.json was written: " in capsys.readouterr().err
    assert not (tmp_path / "part" / "config.json").exists()


def test_a_stored_copy_of_a_tied_head_stays_tied():
    source = huggingface.load(DATA / "huggingface" / "distilbert_language")
    tensors = naming.to_torch(source.params, source.rules)
    head = "vocab_projector.weight"
    table = np.asarray(tensors["distilbert.embeddings.word_embeddings.weight"])
    alone = huggingface.described(source.config, tensors)
    assert huggingface.described(source.config, {**tensors, head: table}) == alone
    apart = huggingface.described(source.config, {**tensors, head: table + 1})
    assert apart == alone | {"tie_word_embeddings": False}


def test_a_new_head_takes_the_place_of_both_of_a_distilled_deit():
    source = huggingface.load(DATA / "huggingface" / "deit_teacher")
    assert "distillation_head" in source.params
    small = huggingface.student(source, layers=(0,), classes=2)
    assert "distillation_head" not in small.params and small.module.classes == 2
    assert small.config["architectures"] == ["DeiTForImageClassification"]


@pytest.mark.usefixtures("standard_promotion")
def test_the_first_layer_of_deberta_ends_behind_its_convolution():
    """As transformers' hidden states: of one layer they are the last hidden state."""
    source = huggingface.load(DATA / "huggingface" / "deberta_tokens", taps=["layers_0"])
    assert source.config["conv_kernel_size"] == 3 and source.module.layers == 1
    tokens = jnp.asarray([[3, 5, 7, 9]])
    out, _ = jax.jit(source.model)(source.params, None, {"tokens": tokens})
    np.testing.assert_array_equal(out["layers_0"], out["last_hidden"])


def test_a_slice_keeps_the_class_of_a_head_that_is_not_built_here(tmp_path: Path):
    source = huggingface.load(DATA / "huggingface" / "modernbert_language")
    tensors = naming.to_torch(source.params, source.rules)
    tensors = {name: np.asarray(x) for name, x in tensors.items() if name.startswith("model.")}
    tensors |= {"qa_outputs.weight": np.zeros((2, 4), np.float32)}
    folder = tmp_path / "whole"
    folder.mkdir()
    safetensors.save(folder / "model.safetensors", tensors)
    config = {**source.config, "architectures": ["ModernBertForQuestionAnswering"]}
    (folder / "config.json").write_text(json.dumps(config))
    keep = ("--layers", r"model\.layers\.(\d+)\..*", "--keep", "0")
    actual = sliced(tmp_path / "first", str(folder), *keep)  # alone without a norm of attention
    assert actual["architectures"] == config["architectures"] and actual["num_hidden_layers"] == 1
