"""Files that appear whole, folders that are marked and locked, records that never refuse."""

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdtl_jax import _files, _locks


def test_a_lock_is_held_once_and_named(tmp_path: Path) -> None:
    with _locks.locked(tmp_path):
        with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()} on"):
            with _locks.locked(tmp_path):
                pass
    with _locks.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()}")


def test_a_lock_that_a_full_disk_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(handle: int, said: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_locks.os, "write", write)
    with pytest.raises(OSError, match=r"No space left on device: '.*/\.lock'"):
        with _locks.locked(tmp_path):
            pass


def test_a_folder_is_checked_again_once_it_is_locked(tmp_path: Path) -> None:
    """Another process may have written there between the check and the lock."""
    folder, calls = tmp_path / "run", []

    def check() -> None:
        calls.append(folder.exists())
        if len(calls) == 2:
            raise ValueError("meanwhile it is full")

    with (
        pytest.raises(ValueError, match="meanwhile it is full"),
        _locks.checked_lock(folder, check),
    ):
        raise AssertionError
    assert calls == [False, True]
    with _locks.locked(folder):  # what was refused holds no lock
        with (
            pytest.raises(RuntimeError, match="in use by"),
            _locks.checked_lock(folder, lambda: 1 / 0),
        ):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), _locks.checked_lock(folder, lambda: 1 / 0):
        raise AssertionError
    (folder / ".lock").write_bytes(b"")
    with pytest.raises(ZeroDivisionError), _locks.checked_lock(folder, lambda: 1 / 0):
        raise AssertionError
    assert not (folder / ".lock").read_bytes(), "a refused folder is left as it was"


@pytest.mark.parametrize("other", ["folder", "file"])
def test_a_new_folder_that_another_process_makes_meanwhile(tmp_path: Path, other: str) -> None:
    folder = tmp_path / "model"
    with pytest.raises(FileExistsError, match="model exists and is not empty. Choose a new"):
        with _files.new_folder(folder) as part:
            (part / "mine").write_text("mine")
            if other == "folder":
                folder.mkdir()
            (folder / "theirs" if other == "folder" else folder).write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    left = folder / "theirs" if other == "folder" else folder
    assert left.read_text() == "theirs"


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "folder", "pipe"])
def test_a_lock_never_writes_to_what_is_not_its_own(tmp_path: Path, kind: str) -> None:
    precious, folder = tmp_path / "precious.txt", tmp_path / "run"
    precious.write_text("precious")
    folder.mkdir()
    lock = folder / ".lock"
    if kind == "symlink":
        lock.symlink_to(precious)
    elif kind == "dangling":
        lock.symlink_to(tmp_path / "nowhere")
    elif kind == "hard link":
        os.link(precious, lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    if kind == "hard link":  # cannot be told from a file: locked, not written to
        with _locks.locked(folder):
            pass
    else:
        with pytest.raises(RuntimeError, match=r"\.lock is not a file"):
            with _locks.locked(folder):
                pass
    assert precious.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Any, flags: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(_locks.fcntl, "flock", refused)
    with pytest.warns(RuntimeWarning, match="cannot be locked .No locks available.: make sure"):
        with _locks.locked(tmp_path):
            pass
    monkeypatch.setattr(_locks, "fcntl", None)
    with pytest.warns(RuntimeWarning, match="this system has no flock"):
        with _locks.locked(tmp_path):
            pass


def test_marks_tell_whose_a_folder_is(tmp_path: Path) -> None:
    mine, foreign = tmp_path / "a" / "mine", tmp_path / "foreign"
    identity = _files.claim(mine, "checkpoints")
    (mine / "1").mkdir()
    assert _files.claim(mine, "checkpoints") == identity
    with pytest.raises(ValueError, match="holds checkpoints, not sweeps"):
        _files.claim(mine, "sweeps")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files: thesis\.tex"):
        _files.claim(foreign, "checkpoints")
    assert sorted(path.name for path in foreign.iterdir()) == ["thesis.tex"]
    (tmp_path / "link").symlink_to(mine)
    assert not _files.remove(tmp_path / "link", "checkpoints")
    assert not _files.remove(foreign, "checkpoints") and not _files.remove(mine, "sweeps")
    assert _files.remove(mine, "checkpoints") and not mine.exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), _files.atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    long = tmp_path / ("n" * 250)
    _files.write_atomic(long, b"x")
    assert long.read_bytes() == b"x"


@pytest.mark.parametrize("writer", [_files.atomic_file, _files.new_folder])
def test_what_cannot_be_written_is_named_by_its_own_name(
    tmp_path: Path, writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str, *args: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system", path)

    for name in ("open", "mkdir"):  # of a temporary file, of a folder
        monkeypatch.setattr(os, name, refused)
    with pytest.raises(OSError) as caught, writer(tmp_path / "mine"):
        pass
    assert caught.value.filename == str(tmp_path / "mine")


ODD: list[tuple[Any, Any]] = [
    (float("nan"), None),
    ([1.0, -np.inf, {"a": np.float32("nan")}], [1.0, None, {"a": None}]),
    (np.arange(3), [0, 1, 2]),
    (np.float64(0.5), 0.5),
    (np.bool_(True), True),
    (jnp.asarray([jnp.nan, 1.0]), [None, 1.0]),
    ({1: (2, 3)}, {"1": [2, 3]}),
    (Path("a/b"), "a/b"),
    (os.fsdecode(b"caf\xe9.npz"), "caf\udce9.npz"),
    (np.dtype("float32"), "dtype('float32')"),
    (2**200, 2**200),
]


@pytest.mark.parametrize(("value", "wanted"), ODD, ids=range(len(ODD)))
def test_a_record_takes_any_value(tmp_path: Path, value: Any, wanted: Any) -> None:
    _files.write_json(tmp_path / "r.json", {"x": value})
    content = (tmp_path / "r.json").read_bytes()
    assert content.isascii() and json.loads(content)["x"] == wanted


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_bytes_are_a_sealed_record_or_one_reason(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("sealed") / "r.json"
    path.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"r\.json"):
        _files.read_sealed(path)


def test_json_of_others_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(_files.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="16,777,217 bytes, at most 16,777,216 are read"):
        _files.read_json(path)
    path.write_bytes(b" " * (_files.MAX_JSON_BYTES - 2) + b"{}")
    assert _files.read_json(path) == {}


def test_space_is_checked_before_writing(tmp_path: Path) -> None:
    _files.check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"no space left: 1,152,921,504,606,846,976 bytes .*Tidy"):
        _files.check_space(tmp_path, 2**60, "Tidy up")
