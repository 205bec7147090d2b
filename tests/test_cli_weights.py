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
from model_folders import edited
from tiny import kdtl, results, write_data

from kdtl_jax import datasets, models, trees
from kdtl_jax.interop import huggingface, model_files, networks, safetensors, sources
from kdtl_jax.recipes import _models
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
    result = huggingface.load(folder)
    scaled = (test.inputs / 255 - np.array(mean)) / np.array(deviation)
    logits = result.model(result.params, None, scaled.astype(np.float32))[0]["logits"]
    teacher = results(out)["rows"][0]
    expected = np.mean(np.argmax(logits, -1) == test.labels)
    assert teacher["test_accuracy"]["values"] == [pytest.approx(expected)]
    file = out / "teacher.safetensors"
    assert f"Pass it: model=huggingface.load('{folder}').module" in _refusal(
        file, tmp_path / "d.npz", capsys
    )
    module = huggingface.load(folder).module
    again = model_files.load(file, model=module).predict(test.inputs)
    np.testing.assert_allclose(again, logits, atol=1e-5)
    assert kdtl("predict", out / "students" / "kd.safetensors", tmp_path / "d.npz") == 0
    capsys.readouterr()
    assert kdtl(*words, "--teacher", "mlp:8", "--out", tmp_path / "other") == 2
    assert "already says which model it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"image_mean": [0.4], "image_std": [0.2]}, lambda x: (x / 255 - 0.4) / 0.2),
        ({"image_mean": [0.4], "image_std": [0.2], "do_normalize": False}, lambda x: x / 255),
        ({"image_mean": None, "image_std": None, "do_normalize": False}, lambda x: x / 255),
        ({"do_normalize": False, "rescale_factor": 0.5}, lambda x: x / 2),
        ({"image_mean": [9], "image_std": [7], "do_rescale": False}, lambda x: (x - 9) / 7),
        ({"do_normalize": False, "do_rescale": False}, lambda x: x),
    ],
)
def test_images_are_scaled_by_the_steps_that_the_processor_takes(
    known: dict[str, Any], wanted: Any, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(known))
    made, x = sources.scaling(str(tmp_path)), np.array([[0.0], [100.0], [255.0]])
    assert made is not None
    np.testing.assert_allclose((x - made.mean) / made.scale, wanted(x), rtol=1e-5, atol=1e-5)


