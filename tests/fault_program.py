"""A small run that can be killed and resumed, and a driver that does so at random moments.

    python fault_program.py FOLDER --kills 6 --terms 2 --seed 0 [--chain]

prints one JSON object. Each attack waits for a random line of the run's metrics and a random while
longer, sends the signal, resumes to the end and compares with a run that nothing disturbed; with
`--chain` all attacks hit one run, one resume after another. Shared by tests/test_faults.py and
benchmarks/faults.py. The driver imports everything once and forks a child per run before any JAX
back end starts, so that a run costs its compilation only.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import Variables, augment, losses, train
from kdtl_jax.run import checkpoint, data, loop

STEPS, SAVE_EVERY, LOG_EVERY, EVALUATE_EVERY = 200, 20, 7, 50


def init(seed: int, widths: list[int]) -> Any:
    """On the host, so that a child compiles nothing for it."""
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": np.float32(rng.normal(size=(i, o)) / i**0.5),
            "bias": np.zeros(o, np.float32),
        }
        for i, o in zip(widths, widths[1:], strict=False)
    ]


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    """An MLP with dropout and a running mean as model state."""
    x = inputs.reshape(len(inputs), -1)
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    if train and key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0.0)
        model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(x)}
    return {"logits": x @ params[-1]["kernel"] + params[-1]["bias"]}, model_state


def terms(x: Any) -> Any:
    student, teacher = x.student["logits"], x.teacher["logits"]
    task = optax.softmax_cross_entropy_with_integer_labels(student, x.batch["labels"])
    return {"kd": losses.kd_kl(student, teacher, temperature=4.0), "task": task}


def views(keys: jax.Array, batch: data.Batch) -> data.Batch:
    return {**batch, "inputs": augment.crop(keys, batch["inputs"], padding=1)}


def train_once(folder: Path, wrote_line: Callable[[], None] = lambda: None) -> str:
    """Trains to the end from the newest whole checkpoint; returns the digest of everything."""
    key = jax.random.key(0)
    rng = np.random.default_rng(0)
    arrays = {
        "inputs": rng.normal(size=(300, 8, 8, 1)).astype(np.float32),
        "labels": rng.integers(0, 10, 300).astype(np.int32),
    }
    source = data.resident(arrays, 32, key=key, drop_remainder=False, augment=views)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS))
    frozen = jax.device_put(Variables(init(1, [64, 128, 10]), {"mean": np.float32(0)}))
    step = train.make_step(model, terms, {"kd": 0.9, "task": 0.1}, tx, teacher=model)
    params, model_state = init(2, [64, 32, 10]), {"mean": np.float32(0)}
    state = jax.jit(partial(train.init_state, params, tx, model_state=model_state))(key=key)
    measure = train.make_eval_step(
        model, lambda x: {"error": (jnp.argmax(x.student["logits"], -1) != x.batch["labels"]) * 1.0}
    )
    evaluate = loop.evaluation(
        measure,
        lambda: data.in_order(arrays, 128),
        variables=lambda s: Variables(s.params, s.model_state),
    )
    meta = None
    with checkpoint.open_folder(folder / "checkpoints") as checkpoints:
        try:
            state, _, meta, *_ = checkpoint.restore(folder / "checkpoints", state)
        except FileNotFoundError:
            pass
        with loop.metrics_file(folder / "metrics.jsonl", resume_at=int(state.step)) as log:

            def told(line: dict[str, Any]) -> None:
                log(line)
                wrote_line()

            result = loop.run(
                step, state, source, frozen,
                steps=STEPS, log=told, log_every=LOG_EVERY,
                evaluate=evaluate, evaluate_every=EVALUATE_EVERY,
                save=partial(checkpoint.save, checkpoints), save_every=SAVE_EVERY, meta=meta,
            )  # fmt: skip
    assert result.stopped == "finished", result.stopped
    return digest(result.state, folder / "metrics.jsonl")


def digest(state: Any, metrics: Path) -> str:
    result = hashlib.sha256(metrics.read_bytes())
    for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))):
        result.update(np.asarray(leaf).tobytes())
    return result.hexdigest()


class Child:
    """A run in a forked process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.out, inside = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                result = train_once(folder, lambda: (os.write(inside, b"-"), None)[1])
                os.write(inside, result.encode())
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(inside)

    def wait_for_line(self, number: int) -> None:
        for _ in range(number):
            assert os.read(self.out, 1) == b"-", "the run ended too early"

    def end(self) -> tuple[int, str]:
        """Exit code (negative: the signal) and the digest."""
        text = b""
        while piece := os.read(self.out, 4096):
            text += piece
        os.close(self.out)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status), text.decode().lstrip("-")


def straight(folder: Path) -> tuple[str, float]:
    """Digest, and seconds per line, of a run that nothing disturbs."""
    child = Child(folder)
    child.wait_for_line(1)
    first = time.monotonic()
    code, result = child.end()
    assert code == 0 and result, f"the straight run failed ({code})"
    lines = len(loop.read_metrics(folder / "metrics.jsonl"))
    return result, (time.monotonic() - first) / (lines - 1)


def attack(folder: Path, number: int, line: int, delay: float) -> dict[str, Any]:
    """Starts or resumes a run and sends it a signal `delay` seconds after its n-th line."""
    child = Child(folder)
    child.wait_for_line(line)
    time.sleep(delay)
    sent = time.monotonic()
    os.kill(child.pid, number)
    code, _ = child.end()
    home = folder / "checkpoints"
    reasons = {s: checkpoint.problem(home, s) for s in checkpoint.steps(home)}
    lines = loop.read_metrics(folder / "metrics.jsonl") if number != signal.SIGKILL else []
    return {
        "line": line,
        "delay": round(delay, 3),
        "code": code,
        "seconds": round(time.monotonic() - sent, 3),
        "newest": max((s for s, why in reasons.items() if why is None), default=0),
        "last_line": max((line["step"] for line in lines), default=0),
        "in_save": any(reasons.values()) or any(home.glob(".saving-*")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: fault_program.py faults --kills 6")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--terms", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true", help="all attacks on one run")
    args = parser.parse_args()
    expected, per_line = straight(args.folder / "straight")
    dice = random.Random(args.seed)
    plan = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.terms
    dice.shuffle(plan)
    attacks, victim = [], args.folder / "victim"
    for number in plan:
        line = dice.randint(2, 4) if args.chain else dice.randint(1, STEPS // LOG_EVERY - 4)
        result = attack(victim, number, line, dice.uniform(0, 1.5 * per_line))
        if not args.chain:
            result["identical"] = Child(victim).end() == (0, expected)
            shutil.rmtree(victim)
        attacks.append({"signal": signal.Signals(number).name} | result)
        print(attacks[-1], file=sys.stderr, flush=True)
    if args.chain:
        attacks.append({"signal": "", "identical": Child(victim).end() == (0, expected)})
    print(json.dumps({"seconds_per_line": per_line, "attacks": attacks}))


if __name__ == "__main__":
    main()
