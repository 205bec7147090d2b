"""Importing a user's `FILE.py:NAME`, and the files that it imports.

Modules in the file's folder are found first, as with `python FILE.py`; a module of the same name in
another file's folder is a different module. All are compiled from source, never from cached
bytecode, and run again when any of them changes. Functions of the file may import modules that an
import statement names, and no others.
"""

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import kdtl_jax
from kdtl_jax import _files
from kdtl_jax.recipes.settings import UsageError

FORM = "FILE.py:NAME, as in my_model.py:Net"
OWN = "_kdtl_own_"  # prefix of the module name of a user's file
READ = "__kdtl_files__"  # in a module: the digest of every file that it consists of
# Installed packages are identified by their versions.
LIBRARIES = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in (*map(sysconfig.get_path, LIBRARIES), Path(kdtl_jax.__file__).parent)
)
SITES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class FromText(importlib.machinery.SourceFileLoader):
    """Compiles from source; Python would trust cached bytecode of the same size and date."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def file_of(text: str) -> Path:
    """The file of `file.py:name`."""
    return Path(text.rpartition(":")[0])


def checked(value: Any) -> str | None:
    """`parse=` of a setting: the text, if it has the form `file.py:name`."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r".+\.py:[A-Za-z_]\w*", value):
        raise ValueError(f"expected {FORM}, got {value!r:.80}")
    return value


def checked_all(value: Any) -> tuple[str, ...]:
    """`parse=` of a setting that may be repeated."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    return tuple(text for part in parts if (text := checked(part)) is not None)


def imported(text: str) -> Any:
    """The object named `file.py:name`; the file is run once per process and content.

    Raises:
      UsageError: if there is no such file, or no such name in it (its names are listed).
      ValueError: if the file cannot be imported, with the line at fault.
    """
    path, name = file_of(text), text.rpartition(":")[2]
    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    module = _module(text)
    if not hasattr(module, name):
        names = [n for n, x in vars(module).items() if callable(x) and n[0] != "_"]
        raise UsageError(f"{path} has no {name!r}. It has {', '.join(names) or 'nothing'}.")
    return getattr(module, name)


def files_of(text: str) -> list[Path]:
    """The file of `file.py:name` and the files it imports, except installed packages.

    Raises:
      ValueError: as `imported`.
    """
    path = file_of(text).resolve()
    return [path, *sorted(getattr(_module(text), READ).keys() - {path})]


@contextlib.contextmanager
def importing(text: str) -> Iterator[None]:
    """A context in which `imported(text)` finds the modules in its file's folder.

    Importing a file of the folder that is not in `files_of` raises ImportError, with the repair:
    `files_of` identify the run, and another file could change unnoticed.
    """
    path = file_of(text).resolve()
    _forget_modules(path.parent, set())
    with _folder_first(path.parent, getattr(sys.modules[f"{OWN}{path}"], READ)):
        yield


def run_in_folder(text: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that runs code of the file: it finds the modules of the file's folder."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with importing(text):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def located_errors(text: str, subject: str) -> Iterator[None]:
    """A context in which whatever code of the file raises is a ValueError about the subject."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{subject}: {locate_error(text, error)}") from error


def locate_error(text: str, error: BaseException) -> str:
    """`my_loss.py, line 3: NameError: ...`, with the innermost line of the user's files.

    Only the message if the traceback has no line of theirs.
    """
    inner = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if is_own(Path(frame.filename))
    ]
    inner += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
    file, line = inner[-1] if inner else (None, None)
    path = file_of(text)
    source = path if file is None or Path(file).resolve() == path.resolve() else file
    message = " ".join(str(error).split())
    if line is None:
        return f"{message or type(error).__name__:.500}"
    return f"{source}, line {line}: {type(error).__name__}: {message:.300}"


def _module(text: str) -> ModuleType:
    try:
        return _run_file(file_of(text))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        message = locate_error(text, error)
        if ", line " not in message:
            message = f"{file_of(text)}: {type(error).__name__}: {message}"
        raise ValueError(message) from error


