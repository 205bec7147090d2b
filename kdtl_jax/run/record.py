"""The record of a run's input files and package versions, compared when it resumes.

    made = record.made_from({"data": "digits.npz", "teacher_weights": path})
    record.keep(folder, made)                       # at the start
    notices = record.compare(folder, made)          # at --resume: raises if a file has changed

Settings are compared elsewhere; this record detects that the contents of a file have changed.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdtl_jax import _files, _text, trees
from kdtl_jax._types import PyTree

# A file or folder, or a sequence of them.
Paths = str | Path | Sequence[Path]
FILE = "made_from.json"  # in the run folder
# Packages whose versions are recorded.
PACKAGES = ("kdtl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class FileRecord(NamedTuple):
    """SHA-256 of every file by role, and the version of every package by name."""

    files: dict[str, str]
    versions: dict[str, str]


def made_from(files: Mapping[str, Paths]) -> FileRecord:
    """Makes the record of a run that reads these files; a folder includes all files below it.

    Args:
      files: `{role: path}`, such as `{"data": "digits.npz"}`, or more than one path per
        role. A path that does not exist (the name of a built-in data set) counts as its own text.

    Raises:
      OSError: if a file cannot be read.
    """
    return FileRecord({role: _digest(paths) for role, paths in files.items()}, _versions())


def keep(folder: str | Path, made: FileRecord) -> None:
    """Writes the record into a run folder."""
    _files.write_sealed(Path(folder) / FILE, made._asdict())


def is_kept(folder: str | Path) -> bool:
    """Whether the folder holds a run's complete record; then its other files belong to it."""
    try:
        return _files.read_sealed(Path(folder) / FILE).keys() == {*FileRecord._fields}
    except ValueError:
        return False


def compare(folder: str | Path, now: FileRecord) -> list[str]:
    """Compares a run folder's record with the current files and versions.

    Returns:
      Notices about versions that differ, which may change the last bits of a resumed run.

    Raises:
      ValueError: naming the files whose content has changed, or if the record is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return [f"{path} is missing: whether data and weights are the same is unknown"]
    try:
        record = _files.read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}. Start the run anew in another folder.") from None
    fields: dict[str, Any] = {name: record.get(name) for name in FileRecord._fields}
    if not all(isinstance(field, dict) for field in fields.values()):
        raise ValueError(f"{path} is not a run's record. Start the run anew in another folder.")
    old = FileRecord(**fields)
    roles = sorted(old.files.keys() | now.files.keys())
    changed = [role for role in roles if old.files.get(role) != now.files.get(role)]
    if changed:
        raise ValueError(
            f"{folder} was started with other content of {_name_list(changed)}: the SHA-256 "
            "differs. Restore what it was started with, or start anew in another folder."
        )
    names = sorted(old.versions.keys() | now.versions.keys())
    return [
        f"{_text.shown(name, 80)} was {_text.shown(old.versions.get(name, 'absent'), 80)}, is "
        f"{now.versions.get(name, 'absent')}: the run may end with other bits"
        for name in names
        if old.versions.get(name) != now.versions.get(name)
    ]


def _name_list(names: Sequence[str]) -> str:
    return ", ".join(_text.shown(name, 200) for name in names[:20])


def check_finite(name: str, tree: PyTree) -> None:
    """Refuses weights with NaN or infinity, which would silently ruin later training.

    Args:
      name: of the weights' file, for the message.
      tree: parameters, or `Variables`; arrays that are not floating point pass.

    Raises:
      ValueError: naming the first leaves and how many values are not finite.
    """
    problems = []
    for path, leaf in trees.flatten(tree).items():
        if not trees.is_inexact(leaf):
            continue
        array = np.asarray(leaf)
        finite = np.isfinite(array if array.dtype.kind in "fc" else array.astype(np.float32))
        if not finite.all():
            problems.append(f"{path!r} ({finite.size - int(finite.sum())} of {finite.size})")
    if problems:
        suffix = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{name}: weights are not finite: {', '.join(problems[:4])}{suffix}. The training that "
            "made them diverged; take an earlier checkpoint."
        )


def _digest(paths: Paths) -> str:
    if isinstance(paths, (str, Path)):
        path = Path(paths)
        if not path.is_dir():
            return _files.sha256(path) if path.exists() else f"named {path}"
        return _combined_digest({str(file.relative_to(path)): file for file in _files_below(path)})
    first, *rest = paths
    if not rest:
        return _digest(first)
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return _combined_digest({os.path.relpath(path, common): path for path in paths})


def _combined_digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(_files.sha256(files[name]).encode())
    return digest.hexdigest()


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder, including folders that it links to, each folder once."""
    seen: set[Path] = set()
    for root, subfolders, names in os.walk(folder, followlinks=True):
        current = Path(root)
        if current.resolve() in seen:
            subfolders.clear()
            continue
        seen.add(current.resolve())
        yield from (current / name for name in names if (current / name).is_file())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
