"""What `kdtl distill` refuses, before anything is trained, and what it says of what diverged."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import SHORT, kdtl, results, write_data

from kdtl_jax import cli
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes import _folders, _seeds

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run_of_kd(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "kd"
    assert kdtl("distill", "--data", file, *SHORT, "--seeds", 1, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def teacher(run_of_kd: Path) -> Path:
    return run_of_kd / "teacher.safetensors"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--methods", "kdd"], 2, "Nearest: kd, "),
        (["--methods", ","], 2, "at least one name"),
        (["--temperature", "0"], 2, "above 0"),
        (["--temperature", "-1"], 2, "above 0"),
        (["--seeds", "0"], 2, "1 or more"),
        (["--student", "mlp:x"], 2, "whole numbers"),
        (["--mesh", "data=x"], 2, "data=4,fsdp=2"),
        (["--augment", "blur"], 2, "crop, flip, mixup, cutmix"),
        (["--augment", "flip"], 2, "needs images"),
        (["--augment", "flip", "--teacher-cache", "c"], 2, "not for --augment's views"),
        (["--loss-weights", "kd"], 2, "term=number"),
        (["--loss-weights", "kd=-1"], 2, "term=number"),
        (["--layers", "hidden_0"], 2, "student_tap:teacher_tap"),
        (["--epoch", "3"], 2, "did you mean --epochs"),
        (["--process", "0"], 2, "give all of coordinator"),
        (["--loss-weights", "kdd=1"], 2, "student_alone: task; kd: kd, task"),
        (["--loss-weights", "dkd.kd=1"], 2, "method.term=weight"),
        (["--methods", "at"], 2, "no method is left. at does not apply: "),
        (["--batch-size", "64"], 1, "a batch of 64 is larger than the 45 training examples"),
        (["--per-class", "2"], 1, "a batch of 8 is larger than the 6 training examples"),
        (["--per-class", "99"], 1, "class 0 has 15 examples, but 99 are needed"),
        (["--microbatches", "3"], 2, "does not divide into 3 microbatches"),
        (["--mesh", "data=16"], 1, "there are 8"),
        (["--mesh", "data=3"], 2, "Choose a multiple of 3"),
        (["--data", "none.npz"], 1, "no such file"),
        (["--student", "cnn:4"], 1, "images must be"),
        (["--teacher-weights", "none.safetensors"], 1, "no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_told_before_anything_is_trained(
    file: Path,
    tmp_path: Path,
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert kdtl("distill", "--data", file, "--out", run, *SHORT, *words) == code
    assert message in capsys.readouterr().err
    assert not (run / "checkpoints").exists()
    settings = cli.parse(["distill", "--out", str(run)])
    with _folders.run_folder(settings, "distill"):
        pass  # the next attempt may go to the same folder


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("distill", "--resume", "there is no run in"),
        ("distill", "--loss-weights kdd=1", "'kdd' is not a term here"),
        ("distill", "--methods at,minilm --loss-weights at.kd=1", "at: at, task; minilm: "),
        ("distill", "--augment flip --teacher-cache c", "not for --augment's views"),
        ("distill", "--batch-size 8 --microbatches 3", "does not divide into 3 microbatches"),
        ("distill", "--target numbers --label-smoothing 0.1", "the targets are numbers"),
        ("distill", "--layers hidden_0:hidden_9", "teacher has no tap 'hidden_9'. It has dense_0"),
        ("distill", "--student none.py:Net", "none.py: no such file"),
        ("sweep", "--resume", "there is no run in"),
        ("sweep", "--grid temprature=1,2 fast=1", "'temprature', 'fast' are not axes of kd, "),
        ("sweep", "--teacher none.py:Net", "none.py: no such file"),
        ("transfer", "--resume", "there is no run in"),
        ("transfer", "--class-weights balanced --labels-per-class 3", "has 3 labels already"),
        ("transfer", "--model none.py:Net", "none.py: no such file"),
        ("transfer", "--source-classes 0-1 --source-weights x", "Give one of them"),
        ("transfer", "--where [", "'[' is not a regular expression (unterminated"),
        ("transfer", "--rename (=>x", "'(' is not a regular expression (missing )"),
        ("cache", "--teacher none.py:Net --teacher-weights x", "none.py: no such file"),
    ],
)
def test_usage_errors_are_told_before_the_data_are_read(
    tmp_path: Path, command: str, words: str, message: str, capsys: Captured
) -> None:
    data = ["--data", tmp_path / "none.npz", "--out", tmp_path / "run"]
    assert kdtl(command, *data, *words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_there_is_told_before_the_data_are_read(
    run_of_kd: Path, tmp_path: Path, capsys: Captured
) -> None:
    data = ["--data", tmp_path / "none.npz", "--out", run_of_kd]
    for command in ("distill", "sweep", "transfer"):
        assert kdtl(command, *data) == 1
        assert "is not empty" in capsys.readouterr().err
    assert kdtl("distill", *data, *SHORT, "--resume") == 2
    assert "was run with other settings: data (" in capsys.readouterr().err


def test_a_teacher_of_other_shapes_is_named_leaf_by_leaf(
    teacher: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.save(tmp_path / "teacher.safetensors", safetensors.load(teacher))  # no metadata
    given = ["--teacher-weights", tmp_path / "teacher.safetensors", "--teacher", "mlp:9"]
    assert kdtl("distill", "--data", file, *SHORT, *given, "--out", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "'head/kernel' is [8, 3], expected [9, 3]" in errors and "teacher.safetensors" in errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3\n", "unknown key 'epoch'; did you mean epochs"),
        ("methods: [kd, nothing]\n", "'nothing' is not a method"),
        ("loss_weights: {kd: much}\n", "term=number"),
        ("data: {a: 1}\n", "expected text, got"),
        ("temperature: 0\n", "above 0"),
    ],
)
def test_bad_configs_are_told(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    words = ["--config", tmp_path / "config.yaml", "--out", tmp_path / "run"]
    assert kdtl("distill", *words) == 2
    assert message in capsys.readouterr().err


def test_a_teacher_is_run_on_the_inputs_that_it_was_made_for(
    teacher: Path, file: Path, tmp_path: Path, run_of_kd: Path
) -> None:
    """The same examples, shifted and scaled: its own mean and deviation, not the new data's."""
    moved = write_data(tmp_path / "moved.npz", shift=3.0)
    flags = ["--teacher-weights", teacher, "--methods", "kd", "--epochs", 1]
    short = [*SHORT[:2], *flags, "--student", "mlp:4", "--batch-size", 8, "--seeds", 1]
    assert kdtl("distill", "--data", moved, *short, "--out", tmp_path / "run") == 0
    shown = results(tmp_path / "run")["rows"][0]["test_accuracy"]["mean"]
    known = safetensors.index(teacher).metadata
    kept = safetensors.index(tmp_path / "run" / "students" / "kd.safetensors").metadata
    assert kept["input_mean"] == known["input_mean"]
    from kdtl_jax import datasets, models
    from kdtl_jax.interop import linen

    test = datasets.read_splits(str(moved)).test
    mean, scale = (np.fromstring(known[f"input_{n}"][1:-1], sep=",") for n in ("mean", "scale"))
    params = safetensors.load_tree(teacher)
    logits = linen.model(models.mlp((8,), 3)).apply(
        params, None, ((test.inputs - mean) / scale).astype(np.float32)
    )[0]["logits"]
    assert shown == pytest.approx(np.mean(np.argmax(logits, -1) == test.labels))


