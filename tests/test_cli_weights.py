"""Teachers from elsewhere: an Orbax folder, a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import kdtl, results, write_data

from kdtl_jax import datasets, models
from kdtl_jax.interop import huggingface, networks
from kdtl_jax.recipes import _models, _weights
from kdtl_jax.recipes.settings import UsageError

SHORT = ["--seeds", 1, "--epochs", 1, "--student", "mlp:3", "--methods", "kd", "--batch-size", 8]
VIT = Path(__file__).parent / "data" / "huggingface" / "vit"


def test_a_hugging_face_folder_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its images are scaled as its preprocessor says."""
    folder = tmp_path / "vit"
    shutil.copytree(VIT, folder)
    mean, deviation = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    known = {"image_mean": mean, "image_std": deviation, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(known))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 16, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=images, y=np.arange(50) % 5)
    out = tmp_path / "run"
    words = ["distill", "--data", tmp_path / "d.npz", "--teacher-weights", folder, *SHORT]
    assert kdtl(*words, "--out", out) == 0
    test = datasets.read_splits(str(tmp_path / "d.npz")).test
    found = huggingface.load(folder)
    scaled = (test.inputs / 255 - np.array(mean)) / np.array(deviation)
    logits = found.model(found.params, None, scaled.astype(np.float32))[0]["logits"]
    teacher = results(out)["rows"][0]
    wanted = np.mean(np.argmax(logits, -1) == test.labels)
    assert teacher["test_accuracy"]["values"] == [pytest.approx(wanted)]
    assert "copy of" in _refusal(out / "teacher.safetensors", tmp_path / "d.npz", capsys)
    assert kdtl("predict", out / "students" / "kd.safetensors", tmp_path / "d.npz") == 0
    capsys.readouterr()
    assert kdtl(*words, "--teacher", "mlp:8", "--out", tmp_path / "other") == 2
    assert "says itself what model it is" in capsys.readouterr().err


def _refusal(student: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert kdtl("predict", student, data) == 1
    return capsys.readouterr().err


def test_an_orbax_folder_teaches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters alone, or beside an optimizer's state among the steps of a manager."""
    net = networks.network(models.mlp((6,), 3), np.zeros((1, 5), np.float32))
    example = jnp.zeros((1, 5))
    variables = jax.jit(lambda: net.init(jax.random.key(3), example))()
    alone, steps = tmp_path / "alone", tmp_path / "steps"
    ocp.PyTreeCheckpointer().save(alone, variables.params)
    with ocp.CheckpointManager(steps) as manager:
        for step, scale in ((2, 0.5), (10, 1.0)):
            params = jax.tree.map(lambda x, s=scale: x * jnp.asarray(s, x.dtype), variables.params)
            whole: Any = {"params": params, "opt": {"count": jnp.zeros(())}}
            manager.save(step, args=ocp.args.PyTreeSave(whole))
    for folder in (alone, steps):
        assert _models.read_about(str(folder), "mlp:6", "mlp:1")[0] == "mlp:6"
        found = _models.load_variables(str(folder), net, example)
        jax.tree.map(np.testing.assert_array_equal, found.params, variables.params)
    with pytest.raises(ValueError, match="alone: the file does not fit.*dense_0/kernel"):
        other = networks.network(models.mlp((7,), 3), np.zeros((1, 5), np.float32))
        _models.load_variables(str(alone), other, example)
    with pytest.raises(UsageError, match="an Orbax folder, which does not say its model"):
        _models.read_about(str(alone), None, "mlp:1")
    assert not _weights.is_orbax(str(tmp_path))
    data, out = write_data(tmp_path / "d.npz"), tmp_path / "run"
    words = ["distill", "--data", data, "--teacher-weights", alone, "--teacher", "mlp:6", *SHORT]
    assert kdtl(*words, "--out", out) == 0
    assert results(out)["rows"][0]["settings"]["weights"] == str(alone)
