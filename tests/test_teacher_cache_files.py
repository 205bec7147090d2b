"""The teacher cache on disk: what survives a kill, damage, foreign files and few open files."""

import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_caches import CLASSES, LIVE, PARAMS, ROWS, N, contents, expected, write

from kdtl_jax import _files, _locks
from kdtl_jax.run import teacher_cache as tc


class Killed(BaseException):
    """Not an Exception: nothing on the way may handle it."""


@pytest.mark.parametrize(("after", "kept"), [(0, 0), (16, 0), (20, 1), (29, 1), (45, 2), (50, 3)])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, after: int, kept: int) -> None:
    """Killed once so many rows were done: bitwise what an uninterrupted run writes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole)

    def kill(done: int, total: int) -> None:
        if done >= after:
            raise Killed

    with pytest.raises(Killed):
        write(broken, progress=kill)
    (broken / ".00001.bin.123.kdtl-tmp").write_bytes(b"cut sho")
    with pytest.raises(ValueError, match=f"not finished: {kept} of 3 shards"):
        tc.open_cache(broken, expect=expected())
    seen = []
    write(broken, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (min(20 * kept, N), N) and seen[-1] == (N, N)
    assert contents(broken) == contents(whole)


def test_a_run_killed_before_every_file_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between a shard and its seal, and before the manifest."""
    options: dict[str, Any] = {"top_k": 3, "shard_rows": 25}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, **options)
    write_atomic, left = _files.write_atomic, 0

    def killing(path: Path, content: bytes) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        write_atomic(path, content)

    monkeypatch.setattr(_files, "write_atomic", killing)
    # Before the plan; the first shard; its seal; after it; the second one's seal; the manifest.
    for count in [0, 1, 1, 2, 1, 2]:
        left = count
        with pytest.raises(Killed):
            write(broken, **options)
    left = 1
    write(broken, **options)
    assert left == 0 and contents(broken) == contents(whole)


def test_writing_again_computes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    seen = []
    write(tmp_path, shard_rows=None, progress=lambda *done: seen.append(done))
    assert seen == [(N, N)], "the layout of the folder is kept"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(_flip, "altered"), (_truncate, "bytes, not"), (Path.unlink, "missing")],
)
def test_damage_is_named_and_mended(tmp_path: Path, damage: Any, reason: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    victim = tmp_path / "00001.bin"
    damage(victim)
    with pytest.raises(ValueError, match=rf"damaged: 00001\.bin.*{reason}"):
        tc.open_cache(tmp_path, expect=expected())
    assert [problem.split()[0] for problem in tc.verify(tmp_path)] == [victim.name]
    seen = []
    write(tmp_path, progress=lambda *done: seen.append(done))
    assert seen[0] == (N - 20, N), "only the damaged shard is computed"
    assert contents(tmp_path) == before and tc.verify(tmp_path) == []


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "00002.json"])
def test_altered_records_are_noticed(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(b"bytes", b"Bytes").replace(b"dense", b"Dense"))
    assert (tmp_path / name).read_bytes() != content
    if name == "manifest.json":
        with pytest.raises(ValueError, match="manifest.json was altered"):
            tc.open_cache(tmp_path, expect=expected())
    if name == "plan.json":
        with pytest.raises(ValueError, match=r"plan\.json was altered.*Choose another folder"):
            write(tmp_path)
    else:
        write(tmp_path)
        assert contents(tmp_path) == before


def test_a_quick_open_sees_sizes_and_no_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    _flip(tmp_path / "00001.bin")
    tc.open_cache(tmp_path, expect=expected(), contents=False)
    _truncate(tmp_path / "00001.bin")
    with pytest.raises(ValueError, match="bytes, not"):
        tc.open_cache(tmp_path, expect=expected(), contents=False)


