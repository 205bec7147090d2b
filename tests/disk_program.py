"""Commands that write where the disk fills up, or becomes read-only, and what must then be true.

    python disk_program.py FOLDER --full 6 --read-only 2 --seed 0 [--only export,language]

prints one JSON object per command; Linux, as root (it mounts small tmpfs file systems). Every
command of kill_program.py runs once with space to spare. Then it runs where it has a share of the
space that it took, or where the file system becomes read-only at a random moment. It must end with
1 and one line that names a file or folder and the reason; the old files and those of others are
whole, nothing unfinished stays (on a full disk), and once there is space, the command, run again,
ends with the bytes of the undisturbed run.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
from kill_program import (
    TINY,
    TRAINED,
    Case,
    Times,
    cases,
    end,
    finish,
    prepare,
    start,
)
from whole_files import TIMED, content, harmed

from kdtl_jax import _files
from kdtl_jax.cli import find

PAGE = os.sysconf("SC_PAGE_SIZE")
SPARE = 2**26
REASONS = r"bytes free|[kM]B free|[Nn]o space left|ENOSPC|[Rr]ead-only|EROFS|RESOURCE_EXHAUSTED"


def mounted(folder: Path, *options: str) -> None:
    """Mounts a tmpfs there, or changes the one that is."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], check=True
    )


def used(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def peak(home: Path, case: Case, small: Path, log: Path) -> tuple[int, Times, dict[str, bytes]]:
    """The most space that a command takes, its times, and what it writes."""
    mounted(small, f"size={SPARE}")
    try:
        work = small / "work"
        shutil.copytree(home, work, symlinks=True)
        before, most = used(small), 0
        pid, status, begun = start(work, case.words, log), (0, 0), time.monotonic()
        while not status[0]:
            most = max(most, used(small) - before)
            status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)
        ended = time.monotonic() - begun
        assert status[1] == 0, log.read_text()
        return most, Times(0.0, ended), content(work)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def attack(home: Path, case: Case, space: int | None, moment: float, whole: dict[str, bytes],
           log: Path, small: Path) -> dict[str, Any]:  # fmt: skip
    """One run with so much space (None: it becomes read-only); what was wrong is in `wrong`."""
    mounted(small, f"size={SPARE}")
    try:
        work, wrong = small / "work", []
        shutil.copytree(home, work, symlinks=True)
        before = content(work)
        if space is not None:
            mounted(small, "remount", f"size={used(small) + space}")
        pid, begun = start(work, case.words, log), time.monotonic()
        time.sleep(moment)
        is_shut = space is None and _shut(small, pid)
        code = end(pid)
        seconds, output = time.monotonic() - begun, log.read_text(errors="replace")
        after = content(work)
        errors = [line for line in output.splitlines() if line.startswith("kdtl ")]
        if code not in (0, 1):
            wrong.append(f"it ended with {code}: {output[-400:]}")
        if code == 1:
            if len(errors) != 1 or not re.search(REASONS, errors[0]):
                wrong.append(f"it does not say why in one line: {output[-600:]}")
            if "Traceback" in output:
                wrong.append(f"a traceback: {output[-600:]}")
        wrong += harmed(before, after, whole, replaces=case.old is not None)
        left = [str(p.relative_to(work)) for p in work.rglob(f"*{_files.TEMPORARY}")]
        if left and not is_shut:
            wrong.append(f"unfinished files stay: {left[:3]}")
        if code == 0 and not is_shut:
            differ = [n for n in whole if Path(n).name not in TIMED and after.get(n) != whole[n]]
            if differ:
                wrong.append(f"it ended with 0, but {differ[:5]} differ or are missing")
        mounted(small, "remount", "rw", f"size={SPARE}")
        if code and case.again:
            wrong += _again(work, case, whole, log)
        return {"space": space, "moment": round(moment, 2), "code": code,
                "said": errors[-1][-200:] if errors else "", "seconds": round(seconds, 1),
                "wrong": wrong}  # fmt: skip
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _shut(small: Path, pid: int) -> bool:
    """Makes the file system read-only as soon as no file is open for writing there."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        command = ["mount", "-o", "remount,ro", str(small)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return True
        time.sleep(0.01)
    return False


def _again(work: Path, case: Case, whole: dict[str, bytes], log: Path) -> list[str]:
    """What is wrong with the command that runs again, now that there is space."""
    again = case.again
    if "--resume" in again and not (work / "run/config.yaml").exists():
        again = case.words
    code = end(start(work, again, log))
    ended = content(work)
    if code:
        return [f"again, it ended with {code}: {log.read_text(errors='replace')[-500:]}"]
    return [
        f"again, {name} differs from the undisturbed run's"
        for name, want in whole.items()
        if Path(name).name not in TIMED and ended.get(name) != want
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: disk_program.py FOLDER --full 3")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", type=int, default=6)
    parser.add_argument("--read-only", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of commands, by comma")
    args = parser.parse_args()
    root: Path = args.folder.absolute()
    base, small, log = root / "prepared", root / "small", root / "log.txt"
    base.mkdir(parents=True)
    small.mkdir()
    jax.config.update("jax_traceback_in_locations_limit", 0)
    chosen = {name: case for name, case in cases().items() if name not in ("inspect", "diff")}
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    for case in chosen.values():
        find(case.words)  # imports its module
    teacher = ["distill", *TINY, *TRAINED, "--methods", "kd", "--out", "teacher"]
    find(teacher)
    if (child := os.fork()) == 0:
        prepare(base, has_sentences="sentences" in chosen)
        os._exit(0)
    assert end(child) == 0
    if {"cache", "predict", "evaluate", "export"} & chosen.keys():
        finish(base, teacher, log)
    total = 0
    for name, case in chosen.items():
        home, dice = root / "home", random.Random(f"{args.seed} {name}")
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(base, home)
        if case.folder:
            (home / "run" / case.mine).mkdir(parents=True)
            (home / "run" / case.mine / "weights.bin").write_bytes(b"mine")
            (home / "run/notes.txt").write_text("mine")
        if case.old is not None:
            finish(home, case.old, log)
        most, times, whole = peak(home, case, small, log)
        done = []
        for i in range(args.full):
            space = int(most * (i + dice.random()) / args.full) // PAGE * PAGE
            done.append(attack(home, case, space, 0.0, whole, log, small))
        for _ in range(args.read_only):
            moment = times.ended * dice.random()
            done.append(attack(home, case, None, moment, whole, log, small))
        wrong = sum(bool(one["wrong"]) for one in done)
        total += wrong
        results = {"seconds": round(times.ended, 1), "peak": most, "runs": done, "wrong": wrong}
        print(name, json.dumps(results), flush=True)
    print(json.dumps({"wrong": total}))


if __name__ == "__main__":
    main()