def test_a_processor_that_shifts_or_only_resizes(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    # EfficientNet's, and MobileViT's, which turn colors about.
    for strange in ("rescale_offset", "include_top", "do_flip_channel_order"):
        file.write_text(json.dumps({"do_normalize": False, strange: True}))
        with pytest.raises(ValueError, match=f"'{strange}' is not known here"):
            sources.scaling(str(tmp_path))
    file.write_text(json.dumps({"do_normalize": False, "do_flip_channel_order": False}))
    assert sources.scaling(str(tmp_path)) is not None
    file.write_text(json.dumps({"do_resize": True, "size": 16, "do_rescale": True}))
    assert sources.scaling(str(tmp_path)) is None


def test_a_hugging_face_folder_becomes_a_model_of_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The body is copied, the head is new; the file is used with the folder."""
    rng, y = np.random.default_rng(0), np.arange(40) % 3
    images = rng.integers(0, 100, (40, 16, 16, 3)) + 40 * y[:, None, None, None]
    np.savez(tmp_path / "d.npz", x=images.astype(np.uint8), y=y)
    data, out = tmp_path / "d.npz", tmp_path / "run"
    shutil.copytree(VIT, tmp_path / "vit")
    words = ["transfer", "--data", data, "--source-weights", tmp_path / "vit", "--seeds", 1]
    words += ["--methods", "copied_head_only", "--epochs", 1, "--lr", 0.01, "--out", out]
    assert kdtl(*words) == 0
    actual = results(out)
    assert any("new in the target: head (5 outputs there, 3 here)" in x for x in actual["notes"])
    student, known = out / "students" / "copied_head_only.safetensors", huggingface.load(VIT)
    stored = safetensors.load(student)
    assert stored["head/kernel"].shape == (12, 3)
    body = {k: x for k, x in trees.flatten(known.params).items() if not k.startswith("head/")}
    assert body.keys() | {"head/kernel", "head/bias"} == stored.keys()
    for path, leaf in body.items():
        np.testing.assert_array_equal(stored[path], leaf)
    model = model_files.load(student, model=known.module)
    assert model.about.preprocessing is not None
    test = datasets.read_splits(str(data), preprocessing=model.about.preprocessing).test
    score = np.mean(model.predict(test.inputs).argmax(-1) == test.labels)
    (row,) = actual["rows"]
    assert row["test_accuracy"]["values"] == [pytest.approx(score)]
    assert "Pass it" in _refusal(student, data, capsys)
    words = [student, data, "--model", f"{tmp_path / 'vit'}/", "--out", tmp_path / "scores.json"]
    assert kdtl("evaluate", *words) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == pytest.approx(score)
    # As a teacher it keeps its own classes.
    with pytest.raises(ValueError, match="head/kernel.*for these classes"):
        net = _models.make_network(f"huggingface:{VIT}", 3, test.inputs[:1])
        sources.variables(sources.opened(str(VIT)), networks.abstract(net, test.inputs[:1]))


@pytest.mark.parametrize(
    ("said", "answers"), [("multi_label_classification", "labels"), ("regression", "numbers")]
)
def test_a_folder_that_answers_something_else_is_no_teacher_of_classes(
    said: str, answers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A softmax over the logits of separate labels would look right."""
    folder = edited(VIT, tmp_path, problem_type=said)
    data = tmp_path / "d.npz"
    np.savez(data, x=np.zeros((40, 16, 16, 3), np.uint8), y=np.arange(40) % 5)
    words = ["--data", data, "--teacher-weights", folder, "--out", tmp_path / "out"]
    assert kdtl("cache", *words) == 1
    assert f"answers {answers} (problem_type in its config.json)" in capsys.readouterr().err
    assert sources.kind(str(VIT)) is None


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, (224, 224)),
        ({"size": {"height": 8, "width": 6}, "crop_size": 4, "do_center_crop": False}, (8, 6)),
        ({"size": [8, 6]}, (8, 6)),
        ({"size": 8, "do_resize": False}, None),
        ({"size": {"longest_edge": 8}}, None),
        ({}, None),
    ],
)
def test_images_of_another_size_than_the_folder_makes_are_told(
    known: dict[str, Any],
    wanted: tuple[int, int] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A convolutional network takes them; this one is refused later, for its four channels."""
    folder = edited(VIT.parent / "resnet_basic", tmp_path)
    known = {"image_mean": [0.5] * 4, "image_std": [1] * 4, **known}
    (folder / "preprocessor_config.json").write_text(json.dumps(known))
    assert sources.sides(str(folder)) == wanted
    np.savez(tmp_path / "d.npz", x=np.zeros((40, 9, 7, 3), np.uint8), y=np.arange(40) % 5)
    words = ["--data", tmp_path / "d.npz", "--teacher-weights", folder]
    assert kdtl("cache", *words, "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "scales inputs of shape [4]" in errors
    note = "was made for images of {}x{}; these are 9x7".format(*wanted or (0, 0))
    assert (note in errors) == (wanted is not None)


def test_a_body_without_a_head_gets_one() -> None:
    folder = VIT.parent / "vit_rectangles"
    sides = huggingface.load(folder).config["image_size"]
    net = _models.make_network(f"huggingface:{folder}", 3, jnp.zeros((1, *sides, 3)))
    head = networks.abstract(net, jnp.zeros((1, *sides, 3))).params["head"]
    assert head["kernel"].shape[-1] == 3
    with pytest.raises(ValueError, match="type 'bert' reads text, not images or tables"):
        _models.make_network(f"huggingface:{VIT.parent / 'bert'}", 3, jnp.zeros((1, *sides, 3)))


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
        source = _models.open_source(str(folder), "mlp:6", "mlp:1")
        assert source.about.model == "mlp:6"
        result = sources.variables(source, networks.abstract(net, example))
        jax.tree.map(np.testing.assert_array_equal, result.params, variables.params)
    with pytest.raises(ValueError, match="alone: the file does not fit.*dense_0/kernel"):
        other = networks.network(models.mlp((7,), 3), np.zeros((1, 5), np.float32))
        sources.variables(sources.opened(str(alone)), networks.abstract(other, example))
    with pytest.raises(UsageError, match="an Orbax folder, which does not say its model"):
        _models.open_source(str(alone), None, "mlp:1")
    assert not sources.is_orbax(str(tmp_path))
    data, out = write_data(tmp_path / "d.npz"), tmp_path / "run"
    words = ["distill", "--data", data, "--teacher-weights", alone, "--teacher", "mlp:6", *SHORT]
    assert kdtl(*words, "--out", out) == 0
    assert results(out)["rows"][0]["settings"]["weights"] == str(alone)
