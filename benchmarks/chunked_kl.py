"""KL at vocabulary scale, with gradients by the student's hidden states and head, as ratios.

Command:   python benchmarks/chunked_kl.py [--tokens 2048] [--vocabulary 32768] [--rounds 5]
               [--json out.json]
Peers:     PyTorch dense, eager (skipped with a line where torch is not installed;
           `pip install torch==2.13.0`).
Machine:   Intel Xeon 2.5 GHz (AVX-512), virtual, 2 cores, nothing else running; jax 0.10.2, torch
           2.13.0, Python 3.11.7; OMP_WAIT_POLICY=PASSIVE
RESULT:    5 rounds, median seconds (least) / times the floor / temporary memory:
           matrix products alone             2.17 (2.06)   1.00    537 MB
           dense, plain KL                   2.93 (2.78)   1.32   1342 MB
           dense, exact KL                   2.87 (2.77)   1.32   1409 MB
           chunked 256, plain KL             3.74 (3.57)   1.73    185 MB
           chunked 256, exact KL             3.02 (2.98)   1.37    202 MB
           chunked 256, exact KL, bfloat16   3.57 (3.44)   1.69    300 MB
           torch dense, eager                2.95 (2.64)   1.31

Student width 512, teacher width 1024, float32. Forms: the matrix products alone (the floor: logits
of both, the student's gradients); dense JAX by the plain formula and by this library's exact KL;
`losses.chunked_divergence` with both; the same in bfloat16. A round runs every form once; medians
and spreads are over rounds, ratios are medians of paired rounds. Temporary memory is XLA's own
figure for the compiled program.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import kdtl_jax
from kdtl_jax import losses
from kdtl_jax.losses import Head

WIDTH, TEACHER_WIDTH = 512, 1024
FLOOR = "matrix products alone"
Form = Callable[[], None]  # runs one loss with its gradients to completion


def plain_kl(student: Array, teacher: Array) -> Array:
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)


def products(h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Any:
    by_logits = h @ kernel - teacher_h @ teacher_kernel
    return by_logits @ kernel.T, h.T @ by_logits


def dense(kl: Any, h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array) -> Array:
    return jnp.mean(kl(h @ kernel, teacher_h @ teacher_kernel))


def chunked(
    kl: Any, chunk: int, h: Array, kernel: Array, teacher_h: Array, teacher_kernel: Array
) -> Array:
    summed = losses.chunked_divergence(
        kl, h, Head(kernel), teacher_h, Head(teacher_kernel), chunk_size=chunk
    )
    return summed.total / summed.weight


def jax_forms(arrays: list[np.ndarray]) -> tuple[dict[str, Form], dict[str, float]]:
    wide = [jnp.asarray(a, jnp.float32) for a in arrays]
    half = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    gradients = partial(jax.value_and_grad, argnums=(0, 1))
    functions: dict[str, tuple[Any, list[Array]]] = {
        FLOOR: (products, wide),
        "dense, plain KL": (gradients(partial(dense, plain_kl)), wide),
        "dense, exact KL": (gradients(partial(dense, losses.forward_kl)), wide),
        "chunked 256, plain KL": (gradients(partial(chunked, plain_kl, 256)), wide),
        "chunked 256, exact KL": (gradients(partial(chunked, losses.forward_kl, 256)), wide),
        "chunked 256, exact KL, bfloat16": (
            gradients(partial(chunked, losses.forward_kl, 256)),
            half,
        ),
    }
    forms: dict[str, Form] = {}
    megabytes: dict[str, float] = {}
    for name, (function, args) in functions.items():
        program = jax.jit(function).lower(*args).compile()
        memory: Any = program.memory_analysis()
        megabytes[name] = memory.temp_size_in_bytes / 1e6

        def form(program: Any = program, args: list[Array] = args) -> None:
            jax.block_until_ready(program(*args))

        forms[name] = form
    return forms, megabytes


def torch_forms(arrays: list[np.ndarray]) -> dict[str, Form]:
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(os.cpu_count() or 1)
    h, kernel, teacher_h, teacher_kernel = (torch.tensor(a).float() for a in arrays)
    h.requires_grad_(True)
    kernel.requires_grad_(True)

    def eager() -> None:
        h.grad = kernel.grad = None
        with torch.no_grad():
            soft = F.log_softmax(teacher_h @ teacher_kernel, dim=-1)
        log_s = F.log_softmax(h @ kernel, dim=-1)
        F.kl_div(log_s, soft, reduction="batchmean", log_target=True).backward()

    return {"torch dense, eager": eager}


def measure(forms: dict[str, Form], rounds: int) -> dict[str, list[float]]:
    """Seconds of every form in every round, interleaved, after one warm-up."""
    for form in forms.values():
        form()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Example: python benchmarks/chunked_kl.py")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    versions = (
        f"jax {jax.__version__}, kdtl_jax {kdtl_jax.__version__}, python {sys.version.split()[0]}"
    )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {versions}"
    )
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(args.tokens, WIDTH)),
        rng.normal(size=(WIDTH, args.vocabulary)) / WIDTH**0.5,
        rng.normal(size=(args.tokens, TEACHER_WIDTH)),
        rng.normal(size=(TEACHER_WIDTH, args.vocabulary)) / TEACHER_WIDTH**0.5,
    ]
    forms, megabytes = jax_forms(arrays)
    try:
        forms |= torch_forms(arrays)
    except ImportError:
        print("torch is not installed: the peer is left out (pip install torch==2.13.0)")
    seconds = measure(forms, args.rounds)
    rows = []
    print(f"{args.tokens} tokens x {args.vocabulary}; ratios are medians of paired rounds")
    print(f"{'form':34s} {'median s':>9s} {'min':>7s} {'max':>7s} {'x floor':>8s} {'temp MB':>8s}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[FLOOR], strict=True))
        middle, temp = statistics.median(times), megabytes.get(name, float("nan"))
        print(
            f"{name:34s} {middle:9.2f} {min(times):7.2f} {max(times):7.2f} {ratio:8.2f} {temp:8.0f}"
        )
        rows.append({"form": name, "seconds": times, "over_floor": ratio, "temp_megabytes": temp})
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"versions": versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
