"""Arrays: an npz, and npy files in a folder or beside each other.

Nothing is ever unpickled, and an array is unpacked only on request, up to the size in its header.

Raises OSError if a file does not exist or cannot be read, and ValueError if it is not an npz or npy
file, or holds pickled objects.
"""

import contextlib
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MAX_HEADER_BYTES = 10_000  # bytes, of one array
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
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    SyntaxError,
    UnicodeError,
    OSError,
    tokenize.TokenError,  # from NumPy's header reader
)


class Arrays(NamedTuple):
    """Arrays by name, each read on request."""

    path: Path
    names: tuple[str, ...]
    shape: Callable[[str], tuple[int, ...]]  # from its header; nothing else is read
    load: Callable[[str], np.ndarray]


def npz(path: Path) -> Arrays:
    """The arrays of an npz, not yet unpacked."""
    with path.open("rb") as file:
        magic = file.read(6)
    if not magic:
        raise ValueError(f"{path}: the file is empty.")
    if magic == b"\x93NUMPY":
        raise ValueError(f"{path}: a single array, not an npz. Use np.savez(path, x=, y=).")
    with _read_errors(path, "npz"), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
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
    """The shape of an npy file's array."""
    with path.open("rb") as file, _read_errors(path, "npy file"):
        return _checked_shape(file, path.name, path.stat().st_size)


def read_npy(path: Path) -> np.ndarray:
    """One npy file."""
    npy_shape(path)
    with path.open("rb") as file, _read_errors(path, "npy file"):
        return np.lib.format.read_array(file, allow_pickle=False)


def pairs(
    arrays: Arrays, *, inputs: str | None, label: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The names of inputs and of targets by part: "train", "validation", "test", or "whole".

    Args:
      arrays: the available arrays.
      inputs: the array of inputs, of the training part if there are several; None means the usual
        names.
      label: the array of targets, likewise; "label" means the usual names.

    Raises:
      ValueError: if a requested array does not exist.
    """
    label_name = None if label == "label" else label
    for name in filter(None, (inputs, label_name)):
        if name not in arrays.names:
            raise ValueError(
                f"{arrays.path}: has no array {name!r:.80}; {list_names(arrays)}. Name the arrays "
                "of inputs (--inputs) and labels (--label)."
            )
    x = _names_by_part(arrays.names, INPUTS, inputs)
    y = _names_by_part(arrays.names, LABELS, label_name)
    if inputs is not None and label_name is not None and not set(x) & set(y):
        return {"whole": inputs}, {"whole": label_name}
    if "train" in x:
        x.pop("whole", None)
    if "train" in y or "train" in x:
        y.pop("whole", None)
    return x, y


def list_names(arrays: Arrays) -> str:
    """Lists the available arrays for a message."""
    names = str(list(arrays.names[:12]))
    return f"it has {names if len(arrays.names) <= 12 else f'{names:.400} and more'}"


def _names_by_part(
    names: Sequence[str], usual_names: Sequence[str], name: str | None
) -> dict[str, str]:
    by_lowercase = {each.lower(): each for each in reversed(names)}
    if name is not None:
        return _sibling_parts(name, by_lowercase)
    result: dict[str, str] = {}
    for part, affixes in PARTS.items():
        candidates = (
            candidate
            for usual in usual_names
            for affix in affixes
            for candidate in (f"{usual}_{affix}", f"{affix}_{usual}", f"{usual}{affix}")
        )
        if match := _first_match(candidates, by_lowercase):
            result[part] = match
    if match := _first_match(usual_names, by_lowercase):
        result["whole"] = match
    return result


def _first_match(candidates: Iterable[str], by_lowercase: Mapping[str, str]) -> str | None:
    return next((by_lowercase[name] for name in candidates if name in by_lowercase), None)


def _sibling_parts(name: str, by_lowercase: Mapping[str, str]) -> dict[str, str]:
    """Finds the other parts of an array named after its training part, such as cells_train."""
    for affix in PARTS["train"]:
        prefix, marker, suffix = name.lower().rpartition(affix)
        if marker and (prefix.endswith("_") or suffix.startswith("_") or not (prefix or suffix)):
            result = {"train": name}
            for part in ("validation", "test"):
                candidates = (prefix + alternative + suffix for alternative in PARTS[part])
                if match := _first_match(candidates, by_lowercase):
                    result[part] = match
            return result
    return {"whole": name}


def _npz_shape(path: Path, name: str) -> tuple[int, ...]:
    with _read_errors(path, "npz"), zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        max_bytes = min(member.file_size, DEFLATE * (member.compress_size + 1))
        with archive.open(member) as file:
            return _checked_shape(file, member.filename, max_bytes)


def _npz_array(path: Path, name: str) -> np.ndarray:
    _npz_shape(path, name)
    with (
        _read_errors(path, "npz"),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{name}.npy") as file,
    ):
        return np.lib.format.read_array(file, allow_pickle=False)


@contextlib.contextmanager
def _read_errors(path: Path, kind: str) -> Iterator[None]:
    """Converts errors from broken files into a ValueError that names the file."""
    try:
        yield
    except _READ_ERRORS as error:  # an OSError here is a seek to a broken file's offset
        repair = " Save text as text, x.astype(str)." if "pickle" in str(error) else ""
        raise ValueError(f"{path}: not a readable {kind} ({error!s:.200}).{repair}") from None


def _checked_shape(file: Any, name: str, max_bytes: int) -> tuple[int, ...]:
    """Reads an array's shape; refuses one larger than the file's bytes can hold."""
    version = np.lib.format.read_magic(file)
    read_header = _NPY_HEADERS.get(version)
    if read_header is None:
        raise ValueError("an unknown version of the array format")
    length = int.from_bytes(file.read(2 if version == (1, 0) else 4), "little")
    if length > MAX_HEADER_BYTES:  # NumPy refuses it, too, after reading it
        raise ValueError(f"a header of {length} bytes")
    file.seek(np.lib.format.MAGIC_LEN)
    shape, _, dtype = read_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes and not dtype.hasobject:
        raise ValueError(f"{name} asks for {size} bytes, at most {max_bytes} are there")
    return shape
