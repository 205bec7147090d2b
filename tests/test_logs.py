"""What is logged beside results: `metrics.jsonl` for other tools, and the programs compiled."""

import csv
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from kdtl_jax.datasets import Dataset, Splits
from kdtl_jax.recipes import _logs, _output, _seeds
from kdtl_jax.train import sweep

LINES = [
    {"method": "kd", "step": 5, "loss": [1.0, 3.0], "learning_rate": 0.1},
    {"method": "kd", "step": 5, "eval/validation_accuracy": [0.5, 1.0]},
    {"method": "dkd", "step": 5, "loss": [4.0, None], "learning_rate": 0.1},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = "".join(f"{json.dumps(line)}\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(text)
    return tmp_path


def run_of(folder: Path) -> _seeds.SharedRun:
    none = Dataset("none", np.zeros((0, 1)), np.zeros(0), 2)
    return _seeds.SharedRun(
        folder, "", False, 1, {}, Splits(none, none, none), _logs.read_lines(folder)
    )


def test_a_table_has_a_row_per_line(folder: Path) -> None:
    _logs.write(folder, ["csv"])
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["2.0", "", "nan"]
    assert rows[1]["eval/validation_accuracy"] == "0.75" and rows[0]["learning_rate"] == "0.1"
    assert _logs.curves(_logs.read_lines(folder)["kd"]) == {"loss": [2.0], "learning_rate": [0.1]}


def test_lines_of_other_programs_stand_there_for_others(folder: Path) -> None:
    theirs = [{"epoch": 1, "loss": 2.0}, {"method": "kd", "loss": 9.0}, {"method": 3, "step": 1}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in theirs)
    assert _logs.method_lines(folder) == LINES
    assert _logs.curves(_logs.read_lines(folder)["kd"]) == {"loss": [2.0], "learning_rate": [0.1]}
    _logs.write_curves(folder, {"dkd": {"epoch": [1], "loss": [0.5]}}, ["csv"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*LINES[:2], *theirs, {"step": 1, "method": "dkd", "loss": 0.5}]
    run = run_of(folder)
    assert _seeds._skipped(run, "kd", 1) == []
    with _seeds._log(run, "kd", 0, 1, []) as log:
        assert log is not None
        log({"step": 1})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == theirs[0] and lines[1] == theirs[2], "theirs stay when a run is taken up"


def test_the_file_is_read_once_for_all_methods(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, plain = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or plain(path))
    run = run_of(folder)
    assert [*run.lines] == ["kd", "dkd"]
    before = len(reads)
    for name in ("dkd", "hint", "sp"):  # one was finished before the run was taken up
        with _seeds._log(run, name, 5, 1, []) as log:
            assert log is not None
            log({"step": 6, "loss": [np.float32(2), np.nan], "skipped": [0.5, 0.0]})
        assert _seeds._skipped(run, name, 4) == [2, 0]
        assert _logs.curves(run.lines[name])["loss"][-1:] == pytest.approx([np.nan], nan_ok=True)
    assert len(reads) == before, "it grows with the square of the methods otherwise"
    assert _logs.read_lines(folder) == run.lines, "what is remembered is what is written"


def test_a_lost_file_is_told_once_a_method_has_saved_steps(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoints" / "kd").mkdir(parents=True)
    assert _logs.read_lines(folder) == {}, "ended before it had logged anything"
    (folder / "checkpoints" / "kd" / "3").mkdir()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is missing: its metrics are lost"):
        assert _logs.read_lines(folder) == {}
    (folder / "metrics.jsonl").write_text("\n")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl holds no metrics: those of the saved"):
        assert _logs.read_lines(folder) == {}


def test_tensorboard_has_a_run_per_method_written_once(folder: Path) -> None:
    for _ in range(2):
        _logs.write(folder, ["tensorboard"])
    for method, tags in (("kd", (b"loss", b"eval/validation_accuracy")), ("dkd", (b"loss",))):
        [events] = (folder / "tensorboard" / method).iterdir()
        assert all(tag in events.read_bytes() for tag in tags)
    own = [{**LINES[0], "method": "hint"}]
    for chosen in (("csv",), ("csv", "tensorboard")):  # as soon as a method is finished, if asked
        _logs.write_method_events(folder, own, chosen)
        known = {home.name for home in (folder / "tensorboard").iterdir()}
        assert known == {"kd", "dkd"} | ({"hint"} if "tensorboard" in chosen else set())


def test_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _logs.kinds("csv,tensorboard") == ("csv", "tensorboard") and _logs.kinds(None) == ()
    with pytest.raises(ValueError, match="'wandb' is not one of tensorboard, csv"):
        _logs.kinds("csv,wandb")
    monkeypatch.setattr(_logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kdtl_jax\[tensorboard\]'"):
        _logs.kinds("tensorboard")


def test_programs_are_listed_by_name_with_their_number_and_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with _output.count_programs() as summary:

        @jax.jit
        def doubled(x: jax.Array) -> jax.Array:
            return 2 * x

        for size in (1, 2, 2):
            doubled(np.ones(size, np.float32))
        once = summary()
        jax.jit(lambda x: x - 1)(np.ones(3, np.float32))
        monkeypatch.setattr(_output, "MOST_NAMES", 1)
        summed = summary()
    seconds = r"\d+\.\d s"
    total = rf"\d compiled, \d from the compilation cache, {seconds} in all"
    assert re.fullmatch(rf"Programs: {total}: doubled \(2\) {seconds}\.", once), once
    assert re.search(rf"in all: .+ {seconds}, 1 other names {seconds}\.$", summed), summed
    jax.jit(lambda x: x - 2)(np.ones(3, np.float32))
    assert summary() == summed, "it has stopped listening"


def test_programs_of_sweeps_have_names() -> None:
    points = {"x": np.arange(5.0)}
    with _output.count_programs() as summary:
        for run in (sweep.vmap, sweep.map):
            run(lambda point: point["x"] + 1)(points)
    assert "run_at_once" in summary() and "run_in_turn" in summary()
    assert "<lambda>" not in summary()
