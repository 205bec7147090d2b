"""Peak memory of `kdtl params` on checkpoints far larger than it.

Command:   python benchmarks/params_memory.py [--gigabytes 1] [--json out.json]
Machine:   Intel Xeon 2.5 GHz, virtual, 2 cores, other jobs running; jax 0.10.2, numpy 2.4.6,
           Python 3.11.7
RESULT:    growth of the peak, checkpoints of 1 GB each (a tensor of 0.25 GB in each), and seconds:
           scale 47 MB 12 s, average of two 118 MB 22 s, merge of two by ties 311 MB 108 s. For
           checkpoints with little else than that tensor: dare 192 MB 15 s, della 294 MB 134 s.
           For checkpoints of 0.49 GB whose largest tensor has 123 MB: slerp 167 MB, karcher 198 MB,
           model_stock 212 MB, multi_slerp 227 MB, dare as mergekit 257 MB, breadcrumbs 322 MB, ram
           249 MB, arcee_fusion 194 MB, sce 294 MB (2.4 of that tensor), slerp of columns 184 MB.
           regmean of a kernel of 250 MB, which factors a matrix: 922 MB (3.7 of it). All others
           are streamed in pieces

Checkpoints of one structure are written to a temporary folder: an embedding of a quarter of the
size, the rest kernels of 16 MB, float32 (for regmean one square kernel as large as the embedding,
and its Gram matrices). Every command runs in its own process, first on a checkpoint of a few
numbers (imports and compilation), then on the large ones; the growth of the peak resident set
between the two is what the large one costs. `average` reads two checkpoints, `ties` three, several
times each.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdtl_jax.interop import safetensors

NAMES = ("base", "a", "b", "kernel_a", "kernel_b", "gram_a", "gram_b")
COMMANDS = {
    "scale": ["scale", "{a}", "--alpha", "0.5"],
    "average of 2": ["average", "{a}", "{b}"],
    "merge ties of 2": ["merge", "{a}", "{b}", "--method", "ties", "--base", "{base}"],
    "merge dare of 2": [
        *("merge", "{a}", "{b}", "--method", "dare", "--base", "{base}", "--density", "0.5")
    ],
    "merge della of 2": [
        *("merge", "{a}", "{b}", "--method", "della", "--base", "{base}", "--density", "0.5")
    ],
    "merge slerp of 2": ["merge", "{a}", "{b}", "--method", "slerp", "--t", "0.5"],
    "karcher of 2": ["merge", "{a}", "{b}", "--method", "karcher"],
    "multi_slerp of 2": ["merge", "{a}", "{b}", "--method", "multi_slerp", "--base", "{base}"],
    "model_stock of 2": ["merge", "{a}", "{b}", "--method", "model_stock", "--base", "{base}"],
    "breadcrumbs of 2": [
        *("merge", "{a}", "{b}", "--method", "breadcrumbs", "--base", "{base}", "--density", "0.5")
    ],
    "sce of 2": ["merge", "{a}", "{b}", "--method", "sce", "--base", "{base}", "--density", "0.5"],
    "ram of 2": ["merge", "{a}", "{b}", "--method", "ram", "--base", "{base}", "--gain", "0.1"],
    "arcee_fusion": ["merge", "{a}", "--method", "arcee_fusion", "--base", "{base}"],
    "slerp of columns": ["merge", "{a}", "{b}", "--method", "slerp", "--t", "0.5", "--axis", "0"],
    "regmean of 2": [
        *("merge", "{kernel_a}", "{kernel_b}", "--method", "regmean"),
        *("--statistics", "{gram_a}", "--statistics", "{gram_b}"),
    ],
    "dare as mergekit": [
        *("merge", "{a}", "{b}", "--method", "dare", "--base", "{base}", "--density", "0.5"),
        *("--as", "mergekit"),
    ],
}

CHILD = """
import json, sys, time
from kdtl_jax.cli import main

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

small, large = json.loads(sys.argv[1])
assert main(small) == 0
before, start = peak(), time.perf_counter()
assert main(large) == 0
print(json.dumps([before, peak(), time.perf_counter() - start]))
"""


def write(path: Path, seed: int, kernels: int, width: int, vocabulary: int) -> None:
    """A checkpoint whose values repeat one random block; nothing of its size is held."""
    block = np.random.default_rng(seed).normal(size=width * width).astype(np.float32)
    specs = {f"layer_{i}/kernel": (width, width) for i in range(kernels)}
    specs["embedding"] = (vocabulary, width)
    if "kernel" in path.stem or "gram" in path.stem:  # one square matrix as large as the embedding
        side = int((vocabulary * width) ** 0.5)
        specs = {"kernel": (side, side)}
    rows = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in specs.items()}

    def produce(name: str) -> Iterator[np.ndarray]:
        left = math.prod(specs[name])
        while left > 0:
            yield block[:left]
            left -= block.size

    safetensors.stream(path, rows, produce)


def run(folder: Path, words: list[str]) -> tuple[int, int, float]:
    """(peak after the small run, peak after the large, seconds of the large)."""
    calls = [
        ["params", *(word.format(**files(folder, size)) for word in words)]
        + ["--write", str(folder / "out.safetensors"), "--force", "--skip-sha256"]
        for size in ("small", "large")
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    before, after, seconds = json.loads(done.stdout.splitlines()[-1])
    return before, after, seconds


def files(folder: Path, size: str) -> dict[str, str]:
    return {name: str(folder / f"{size}_{name}.safetensors") for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of a checkpoint")
    parser.add_argument("--only", default="", help="run the commands whose name has this")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    count = int(arguments.gigabytes * 1e9) // 4
    vocabulary, kernels = count // 4 // 2048, 3 * count // 4 // 2048**2
    largest = 4 * vocabulary * 2048
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, (small, large) in enumerate(
            zip(files(folder, "small").values(), files(folder, "large").values(), strict=True)
        ):
            write(Path(small), seed, 2, 8, 16)
            write(Path(large), seed, kernels, 2048, vocabulary)
        for command, words in COMMANDS.items():
            if arguments.only not in command:
                continue
            start = time.perf_counter()
            before, after, seconds = run(folder, words)
            size = Path(words[1].format(**files(folder, "large"))).stat().st_size
            growth = after - before
            figures[command] = {
                "checkpoint_bytes": size,
                "peak_bytes": after,
                "growth_bytes": growth,
                "largest_tensors": growth / largest,
                "seconds": seconds,
            }
            print(
                f"{command:16} {size / 1e9:.2f} GB each: peak {after / 1e6:5.0f} MB, of which "
                f"{growth / 1e6:5.0f} MB for the data, {growth / largest:.2f} of the largest "
                f"tensor; {seconds:5.1f} s (process {time.perf_counter() - start:.1f} s)",
                flush=True,
            )
    print(
        f"jax {jax.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}; "
        f"{platform.machine()}, {os.cpu_count()} CPUs"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
