"""What a command has written: the old files or the new ones, whole, and no others.

Shared by kill_program.py, disk_program.py and race_program.py.
"""

import json
import zipfile
from pathlib import Path

import numpy as np

from kdtl_jax import _files

Files = dict[str, bytes]  # by path
RUN = "run"  # where a command writes: a folder, or what --write names
# Where a run keeps when it was made and how long it took, beside what has to be equal.
TIMED = {"results.json", "report.html", "env.json", "bench.json"}


def content(folder: Path) -> Files:
    """The bytes of every file but locks, marks, unfinished files, and what a run resumes from."""
    results = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        ours = name.parts[0] in (RUN, f"{RUN}.safetensors")
        hidden = name.name in (".lock", _files.MARK) or any(
            part.endswith(_files.TEMPORARY) for part in name.parts
        )
        kept = ours and {"checkpoints", "finished"} & {*name.parts} and "mine" not in name.parts
        if not hidden and not kept:
            kept = ours and "finished" in name.parts
            results[name.as_posix()] = _arrays(path) if kept else path.read_bytes()
    return results


def _arrays(path: Path) -> bytes:
    """The arrays of a finished method's file; which run it is of and what it took are beside."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return b"".join(stored[name].tobytes() for name in stored.files if name != "about")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        return path.read_bytes()  # it is not whole


def is_whole(name: str, now: bytes, versions: list[Files]) -> bool:
    """Whether a file that a command writes is one of the versions, or readable if timed."""
    base = Path(name).name
    if base in TIMED:
        try:
            text = now.decode()
            if base.endswith(".html"):
                return text.rstrip().endswith("</html>")
            return json.loads(text) is not None
        except ValueError:
            return False
    if base == "metrics.jsonl":  # it grows line by line
        return any(version[name].startswith(now) for version in versions if name in version)
    return any(version.get(name) == now for version in versions)


def harmed(before: Files, after: Files, whole: Files, *, replaces: bool) -> list[str]:
    """What a command that ended early did to files: each is as it was, or written whole.

    `replaces`: whether it writes over files of an earlier run.
    """
    wrong: list[str] = []
    for name, was in before.items():
        if not is_written(name) and after.get(name) != was:
            wrong.append(f"{name} of another was changed or lost")
        if replaces and is_written(name) and name not in after:
            wrong.append(f"the old {name} is lost")
    for name, now in after.items():
        if is_written(name) and not is_whole(name, now, [before, whole]):
            wrong.append(f"{name} is neither the old nor the new one")
        if not is_written(name) and name not in before:
            wrong.append(f"{name} was left behind")
    return wrong


def is_written(name: str) -> bool:
    """Whether a command writes it: what lies in RUN, but for the files of another there."""
    return name.startswith(RUN) and Path(name).name not in ("notes.txt", "weights.bin")
