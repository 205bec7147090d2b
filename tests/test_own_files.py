"""Modules beside a user's file: found, digested with it, never stale, never another file's."""

import importlib
import os
import py_compile
import sys
from pathlib import Path
from typing import Any

import pytest

from kdtl_jax.recipes import _imports, _models, _user_code
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.run import record

FILE = """
import importlib

import own_shared
from own_parts.inner import VALUE as inner

by_name = importlib.import_module("own_" + "named")

def model():
    import own_late  # only where it is called

    return own_late

value = (own_shared.VALUE, inner, by_name.VALUE)
"""
BESIDE = (
    "own_shared.py", "own_parts/__init__.py", "own_parts/inner.py", "own_parts/deep.py",
    "own_named.py", "own_late.py",
)  # fmt: skip


def written(folder: Path, value: int) -> str:
    """A file that imports six others in every way, each with a value; its text for a setting."""
    (folder / "own_parts").mkdir(parents=True)
    for name in BESIDE:
        (folder / name).write_text(f"VALUE = {value}\n")
    with (folder / "own_parts/inner.py").open("a") as file:
        file.write("from .deep import VALUE as DEEP\nfrom . import deep\n")
    (folder / "own_file.py").write_text(FILE)
    (folder / "own_unasked.py").write_text("raise RuntimeError\n")
    return f"{folder}/own_file.py:value"


def digest(text: str) -> str:
    return record.made_from({"": _imports.files_of(text)}).files[""]


def same_size_and_date(path: Path, old: str, new: str) -> None:
    """Edits a file so that a program cached from it seems to be its own."""
    was, text = path.stat(), path.read_text()
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_all_that_a_file_imports_is_part_of_it(tmp_path: Path) -> None:
    text = written(tmp_path, 1)
    paths = _imports.files_of(text)
    assert {path.relative_to(tmp_path.resolve()).as_posix() for path in paths} == {
        "own_file.py", *BESIDE,
    }  # fmt: skip
    model = f"{tmp_path}/own_file.py:model"
    before, known = digest(text), _models.identity(model)
    for name in BESIDE:
        same_size_and_date(tmp_path / name, "1", "2")
        changed, now = digest(text), _models.identity(model)
        assert changed != before and now != known, name
        before, known = changed, now
    (tmp_path / "own_unasked.py").write_text("")
    assert digest(text) == before
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in [tmp_path / name for name in ("own_file.py", "own_parts", *BESIDE)]:
        if path.parent == tmp_path:
            path.rename(moved / path.name)
    assert digest(f"{moved}/own_file.py:value") == before


def test_an_edited_neighbor_runs_anew_whatever_python_has_cached(tmp_path: Path) -> None:
    text = written(tmp_path, 1)
    for name in BESIDE:
        py_compile.compile(str(tmp_path / name))
    assert _imports.imported(text) == (1, 1, 1)
    for i, name in enumerate(("own_shared.py", "own_parts/inner.py", "own_named.py")):
        same_size_and_date(tmp_path / name, "VALUE = 1", f"VALUE = {i + 2}")
    assert _imports.imported(text) == (2, 3, 4)


