"""Files that appear whole or not at all, their digests, and a lock on a folder."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system: folders are then not locked
    fcntl = None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its name, synced, when the block succeeds.

    A killed process leaves the old file as it was, and a `.tmp` file that may be deleted.

    Raises:
      OSError: naming `path`, if the disk is full; the old file then stays as it was.
      FileNotFoundError: naming its folder, if there is none.
    """
    if not path.parent.is_dir():
        reason = f"{path.name} cannot be written: its folder does not exist; make it first"
        raise FileNotFoundError(errno.ENOENT, reason, str(path.parent))
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
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
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it refused
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block succeeds.

    Raises:
      FileExistsError: if `folder` exists and is not empty; what is there is never touched.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Choose a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        yield part
        os.chmod(part, _usual_mode() | 0o111)
        os.replace(part, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a whole file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content)


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """A JSON object with its own digest, so that `read_sealed` notices any changed byte."""
    write_atomic(path, json.dumps(value | {"digest": digest(value)}, indent=1).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
      ValueError: with the reason, if the file is missing, cut short or altered.
    """
    try:
        value = json.loads(path.read_bytes())
        seal = value.pop("digest")
    except FileNotFoundError:
        raise ValueError(f"no {path.name}: the save was cut short") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from None
    if seal != digest(value):
        raise ValueError(f"{path.name} was altered: its digest does not match")
    return value


def sync(path: Path) -> None:
    """Makes a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, fn: str) -> Iterator[None]:
    """Holds `folder/.lock`; the system lets it go when the process ends, however it ends.

    Raises:
      RuntimeError: if another process holds it, naming that process.
    """
    path = folder / ".lock"
    with path.open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise RuntimeError(
                    f"{folder} is in use by {file.read().strip() or 'another process'}. "
                    "Two runs cannot share a folder: wait for it, or choose another one."
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _usual_mode() -> int:
    """What a plain `open(path, "w")` would give; temporary files are private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
