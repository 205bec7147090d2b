"""`kdtl distill` in-process on tiny data: what it writes, resuming, placements, and bad input."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from tiny import SHORT, kdtl, results

from kdtl_jax import datasets, methods, models, trees
from kdtl_jax.interop import linen, safetensors
from kdtl_jax.recipes import _models, _seeds
from kdtl_jax.run import checkpoint, loop


@pytest.fixture(scope="module")
def straight(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs: kd, and hint with its connector."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert kdtl("distill", "--data", file, *SHORT, "--methods", "kd,hint", "--out", folder) == 0
    return folder


def final(folder: Path, method: str) -> dict[str, np.ndarray]:
    """Every array of a method's last checkpoint, by path, but its keys."""
    home = folder / "checkpoints" / method
    step = checkpoint.steps(home)[-1]
    manifest = json.loads((home / str(step) / "manifest.json").read_text())
    template = {
        leaf["path"]: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
        for leaf in manifest["leaves"]
        if not leaf["dtype"].startswith("key")
    }
    result = checkpoint.restore(home, template, only=trees.everything).state
    return {path: np.asarray(x) for path, x in result.items()}


def bits(folder: Path, methods: Sequence[str]) -> dict[str, Any]:
    """All that must come out alike: parameters, optimizer, metrics, the student's file."""
    found: dict[str, Any] = {
        f"{method}/{path}": x.tobytes()
        for method in methods
        for path, x in final(folder, method).items()
    }
    files = [f"students/{name}.safetensors" for name in methods if name != "teacher"]
    for name in ("metrics.jsonl", "teacher.safetensors", *files):
        found[name] = (folder / name).read_bytes()
    return found


# What a run leaves.


def test_the_run_folder_is_complete(straight: Path) -> None:
    names = {path.name for path in straight.iterdir() if path.name != ".lock"}
    assert names == {
        *("config.yaml", "env.json", "metrics.jsonl", "results.json", "report.html"),
        "made_from.json",
        *("checkpoints", "students", "teacher.safetensors"),
    }
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {
        *("teacher", "student_alone", "kd", "hint")
    }
    page = (straight / "report.html").read_text()
    assert "Knowledge distillation" in page and "http" not in page.replace("http-equiv", "")


def test_results_have_the_documented_schema(straight: Path) -> None:
    actual = results(straight)
    assert actual["schema_version"] == 2
    rows = {row["method"]: row for row in actual["rows"]}
    assert list(rows) == ["teacher", "student_alone", "kd", "hint"]
    for name, row in rows.items():
        accuracy, seeds = row["test_accuracy"], 1 if name == "teacher" else 2
        assert row["seeds"] == len(accuracy["values"]) == seeds
        assert accuracy["mean"] == pytest.approx(np.mean(accuracy["values"]))
        assert (row["versus"] is not None) == (name in ("kd", "hint"))
        if row["versus"] is not None:
            assert row["versus"]["verdict"] == "not tested", "two seeds decide nothing"
        assert row["settings"]["epochs"] == (2 if name == "teacher" else 4)
    assert rows["teacher"]["parameters"] == 5 * 8 + 8 + 8 * 3 + 3
    assert rows["hint"]["parameters"] == 5 * 4 + 4 + 4 * 3 + 3  # the connector is thrown away
    assert rows["kd"]["settings"]["weights"] == {"task": 0.1, "kd": 0.9}
    assert set(actual["curves"]["learning"]) == {"student_alone", "kd", "hint"}
    assert actual["curves"]["learning"]["kd"]["epoch"] == [1, 2, 3, 4]


def test_metrics_have_a_line_per_epoch_and_evaluation(straight: Path) -> None:
    lines = [line for line in loop.read_metrics(straight / "metrics.jsonl") if "loss" in line]
    # 45 training examples: 5 steps per epoch.
    assert [line["step"] for line in lines if line["method"] == "kd"] == [5, 10, 15, 20]
    assert [line["step"] for line in lines if line["method"] == "teacher"] == [5, 10]
    line = next(line for line in lines if line["method"] == "kd")
    assert line.keys() == {"method", "step", "task", "kd", "loss", "learning_rate", "skipped"}
    assert 0 < lines[-1]["learning_rate"] < 1e-4 < line["learning_rate"]
    assert len(line["kd"]) == 2 and line["kd"][0] != line["kd"][1]
    np.testing.assert_allclose(
        line["loss"], 0.9 * np.array(line["kd"]) + 0.1 * np.array(line["task"]), rtol=1e-5
    )


