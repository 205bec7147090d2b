"""The evaluations of a run, in one append-only file per folder.

A run passes all its evaluations to every save. Repeated in every checkpoint, they would take space
and time quadratic in their number. So they are appended to a file beside the steps, and a step's
manifest records how many bytes of it belong to the step, and their SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY = "evaluations"  # in `meta`: a list of lines `{"step": ..., "eval/name": ...}`
PATTERN = f"{KEY}-*.jsonl"
FIELDS = {"file": str, "bytes": int, "sha256": str}


@dataclass
class History:
    """A history file that saves append to; `file` is empty before the first one."""

    file: str = ""
    count: int = 0
    size: int = 0  # bytes
    last: bytes = b""
    digest: Any = field(default_factory=hashlib.sha256)


def open_history(folder: Path, known: Mapping[str, Any] | None) -> History:
    """The history that the newest step's manifest names, to append to; else a new one."""
    found = History()
    if known is not None:
        _extend(found, _content(folder, known).splitlines(keepends=True))
        found.file = known["file"]
    return found


def append(history: History, folder: Path, step: int, lines: Sequence[Any]) -> dict[str, Any]:
    """Writes the lines that the file lacks; returns the entry for the manifest of `step`.

    Lines that do not continue the file come from a rewound run. They start another file, because
    older steps still need theirs.

    Raises:
      TypeError: if a line is not JSON.
      OSError: if it cannot be written.
    """
    goes_on = history.file and len(lines) >= history.count
    if not goes_on or (history.count and _text(lines[history.count - 1]) != history.last):
        _begin(history, f"{KEY}-{step}-{os.urandom(4).hex()}.jsonl")
    new = [_text(line) for line in lines[history.count :]]
    if new or not history.size:
        with (folder / history.file).open("r+b" if history.size else "wb") as file:
            file.truncate(history.size)  # removes what a killed save left
            file.seek(history.size)
            file.write(b"".join(new))
            file.flush()
            os.fsync(file.fileno())
        _extend(history, new)
    digest = history.digest.hexdigest()
    return {"file": history.file, "bytes": history.size, "sha256": digest}


def read(folder: Path, known: Mapping[str, Any]) -> list[Any]:
    """All lines up to a step, as recorded in its manifest.

    Raises:
      ValueError: with the reason, if they are missing or altered.
    """
    return [json.loads(line) for line in _content(folder, known).splitlines()]


def is_known(value: Any) -> bool:
    """Whether a manifest's entry is one of ours (or there is none)."""
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is kind for name, kind in FIELDS.items())
        and value["bytes"] >= 0
        and Path(value["file"]).match(PATTERN)
        and Path(value["file"]).name == value["file"]
    )


def _content(folder: Path, known: Mapping[str, Any]) -> bytes:
    path = folder / known["file"]
    try:
        size = path.stat().st_size
        if size < known["bytes"]:
            raise ValueError(f"{path.name} has {size} bytes, not {known['bytes']}")
        with path.open("rb") as file:
            content = file.read(known["bytes"])
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise ValueError(f"{path.name} was altered: its SHA-256 does not match")
    return content


def _begin(history: History, file: str) -> None:
    """Turns it into the empty history of a new file."""
    history.file, history.count, history.size, history.last = file, 0, 0, b""
    history.digest = hashlib.sha256()


def _extend(history: History, new: Sequence[bytes]) -> None:
    for text in new:
        history.digest.update(text)
        history.size += len(text)
    history.count += len(new)
    history.last = new[-1] if new else history.last


def _text(line: Any) -> bytes:
    return json.dumps(line).encode() + b"\n"
