"""Atomic files and folders, digests, and marks of ownership."""

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
OTHER_FOLDER = "Choose another folder."
MAX_RECORD_BYTES = 64 * 2**20  # none of our records is larger
MAX_JSON_BYTES = 16 * 2**20  # of config.json and the like


def regular(path: Path) -> Path:
    """Returns the path, but refuses a pipe, a socket or a device: reading one may never end.

    Raises:
      OSError: if it does not exist.
      ValueError: naming its kind.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise ValueError(f"{path} is a {kind}, not a file.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file from elsewhere.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, if it is not JSON, does not hold an object, or is too large.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, at most {MAX_JSON_BYTES:,} are read."
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({_text.shown(str(error), 100)}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_place(path: Path) -> None:
    """Refuses a path where no file can be written; call it before long work.

    Raises:
      FileNotFoundError: naming the folder, if it does not exist.
      FileExistsError: if the path is a folder, a pipe or a device.
    """
    if not path.parent.is_dir():
        reason = f"{path.name} cannot be written: its folder does not exist; make it first"
        raise FileNotFoundError(errno.ENOENT, reason, str(path.parent))
    if path.exists() and not path.is_file():
        reason = "a folder, a pipe or a device is there; name a file"
        raise FileExistsError(errno.EEXIST, reason, str(path))


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`, synced and renamed to it when the block succeeds.

    A killed process leaves the old file unchanged, and a temporary file that may be deleted.

    Raises:
      OSError: naming `path`, if the disk is full or read-only; the old file is then unchanged.
      FileNotFoundError, FileExistsError: as `check_place`.
    """
    check_place(path)
    prefix = f".{path.name[:100]}."
    with _naming_target(path):
        handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _default_mode())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder beside `folder`, renamed to it when the block succeeds.

    Raises:
      FileExistsError: if `folder` exists and is not empty; its content is never touched.
      OSError: naming `folder`, if the disk is full or read-only.
    """
    message = f"{folder} exists and is not empty. Choose a new folder."
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(message)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name[:100]}."
    with _naming_target(folder):
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=TEMPORARY, dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, _default_mode() | 0o111)
        try:
            os.replace(temporary, folder)
        except OSError as error:  # another process has made it meanwhile
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(message) from None
            raise
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Writes beside `path`, syncs, renames: readers see the old file or the new one."""
    with atomic_file(path) as file:
        file.write(content)


def as_json(value: Any) -> Any:
    """Converts any value to strict JSON.

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
        plain = value.tolist()
        return as_json(plain) if type(plain) is not type(value) else repr(value)
    return os.fsdecode(value) if isinstance(value, os.PathLike) else repr(value)


def write_json(path: Path, value: Any) -> None:
    """Writes indented, strict, ASCII JSON; file names that are not UTF-8 are escaped."""
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
        if path.stat().st_size > MAX_RECORD_BYTES:
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


def damage(path: Path, name: str, entry: Mapping[str, Any], *, contents: bool = True) -> str | None:
    """How a file differs from its recorded `bytes` and `sha256`, or None.

    Args:
      path: of the file.
      name: of the file in the message.
      entry: the record.
      contents: whether to read the file and compare its SHA-256.
    """
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    if contents and sha256(path) != entry["sha256"]:
        return f"{name} was altered: its SHA-256 does not match"
    return None


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
    """Refuses content that cannot fit on the disk; call it before writing.

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
      ValueError: naming the content.
    """
    if not folder.exists():
        return
    if (folder / MARK).exists():
        mark = read_sealed(folder / MARK)
        if mark.get("kind") != kind or not isinstance(mark.get("id"), str):
            other_kind = _text.shown(mark.get("kind"))
            raise ValueError(f"{folder} holds {other_kind}, not {kind}. {OTHER_FOLDER}")
        return
    refuse(folder, folder.iterdir())


def refuse(folder: Path, paths: Iterable[Path]) -> None:
    """Refuses a folder if any of these foreign files is not hidden.

    Raises:
      ValueError: naming the first of them.
    """
    names = sorted(path.name for path in paths if path.name[0] != ".")
    if names:
        name_list = ", ".join(_text.shown(name) for name in names[:5])
        raise ValueError(f"{folder} holds other files: {name_list}. {OTHER_FOLDER}")


def claim(folder: Path, kind: str) -> str:
    """Marks a new or empty folder as ours, and returns the random identity in its mark.

    Args:
      folder: made if it does not exist.
      kind: of its content, such as "checkpoints"; an existing mark must have the same kind.

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
    """Whether `claim(folder, kind)` marked this folder itself, not the target of a link."""
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


def remove_unfinished(folder: Path) -> None:
    """Deletes what killed processes left unfinished in a folder, which the caller has locked."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if path.is_file():
            path.unlink()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


@contextlib.contextmanager
def _naming_target(path: Path) -> Iterator[None]:
    """Makes errors name the target, not its temporary file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _default_mode() -> int:
    """The mode that a plain `open(path, "w")` would give; temporary files are private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