def _run_file(path: Path) -> ModuleType:
    """The module of a file, run once per process and content.

    Raises:
      Exception: whatever the file raises.
    """
    path = path.resolve()
    name = f"{OWN}{path}"
    module = sys.modules.get(name)
    if module is not None:
        if all(_digest(file) == digest for file, digest in getattr(module, READ).items()):
            return module
    _forget_modules(path.parent, {*getattr(module, READ, ())})
    spec = importlib.util.spec_from_loader(name, FromText(name, str(path)))
    assert spec is not None and spec.loader is not None
    digests = {file: _digest(file) for file in _imported_files(path, path.parent, {path})}
    new_module, loaded = importlib.util.module_from_spec(spec), {*sys.modules}
    sys.modules[name] = new_module  # dataclasses look their module up
    try:
        with _folder_first(path.parent):
            spec.loader.exec_module(new_module)
    except BaseException:
        for new in _new_modules(loaded):
            del sys.modules[new]
        raise
    digests |= {file: _digest(file) for file in _new_modules(loaded).values() if file.is_file()}
    setattr(new_module, READ, digests)
    return new_module


def _digest(path: Path) -> str | None:
    return _files.sha256(path) if path.is_file() else None


def _new_modules(before: set[str]) -> dict[str, Path]:
    """The user's modules imported since, with their files."""
    names = sys.modules.keys() - before
    return {name: file for name in names if (file := _own_file(sys.modules[name])) is not None}


def _own_file(module: ModuleType) -> Path | None:
    """The file of a module, if it is the user's."""
    file = getattr(module, "__dict__", {}).get("__file__")
    return Path(file).resolve() if isinstance(file, str) and not _installed(file) else None


def is_own(path: Path) -> bool:
    """Whether a file exists and is in no installed package."""
    return path.is_file() and not _installed(path)


def _installed(path: str | Path) -> bool:
    def is_in_site(text: str) -> bool:
        return f"{text}{os.sep}".startswith(INSTALLED) or any(site in text for site in SITES)

    # The disk is rarely accessed.
    return is_in_site(str(path)) or is_in_site(os.path.realpath(path))


def _forget_modules(folder: Path, stale: set[Path]) -> None:
    """Removes stale modules, and those of other files' folders, from `sys.modules`.

    Otherwise importing a name could find the module of another folder.
    """
    for name, module in list(sys.modules.items()):
        file = None if READ in getattr(module, "__dict__", ()) else _own_file(module)
        if file is None or (folder in file.parents and file not in stale):
            continue
        loaded_here = isinstance(getattr(module, "__loader__", None), FromText)
        if file in stale or loaded_here or any(_files_of_import(folder, name.partition(".")[0])):
            del sys.modules[name]


@contextlib.contextmanager
def _folder_first(folder: Path, digests: Mapping[Path, str | None] | None = None) -> Iterator[None]:
    """A context in which modules in the folder come first, and user modules compile from source.

    Args:
      folder: of the user's file.
      digests: of the files in the folder that may be imported; None: any file may be.
    """

    def check(file: Path) -> None:
        if digests is None or folder not in file.parents:
            return
        if file not in digests:
            raise ImportError(
                f"no import statement names {file.relative_to(folder)}, so a run could not "
                "record it. Import it at the top of the file."
            )
        if digests[file] != _digest(file):
            raise ImportError(f"{file.relative_to(folder)} has changed since the file was run.")

    def compiled(name: str, path: str) -> Any:
        check(Path(path).resolve())
        return importlib.machinery.ExtensionFileLoader(name, path)

    def text(name: str, path: str) -> Any:
        check(Path(path).resolve())
        return FromText(name, path)

    def finder(entry: str) -> Any:
        if _installed(entry) or not Path(entry).is_dir():
            raise ImportError(entry)
        loaders: Any = (compiled, importlib.machinery.EXTENSION_SUFFIXES), (text, [".py"])
        return importlib.machinery.FileFinder(entry, *loaders)

    entry, finders = str(folder), dict(sys.path_importer_cache)
    for place in list(sys.path_importer_cache):
        if not _installed(place):
            del sys.path_importer_cache[place]
    sys.path.insert(0, entry)
    sys.path_hooks.insert(0, finder)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
        sys.path_hooks.remove(finder)
        sys.path_importer_cache.clear()
        sys.path_importer_cache.update(finders)


def _imported_files(path: Path, root: Path, seen: set[Path]) -> set[Path]:
    """The files in the folder named by a file's import statements, including in functions."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, IndexError):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                start, names = root, [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1] if node.level else root
                module = node.module or ""
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for file in {file for name in names for file in _files_of_import(start, name)} - seen:
                seen.add(file)
                _imported_files(file, root, seen)
    return seen


def _files_of_import(start: Path, name: str) -> Iterator[Path]:
    """The files run by importing a dotted name: the packages and the module."""
    path = start
    for part in filter(None, name.split(".")):
        path = path / part
        for file in (path / "__init__.py", path.with_name(f"{part}.py")):
            if file.is_file() and not _installed(file):
                yield file.resolve()