def test_students_read_back_give_the_accuracy_in_the_table(straight: Path, file: Path) -> None:
    with np.load(file) as stored:
        x, y = stored["x"], stored["y"]
    stored = straight / "students" / "kd.safetensors"
    meta = safetensors.index(stored).metadata
    assert meta["model"] == "mlp:4" and meta["method"] == "kd" and meta["classes"] == "3"
    model = linen.model(models.mlp((4,), 3))
    mean, scale = (np.array(json.loads(meta[f"input_{n}"]), np.float32) for n in ("mean", "scale"))
    params = safetensors.load_tree(stored)
    rows = datasets.read_splits(str(file))
    inputs = (rows.test.inputs - mean) / scale
    logits = model.apply(params, None, inputs)[0]["logits"]
    actual = {row["method"]: row for row in results(straight)["rows"]}[meta["method"]]
    assert actual["settings"]["file"] == "students/kd.safetensors"
    validation = actual["validation_accuracy"]["values"]
    assert int(meta["seed"]) == actual["settings"]["file_seed"] == np.argmax(validation)
    expected = actual["test_accuracy"]["values"][int(meta["seed"])]
    assert np.mean(np.argmax(logits, -1) == rows.test.labels) == pytest.approx(expected)
    assert len(x) == len(y) == 90


def test_the_written_config_is_the_settings(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kdtl("distill", "--config", straight / "config.yaml", "--print-config") == 0
    assert capsys.readouterr().out == (straight / "config.yaml").read_text()


def test_lists_and_mappings_in_a_config_go_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "methods": ["kd", "dkd"],
        "loss_weights": {"kd": {"kd": 0.5}, "task": 0.2},
        "layers": {"hidden_0": "hidden_1"},
        "mesh": {"data": 2},
        "augment": ["crop=1", "flip"],
    }
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(config))
    assert kdtl("distill", "--config", tmp_path / "in.yaml", "--print-config") == 0
    text = capsys.readouterr().out
    actual = yaml.safe_load(text)
    assert actual["loss_weights"] == {"kd.kd": 0.5, "task": 0.2}
    assert actual["layers"] == [["hidden_0", "hidden_1"]] and actual["mesh"] == {"data": 2}
    assert actual["augment"] == ["crop=1", "flip"]
    (tmp_path / "out.yaml").write_text(text)
    assert kdtl("distill", "--config", tmp_path / "out.yaml", "--print-config") == 0
    assert capsys.readouterr().out == text


def test_list_shows_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert kdtl("distill", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        "method",
        *(entry.name for entry in methods.table()),
    ]
    assert "Hinton" in lines[1] and lines[1].endswith("no")


