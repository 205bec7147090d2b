"""What a run was made from: file contents and package versions, compared when it resumes.

    made = record.made_from({"data": "digits.npz", "teacher_weights": path})
    record.keep(folder, made)                       # at the start
    notices = record.compare(folder, made)          # at --resume: raises if a file has changed

Settings are compared elsewhere; this record detects that a file of the same name now has other
contents.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from kdtl_jax import _files, _text, trees
from kdtl_jax._types import PyTree

# A file or folder, or a sequence of them.
Paths = str | Path | Sequence[Path]
FILE = "made_from.json"  # beside what is recorded
# Packages whose versions are recorded.
PACKAGES = ("kdtl_jax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint")


class Record(NamedTuple):
    """SHA-256 of every file by role, and the version of every package by name."""

    files: dict[str, str]
    versions: dict[str, str]


def made_from(files: Mapping[str, Paths]) -> Record:
    """Makes the record of a run that reads these files; a folder includes all files below it.

    Args:
      files: `{role: path}`, such as `{"data": "digits.npz"}`, or more than one path per
        role. A path that does not exist (the name of a built-in data set) counts as its own text.

    Raises:
      OSError: if a file cannot be read.
    """
    return Record({role: _digest(paths) for role, paths in files.items()}, _versions())


def keep(folder: str | Path, made: Record) -> None:
    """Writes the record into a run folder."""
    _files.write_sealed(Path(folder) / FILE, made._asdict())


def is_kept(folder: str | Path) -> bool:
    """Whether the folder holds a run's complete record; then its other files belong to it."""
    try:
        return _files.read_sealed(Path(folder) / FILE).keys() == {*Record._fields}
    except ValueError:
        return False


def compare(folder: str | Path, now: Record) -> list[str]:
    """Compares a run folder's record with what the run would read now.

    Returns:
      Notices about versions that differ, which may change the last bits of a resumed run.

    Raises:
      ValueError: naming the files whose content has changed, or if the record is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return [f"{path} is missing: whether data and weights are the same is unknown"]
    try:
        before = _files.read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}. Start the run anew in another folder.") from None
    kinds = [before.get(name) for name in Record._fields]
    if not all(isinstance(kind, dict) for kind in kinds):
        raise ValueError(f"{path} is not a run's record. Start the run anew in another folder.")
    was = Record(*(dict(before[name]) for name in Record._fields))
    roles = sorted(was.files.keys() | now.files.keys())
    changed = [role for role in roles if was.files.get(role) != now.files.get(role)]
    if changed:
        raise ValueError(
            f"{folder} was started with other content of {_listed(changed)}: the SHA-256 differs. "
            "Restore what it was started with, or start anew in another folder."
        )
    names = sorted(was.versions.keys() | now.versions.keys())
    return [
        f"{_text.shown(name, 80)} was {_text.shown(was.versions.get(name, 'absent'), 80)}, is "
        f"{now.versions.get(name, 'absent')}: the run may end with other bits"
        for name in names
        if was.versions.get(name) != now.versions.get(name)
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_text.shown(name, 200) for name in names[:20])


def check_finite(name: str, tree: PyTree) -> None:
    """Raises an error for weights with NaN or infinity, which would silently ruin later training.

    Args:
      name: of the weights' file, for the message.
      tree: parameters, or `Variables`; arrays that are not floating point pass.

    Raises:
      ValueError: naming the first leaves and how many values are not finite.
    """
    broken = []
    for path, leaf in trees.flatten(tree).items():
        if not trees.is_inexact(leaf):
            continue
        array = np.asarray(leaf)
        finite = np.isfinite(array if array.dtype.kind in "fc" else array.astype(np.float32))
        if not finite.all():
            broken.append(f"{path!r} ({finite.size - int(finite.sum())} of {finite.size})")
    if broken:
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        raise ValueError(
            f"{name}: weights are not finite: {', '.join(broken[:4])}{more}. The training that "
            "made them diverged; take an earlier checkpoint."
        )


def _digest(paths: Paths) -> str:
    if isinstance(paths, (str, Path)):
        path = Path(paths)
        if not path.is_dir():
            return _files.sha256(path) if path.exists() else f"named {path}"
        return _digest_of({str(file.relative_to(path)): file for file in _below(path)})
    first, *others = paths
    if not others:
        return _digest(first)
    common = os.path.commonpath([path.absolute().parent for path in paths])
    return _digest_of({os.path.relpath(path, common): path for path in paths})


def _digest_of(files: Mapping[str, Path]) -> str:
    found = hashlib.sha256()
    for name in sorted(files):
        found.update(name.encode(errors="surrogateescape") + b"\0")
        found.update(_files.sha256(files[name]).encode())
    return found.hexdigest()


def _below(folder: Path) -> Iterator[Path]:
    """All files in a folder, including folders that it links to, each folder once."""
    seen: set[Path] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        here = Path(at)
        if here.resolve() in seen:
            folders.clear()
            continue
        seen.add(here.resolve())
        yield from (here / name for name in names if (here / name).is_file())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
