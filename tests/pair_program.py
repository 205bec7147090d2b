"""Two processes that train together, and a driver that leaves them alone, stops or kills them.

    python pair_program.py FOLDER --undisturbed 3 --stopped 3 --killed 1 --lost 1 --seed 0

prints one JSON object. A run trains two models, one after the other as the methods of a command,
on a mesh of both processes, and saves every third step while older steps are dropped. A stopped
run gets SIGTERM in both processes or in one of them at a random moment and is resumed to its end;
of a killed one a process dies without a word and the other must end by itself; of a lost one both
die. Everything is imported once, and a child is forked per process before any JAX back end starts;
it leaves through the interpreter's own exit, as any process does. Shared by tests/test_faults.py
and benchmarks/faults.py.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdtl_jax import train
from kdtl_jax.run import checkpoint, data, loop, processes, sharding

SAVE_EVERY, LOG_EVERY = 3, 5
SECONDS = 90  # a process whose partner died has ended after so long


def model(
    params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
) -> Any:
    x = jnp.tanh(inputs @ params["w"])
    if train and key is not None:
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, 0.0)
    return {"logits": x @ params["v"]}, model_state


def terms(x: Any) -> Any:
    logits, labels = x.student["logits"], x.batch["labels"]
    return {"task": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


def trained(folder: Path, seed: int, steps: int, mesh: Any) -> bytes:
    """One model, from its newest whole step to the end; its bytes."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(64, 4)).astype(np.float32)
    arrays = {"inputs": inputs, "labels": rng.integers(0, 3, 64).astype(np.int32)}
    half = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
    source = data.stream(
        lambda epoch, rows: data.take_rows(arrays, rows[half]), 64, 8, key=jax.random.key(seed)
    )
    tx = optax.adam(1e-2)
    step = train.make_step(model, terms, {"task": 1.0}, tx)
    params = {"w": jnp.eye(4) * 0.5, "v": jnp.ones((4, 3)) * 0.1}
    state = sharding.place(train.init_state(params, tx, key=jax.random.key(1)), mesh)
    step, meta = sharding.keep_placement(step, state), None
    measure = jax.jit(lambda state: jnp.sum(state.params["w"]))
    with checkpoint.open_folder(folder, keep=checkpoint.newest(1)) as checkpoints:
        try:
            state, _, meta, *_ = checkpoint.restore(folder, state)
        except FileNotFoundError:
            pass
        result = loop.run(
            step, state, source, steps=steps, log=lambda line: None, log_every=LOG_EVERY,
            evaluate=lambda state: {"sum": measure(state)}, evaluate_every=4 * LOG_EVERY, meta=meta,
            save=partial(checkpoint.save, checkpoints), save_every=SAVE_EVERY,
            place=partial(sharding.place_batch, mesh=mesh),
        )  # fmt: skip
    assert result.stopped == "finished", result.stopped
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(result.state.params))


def child(folder: Path, steps: int, port: int, rank: int) -> None:
    faulthandler.register(signal.SIGUSR1)  # tells where it hangs, should it
    jax.config.update("jax_platforms", "cpu")
    processes.initialize(coordinator=f"localhost:{port}", processes=2, process=rank)
    with processes.signals():
        (folder / f"started{rank}").touch()
        mesh = sharding.make_mesh(data=2)
        results = [
            trained(folder / name, seed, steps, mesh) for seed, name in enumerate(("a", "b"))
        ]
    (folder / f"digest{rank}").write_text(hashlib.sha256(b"".join(results)).hexdigest())


class Process:
    """A forked process that runs `child`."""

    def __init__(self, folder: Path, steps: int, port: int, rank: int) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            errors = os.open(folder / f"errors{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            sys.exit(child(folder, steps, port, rank))  # unwinds `main`

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(folder: Path, steps: int) -> list[Process]:
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("started*"), *folder.glob("digest*")]:
        path.unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    return [Process(folder, steps, port, rank) for rank in range(2)]


def end(folder: Path, pair: list[Process]) -> tuple[list[int], list[str], float]:
    """Exit codes, digests, and seconds until the second one ended; -99: it never did."""
    begun, codes = time.monotonic(), []
    for process in pair:
        try:
            codes.append(process.wait(max(1.0, begun + 3 * SECONDS - time.monotonic())))
        except TimeoutError:
            process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(TimeoutError):
                process.wait(2)
            process.send_signal(signal.SIGKILL)
            codes.append(-99)
    digests = [(folder / f"digest{rank}") for rank in range(2)]
    results = [path.read_text() if path.exists() else "" for path in digests]
    return codes, results, time.monotonic() - begun


def disturbed(
    folder: Path, kind: str, steps: int, within: float, dice: random.Random, wanted: str
) -> dict[str, Any]:
    begun, pair = time.monotonic(), start(folder, steps)
    while not all((folder / f"started{rank}").exists() for rank in range(2)):
        assert all(process.poll() is None for process in pair), "it ended too early"
        time.sleep(0.02)
    delay, victims = dice.uniform(0, within), [[0, 1], [0], [1]][dice.randrange(3)]
    time.sleep(delay)
    if kind == "killed":
        victims = [dice.randrange(2)]
    if kind == "lost":
        victims = [0, 1]
    for rank in victims:
        if pair[rank].poll() is None:
            pair[rank].send_signal(signal.SIGTERM if kind == "stopped" else signal.SIGKILL)
    codes, _, seconds = end(folder, pair)
    again, digests, _ = end(folder, start(folder, steps))
    return {
        "kind": kind,
        "victims": victims,
        "delay": round(delay, 2),
        "codes": codes,
        "seconds": round(seconds, 1),
        "ended": -99 not in codes and (kind == "stopped" or seconds < SECONDS),
        "identical": again == [0, 0] and digests == [wanted, wanted],
        "total": round(time.monotonic() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: pair_program.py pairs --stopped 3")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--undisturbed", type=int, default=2)
    parser.add_argument("--stopped", type=int, default=2)
    parser.add_argument("--killed", type=int, default=1)
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--within", type=float, default=6, help="seconds, the latest signal")
    args = parser.parse_args()
    dice, expected = random.Random(args.seed), ""
    kinds = ["stopped"] * args.stopped + ["killed"] * args.killed + ["lost"] * args.lost
    results: list[dict[str, Any]] = []
    straight: Path = args.folder / "straight"
    for _ in range(max(1, args.undisturbed)):
        codes, digests, seconds = end(straight, start(straight, args.steps))
        expected = expected or digests[0]
        same = codes == [0, 0] and digests == [expected, expected]
        results.append({"kind": "undisturbed", "codes": codes, "ended": -99 not in codes,
                      "identical": same, "seconds": round(seconds, 1)})  # fmt: skip
        print(results[-1], file=sys.stderr, flush=True)
        if not same:
            for rank in range(2):
                print((straight / f"errors{rank}").read_text(), file=sys.stderr)
        shutil.rmtree(straight)
    for i, kind in enumerate(kinds):
        folder = args.folder / f"{kind}{i}"
        results.append(disturbed(folder, kind, args.steps, args.within, dice, expected))
        print(results[-1], file=sys.stderr, flush=True)
        if results[-1]["ended"] and results[-1]["identical"]:
            shutil.rmtree(folder)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
