"""Locks on folders, so that two processes do not write to the same one."""

import contextlib
import errno
import os
import socket
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder; the system releases it when the process ends, however it ends.

    The lock is a file `.lock`, opened without following links; it is written only if it is ours. If
    the file system has no locks, a warning says that nothing protects the folder.

    Raises:
      RuntimeError: if another process holds it, naming that process; or if `.lock` is not a file.
      OSError: if it cannot be written, naming it.
    """
    with os.fdopen(_open_lock(folder / ".lock"), "r+b") as file:
        _flock(folder, file)
        file.seek(0)
        content = file.read(64)
        if not content or content.startswith(b"process "):
            _write(folder, file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


@contextlib.contextmanager
def checked_lock(folder: Path, check: Callable[[], object]) -> Iterator[None]:
    """Makes and locks a folder, with a check before locking and again under the lock.

    The first check leaves nothing behind in a refused folder; the second is needed because another
    process may have written there meanwhile. If the check fails while another process uses the
    folder, the error names the lock's holder instead.

    Raises:
      RuntimeError: as `locked`.
      Exception: whatever `check` raises.
    """
    try:
        check()
    except Exception:
        if (folder / ".lock").is_file():
            with os.fdopen(_open_lock(folder / ".lock"), "r+b") as file:
                _flock(folder, file)  # and nothing is written there
        raise
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        check()
        yield


def _open_lock(path: Path) -> int:
    """Opens a lock file without following links."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    for name in ("O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    raise RuntimeError(
        f"{path} is not a file but a link, a folder or the like, and is left alone. Remove it, "
        "or choose another folder."
    )


def _write(folder: Path, file: BinaryIO, content: bytes) -> None:
    try:
        os.ftruncate(file.fileno(), 0)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.write(file.fileno(), content)  # unbuffered, or closing would fail once more
    except OSError as error:  # which names no file
        raise OSError(error.errno, error.strerror, str(folder / ".lock")) from None


def _flock(folder: Path, file: BinaryIO) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other run "
                "writes there.",
                RuntimeWarning,
                stacklevel=5,
            )
            return
        file.seek(0)
        holder = file.read(200).decode(errors="replace")
        raise RuntimeError(
            f"{folder} is in use by {holder if holder.startswith('process ') else 'another one'}. "
            "Two runs cannot share a folder: wait for it, or choose another one."
        ) from None