def test_a_teachers_file_must_be_of_this_network_and_finite(
    teacher: Path, file: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["distill", "--data", file, "--out", tmp_path / "run", "--teacher-weights"]
    assert kdtl(*arguments, teacher, "--teacher", "mlp:8,8") == 2
    assert "holds the model mlp:8, not mlp:8,8" in capsys.readouterr().err
    stored = safetensors.load(teacher)
    nan = {name: x * np.float32(np.nan) for name, x in stored.items()}
    safetensors.save(tmp_path / "nan.safetensors", nan)
    for command in ("distill", "sweep"):
        words = [command, *arguments[1:], tmp_path / "nan.safetensors", "--teacher", "mlp:8"]
        assert kdtl(*words) == 1
        assert "weights are not finite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_nothing_held_out_is_told_at_once(file: Path, tmp_path: Path, capsys: Captured) -> None:
    for part in ("validation", "test"):
        words = ["distill", "--data", file, *SHORT, f"--{part}", 0, "--out", tmp_path / "run"]
        assert kdtl(*words) == 2
        assert f"--{part} 0 leaves no {part} examples" in capsys.readouterr().err


def test_resuming_wants_the_same_content(
    run_of_kd: Path, file: Path, tmp_path: Path, capsys: Captured
) -> None:
    data, run = tmp_path / "data.npz", tmp_path / "run"
    shutil.copy(file, data)
    words = ["distill", "--data", data, *SHORT, "--seeds", 1, "--out", run]
    assert kdtl(*words) == 0
    with np.load(file) as stored:
        np.savez(data, x=stored["x"], y=2 - stored["y"])
    capsys.readouterr()
    assert kdtl(*words, "--resume") == 1
    assert "other content of data" in capsys.readouterr().err
    assert kdtl(*words, "--resume", "--force") == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_student_that_diverges_ranks_last_and_is_not_saved(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are not finite name no class: not even class 0."""
    plain = _seeds.make_evaluate

    def evaluation(experiment: Any, *rest: Any) -> Any:
        evaluate = plain(experiment, *rest)

        def diverged(state: Any, inputs: np.ndarray) -> np.ndarray:
            result = evaluate(state, inputs)
            return result if len(result) == 1 else np.full_like(result, -1)

        return diverged

    monkeypatch.setattr(_seeds, "make_evaluate", evaluation)
    run = tmp_path / "run"
    assert kdtl("distill", "--data", file, *SHORT, "--out", run) == 0
    rows = {row["method"]: row for row in results(run)["rows"]}
    assert rows["kd"]["test_accuracy"]["mean"] is None
    assert rows["teacher"]["test_accuracy"]["mean"] is not None
    assert not list((run / "students").glob("*.safetensors")) and (run / "report.html").exists()
    assert any("kd diverged" in note for note in results(run)["notes"])
