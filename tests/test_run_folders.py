"""Run folders of strangers: records are read at a small cost, links are not followed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded, is_plain, values
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtl_jax.recipes import _folders, _inputs, predict, sweep
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import loop

BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = ["", "- a", BOMB, "!!set {a}", "seeds: 2\nseeds: 3", "a: " + "[" * 3000, "1: 2", "~: 1"]


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    with bounded():
        try:
            yield
        except (ValueError, OSError, UsageError) as error:
            assert is_plain(str(error)), str(error)[:2000]


def resume(folder: Path) -> None:
    asked = sweep.Settings(out=str(folder), resume=True)
    with one_line(), _folders.run_folder(asked, "sweep"):
        pass


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run") / "o"
    with _folders.run_folder(sweep.Settings(out=str(folder)), "sweep"):
        pass
    config = (folder / "config.yaml").read_text()
    return folder, config, json.loads((folder / "env.json").read_text())


scalars = st.recursive(
    values,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("force", [False, True])
def test_what_a_killed_run_left_unfinished_is_deleted(
    begun: Any, tmp_path: Path, force: bool
) -> None:
    folder = tmp_path / "o"
    shutil.copytree(begun[0], folder)
    for part in ("", "students", "finished", "model"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / ".kd.safetensors.x1.kdtl-tmp").write_bytes(b"cut sho")
        (folder / part / ".model.x2.kdtl-tmp").mkdir()
        (folder / part / ".model.x2.kdtl-tmp" / "model.safetensors").write_bytes(b"cut sho")
    (folder / "finished" / "mine.kdtl-tmp").write_text("mine")
    asked = sweep.Settings(out=str(folder), resume=not force, force=force)
    with _folders.run_folder(asked, "sweep", models=["model"]):
        assert [path.name for path in folder.rglob("*.kdtl-tmp")] == ["mine.kdtl-tmp"]


@given(
    st.sampled_from(CONFIGS) | st.text(max_size=40),
    st.integers(0, 400),
    st.binary(max_size=30) | scalars.map(lambda x: json.dumps(x).encode()),
)
@settings(max_examples=12)
def test_any_records(begun: Any, put: str, place: int, env: bytes) -> None:
    folder, config, about = begun
    text = config[:place] + put + config[place:] if place else put
    (folder / "config.yaml").write_bytes(text.encode(errors="surrogatepass"))
    (folder / "env.json").write_bytes(env)
    resume(folder)
    (folder / "env.json").write_text(json.dumps(about))
    resume(folder)
    with bounded():
        _folders.run_record(folder)


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "made_from.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "missing", "device"])
def test_records_that_are_no_files(begun: Any, name: str, kind: str) -> None:
    folder, config, about = begun
    (folder / "config.yaml").write_text(config)
    (folder / "env.json").write_text(json.dumps(about))
    path, kept = folder / name, (folder / name).read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    resume(folder)
    with bounded():
        assert "ended" in _folders.run_record(folder), "results are written all the same"
    if kind == "folder":
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(kept)


@pytest.mark.parametrize("name", ["results.json", "report.html", "metrics.jsonl", "sweep.csv"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
@pytest.mark.parametrize("force", [False, True])
def test_what_no_record_could_replace_is_refused_before_any_work(
    begun: Any, tmp_path: Path, name: str, kind: str, force: bool
) -> None:
    folder = tmp_path / "o"
    shutil.copytree(begun[0], folder)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).mkdir()
    asked = sweep.Settings(out=str(folder), resume=not force, force=force)
    refused = pytest.raises(FileExistsError, match="a folder, a pipe or a device is there")
    with bounded(), refused as error, _folders.run_folder(asked, "sweep"):
        raise AssertionError("it would train now")
    assert is_plain(str(error.value)) and (folder / name).exists()


def test_a_name_in_which_nothing_can_be_saved_is_refused_before_any_work(tmp_path: Path) -> None:
    asked = sweep.Settings(out=os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    with pytest.raises(ValueError, match=r"r\\udcff: the name is not UTF-8") as error:
        _folders.check_out(asked, "sweep")
    assert is_plain(str(error.value)) and not list(tmp_path.iterdir())


FOREIGN = [
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "results.json",
    "made_from.json",
    "sweep.csv",
]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [*FOREIGN, "report.html", "bench.json", "teacher.safetensors"])
def test_a_folder_of_another_is_not_overwritten(tmp_path: Path, name: str, force: bool) -> None:
    """Not even with --force, which is for runs: they leave a sealed record."""
    (tmp_path / name).write_text("mine")
    asked = sweep.Settings(out=str(tmp_path), force=force)
    with pytest.raises(ValueError, match=f"{name}|not empty"), _folders.run_folder(asked, "sweep"):
        pass
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_a_model_of_another_is_not_overwritten(tmp_path: Path) -> None:
    """Beside a configuration that no run wrote."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/model.safetensors").write_text("mine")
    asked = sweep.Settings(out=str(tmp_path), force=True)
    with pytest.raises(ValueError, match="model.safetensors"):
        with _folders.run_folder(asked, "sweep", models=["teacher"]):
            pass


@pytest.mark.parametrize("kind", ["student", "data", "model"])
def test_what_is_read_is_not_what_is_written(tmp_path: Path, kind: str) -> None:
    files = {name: tmp_path / name for name in ("student", "data", "model.py")}
    for path in files.values():
        path.write_text("mine")
    (tmp_path / "link").symlink_to(files["model.py" if kind == "model" else kind])
    asked = predict.Settings(
        student=str(files["student"]), data=str(files["data"]), model=f"{files['model.py']}:net",
        out=str(tmp_path / "link"), force=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="is an input file"):
        _inputs.check_out(asked)


@pytest.mark.parametrize("content", ["", '{"step": 1}\n', None])
def test_metrics_are_never_written_through_a_link(tmp_path: Path, content: str | None) -> None:
    mine, path = tmp_path / "mine", tmp_path / "metrics.jsonl"
    if content is not None:
        mine.write_text(content)
    path.symlink_to(mine)
    with loop.metrics_file(path, resume_at=1) as log:
        log({"step": 2})
    assert not path.is_symlink() and path.read_text() == (content or "") + '{"step": 2}\n'
    assert (mine.read_text() if mine.exists() else None) == content
