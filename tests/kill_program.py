"""Kills of every command that writes, spread over its run, and what must then be true.

    python kill_program.py FOLDER --kills 10 --stops 4 --seed 0 [--only scale,distill]

prints one JSON object. Every command runs once undisturbed; then it is killed (SIGKILL) or stopped
(SIGTERM, SIGINT) at moments spread over that time, every second one over the time in which it
writes. Afterwards every file that it writes is the old one or the new one, whole, files of others
are as they were, and the command, run again (`--resume` where there is one), ends with the bytes of
the undisturbed run. Everything is imported once, and a child is forked per run before any JAX back
end starts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from params_checkpoints import flat
from test_sentences import write_encoder, write_text
from tiny import write_data
from whole_files import RUN, TIMED, content, harmed

from kdtl_jax import _files
from kdtl_jax.cli import find, main
from kdtl_jax.interop import safetensors

STUDENT = "teacher/students/kd.safetensors"
TINY = ["--data", "data.npz", "--teacher", "mlp:8", "--student", "mlp:4", "--batch-size", "8"]
TRAINED = ["--seeds", "2", "--epochs", "6", "--teacher-epochs", "4"]
OUT = ["--out", RUN]
RESUMED = {"distill", "sweep", "transfer", "demo", "language", "sentences"}
LANGUAGE = [
    "--data", "text.txt", "--teacher-shape", "layers=2,width=8,heads=2", "--teacher-steps", "6",
    "--steps", "6", "--batch-size", "4", "--length", "12", "--prompt", "4", "--samples", "1",
    "--checks", "2", "--held-out", "0.2", "--method", "sft,opd", "--save-every", "2",
]  # fmt: skip
# Models with a state and random keys, a loss and a method, from a file.
OWN = """
from flax import nnx
from kdtl_jax import methods
class Net(nnx.Module):
    def __init__(self, din, classes, *, rngs):
        self.hidden = nnx.Linear(din, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, classes, rngs=rngs)
    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))
def squares(student_logits, teacher_logits):
    return ((student_logits - teacher_logits) ** 2).mean(axis=-1)
def twice(setup):
    def terms(inputs):
        return {"twice": 2 * squares(inputs.student["logits"], inputs.teacher["logits"])}
    return methods.method(setup, terms, {"task": 0.5, "twice": 0.25})
