"""Evaluations are written once, however many saves repeat them; every step gets its own back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax.run import checkpoint

TREE = {"w": np.zeros(1, np.float32)}


def lines(count: int, start: int = 1) -> list[dict[str, Any]]:
    return [{"step": step, "eval/error": step / 3} for step in range(start, start + count)]


def written(folder: Path) -> int:
    """Bytes of all manifests and histories."""
    files = [*folder.glob("*/manifest.json"), *folder.glob("evaluations-*.jsonl")]
    return sum(path.stat().st_size for path in files)


def test_bytes_grow_with_the_number_of_evaluations(tmp_path: Path) -> None:
    seen = []
    with checkpoint.open_folder(tmp_path, keep=lambda saved: [x.step for x in saved]) as open_:
        for step in range(1, 17):
            every = lines(50 * step)
            checkpoint.save(open_, step, TREE, {"evaluations": every})
            checkpoint.wait(open_)
            seen.append(written(tmp_path))
    grown = np.diff(seen)
    assert grown.max() < 1.2 * grown.min(), "no save repeats what an earlier one wrote"
    for step in (1, 8, 16):
        assert checkpoint.restore(tmp_path, TREE, step=step).meta["evaluations"] == lines(50 * step)


def test_a_resumed_run_appends_and_a_rewound_one_leaves_older_steps_theirs(tmp_path: Path) -> None:
    def save(step: int, every: list[Any]) -> None:
        with checkpoint.open_folder(tmp_path) as open_:
            checkpoint.save(open_, step, TREE, {"evaluations": every})

    save(1, lines(1))
    save(2, lines(2))
    (history,) = tmp_path.glob("evaluations-*.jsonl")
    with history.open("ab") as file:
        file.write(b'{"step": 3, "cut sho')  # as a kill between the line and its step leaves it
    save(3, lines(3))
    assert history.read_bytes().count(b"\n") == 3
    other = [*lines(1), {"step": 2, "eval/error": 9.0}]
    save(2, other)  # from step 1 on it went otherwise
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.restore(tmp_path, TREE).meta["evaluations"] == other
    assert checkpoint.restore(tmp_path, TREE, step=1).meta["evaluations"] == lines(1)
    save(3, [])
    assert checkpoint.restore(tmp_path, TREE).meta["evaluations"] == []
    save(4, [*other, *lines(1, 4)])
    assert checkpoint.restore(tmp_path, TREE, step=2).meta["evaluations"] == other


def test_keep_functions_see_the_evaluations_of_the_step(tmp_path: Path) -> None:
    seen: list[Any] = []

    def keep(saved: Any) -> list[int]:
        seen.append([one.meta["evaluations"] for one in saved])
        return [one.step for one in saved]

    with checkpoint.open_folder(tmp_path, keep=keep) as open_:
        for step in (1, 2):
            checkpoint.save(open_, step, TREE, {"evaluations": lines(step)})
    assert seen[-1] == [[line] for line in lines(2)]
    with (
        pytest.raises(TypeError, match="must be a list"),
        checkpoint.open_folder(tmp_path) as open_,
    ):
        checkpoint.save(open_, 3, TREE, {"evaluations": {"error": 1.0}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("history")
    with checkpoint.open_folder(home) as open_:
        for step in (1, 2):
            checkpoint.save(open_, step, TREE, {"evaluations": lines(20 * step)})
    return home


@settings(max_examples=25)
@given(place=st.integers(0, 1500), put=st.binary(max_size=4), cut=st.integers(0, 900))
def test_any_history_is_whole_or_one_reason(folder: Path, place: int, put: bytes, cut: int) -> None:
    (path,) = folder.glob("evaluations-*.jsonl")
    whole = path.read_bytes()
    mine = json.loads((folder / "1/manifest.json").read_bytes())["history"]["bytes"]
    damaged = whole[:place] + put + whole[place + cut :]
    path.write_bytes(damaged)
    try:
        for step, size in ((1, mine), (2, len(whole))):
            reason = checkpoint.problem(folder, step)
            assert (reason is None) == (damaged[:size] == whole[:size])
            assert reason is None or path.name in reason
    finally:
        path.write_bytes(whole)
