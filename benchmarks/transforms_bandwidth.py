"""Parameter transforms compared with the machine's own NumPy copy, and the cost of planning.

Command:   python benchmarks/transforms_bandwidth.py [--rounds 9] [--millions 100] [--json out.json]
Machine:   Intel Xeon 2.5 GHz, virtual, 2 cores, nothing else running; jax 0.10.2, numpy 2.4.6,
           Python 3.11.7
RESULT:    GB/s and ratio to numpy copy (one thread, 9.9 GB/s): scale 28.7 2.85, interpolate 36.6
           3.72, average of two 36.1 3.69, of four 27.7 2.81; plan of 1,000 leaves 50 ms equal,
           59 ms renamed, 70 ms adapted; of 70 billion parameters in 560 leaves 41 ms

100 million float32 in 400 leaves. `scale`, `interpolate` and `average` (of two and of four models)
run under `jit` with the first tree donated, so the result reuses its memory. Bandwidth counts
each byte that must be read or written once: 2, 3, 3 and 5 times the size of a tree, 2 for
`numpy.copyto`. Every round runs all forms one after another, so that ratios compare adjacent
timings; medians over rounds. Planning is timed on abstract trees: 1,000 leaves, equal,
renamed and with every leaf adapted, and a model of 70 billion parameters made half as wide.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import transforms

LEAVES = 400
Tree = dict[str, Any]


def tree(size: int, value: float) -> Tree:
    """`LEAVES` leaves of matrices with `size` numbers each."""
    rows = max(1, int(size**0.5))
    leaf = np.full((rows, size // rows), value, np.float32)
    return {f"layer_{i}": {"kernel": jax.device_put(leaf, may_alias=False)} for i in range(LEAVES)}


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def forms(size: int) -> dict[str, tuple[float, Callable[[], Any]]]:
    """`{name: (trees of traffic, one run)}`."""
    # Each transform owns its first tree and gets it back as the result of the last run.
    own = {name: tree(size, 1.0) for name in ("scale", "interpolate", "average 2", "average 4")}
    others = [tree(size, float(i)) for i in range(3)]
    alpha = jnp.float32(0.999)
    host = np.ones((LEAVES, size), np.float32)
    to = np.zeros_like(host)

    def donating(name: str, fn: Callable[..., Tree], *rest: Any) -> Callable[[], Tree]:
        compiled = jax.jit(fn, donate_argnums=0)

        def run() -> Tree:
            given = own[name]
            own[name] = compiled(given, *rest)
            assert jax.tree.leaves(given)[0].is_deleted(), "the first tree was not donated"
            return own[name]

        return run

    return {
        "numpy copy": (2, lambda: np.copyto(to, host)),
        "scale": (2, donating("scale", transforms.scale, alpha)),
        "interpolate": (3, donating("interpolate", transforms.interpolate, others[0], alpha)),
        "average 2": (3, donating("average 2", lambda a, b: transforms.average([a, b]), others[0])),
        "average 4": (
            5,
            donating("average 4", lambda a, b: transforms.average([a, *b]), others),
        ),
    }


def seventy_billion(width: int) -> Tree:
    """80 blocks of a Llama-like model, abstract; 70 billion parameters at width 9,216."""
    square = jax.ShapeDtypeStruct((width, width), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((width, 3 * width), jnp.bfloat16)
    names = {"q": square, "k": square, "v": square, "o": square, "norm": square}
    return {f"layers_{i}": {**names, "up": wide, "gate": wide} for i in range(80)}


def plan_seconds() -> dict[str, float]:
    large = {f"layer_{i}": jax.ShapeDtypeStruct((8192, 8192), jnp.float32) for i in range(1000)}
    small = {f"layer_{i}": jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for i in range(1000)}
    named = [(r"layer_(\d+)", r"layer_\1")]
    huge, half = seventy_billion(9216), seventy_billion(4608)
    runs = {
        "1,000 leaves, equal": lambda: transforms.plan_transfer(large, large),
        "1,000 leaves, renamed": lambda: transforms.plan_transfer(large, large, rename=named),
        "1,000 leaves, adapted": lambda: transforms.plan_transfer(
            large, small, on_mismatch=transforms.select_uniform
        ),
        "70 billion parameters, 560 leaves, adapted": lambda: transforms.plan_transfer(
            huge, half, on_mismatch=transforms.select_uniform
        ),
    }
    return {name: min(seconds(run) for _ in range(3)) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--millions", type=float, default=100, help="parameters per tree, millions")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    size = int(arguments.millions * 1e6) // LEAVES
    runs = forms(size)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(arguments.rounds + 1):
        for name, (_, run) in runs.items():
            took = seconds(run)
            if number:  # the first round compiles
                times[name].append(took)
    gigabytes = 4e-9 * size * LEAVES
    copy = times["numpy copy"]
    figures: dict[str, Any] = {}
    print(f"{'':14}{'ms':>8}{'GB/s':>8}{'/ copy':>8}{'spread':>16}")
    for name, (traffic, _) in runs.items():
        ratios = [
            (traffic / took) / (2 / paired) for took, paired in zip(times[name], copy, strict=True)
        ]
        median = statistics.median(times[name])
        figures[name] = {
            "seconds": median,
            "gigabytes_per_second": traffic * gigabytes / median,
            "ratio_to_copy": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
        spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
        print(
            f"{name:14}{1e3 * median:8.1f}{traffic * gigabytes / median:8.1f}"
            f"{statistics.median(ratios):8.2f}{spread:>16}"
        )
    figures["plan"] = plan_seconds()
    for name, took in figures["plan"].items():
        print(f"plan, {name}: {1e3 * took:.0f} ms")
    versions = f"jax {jax.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}"
    print(f"{versions}; {platform.machine()}, {os.cpu_count()} CPUs, {jax.devices()[0]}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