def test_two_files_of_one_name_have_their_own_neighbors(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a", 1), written(tmp_path / "b", 2)
    assert _imports.imported(one) == (1, 1, 1)
    assert _imports.imported(two) == (2, 2, 2)
    assert _imports.imported(one) == (1, 1, 1)
    (tmp_path / "c").mkdir()
    alone = tmp_path / "c/own_file.py"
    alone.write_text("import own_shared\n")
    with pytest.raises(ValueError, match="line 1: ModuleNotFoundError: No module named 'own_sha"):
        _imports.imported(f"{alone}:value")
    # Neighbors of one folder are one module for all its files.
    (tmp_path / "b/own_second.py").write_text("import own_shared\n")
    shared = _imports.imported(f"{tmp_path}/b/own_second.py:own_shared")
    assert _imports.imported(f"{tmp_path}/b/own_second.py:own_shared") is shared


CALLED = """
import importlib

def named():
    import own_late

    return own_late.VALUE

def loss(student, teacher):
    return importlib.import_module("own_" + "computed").VALUE * (student - teacher).sum(-1)

def method(setup):
    importlib.import_module("own_parts")
"""


def test_a_called_function_finds_what_an_import_statement_names(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        written(tmp_path / folder, value)
        (tmp_path / folder / "own_called.py").write_text(CALLED)
        (tmp_path / folder / "own_computed.py").write_text(f"VALUE = {value}.0")
    texts = [f"{tmp_path}/{folder}/own_called.py:named" for folder in "ab"]
    calls = [_imports.run_in_folder(text, _imports.imported(text)) for text in texts]
    # Each file's own, in turns: the other's is in sys.modules under the same name.
    assert [call() for call in [*calls, *calls]] == [1, 2, 1, 2]
    path = tmp_path / "a/own_called.py"
    message = (
        rf"{path}, line 10: ImportError: no import statement names own_computed\.py.*at the top"
    )
    with pytest.raises(ValueError, match=message):
        _user_code.entries(_user_code.Terms(loss=(f"{path}:loss",)))
    anything: Any = None
    (method,) = _user_code.entries(_user_code.Terms(method=(f"{path}:method",))).values()
    with pytest.raises(ValueError, match=r"line 13: ImportError.* names own_parts/__init__\.py"):
        method.build(anything)
    assert "own_computed" not in sys.modules
    # Its content at the start is part of what the run is known by: no other may run later.
    sys.modules.pop("own_late", None)
    same_size_and_date(tmp_path / "a/own_late.py", "1", "3")
    with pytest.raises(ImportError, match=r"own_late\.py has changed since the file was run"):
        calls[0]()


def test_nothing_is_left_on_the_path(tmp_path: Path) -> None:
    path, hooks = list(sys.path), list(sys.path_hooks)
    _imports.imported(written(tmp_path, 1))
    (tmp_path / "own_bad.py").write_text("import own_shared\n1 / 0\n")
    with pytest.raises(ValueError, match=r"own_bad.py, line 2: ZeroDivisionError"):
        _imports.imported(f"{tmp_path}/own_bad.py:x")
    assert (sys.path, sys.path_hooks) == (path, hooks)
    assert not list(tmp_path.rglob("__pycache__"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("own_unasked")


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("x = (\n", r"own_broken\.py, line 1: SyntaxError"),
        ("y = 1\nx = y.z\n", r"own_broken\.py, line 2: AttributeError"),
        ("import sys\nsys.exit(0)\n", r"own_broken\.py, line 2: SystemExit: 0"),
        ("x = 1\x00\n", "SyntaxError|ValueError"),
        ("(" * 5000, "SyntaxError|MemoryError|RecursionError"),
    ],
)
def test_what_is_wrong_beside_a_file_is_named(tmp_path: Path, beside: str, message: str) -> None:
    (tmp_path / "own_first.py").write_text("\n\nimport own_broken\n")
    (tmp_path / "own_broken.py").write_text(beside)
    with pytest.raises(ValueError, match=message) as raised:
        _imports.imported(f"{tmp_path}/own_first.py:x")
    assert not isinstance(raised.value, UsageError) and str(raised.value).count("\n") == 0
    (tmp_path / "own_broken.py").write_text("")
    (tmp_path / "own_first.py").write_text("import own_broken as x\n1 / 0\n")
    with pytest.raises(ValueError, match="line 2: ZeroDivisionError"):
        _imports.imported(f"{tmp_path}/own_first.py:x")
    (tmp_path / "own_first.py").write_text("from own_broken import value\n")
    (tmp_path / "own_broken.py").write_text("value = 1\n")  # what ran before is not believed
    assert _imports.imported(f"{tmp_path}/own_first.py:value") == 1


def test_installed_packages_are_not_a_files_own() -> None:
    assert not _imports.is_own(Path(pytest.__file__))
    assert not _imports.is_own(Path(_imports.__file__)) and _imports.is_own(Path(__file__))
