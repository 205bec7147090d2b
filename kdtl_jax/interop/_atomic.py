"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdtl_jax import _files


@contextmanager
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
        _files.sync_folder(path.parent)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file it refused
        raise


@contextmanager
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
        _files.sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _usual_mode() -> int:
    """What a plain `open(path, "w")` would give; temporary files are private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