"""
PAIR = ["--data", "data.npz", "--teacher", "own.py:Net", "--student", "own.py:Net"]


class Case(NamedTuple):
    """A command: its words, what repeats it after a kill, and what is there before."""

    words: list[str]
    again: list[str]
    old: list[str] | None = None  # an earlier command whose result is there already
    folder: bool = True  # whether RUN is a folder with foreign files in it
    mine: str = "checkpoints/mine"  # where they may lie beside what is written


def cases() -> dict[str, Case]:
    """Every command that writes, and the two of `params` that only read."""

    def written(*words: str, shards: bool = False) -> Case:
        command = ["params", *words, "--write", RUN if shards else f"{RUN}.safetensors"]
        if shards:  # a folder is never replaced
            command += ["--shard-bytes", "2000"]
            return Case(command, command, folder=False)
        old = ["params", "scale", "base.safetensors", "--write", f"{RUN}.safetensors"]
        return Case([*command, "--force"], [*command, "--force"], old, folder=False)

    def run(name: str, *words: str) -> Case:
        command = [name, *words, *OUT]
        again = ("--resume",) if name in RESUMED else ("--force",)
        mine = "mine" if name in ("transfer", "demo") else "checkpoints/mine"
        return Case([*command, "--force"], [*command, *again], mine=mine)

    def used(name: str, *words: str) -> Case:
        command = [name, STUDENT, *words, "--out", f"{RUN}.safetensors", "--force"]
        old = ["params", "scale", "base.safetensors", "--write", f"{RUN}.safetensors"]
        return Case(command, command, old, folder=False)

    models = ["a.safetensors", "b.safetensors"]
    return {
        "scale": written("scale", "a.safetensors", "--alpha", "2"),
        "transfer weights": written("transfer", *models),
        "slice": written("slice", "a.safetensors", "--where", "layer_.*"),
        "average": written("average", *models),
        "merge": written("merge", *models, "--method", "ties", "--base", "base.safetensors"),
        "lora-merge": written("lora-merge", "plain.safetensors", "adapter"),
        "shards": written("scale", "a.safetensors", "--alpha", "2", shards=True),
        "inspect": Case(["params", "inspect", "a.safetensors", "--values"], [], folder=False),
        "diff": Case(["params", "diff", *models], [], folder=False),
        "predict": used("predict", "data.npz"),
        "evaluate": used("evaluate", "data.npz"),
        "export": used("export"),
        "cache": Case(
            ["cache", "--data", "data.npz", "--teacher-weights", "teacher/teacher.safetensors",
             "--batch-size", "4", *OUT],
            ["cache", "--data", "data.npz", "--teacher-weights", "teacher/teacher.safetensors",
             "--batch-size", "4", *OUT], folder=False,
        ),
        "distill": run("distill", *TINY, *TRAINED, "--methods", "kd"),
        "sweep": run(
            "sweep", *TINY, *TRAINED, "--grid", "temperature=1,4", "--path", "together"
        ),
        "transfer": run(
            "transfer", "--data", "data.npz", "--model", "mlp:8", "--methods", "scratch",
            "--labels-per-class", "3", "--batch-size", "3", "--seeds", "2", "--epochs", "4",
            "--source-epochs", "4", "--source-classes", "0-2", "--target-classes", "0-2",
        ),
        "distill own": run(
            "distill", *PAIR, "--batch-size", "8", *TRAINED, "--loss", "own.py:squares",
            "--method", "own.py:twice", "--methods", "kd",
        ),
        "sweep own": run("sweep", *PAIR, *TRAINED, "--grid", "temperature=1,4"),
        "transfer own": run(
            "transfer", "--data", "data.npz", "--model", "own.py:Net", "--methods",
            "scratch,copied_finetuned", "--seeds", "2", "--epochs", "4", "--source-epochs", "4",
            "--source-classes", "0-2", "--target-classes", "0-2", "--labels-per-class", "3",
        ),
        "sentences": run(
            "sentences", "--encoder", "encoder", "--text", "text.txt", "--layers", "0,2",
            "--quick", "--batch-size", "16", "--save-every", "2",
        ),
        "language": run("language", *LANGUAGE),
        "bench": run("bench", "--preset", "mlp", "--quick"),
        "demo": run("demo", "--quick"),
    }  # fmt: skip


def prepare(folder: Path, *, has_sentences: bool) -> None:
    """Data, weights, an adapter, an encoder and a text in the working folder."""
    write_data(folder / "data.npz")
    (folder / "own.py").write_text(OWN)
    for seed, name in enumerate(("base", "a", "b")):
        tensors = flat(seed, width=64, layers=12)
        safetensors.save(folder / f"{name}.safetensors", tensors, metadata={"format": "np"})
    rng = np.random.default_rng(0)
    layers = {f"layer_{i}.weight": rng.normal(size=(256, 256)) for i in range(12)}
    plain = {name: x.astype(np.float32) for name, x in layers.items()}
    safetensors.save(folder / "plain.safetensors", plain)
    sides = {"A": (4, 256), "B": (256, 4)}
    adapter = {
        f"base_model.model.layer_{i}.lora_{side}.weight": np.ones(shape, np.float32)
        for i in range(12)
        for side, shape in sides.items()
    }
    (folder / "adapter").mkdir()
    safetensors.save(folder / "adapter/adapter_model.safetensors", adapter)
    modules = [f"layer_{i}" for i in range(12)]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": modules}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    if has_sentences:
        write_encoder(folder / "encoder")
    write_text(folder / "text.txt")


def start(folder: Path, words: list[str], log: Path) -> int:
    """Runs a command in a forked process in the folder; its process number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
            os.chdir(folder)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def end(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Times(NamedTuple):
    """The seconds after which a command first wrote, and ended."""

    wrote: float
    ended: float


def finish(folder: Path, words: list[str], log: Path) -> Times:
    """Runs a command to its end."""
    before, begun, wrote = _listed(folder), time.monotonic(), 0.0
    pid, status = start(folder, words, log), (0, 0)
    while not status[0]:
        time.sleep(0.005)
        if not wrote and _listed(folder) != before:
            wrote = time.monotonic() - begun
        status = os.waitpid(pid, os.WNOHANG)
    code, ended = os.waitstatus_to_exitcode(status[1]), time.monotonic() - begun
    assert code == 0, f"kdtl {' '.join(words)} ended with {code}: {log.read_text()[-2000:]}"
    return Times(wrote, ended)


def _listed(folder: Path) -> list[str]:
    """What lies in the folder and in RUN."""
    inside = os.listdir(folder / RUN) if (folder / RUN).is_dir() else []
    return [*os.listdir(folder), *inside]


def moments(count: int, times: Times, dice: random.Random) -> list[float]:
    """Spread over the run, every second one over the time from the first write on."""
    results = []
    for i in range(count):
        first = times.wrote if i % 2 else 0.0
        results.append(first + (times.ended - first) * (i + dice.random()) / count)
    return results


def attack(home: Path, case: Case, number: int, moment: float, whole: dict[str, bytes],
           log: Path, scratch: Path) -> dict[str, Any]:  # fmt: skip
    """One kill in a copy of the prepared folder; what was found wrong is in `wrong`."""
    shutil.copytree(home, scratch, symlinks=True)
    before = content(scratch)
    pid = start(scratch, case.words, log)
    time.sleep(moment)
    sent = time.monotonic()
    os.kill(pid, number)
    code, wrong = end(pid), []
    seconds, after = time.monotonic() - sent, content(scratch)
    known = signal.Signals(number)
    allowed = {
        signal.SIGKILL: {-9, 0},
        signal.SIGTERM: {143, -15, 0},
        signal.SIGINT: {130, 0},
    }
    if code not in allowed[known]:
        wrong.append(f"it ended with {code}: {log.read_text()[-300:]}")
    wrong += harmed(before, after, whole, replaces=case.old is not None)
    if case.again:
        again = case.again
        if "--resume" in again and not (scratch / RUN / "config.yaml").exists():
            again = case.words  # it was killed before there was anything to resume
        is_done = not case.folder and case.old is None and (scratch / RUN).is_dir()
        code_again = end(start(scratch, again, log))
        ended = content(scratch)
        if code_again == 1 and is_done and "exists and is not empty" in log.read_text():
            code_again = 0  # a finished folder of weights is never replaced
        if code_again != 0:
            wrong.append(f"again, it ended with {code_again}: {log.read_text()[-600:]}")
        else:
            for name, want in whole.items():
                if Path(name).name not in TIMED and ended.get(name) != want:
                    wrong.append(f"again, {name} differs from the undisturbed run's")
        if case.folder and list((scratch / RUN).glob(f".*{_files.TEMPORARY}")):
            wrong.append("unfinished files stay in the run folder")
    if not wrong:
        shutil.rmtree(scratch)
    return {"signal": known.name, "moment": round(moment, 2), "code": code,
            "seconds": round(seconds, 2), "wrong": wrong}  # fmt: skip


def main_() -> None:
    parser = argparse.ArgumentParser(description="Example: kill_program.py FOLDER --kills 3")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--stops", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of commands, by comma")
    args = parser.parse_args()
    root: Path = args.folder.absolute()
    base, log = root / "prepared", root / "log.txt"
    base.mkdir(parents=True)
    # An exported program tells from where it was traced: here, of each run, another line.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    chosen = cases()
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    for case in chosen.values():
        find(case.words)  # imports its module
    if (child := os.fork()) == 0:  # it starts a back end, after which nobody may fork
        prepare(base, has_sentences="sentences" in chosen)
        os._exit(0)
    assert end(child) == 0
    if {"cache", "predict", "evaluate", "export"} & chosen.keys():
        teacher = ["distill", *TINY, *TRAINED, "--methods", "kd", "--out", "teacher"]
        finish(base, teacher, log)
    results = []
    for name, case in chosen.items():
        home, scratch = root / "home", root / "killed"
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(base, home)
        if case.folder:
            (home / RUN / case.mine).mkdir(parents=True)
            (home / RUN / case.mine / "weights.bin").write_bytes(b"mine")
            (home / RUN / "notes.txt").write_text("mine")
        if case.old is not None:
            finish(home, case.old, log)
        straight = root / "straight"
        times = Times(0.0, 0.0)
        for _ in range(2):  # the second time nothing is compiled
            shutil.rmtree(straight, ignore_errors=True)
            shutil.copytree(home, straight)
            times = finish(straight, case.words, log)
        whole, dice = content(straight), random.Random(f"{args.seed} {name}")
        plan = [signal.SIGKILL] * args.kills
        plan += [[signal.SIGTERM, signal.SIGINT][i % 2] for i in range(args.stops)]
        planned = [*moments(args.kills, times, dice), *moments(args.stops, times, dice)]
        for number, moment in zip(plan, planned, strict=True):
            one: dict[str, Any] = {}
            for _ in range(5):  # one that came after the end is sent again, earlier
                shutil.rmtree(scratch, ignore_errors=True)
                one = attack(home, case, number, moment, whole, log, scratch)
                if one["code"] != 0 or one["wrong"]:
                    break
                moment *= 0.95
            results.append({"command": name} | one)
            print(results[-1], file=sys.stderr, flush=True)
            if one["wrong"]:
                scratch.rename(root / f"wrong{len(results)}")
    print(json.dumps(results))


if __name__ == "__main__":
    main_()