def test_a_cache_written_again_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write(folder)
    cache = tc.open_cache(folder, expect=expected())
    before = tc.rows(cache, ROWS)["logits"]
    write(folder)  # finished: nothing changes
    np.testing.assert_array_equal(tc.rows(cache, ROWS)["logits"], before)
    shutil.rmtree(folder)
    write(folder, params=PARAMS | {"out": -PARAMS["out"]})
    for read in (lambda: tc.rows(cache, ROWS), lambda: tc.load(cache)):
        with pytest.raises(ValueError, match=r"written again after it was opened: 0000\d\.bin"):
            read()


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "a\x1b[2J").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files: a\\x1b\[2J, thesis\.tex"):
        write(tmp_path)
    with pytest.raises(NotADirectoryError, match=r".*thesis\.tex is a file"):
        write(tmp_path / "thesis.tex")
    with pytest.raises(FileNotFoundError, match="no teacher cache in"):
        tc.open_cache(tmp_path / "nowhere", expect=None)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with _locks.locked(tmp_path), pytest.raises(RuntimeError, match="in use by process"):
        write(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_readonly_disk_leaves_finished_shards(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic, calls = _files.write_atomic, [0]

    def failing(path: Path, content: bytes) -> None:
        if path.name == "00001.bin":
            raise OSError(number, os.strerror(number))
        calls[0] += 1
        write_atomic(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(_files, "write_atomic", failing)
        with pytest.raises(OSError, match="1 of 3 shards are finished and intact") as error:
            write(tmp_path)
    assert error.value.errno == number and calls[0] == 3  # plan, shard 0, its seal
    seen = []
    write(tmp_path, progress=lambda *done: seen.append(done))
    assert seen[0] == (20, N) and tc.verify(tmp_path) == []


def test_what_cannot_fit_is_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = N * CLASSES * 4
    monkeypatch.setattr(
        "kdtl_jax._files.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": needed - 1})(),
    )
    with pytest.raises(OSError, match=f"{needed:,} bytes are needed") as error:
        write(tmp_path)
    assert error.value.errno == errno.ENOSPC and not list(tmp_path.glob("*.bin"))


@pytest.fixture
def few_files() -> Iterator[None]:
    """As on a system that allows 256 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_any_number_of_shards_and_taps_opens_few_files(
    tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 shards of 30 taps, read, loaded and verified; nothing stays open."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand would take a minute
    taps = [f"tap{i}" for i in range(30)]

    def wide(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        return {tap: inputs + i for i, tap in enumerate(taps)}, model_state

    arrays = {"inputs": np.arange(600, dtype=np.float32).reshape(300, 2)}
    options: dict[str, Any] = {"taps": taps}
    tc.write(tmp_path, wide, PARAMS, arrays, batch_size=1, shard_rows=1, **options)
    assert len(list(tmp_path.iterdir())) == 2 * 300 + 3
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    cache = tc.open_cache(tmp_path, expect=tc.fingerprint(PARAMS, arrays, **options))
    actual, whole = tc.rows(cache, np.arange(299, -1, -1)), tc.load(cache)
    for i, tap in enumerate(taps):
        np.testing.assert_array_equal(actual[tap][::-1], arrays["inputs"] + i)
        np.testing.assert_array_equal(whole[tap], arrays["inputs"] + i)
    assert tc.verify(tmp_path) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_temporary_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / ".draft.tmp").write_text("unsaved work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        write(tmp_path)
    assert sorted(contents(tmp_path)) == [".draft.tmp", "file"]
    assert not (tmp_path / ".lock").exists(), "nor is anything added"


SHAPES: list[Any] = [
    [], 3, {}, {"plan": 3, "files": {}}, {"plan": {"format": 2}, "files": {}},
    {"plan": {"format": 1}, "files": {}},
]  # fmt: skip


@pytest.mark.parametrize("value", [*SHAPES, "size", "columns", "fingerprint", "files", "file"])
def test_json_of_another_shape_is_one_error(tmp_path: Path, value: Any) -> None:
    write(tmp_path)
    path = tmp_path / "manifest.json"
    made = _files.read_sealed(path)
    if value == "size":
        made["plan"]["size"] = 10**18
    elif value == "columns":
        made["plan"]["columns"][0]["dtype"] = "float1"
    elif value == "fingerprint":
        del made["plan"]["fingerprint"]["data"]
    elif value == "files":
        made["files"] = list(made["files"])
    elif value == "file":
        made["files"]["00001.bin"] = {"bytes": 5, "sha256": ""}
    if isinstance(value, (dict, str)):
        _files.write_sealed(path, made if isinstance(value, str) else value)
    else:
        path.write_text(json.dumps(value))
    start = time.process_time()
    with pytest.raises(ValueError, match="is damaged: .*Run `write` on it again"):
        tc.open_cache(tmp_path, expect=expected())
    assert time.process_time() - start < 2
    write(tmp_path)
    assert tc.rows(tc.open_cache(tmp_path, expect=expected()), ROWS)["logits"].shape[0] == len(ROWS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    write(folder)
    return folder


@settings(max_examples=40)
@given(
    name=st.sampled_from(["plan.json", "manifest.json", "00001.json", "00002.bin"]),
    place=st.integers(0, 2000),
    put=st.binary(max_size=8),
    cut=st.integers(0, 500),
)
def test_any_bytes_are_the_cache_or_one_error(
    shared: Path, name: str, place: int, put: bytes, cut: int
) -> None:
    path, start = shared / name, time.process_time()
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + put + whole[place + cut :])
    try:
        cache = tc.open_cache(shared, expect=expected())
        np.testing.assert_allclose(tc.rows(cache, ROWS)["logits"], LIVE["logits"][ROWS], atol=1e-5)
    except ValueError as error:
        assert str(shared) in str(error)
    finally:
        path.write_bytes(whole)
    assert time.process_time() - start < 2


def test_infinite_outputs_are_no_teacher(tmp_path: Path) -> None:
    """But a class may be masked with -inf."""

    def model(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> Any:
        return {"logits": inputs}, model_state

    logits = np.ones((6, 3), np.float32)
    logits[4, 1] = np.inf
    with pytest.raises(ValueError, match="'logits' of row 4 is NaN or infinite"):
        tc.write(tmp_path / "a", model, PARAMS, {"inputs": logits}, batch_size=3)
    tc.write(tmp_path / "b", model, PARAMS, {"inputs": -logits}, batch_size=3)
    assert tc.verify(tmp_path / "b") == []
