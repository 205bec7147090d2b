"""The evaluations of a run, in one append-only file per folder.

A run passes all its evaluations to every save. Repeated in every checkpoint, they would take space
and time quadratic in their number. Instead they are appended to a file beside the steps, and each
step's manifest records how many bytes of it belong to the step, and their SHA-256.
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


def open_history(folder: Path, entry: Mapping[str, Any] | None) -> History:
    """Opens the history named by the newest step's manifest for appending; None makes a new one."""
    history = History()
    if entry is not None:
        _extend(history, _content(folder, entry).splitlines(keepends=True))
        history.file = entry["file"]
    return history


def append(history: History, folder: Path, step: int, lines: Sequence[Any]) -> dict[str, Any]:
    """Writes the lines that the file lacks; returns the entry for the manifest of `step`.

    Lines that do not continue the file come from a rewound run. They start another file, because
    older steps still need theirs.
    """
    continues = history.file and len(lines) >= history.count
    if not continues or (history.count and _text(lines[history.count - 1]) != history.last):
        history.file = f"{KEY}-{step}-{os.urandom(4).hex()}.jsonl"
        history.count, history.size, history.last = 0, 0, b""
        history.digest = hashlib.sha256()
    new_lines = [_text(line) for line in lines[history.count :]]
    if new_lines or not history.size:
        with (folder / history.file).open("r+b" if history.size else "wb") as file:
            file.truncate(history.size)  # removes the partial lines of a killed save
            file.seek(history.size)
            file.write(b"".join(new_lines))
            file.flush()
            os.fsync(file.fileno())
        _extend(history, new_lines)
    digest = history.digest.hexdigest()
    return {"file": history.file, "bytes": history.size, "sha256": digest}


def read(folder: Path, entry: Mapping[str, Any]) -> list[Any]:
    """All lines up to a step, as recorded in its manifest."""
    return [json.loads(line) for line in _content(folder, entry).splitlines()]


def is_entry(value: Any) -> bool:
    """Whether a manifest's value is a history entry, or None."""
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is kind for name, kind in FIELDS.items())
        and value["bytes"] >= 0
        and Path(value["file"]).match(PATTERN)
        and Path(value["file"]).name == value["file"]
    )


def _content(folder: Path, entry: Mapping[str, Any]) -> bytes:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size < entry["bytes"]:
            raise ValueError(f"{path.name} has {size} bytes, not {entry['bytes']}")
        with path.open("rb") as file:
            content = file.read(entry["bytes"])
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} was altered: its SHA-256 does not match")
    return content


def _extend(history: History, lines: Sequence[bytes]) -> None:
    for text in lines:
        history.digest.update(text)
        history.size += len(text)
    history.count += len(lines)
    history.last = lines[-1] if lines else history.last


def _text(line: Any) -> bytes:
    return json.dumps(line).encode() + b"\n"
