"""Folders that runs write to: what others hold is refused, and what is not ours is left alone."""

import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kdtl_jax import cli
from kdtl_jax.cli import main
from kdtl_jax.interop import safetensors
from kdtl_jax.recipes import _folders, _tables
from kdtl_jax.run import record

jax.devices()  # the back end is up, as in any test that ran before
Captured = pytest.CaptureFixture[str]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/results.json").write_text("precious")
    assert main(["demo", "--quick", "--out", str(tmp_path / "full")]) == 1
    assert "is not empty, and nothing in it is overwritten" in capsys.readouterr().err
    assert (tmp_path / "full/results.json").read_text() == "precious"
    assert main(["demo", "--quick", "--out", str(tmp_path / "full/results.json")]) == 1
    assert "is a file. Name a folder" in capsys.readouterr().err
    settings = cli.parse(["demo", "--out", str(tmp_path / "full"), "--force"])
    with pytest.raises(ValueError, match="other files: results.json"):
        with _folders.run_folder(settings, "demo"):
            pass
    assert (tmp_path / "full/results.json").read_text() == "precious"
    record.keep(tmp_path / "full", record.made_from({}))  # as a run does
    with _folders.run_folder(settings, "demo") as where:
        assert where.path == tmp_path / "full"


def test_settings_alone_are_no_run_and_a_config_of_ones_own_is_kept(tmp_path: Path) -> None:
    settings = cli.parse(["demo", "--out", str(tmp_path)])
    for _ in range(2):
        with _folders.run_folder(settings, "demo"):
            names = {path.name for path in tmp_path.iterdir()}
        assert names == {".lock", *_folders.SETTINGS}
    (tmp_path / "env.json").unlink()
    with pytest.raises(ValueError, match="is not empty"), _folders.run_folder(settings, "demo"):
        pass


@pytest.mark.parametrize("is_seen", [True, False])
def test_two_runs_cannot_share_a_folder(
    tmp_path: Path, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cli.parse(["bench", "--out", str(tmp_path)])
    if not is_seen:  # as where the first is about to write its record
        monkeypatch.setattr(record, "is_kept", lambda folder: False)
    with (
        _folders.run_folder(settings, "bench"),
        pytest.raises(RuntimeError, match="is in use by process"),
        _folders.run_folder(settings, "bench"),
    ):
        pass


@pytest.mark.parametrize("force", [False, True])
def test_of_two_runs_that_begin_at_one_instant_one_has_the_folder(
    tmp_path: Path, force: bool
) -> None:
    """The other is told so, whatever the first has written by then."""
    first = cli.parse(["bench", "--out", str(tmp_path / "0")])
    if force:
        with _folders.run_folder(first, "bench"):
            pass
    for i in range(6):
        folder = tmp_path / ("0" if force else str(i))
        settings = cli.parse(["bench", "--out", str(folder), *["--force"] * force])
        together = threading.Barrier(2)

        def begin(settings: Any = settings, together: threading.Barrier = together) -> str:
            together.wait()
            try:
                with _folders.run_folder(settings, "bench") as where:
                    together.wait()
                    return where.run
            except RuntimeError as error:
                together.wait()
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            outcomes = sorted(
                (task.result() for task in [pool.submit(begin) for _ in "ab"]), key=len
            )
        assert "in use by" in outcomes[1]
        assert json.loads((folder / "env.json").read_text())["run"] == outcomes[0]
        assert {path.name for path in folder.iterdir()} == {".lock", *_folders.SETTINGS}


def test_force_removes_only_what_a_run_wrote(tmp_path: Path, capsys: Captured) -> None:
    mine = tmp_path / "checkpoints/other/weights.bin"
    mine.parent.mkdir(parents=True)
    mine.write_text("my model")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints/a\x1b[2J").mkdir()
    settings = cli.parse(["demo", "--out", str(tmp_path), "--force"])
    with _folders.run_folder(settings, "demo"):
        pass
    assert mine.read_text() == "my model" and (tmp_path / "notes.txt").exists()
    output = capsys.readouterr().out
    assert rf"left alone in {tmp_path}/checkpoints: a\x1b[2J, other" in output


@pytest.mark.parametrize(("command", "name"), [("sentences", "student"), ("language", "sft")])
def test_models_of_others_are_not_written_over(
    command: str, name: str, tmp_path: Path, capsys: Captured
) -> None:
    """Neither in the run folder nor through a link there."""
    mine, out = tmp_path / "mine" / "model.safetensors", tmp_path / "out"
    mine.parent.mkdir()
    mine.write_text("my model")
    (tmp_path / "text.txt").write_text("words\n" * 99)
    words = ["--encoder", str(tmp_path), "--text"] if command == "sentences" else ["--data"]
    words = [command, *words, str(tmp_path / "text.txt"), "--force", "--out", str(out)]
    for is_link in (False, True):
        out.mkdir()
        if is_link:
            (out / name).symlink_to(mine.parent)
        else:
            shutil.copytree(mine.parent, out / name)
        assert main(words) == 1
        error = capsys.readouterr().err
        assert ("is a link" if is_link else "other files: model.safetensors") in error
        assert (out / name / mine.name).read_text() == "my model"
        shutil.rmtree(out)


@pytest.mark.parametrize("command", ["demo", "transfer", "distill", "sweep"])
def test_what_is_in_the_way_of_checkpoints_is_refused_before_any_training(
    command: str, tmp_path: Path, capsys: Captured
) -> None:
    place = {"distill": "kd/mine", "sweep": "teacher/mine"}.get(command, "mine")
    mine = tmp_path / "checkpoints" / place / "weights"
    mine.parent.mkdir(parents=True)
    mine.write_text("my model")
    (tmp_path / "metrics.jsonl").write_text("an earlier run's")
    words = ["--methods", "kd"] if command == "distill" else []
    assert main([command, "--quick", "--out", str(tmp_path), "--force", *words]) == 1
    output = capsys.readouterr()
    assert "holds other files: mine. Choose another folder." in output.err
    assert "source" not in output.err and "epoch" not in output.err, "nothing was trained"
    assert mine.read_text() == "my model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_lock_that_is_a_link_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(precious)
    settings = cli.parse(["demo", "--out", str(tmp_path / "run")])
    with pytest.raises(RuntimeError, match="link"), _folders.run_folder(settings, "demo"):
        pass
    assert precious.read_text() == "precious"


def test_a_program_that_starts_without_output_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tmp_path / "w.safetensors"
    safetensors.save(student, {"w": np.ones(3, np.float32)})
    for name in ("stdout", "stderr"):  # as Python sets them where a file is closed
        monkeypatch.setattr(sys, name, None)
    out = tmp_path / "o.safetensors"
    assert main(["params", "scale", str(student), "--alpha", "2", "--write", str(out)]) == 0
    assert out.is_file() and main(["params", "scale", "none.safetensors"]) == 1


def test_long_lines_are_printed_whole_and_safely(capsys: Captured) -> None:
    line = ", ".join(f"{i} named class {i}" for i in range(200)) + "\x1b[2J"
    _tables.show(["is"], [["a"]], [f"a\t{line}"])
    assert capsys.readouterr().out == f"a\t{line[:-4]}\\x1b[2J\n"