# Stopped and taken up again.


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sends this process SIGTERM after a given number of lines of the metrics file."""
    plain, counts = loop.metrics_file, {"left": 0}

    @contextlib.contextmanager
    def counted(*args: Any, **options: Any) -> Iterator[loop.Log]:
        with plain(*args, **options) as write:

            def log(line: dict[str, Any]) -> None:
                write(line)
                counts["left"] -= 1
                if counts["left"] == 0:
                    os.kill(os.getpid(), signal.SIGTERM)

            yield log

    monkeypatch.setattr(_seeds.loop, "metrics_file", counted)
    yield lambda number: counts.update(left=number)


@pytest.mark.parametrize("line", [3, 24], ids=["teacher", "hint"])
def test_a_stopped_run_goes_on_bit_for_bit(
    straight: Path,
    file: Path,
    tmp_path: Path,
    stop_at: Callable[[int], None],
    line: int,
) -> None:
    words = ["distill", "--data", file, *SHORT, "--methods", "kd,hint", "--out", tmp_path / "run"]
    stop_at(line)
    assert kdtl(*words) == 143
    assert not (tmp_path / "run" / "results.json").exists()
    assert kdtl(*words, "--resume") == 0
    methods = ["teacher", "student_alone", "kd", "hint"]
    assert bits(tmp_path / "run", methods) == bits(straight, methods)
    old, new = results(straight)["rows"], results(tmp_path / "run")["rows"]
    assert [r["test_accuracy"] for r in old] == [r["test_accuracy"] for r in new]


def test_resuming_wants_the_same_settings(
    straight: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (straight / "results.json").read_bytes()
    words = ["distill", "--data", file, *SHORT, "--methods", "kd,hint", "--out", straight]
    assert kdtl(*words, "--resume", "--seeds", 3) == 2
    assert "seeds (2, now 3)" in capsys.readouterr().err
    assert kdtl(*words) == 1
    assert "is not empty" in capsys.readouterr().err
    assert (straight / "results.json").read_bytes() == before


# Placements and paths.


@pytest.fixture(scope="module")
def kd_params(straight: Path) -> dict[str, np.ndarray]:
    return {k: v for k, v in final(straight, "kd").items() if k.startswith("params")}


@pytest.mark.parametrize(
    "flags",
    [["--mesh", "data=2"], ["--one-by-one", "--microbatches", "2"]],
    ids=["two-devices", "seed-by-seed"],
)
def test_every_way_to_run_gives_the_same_students(
    file: Path,
    tmp_path: Path,
    kd_params: dict[str, np.ndarray],
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", tmp_path / "run"]
    assert kdtl("distill", "--data", file, *SHORT, *flags, *out) == 0
    errors = capsys.readouterr().err
    assert "teacher: epoch 2 of 2, validation" in errors, "the last of each is always told"
    assert "kd: epoch 4 of 4, validation" in errors
    actual = final(tmp_path / "run", "kd")
    for path, expected in kd_params.items():
        np.testing.assert_allclose(actual[path], expected, atol=1e-5, err_msg=path)
    lines = loop.read_metrics(tmp_path / "run" / "metrics.jsonl")
    at = [line["step"] for line in lines if line["method"] == "kd" and "loss" in line]
    assert at == [5, 10, 15, 20]


def test_a_teacher_from_a_file_and_from_its_cache(
    straight: Path, file: Path, tmp_path: Path, kd_params: dict[str, np.ndarray]
) -> None:
    given = ["--teacher-weights", straight / "teacher.safetensors"]
    given += ["--teacher-cache", tmp_path / "cache"]
    assert kdtl("distill", "--data", file, *SHORT, *given, "--out", tmp_path / "run") == 0
    actual = final(tmp_path / "run", "kd")
    for path, expected in kd_params.items():
        np.testing.assert_array_equal(actual[path], expected)
    assert (tmp_path / "cache" / "manifest.json").exists()
    assert [r["method"] for r in results(tmp_path / "run")["rows"]][0] == "teacher"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(1)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 4, 4)) + y[:, None, None]
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x=x.astype(np.float32), y=y)
    return path


@pytest.mark.slow
def test_views_in_half_precision_from_few_examples(images: Path, tmp_path: Path) -> None:
    more = ["--augment", "crop,flip,mixup=0.5", "--precision", "float16", "--per-class", "6"]
    models = ["--teacher", "cnn:2", "--student", "cnn:2", "--teacher-epochs", 1]
    folder = tmp_path / "run"
    assert kdtl("distill", "--data", images, *SHORT, *models, *more, "--out", folder) == 0
    rows = {row["method"]: row for row in results(folder)["rows"]}
    # The live teacher's convolutions keep their threads: one seed, one step per call.
    assert rows["kd"]["settings"]["ran"] == "seed by seed"
    assert "skipped_updates" not in rows["kd"]["settings"]
    lines = [line for line in loop.read_metrics(folder / "metrics.jsonl") if "kd" in line]
    assert lines and all(np.isfinite(line["loss"]).all() for line in lines)


class Normed(nn.Module):
    """An MLP with batch statistics."""

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(inputs)
        hidden = jax.nn.relu(nn.Dense(4, name="dense_0")(x))
        return {"hidden_0": hidden, "logits": nn.Dense(3, name="head")(hidden)}


@pytest.mark.slow
def test_batch_statistics_are_trained_and_saved(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_models, "module", lambda text, classes: Normed())
    folder = tmp_path / "run"
    assert kdtl("distill", "--data", file, *SHORT, "--out", folder) == 0
    stored = safetensors.load(folder / "students" / "kd.safetensors")
    assert {"params/norm/scale", "batch_stats/norm/mean"} <= stored.keys()
    assert np.abs(stored["batch_stats/norm/mean"]).max() > 0
    again = ["--teacher-weights", folder / "teacher.safetensors", "--one-by-one"]
    assert kdtl("distill", "--data", file, *SHORT, *again, "--out", tmp_path / "again") == 0
    for path, expected in final(folder, "kd").items():
        if path.startswith(("params", "model_state")):
            actual = final(tmp_path / "again", "kd")[path]
            np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=path)


# Methods that go wrong.


def made(name: str, terms: Any, applies: Any = lambda setup: None) -> methods.Entry:
    def build(setup: Any) -> methods.Method:
        return methods.method(setup, terms, {"task": 1.0, "term": 1.0})

    return methods.Entry(name, name.title(), "nobody, 2026", "logits", False, build, applies)


def test_methods_that_break_are_reported_and_stop_nothing(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kd_params: dict[str, np.ndarray],
) -> None:
    def bursts(inputs: Any) -> Any:
        # Not finite at two of the twenty steps.
        size = jnp.mean(inputs.student["logits"], axis=-1)
        return {"term": jnp.where(inputs.step % 10 == 7, jnp.nan, 0.0) * size}

    def broken(inputs: Any) -> Any:
        raise ValueError("term: shapes do not fit")

    absent = made("absent", broken, lambda setup: "needs maps")
    added = (made("bursts", bursts), made("broken", broken), absent, *methods.table())
    monkeypatch.setattr(methods, "table", lambda: added)
    words = ["--methods", "broken,absent,bursts,kd", "--out", tmp_path / "run"]
    assert kdtl("distill", "--data", file, *SHORT, *words) == 1
    errors = capsys.readouterr().err
    assert "failed: broken" in errors
    early = errors.index("note: absent does not apply: needs maps")
    assert early < errors.index("s  teacher"), "before anything is trained"
    result = results(tmp_path / "run")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "student_alone", "bursts", "kd"]
    assert rows["bursts"]["settings"]["skipped_updates"] == [2, 2]
    notes = "\n".join(result["notes"])
    assert "broken failed: term: shapes do not fit" in notes
    assert "absent does not apply: needs maps" in notes
    assert "bursts: updates that were not finite were left out" in notes
    for path, expected in kd_params.items():
        np.testing.assert_array_equal(final(tmp_path / "run", "kd")[path], expected)
