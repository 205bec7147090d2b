"""A Python file that the user names as `FILE.py:NAME`, run as a module, and what it imports.

Modules beside the file are found first, as with `python FILE.py`, and each file has its own: a
module of the same name beside another file is a different module. All are compiled from their text,
never from cached bytecode, and run again once any of them has changed. Modules named in an import
statement may also be imported when a function of the file is called; others may not.
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
    """Compiles a file's text; Python itself would trust cached bytecode of its size and date."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def file_of(text: str) -> Path:
    """The file of `file.py:name`."""
    return Path(text.rpartition(":")[0])


def checked(value: Any) -> str | None:
    """`parse=` of a setting: the text itself, if it has the form `file.py:name`."""
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r".+\.py:[A-Za-z_]\w*", value):
        raise ValueError(f"expected {FORM}, got {value!r:.80}")
    return value


def several(value: Any) -> tuple[str, ...]:
    """`parse=` of a setting that may be repeated."""
    parts = [value] if isinstance(value, str) else list(value or ())
    return tuple(text for part in parts if (text := checked(part)) is not None)


def imported(text: str) -> Any:
    """The object that `file.py:name` names; the file is run once per process and content.

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
    """The file of `file.py:name` and those it imports that are in no installed package.

    Raises:
      ValueError: as `imported`.
    """
    path = file_of(text).resolve()
    return [path, *sorted(getattr(_module(text), READ).keys() - {path})]


@contextlib.contextmanager
def at_work(text: str) -> Iterator[None]:
    """A context in which the object `imported(text)` finds the modules beside its file.

    Importing a file below its folder raises ImportError, with the repair, if the file is not in
    `files_of`: those identify the run, and this one could change unnoticed.
    """
    path = file_of(text).resolve()
    _forget(path.parent, set())
    with _beside(path.parent, getattr(sys.modules[f"{OWN}{path}"], READ)):
        yield


def neighborly(text: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the file `text`, or one that calls its functions, run in its folder."""

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        with at_work(text):
            return function(*args, **named)

    return run


def at_fault(text: str, error: BaseException) -> str:
    """`my_loss.py, line 3: NameError: ...`, the innermost line of the user's files.

    Only the message if none of their lines is involved.
    """
    inner = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if is_own(Path(frame.filename))
    ]
    inner += [(error.filename, error.lineno)] if isinstance(error, SyntaxError) else []
    file, line = inner[-1] if inner else (None, None)
    path = file_of(text)
    at = path if file is None or Path(file).resolve() == path.resolve() else file
    said = " ".join(str(error).split())
    if line is None:
        return f"{said or type(error).__name__:.500}"
    return f"{at}, line {line}: {type(error).__name__}: {said:.300}"


def _module(text: str) -> ModuleType:
    try:
        return _run(file_of(text))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        said = at_fault(text, error)
        if ", line " not in said:
            said = f"{file_of(text)}: {type(error).__name__}: {said}"
        raise ValueError(said) from error


def _run(path: Path) -> ModuleType:
    """The module of a file, run once per process and content.

    Raises:
      Exception: whatever the file raises.
    """
    path = path.resolve()
    name = f"{OWN}{path}"
    found = sys.modules.get(name)
    if found is not None:
        if all(_digest(file) == digest for file, digest in getattr(found, READ).items()):
            return found
    _forget(path.parent, {*getattr(found, READ, ())})
    spec = importlib.util.spec_from_loader(name, FromText(name, str(path)))
    assert spec is not None and spec.loader is not None
    read = {file: _digest(file) for file in _imported(path, path.parent, {path})}
    made, before = importlib.util.module_from_spec(spec), {*sys.modules}
    sys.modules[name] = made  # dataclasses look their module up
    try:
        with _beside(path.parent):
            spec.loader.exec_module(made)
    except BaseException:
        for new in _new(before):
            del sys.modules[new]
        raise
    read |= {file: _digest(file) for file in _new(before).values() if file.is_file()}
    setattr(made, READ, read)
    return made


def _digest(path: Path) -> str | None:
    return _files.sha256(path) if path.is_file() else None


def _new(before: set[str]) -> dict[str, Path]:
    """The user's newly imported modules, with their files."""
    names = sys.modules.keys() - before
    return {name: file for name in names if (file := _own_file(sys.modules[name])) is not None}


def _own_file(each: ModuleType) -> Path | None:
    """The file of a module, if it is the user's."""
    file = getattr(each, "__dict__", {}).get("__file__")
    return Path(file).resolve() if isinstance(file, str) and not _installed(file) else None


def is_own(path: Path) -> bool:
    """Whether a file is the user's: it exists, and is not in an installed package."""
    return path.is_file() and not _installed(path)


def _installed(path: str | Path) -> bool:
    def is_so(at: str) -> bool:
        return f"{at}{os.sep}".startswith(INSTALLED) or any(site in at for site in SITES)

    return is_so(str(path)) or is_so(os.path.realpath(path))  # the disk is rarely accessed


def _forget(folder: Path, stale: set[Path]) -> None:
    """Forgets stale modules and other files' neighbors, so that their next import runs them.

    Otherwise a neighbor of another file would be found in place of this folder's of that name.
    """
    for name, each in list(sys.modules.items()):
        file = None if READ in getattr(each, "__dict__", ()) else _own_file(each)
        if file is None or (folder in file.parents and file not in stale):
            continue
        loaded_here = isinstance(getattr(each, "__loader__", None), FromText)
        if file in stale or loaded_here or any(_found(folder, name.partition(".")[0])):
            del sys.modules[name]


@contextlib.contextmanager
def _beside(folder: Path, known: Mapping[Path, str | None] | None = None) -> Iterator[None]:
    """A context: modules in the folder are found first, and the user's compiled from text.

    Args:
      folder: of the user's file.
      known: digests of the files in the folder that may be imported; None: any may.
    """

    def check(file: Path) -> None:
        if known is None or folder not in file.parents:
            return
        if file not in known:
            raise ImportError(
                f"no import statement names {file.relative_to(folder)}, so a run could not "
                "record it. Import it at the top of the file."
            )
        if known[file] != _digest(file):
            raise ImportError(f"{file.relative_to(folder)} has changed since the file was run.")

    class Text(FromText):
        def __init__(self, name: str, path: str) -> None:
            check(Path(path).resolve())
            super().__init__(name, path)

    class Compiled(importlib.machinery.ExtensionFileLoader):
        def __init__(self, name: str, path: str) -> None:
            check(Path(path).resolve())
            super().__init__(name, path)

    def finder(entry: str) -> Any:
        if _installed(entry) or not Path(entry).is_dir():
            raise ImportError(entry)
        both = (Compiled, importlib.machinery.EXTENSION_SUFFIXES), (Text, [".py"])
        return importlib.machinery.FileFinder(entry, *both)

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


def _imported(path: Path, root: Path, seen: set[Path]) -> set[Path]:
    """The files in the folder that a file's import statements name, including in functions."""
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
            for file in {file for name in names for file in _found(start, name)} - seen:
                seen.add(file)
                _imported(file, root, seen)
    return seen


def _found(start: Path, name: str) -> Iterator[Path]:
    """The files that importing a dotted name runs: its packages' and its own."""
    at = start
    for part in filter(None, name.split(".")):
        at = at / part
        for file in (at / "__init__.py", at.with_name(f"{part}.py")):
            if file.is_file() and not _installed(file):
                yield file.resolve()
