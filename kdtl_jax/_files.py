"""Files and folders that appear whole or not at all, their digests, and marks of ownership."""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kdtl_jax import _text

TEMPORARY = ".kdtl-tmp"  # suffix of unfinished files
MARK = ".kdtl"  # the file that makes a folder ours
ANOTHER = "Choose another folder."
RECORD_BYTES = 64 * 2**20  # none of our records is larger
JSON_BYTES = 16 * 2**20  # nor is any config.json or similar file


def regular(path: Path) -> Path:
    """The path, unless it is a pipe, a socket or a device: reading one may never end.

    Raises:
      OSError: if it does not exist.
      ValueError: saying what it is.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ValueError(f"{path} is a {kind}, not a file.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that we did not write.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if it is not JSON, does not hold an object, or is too large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, at most {JSON_BYTES:,} are read."
        )
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({_text.shown(str(error), 100)}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_place(path: Path) -> None:
    """Refuses a path where no file can be written, before the work whose result would go there.

    Raises:
      FileNotFoundError: naming the folder, if it does not exist.
      FileExistsError: if a folder, a pipe or a device is there, which a file would replace.
    """
    if not path.parent.is_dir():
        reason = f"{path.name} cannot be written: its folder does not exist; make it first"
        raise FileNotFoundError(errno.ENOENT, reason, str(path.parent))
    if path.exists() and not path.is_file():
        reason = "a folder, a pipe or a device is there; name a file"
        raise FileExistsError(errno.EEXIST, reason, str(path))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its name, synced, when the block succeeds.

    A killed process leaves the old file unchanged, and a temporary file that may be deleted.

    Raises:
      OSError: naming `path`, if the disk is full or read-only; the old file is then unchanged.
      FileNotFoundError, FileExistsError: as `check_place`.
    """
    check_place(path)
    prefix = f".{path.name[:100]}."
    with _named(path):
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _usual_mode())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block succeeds.

    Raises:
      FileExistsError: if `folder` exists and is not empty; its content is never touched.
      OSError: naming `folder`, if the disk is full or read-only.
    """
    taken_already = f"{folder} exists and is not empty. Choose a new folder."
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(taken_already)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name[:100]}."
    with _named(folder):
        part = Path(tempfile.mkdtemp(prefix=prefix, suffix=TEMPORARY, dir=folder.parent))
    try:
        yield part
        os.chmod(part, _usual_mode() | 0o111)
        try:
            os.replace(part, folder)
        except OSError as error:  # another process has made it meanwhile
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(taken_already) from None
            raise
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes beside `path`, syncs, renames: readers see the old file or the new one."""
    with atomic_file(path) as file:
        file.write(content)


def as_json(value: Any) -> Any:
    """Any value as strict JSON; a record writer never refuses a value.

    Numbers that are not finite become null, arrays become lists, and types that JSON does not
    support become their `repr`.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): as_json(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_json(entry) for entry in value]
    if hasattr(value, "tolist"):  # arrays and array scalars
        listed = value.tolist()
        return as_json(listed) if type(listed) is not type(value) else repr(value)
    return os.fsdecode(value) if isinstance(value, os.PathLike) else repr(value)


def write_json(path: Path, value: Any) -> None:
    """A record as indented, strict, ASCII JSON; file names that are not UTF-8 are escaped."""
    write_atomic(path, (json.dumps(as_json(value), indent=1, allow_nan=False) + "\n").encode())


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with its own digest, so `read_sealed` notices any changed byte."""
    write_atomic(path, json.dumps(value | {"digest": digest(value)}, indent=1).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what `write_sealed` wrote.

    Raises:
      ValueError: with the reason, if the file is missing, cut short, altered, or not a JSON object.
    """
    try:
        if path.stat().st_size > RECORD_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        value = json.loads(regular(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no {path.name}: the save was cut short") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    if not isinstance(value, dict) or "digest" not in value:
        raise ValueError(f"{path.name} cannot be read (it is not an object with a digest)")
    seal = value.pop("digest")
    if seal != digest(value):
        raise ValueError(f"{path.name} was altered: its digest does not match")
    return value


def sync(path: Path) -> None:
    """Makes a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, if the system allows opening a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_space(folder: Path, needed: int, repair: str = "") -> None:
    """Refuses, before anything is written, content that cannot fit on the disk.

    Raises:
      OSError: (ENOSPC) with the bytes needed and free, and the repair.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        reason = f"no space left: {needed:,} bytes are needed in {folder}, {free:,} are free"
        raise OSError(errno.ENOSPC, f"{reason}. {repair}" if repair else reason)


def check_free(folder: Path, kind: str) -> None:
    """Refuses a folder that holds files but no mark of this kind: they are not ours.

    Hidden files do not count as content, and a folder that does not exist is free.

    Raises:
      ValueError: naming what is there.
    """
    if not folder.exists():
        return
    if (folder / MARK).exists():
        found = read_sealed(folder / MARK)
        if found.get("kind") != kind or not isinstance(found.get("id"), str):
            held = _text.shown(found.get("kind"))
            raise ValueError(f"{folder} holds {held}, not {kind}. {ANOTHER}")
        return
    refuse(folder, folder.iterdir())


def refuse(folder: Path, paths: Iterable[Path]) -> None:
    """Refuses a folder because of these files, which are not ours; hidden ones do not count.

    Raises:
      ValueError: naming the first of them.
    """
    others = sorted(path.name for path in paths if path.name[0] != ".")
    if others:
        listed = ", ".join(_text.shown(name) for name in others[:5])
        raise ValueError(f"{folder} holds other files: {listed}. {ANOTHER}")


def claim(folder: Path, kind: str) -> str:
    """Marks a new or empty folder as ours, and returns the random identity in its mark.

    Args:
      folder: made if it does not exist.
      kind: what it holds, such as "checkpoints"; an older mark must say the same.

    Raises:
      ValueError: as `check_free`.
      OSError: if it cannot be written.
    """
    check_free(folder, kind)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        write_sealed(folder / MARK, {"kind": kind, "id": secrets.token_hex(8)})
    return read_sealed(folder / MARK)["id"]


def is_ours(folder: Path, kind: str) -> bool:
    """Whether `claim(folder, kind)` marked this very folder (not what a link points to)."""
    try:
        return not folder.is_symlink() and read_sealed(folder / MARK).get("kind") == kind
    except ValueError:
        return False


def remove(folder: Path, kind: str) -> bool:
    """Deletes a folder if it carries our mark of this kind; returns whether it did."""
    if not is_ours(folder, kind):
        return False
    shutil.rmtree(folder)
    return True


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name what is to be written, not the temporary name beside it."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _usual_mode() -> int:
    """The mode that a plain `open(path, "w")` would give; temporary files are private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
