"""Arrays: an npz, and npy files in a folder or beside each other.

Nothing is ever unpickled, and nothing is unpacked that was not requested or that its own header
does not announce.
"""

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MOST_HEADER = 10_000  # bytes, of one array
DEFLATE = 1032  # no zlib stream unpacks to more bytes per byte than this
INPUTS = ("x", "images", "image", "inputs", "input", "data", "features")
LABELS = ("y", "labels", "label", "targets", "target", "classes", "class")
PARTS = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "te"),
}
# What zipfile and NumPy raise on broken or foreign files; zipfile raises NotImplementedError
# for an unknown compression.
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError, RuntimeError),
    *(NotImplementedError, OverflowError, MemoryError, SyntaxError, UnicodeError, OSError),
    tokenize.TokenError,  # from NumPy's header reader
)


class Arrays(NamedTuple):
    """Arrays by name, each read when asked for."""

    path: Path
    names: tuple[str, ...]
    shape: Callable[[str], tuple[int, ...]]  # from its header; nothing else is read
    load: Callable[[str], np.ndarray]


def npz(path: Path) -> Arrays:
    """The arrays of an npz, not yet unpacked.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is not an npz.
    """
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        raise ValueError(f"{path}: the file is empty.")
    if start == b"\x93NUMPY":
        raise ValueError(f"{path}: a single array, not an npz. Use np.savez(path, x=, y=).")
    with _readable(path, "npz"), zipfile.ZipFile(path) as stored:
        names = [name for name in stored.namelist() if name.endswith(".npy")]
    names = sorted(name.removesuffix(".npy") for name in names)
    return Arrays(path, tuple(names), partial(_npz_shape, path), partial(_npz_array, path))


def npy_folder(folder: Path) -> Arrays:
    """The npy files of a folder, named without their suffix."""
    names = sorted(path.stem for path in folder.glob("*.npy") if path.is_file())
    return Arrays(
        folder,
        tuple(names),
        lambda name: npy_shape(folder / f"{name}.npy"),
        lambda name: read_npy(folder / f"{name}.npy"),
    )


def npy_shape(path: Path) -> tuple[int, ...]:
    """The shape of an npy file's array; raises as `read_npy`."""
    with path.open("rb") as file, _readable(path, "npy file"):
        return _announced(file, path.name, path.stat().st_size)


def read_npy(path: Path) -> np.ndarray:
    """One npy file.

    Raises:
      OSError: if the file does not exist or cannot be read.
      ValueError: if it is not an npy file, or holds pickled objects.
    """
    npy_shape(path)
    with path.open("rb") as file, _readable(path, "npy file"):
        return np.lib.format.read_array(file, allow_pickle=False)


def pairs(
    arrays: Arrays, *, inputs: str | None, label: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of inputs and of targets by part: "train", "validation", "test", or "whole".

    Args:
      arrays: the available ones.
      inputs: the array of inputs, of the training part if there are several; None: the usual names.
      label: likewise for targets; "label" means the usual names.

    Raises:
      ValueError: if a requested array does not exist.
    """
    given = None if label == "label" else label
    for name in filter(None, (inputs, given)):
        if name not in arrays.names:
            raise ValueError(
                f"{arrays.path}: has no array {name!r:.80}; it has {_listed(arrays.names)}. Name "
                "the arrays of inputs (--inputs) and labels (--label)."
            )
    x, y = _by_part(arrays.names, INPUTS, inputs), _by_part(arrays.names, LABELS, given)
    if inputs is not None and given is not None and not set(x) & set(y):
        return {"whole": inputs}, {"whole": given}
    if "train" in x:
        x.pop("whole", None)
    if "train" in y or "train" in x:
        y.pop("whole", None)
    return x, y


def described(arrays: Arrays) -> str:
    """The available arrays, for messages."""
    return f"it has {_listed(arrays.names)}"


def _by_part(names: Sequence[str], words: Sequence[str], given: str | None) -> dict[str, str]:
    lower = {name.lower(): name for name in reversed(names)}
    if given is not None:
        return _like(given, lower)
    found: dict[str, str] = {}
    for part, affixes in PARTS.items():
        forms = (form for word in words for affix in affixes
                 for form in (f"{word}_{affix}", f"{affix}_{word}", f"{word}{affix}"))  # fmt: skip
        if first := next((lower[form] for form in forms if form in lower), None):
            found[part] = first
    if first := next((lower[word] for word in words if word in lower), None):
        found["whole"] = first
    return found


def _like(given: str, lower: Mapping[str, str]) -> dict[str, str]:
    """The other parts of an array named after its training part: cells_train."""
    for affix in PARTS["train"]:
        before, middle, after = given.lower().rpartition(affix)
        if middle and (before.endswith("_") or after.startswith("_") or not (before or after)):
            found = {"train": given}
            for part in ("validation", "test"):
                forms = (before + other + after for other in PARTS[part])
                if first := next((lower[form] for form in forms if form in lower), None):
                    found[part] = first
            return found
    return {"whole": given}


def _npz_shape(path: Path, name: str) -> tuple[int, ...]:
    with _readable(path, "npz"), zipfile.ZipFile(path) as stored:
        member = stored.getinfo(f"{name}.npy")
        most = min(member.file_size, DEFLATE * (member.compress_size + 1))
        with stored.open(member) as file:
            return _announced(file, member.filename, most)


def _npz_array(path: Path, name: str) -> np.ndarray:
    _npz_shape(path, name)
    with (
        _readable(path, "npz"),
        zipfile.ZipFile(path) as stored,
        stored.open(f"{name}.npy") as file,
    ):
        return np.lib.format.read_array(file, allow_pickle=False)


@contextlib.contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turns what broken files raise into one error that names the file."""
    try:
        yield
    except _BROKEN as error:  # an OSError here is a seek to a broken file's offset
        repair = " Save text as text, x.astype(str)." if "pickle" in str(error) else ""
        raise ValueError(f"{path}: not a readable {kind} ({error!s:.200}).{repair}") from None


def _announced(file: Any, name: str, most: int) -> tuple[int, ...]:
    """An array's shape; refused if larger than the file's bytes can hold."""
    version = np.lib.format.read_magic(file)
    read_header = _NPY_HEADERS.get(version)
    if read_header is None:
        raise ValueError("an unknown version of the array format")
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > MOST_HEADER:  # NumPy refuses it, too, after reading it
        raise ValueError(f"a header of {length} bytes")
    file.seek(np.lib.format.MAGIC_LEN)
    shape, _, dtype = read_header(file)
    asked = math.prod(shape) * dtype.itemsize
    if asked > most and not dtype.hasobject:
        raise ValueError(f"{name} asks for {asked} bytes, at most {most} are there")
    return shape


def _listed(names: Sequence[str]) -> str:
    return str(list(names[:12])) if len(names) <= 12 else f"{list(names[:12])!s:.400} and more"
