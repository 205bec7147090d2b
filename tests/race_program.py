"""Pairs of commands that are started in one folder at one instant, and what must then be true.

    python race_program.py FOLDER --rounds 3 --seed 0 [--only distill,merge]

prints one JSON object per pair. Both commands of a pair write to one place. At least one of them
ends well; one that is refused says so in one line and ends with 1 or 2; what is written is, byte
for byte, what one of them writes alone, and nothing unfinished is left.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from kill_program import Case, cases, end, finish, prepare, start
from whole_files import TIMED, content

from kdtl_jax import _files
from kdtl_jax.cli import find

TEACHER = ["distill", "--data", "data.npz", "--teacher", "mlp:8", "--student", "mlp:4",
           "--batch-size", "8", "--seeds", "2", "--epochs", "2", "--teacher-epochs", "2",
           "--methods", "kd", "--out", "teacher"]  # fmt: skip
NEED_TEACHER = {"cache", "predict", "evaluate", "export"}
# How far apart the two begin, as shares of one's time: most at once.
APART = (0.0, 0.0, 0.05, 0.3, 0.0, 0.8)


class Pair(NamedTuple):
    """Two commands by their cases, and the words of each."""

    one: list[str]
    two: list[str]
    before: list[str] | None = None  # a command that has run there


def pairs(known: dict[str, Case]) -> dict[str, Pair]:
    """What is started together."""
    plain = ("sweep", "distill", "transfer", "demo", "language", "sentences", "bench", "cache",
             "merge", "predict", "evaluate", "export", "shards", "average")  # fmt: skip
    results = {name: Pair(known[name].words, known[name].words, known[name].old) for name in plain}
    mixed = ("transfer+distill", "sweep+distill", "language+demo", "predict+merge",
             "export+average", "cache+distill")  # fmt: skip
    for one, two in (names.split("+") for names in mixed):
        results[f"{one}+{two}"] = Pair(known[one].words, known[two].words, known[one].old)
    for name in ("distill", "sweep", "transfer", "language"):
        case = known[name]
        results[f"{name} --resume"] = Pair(case.again, case.again, case.words)
        results[f"{name} --resume+--force"] = Pair(case.again, case.words, case.words)
    return results


def together(folder: Path, pair: Pair, apart: float, logs: list[Path]) -> list[int]:
    """Runs both; their exit codes."""
    pids = [start(folder, pair.one, logs[0])]
    time.sleep(apart)
    pids.append(start(folder, pair.two, logs[1]))
    return [end(pid) for pid in pids]


def race(home: Path, pair: Pair, apart: float, alone: list[dict[str, bytes]],
         logs: list[Path], scratch: Path) -> dict[str, Any]:  # fmt: skip
    """One race in a copy of the prepared folder; what was found wrong is in `wrong`."""
    shutil.copytree(home, scratch, symlinks=True)
    codes, wrong = together(scratch, pair, apart, logs), []
    output = [log.read_text() for log in logs]
    if 0 not in codes:
        wrong.append(f"both ended with {codes}: {output[0][-300:]} {output[1][-300:]}")
    for code, text in zip(codes, output, strict=True):
        if code not in (0, 1, 2):
            wrong.append(f"one ended with {code}: {text[-300:]}")
        errors = [line for line in text.splitlines() if line.startswith("kdtl ")]
        if code and (len(errors) != 1 or "Traceback" in text):
            wrong.append(f"a refusal has several lines: {text[-600:]}")
    after = content(scratch)
    expected = [known for known, code in zip(alone, codes, strict=True) if code == 0]
    differ = [
        [n for n in after.keys() | want.keys() if Path(n).name not in TIMED
         and after.get(n) != want.get(n)] for want in expected
    ]  # fmt: skip
    if differ and all(differ):
        wrong.append(f"what is written is of neither: {sorted(min(differ, key=len))[:8]}")
    for name in after:
        if Path(name).name in TIMED and name.endswith(".json"):
            json.loads(after[name])
    if left := [str(p.relative_to(scratch)) for p in scratch.rglob(f"*{_files.TEMPORARY}")]:
        wrong.append(f"left behind: {left[:4]}")
    if not wrong:
        shutil.rmtree(scratch)
    refused = [
        text.strip().splitlines()[-1][-160:] for c, text in zip(codes, output, strict=True) if c
    ]
    return {"apart": round(apart, 2), "codes": codes, "refused": refused, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: race_program.py FOLDER --rounds 2")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of pairs, by comma")
    args = parser.parse_args()
    root: Path = args.folder.absolute()
    base = root / "prepared"
    base.mkdir(parents=True)
    jax.config.update("jax_traceback_in_locations_limit", 0)
    known = cases()
    chosen = pairs(known)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    for pair in chosen.values():
        for words in (pair.one, pair.two):
            find(words)  # imports their modules
    find(TEACHER)
    if (child := os.fork()) == 0:
        prepare(base, has_sentences=any("sentences" in name for name in chosen))
        os._exit(0)
    assert end(child) == 0
    logs = [root / "one.txt", root / "two.txt"]
    if any(NEED_TEACHER & {pair.one[0], pair.two[0]} for pair in chosen.values()):
        finish(base, TEACHER, logs[0])
    dice, report = random.Random(args.seed), {}
    for name, pair in chosen.items():
        home = Path(tempfile.mkdtemp(dir=root)) / "home"
        shutil.copytree(base, home)
        if pair.before is not None:
            finish(home, pair.before, logs[0])
        alone, took = [], 0.0
        for words in (pair.one, pair.two):
            straight = home.parent / "straight"
            shutil.copytree(home, straight)
            took = finish(straight, words, logs[0]).ended
            alone.append(content(straight))
            shutil.rmtree(straight)
        done = [
            race(home, pair, APART[i % len(APART)] * took * (0.5 + dice.random()), alone, logs,
                 home.parent / f"round{i}")
            for i in range(args.rounds)
        ]  # fmt: skip
        report[name] = {"seconds": round(took, 2), "rounds": done,
                        "wrong": sum(bool(one["wrong"]) for one in done)}  # fmt: skip
        print(name, json.dumps(report[name]), flush=True)
    print(json.dumps({"wrong": sum(one["wrong"] for one in report.values())}))


if __name__ == "__main__":
    main()
