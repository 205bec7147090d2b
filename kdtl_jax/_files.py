"""Files that appear whole or not at all, their digests, and a lock on a folder."""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def write_atomic(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, renames: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
