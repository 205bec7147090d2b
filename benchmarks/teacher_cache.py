"""The teacher cache: what a KD step costs with it, whether reading keeps up, and its bytes.

Command:   python benchmarks/teacher_cache.py [--rounds 21] [--json out.json]
Machine:   Intel Xeon 2.5 GHz (AVX-512), virtual, 2 cores, nothing else running; jax 0.10.2,
           Python 3.11.7; OMP_WAIT_POLICY=PASSIVE
RESULT:    21 rounds; paired median (of the fastest rounds) against the student alone:
             MLP of 64 inputs    cached 1.37 (1.42)   plain KL 1.22 (1.25)  live teacher 4.7 (4.7)
             MLP of 784 inputs   cached 1.16 (1.17)   plain KL 1.11 (1.10)  live teacher 10 (10)
             CNN, on the device  cached 1.03 (1.07)   plain KL 1.02 (1.05)  live teacher 1.8 (1.8)
             CNN, from disk      cached 1.06 (1.03)
           Reading a shuffled batch of 64: 121 to 165 us, 1/40 of the CNN's step (6.7 ms).
           32 of 32,000 classes in float16: 132 bytes a row, 1/968 of dense float32.
           Above the goal of 1.1 are the MLPs: what is left of a step of 47 us beside the loss is
           little, and a KL written by hand costs most of it too.

1. The KD step with cached outputs relative to the student's own step (cross-entropy alone); the
   same with a KL written by hand (the part of the difference that is the loss, not the cache) and
   with a live teacher. MLPs 64-256-256-10 teaching 64-32-10, and 784-1200-1200-10 teaching
   784-128-10; on 28x28 images a CNN with 32, 64 channels teaching one with 8, 16. Batch 64,
   float32, SGD with momentum, temperature 4. A round runs every form once over the same batches, on
   the device (epochs) and, for the CNN, fed from disk (`data.stream`, memory-mapped cache). Ratios
   are medians of paired rounds.
2. Reading: microseconds per shuffled batch of 64 from a cache of 60,000 examples on disk, relative
   to the time of the CNN student's KD step that consumes it.
3. Bytes on disk: 32 of 32,000 classes compared with dense float32.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _rounds import Form, machine, measure

from kdtl_jax import losses, models, train
from kdtl_jax._types import ModelFn, Variables
from kdtl_jax.interop import linen
from kdtl_jax.objective import Inputs
from kdtl_jax.run import data, teacher_cache

BATCH, TEMPERATURE = 64, 4.0
ALONE, CACHED, LIVE = "student alone", "KD, cached teacher", "KD, live teacher"
PLAIN = "the same, plain KL"
TX = optax.sgd(0.05, momentum=0.9)


def task(x: Inputs) -> dict[str, jax.Array]:
    logits, labels = x.student["logits"], x.batch["labels"]
    return {"task": optax.softmax_cross_entropy_with_integer_labels(logits, labels)}


def kd_and_task(x: Inputs) -> dict[str, jax.Array]:
    student, teacher = x.student["logits"], x.teacher["logits"]
    return {**task(x), "kd": losses.kd_kl(student, teacher, temperature=TEMPERATURE)}


def plain_kl_and_task(x: Inputs) -> dict[str, jax.Array]:
    student, teacher = (o["logits"] / TEMPERATURE for o in (x.student, x.teacher))
    log_t, log_s = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    kl = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    return {**task(x), "kd": TEMPERATURE**2 * kl}


def steps_of(student: ModelFn, teacher: ModelFn) -> dict[str, train.Step]:
    weights = {"kd": 0.9, "task": 0.1}
    return {
        ALONE: train.make_step(student, task, {"task": 1.0}, TX),
        CACHED: train.make_step(student, kd_and_task, weights, TX),
        PLAIN: train.make_step(student, plain_kl_and_task, weights, TX),
        LIVE: train.make_step(student, kd_and_task, weights, TX, teacher=teacher),
    }


def on_device(
    steps: Mapping[str, train.Step], params: Any, teacher: Variables, arrays: Any, cached: Any
) -> dict[str, Form]:
    """One epoch over device-resident data, in one call where that is the fast way."""
    index = train.epoch_index(jax.random.key(1), 0, len(arrays["labels"]), BATCH)

    def form(name: str, step: train.Step) -> Form:
        held = jax.device_put(
            {**arrays, "teacher": cached} if name in (CACHED, PLAIN) else dict(arrays)
        )
        epoch = train.jit_epoch(step)
        state = train.init_state(params, TX, key=jax.random.key(0))

        def run() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(epoch(state, held, index, teacher))

        return run

    return {name: form(name, step) for name, step in steps.items()}


def from_disk(
    steps: Mapping[str, train.Step],
    params: Any,
    arrays: Any,
    cache: teacher_cache.Cache,
    count: int,
) -> dict[str, Form]:
    """`count` steps fed by `data.stream`; the cached form reads teacher outputs too."""

    def read(epoch: int, rows: np.ndarray) -> dict[str, Any]:
        return data.take_rows(arrays, rows)

    def read_cached(epoch: int, rows: np.ndarray) -> dict[str, Any]:
        return read(epoch, rows) | {"teacher": teacher_cache.rows(cache, rows, epoch)}

    def form(step: train.Step, reader: data.Reader) -> Form:
        jitted = train.jit_step(step)
        state = train.init_state(params, TX, key=jax.random.key(0))
        source = data.stream(reader, cache.plan.size, BATCH, key=jax.random.key(1))

        def run() -> None:
            nonlocal state
            batches = data.prefetch(source(0), 2)
            for _ in range(count):
                state, _ = jitted(state, next(batches))
            jax.block_until_ready(state)
            batches.close()

        return run

    return {ALONE: form(steps[ALONE], read), CACHED: form(steps[CACHED], read_cached)}


def table(kind: str, seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    print(f"\n{kind}: microseconds per step; ratios are medians of paired rounds")
    rows, fastest = [], 1e6 * min(seconds[ALONE])
    for name, times in seconds.items():
        paired = [a / b for a, b in zip(times, seconds[ALONE], strict=True)]
        us = [1e6 * t for t in (statistics.median(times), min(times), max(times))]
        ratio = statistics.median(paired)
        low, _, high = statistics.quantiles(paired, n=4)
        print(
            f"  {name:20s} {us[0]:9.1f} ({us[1]:.1f} to {us[2]:.1f})   "
            f"{ratio:5.3f} times the student alone (quartiles {low:.3f} to {high:.3f}; "
            f"of the fastest rounds {us[1] / fastest:.3f})"
        )
        rows.append(
            {"kind": kind, "form": name, "us": us, "ratio": ratio, "quartiles": [low, high]}
        )
    return rows


def reading(cache: teacher_cache.Cache, batches: int = 500) -> float:
    """Median seconds per shuffled batch."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(batches):
        rows = rng.integers(0, cache.plan.size, BATCH)
        start = time.perf_counter()
        teacher_cache.rows(cache, rows)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def written(folder: Path, teacher: ModelFn, variables: Any, arrays: Any, **options: Any) -> Any:
    """Writes a cache and opens it; the whole of it is read once by the check."""
    start = time.perf_counter()
    teacher_cache.write(folder, teacher, variables, arrays, batch_size=256, **options)
    seconds = time.perf_counter() - start
    return teacher_cache.open_cache(folder, expect=None), seconds


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npy"))


def pair(small: Any, large: Any, example: np.ndarray) -> tuple[Any, Any, Any, Variables]:
    """Both models, the student's parameters, the teacher's variables."""
    student, teacher = linen.model(small), linen.model(large)
    key_student, key_teacher = jax.random.split(jax.random.key(0))
    params = student.init(key_student, example).params
    return student, teacher, params, teacher.init(key_teacher, example)


def mlp_pair(
    rounds: int,
    rng: np.random.Generator,
    scratch: Path,
    inputs: int,
    widths: tuple[list[int], list[int]],
) -> list[dict[str, Any]]:
    count = 100
    arrays = labelled(rng, count * BATCH, (inputs,))
    small, large = (models.mlp(w, 10) for w in widths)
    student, teacher, params, frozen = pair(small, large, arrays["inputs"][:1])
    cache, _ = written(scratch / f"mlp{inputs}", teacher.apply, frozen, arrays)
    steps = steps_of(student.apply, teacher.apply)
    forms = on_device(steps, params, frozen, arrays, teacher_cache.load(cache))
    return table(f"MLP of {inputs} inputs, on the device", measure(forms, rounds, steps=count))


def cnn_pair(rounds: int, rng: np.random.Generator, scratch: Path) -> list[dict[str, Any]]:
    count, size = 20, 60_000
    arrays = labelled(rng, size, (28, 28, 1))
    small, large = (models.cnn(channels, 10) for channels in ((8, 16), (32, 64)))
    student, teacher, params, big = pair(small, large, arrays["inputs"][:1])
    cache, seconds = written(scratch / "cnn", teacher.apply, big, arrays)
    print(
        f"\ncache of {size:,} images written in {seconds:.1f} s ({bytes_of(cache.folder):,} bytes)"
    )
    steps = steps_of(student.apply, teacher.apply)
    few = {name: x[: count * BATCH] for name, x in arrays.items()}
    outputs = jax.tree.map(lambda x: x[: count * BATCH], teacher_cache.load(cache))
    forms = on_device(steps, params, big, few, outputs)
    rows = table("CNN, on the device", measure(forms, rounds, steps=count))
    disk = measure(from_disk(steps, params, arrays, cache, count), rounds, steps=count)
    rows += table("CNN, fed from disk", disk)
    step_us = next(r["us"][0] for r in rows if r["form"] == CACHED)
    topk, _ = written(scratch / "topk", teacher.apply, big, arrays, top_k=5, dtype=jnp.float16)
    print(f"\nreading a shuffled batch of {BATCH}, while the CNN step takes {step_us:.0f} us")
    for name, opened in (("dense float32", cache), ("5 classes, float16", topk)):
        us = 1e6 * reading(opened)
        print(f"  {name:20s} {us:9.1f} us, {us / step_us:.3f} of the step")
        rows.append({"kind": "reading", "form": name, "us": us, "share_of_step": us / step_us})
    return rows


def bytes_of_top_k(rng: np.random.Generator, scratch: Path) -> dict[str, Any]:
    rows, classes, k = 2048, 32_000, 32

    def head(
        params: Any, model_state: Any, inputs: Any, *, key: Any = None, train: bool = False
    ) -> tuple[dict[str, jax.Array], Any]:
        return {"logits": inputs @ params}, model_state

    arrays = {"inputs": rng.normal(size=(rows, 16)).astype(np.float32)}
    params = rng.normal(size=(16, classes)).astype(np.float32)
    options: dict[str, Any] = {"top_k": k, "dtype": jnp.float16}
    cut, _ = written(scratch / "cut", head, params, arrays, **options)
    dense, _ = written(scratch / "dense", head, params, arrays)
    small, large = bytes_of(cut.folder), bytes_of(dense.folder)
    print(
        f"\n{k} of {classes:,} classes, {rows:,} rows: {small:,} bytes on disk, dense float32 "
        f"{large:,}: 1/{large / small:.0f} ({small / rows:.0f} bytes a row)"
    )
    return {"kind": "bytes", "top_k": small, "dense": large, "ratio": large / small}


def labelled(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        "inputs": rng.standard_normal((size, *shape), np.float32),
        "labels": rng.integers(0, 10, size).astype(np.int32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/teacher_cache.py")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    versions = machine()
    print(versions)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows = mlp_pair(args.rounds, rng, scratch, 64, ([32], [256, 256]))
        rows += mlp_pair(args.rounds, rng, scratch, 784, ([128], [1200, 1200]))
        rows += cnn_pair(args.rounds, rng, scratch)
        rows.append(bytes_of_top_k(rng, scratch))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
