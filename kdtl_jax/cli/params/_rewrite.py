"""A new checkpoint as specs and a function that makes one tensor: report first, then write."""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import kdtl_jax
from kdtl_jax import _files, transforms, trees
from kdtl_jax.cli import _config
from kdtl_jax.cli.params._inputs import Opened
from kdtl_jax.interop import safetensors
from kdtl_jax.transforms import Plan, Report

RECIPE = "kdtl_recipe"  # the metadata key
BLOCK = 1 << 20  # entries of a piece: 4 MB of float32


class Rewrite(NamedTuple):
    """What will be written; `produce` makes a tensor, or an iterator of its pieces."""

    specs: Mapping[str, Any]
    produce: Callable[[str], Any]
    report: Report
    inputs: Sequence[Opened]  # the first gives the metadata
    names: Mapping[str, str]  # canonical path -> name in the file


def add_write(parser: argparse.ArgumentParser) -> None:
    """`--write` and what belongs to it."""
    parser.add_argument(
        "--write",
        metavar="OUT",
        help="write OUT.safetensors, or a new folder of shards; without it nothing is written",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT.safetensors if it exists (atomically)"
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=5_000_000_000,
        metavar="N",
        help="most bytes per file of a folder (default: 5000000000)",
    )
    parser.add_argument(
        "--skip-sha256",
        action="store_true",
        help="record the inputs' sizes only, which saves reading them once more",
    )


def planned(plan: Plan, source: Opened, target: Opened) -> Callable[[str], Any]:
    """Carries out a plan tensor by tensor: in pieces where no shape changes."""
    steps = {step.path: step for step in plan.steps}

    def produce(path: str) -> Any:
        step, spec = steps[path], target.specs[path]
        if step.source is None:
            return safetensors.blocks(target.tensors[path], BLOCK)
        tensor = source.tensors[step.source]
        if step.policy is not None:
            return _applied(step, safetensors.read(tensor), spec)
        flat = safetensors.blocks(tensor, BLOCK)
        return (
            _applied(step, block, jax.ShapeDtypeStruct(block.shape, spec.dtype)) for block in flat
        )

    return produce


def _applied(step: Any, value: np.ndarray, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    like = np.broadcast_to(np.zeros((), spec.dtype), spec.shape)  # a NumPy target without memory
    one = Plan((step,), {step.source: value.shape}, {step.path: like.shape}, Report())
    return transforms.apply_plan(one, {step.source: value}, {step.path: like})[step.path]


def finish(args: argparse.Namespace, rewrite: Rewrite) -> int:
    """Prints the report; with `--write`, writes atomically and reports NaN and infinity by path.

    Raises:
      FileExistsError: if the output exists and `--force` was not given.
      OSError: if the disk is full; what was there stays as it was.
    """
    print(rewrite.report)
    total = sum(_bytes(spec) for spec in rewrite.specs.values())
    what = f"{len(rewrite.specs)} tensors, {size(total)}"
    if args.write is None:
        print(f"dry run: nothing was written; --write OUT.safetensors would write {what}")
        return 0
    out = Path(args.write)
    _check_place(out, args.force, total)
    nonfinite: list[str] = []
    metadata = rewrite.inputs[0].checkpoint.metadata | {RECIPE: _recipe(args, rewrite.inputs)}
    specs = {rewrite.names.get(path, path): spec for path, spec in rewrite.specs.items()}
    produce = _watched(rewrite, total, nonfinite)
    # Double precision stays what it is; without x64, JAX would make float32 of it.
    with jax.enable_x64(True):
        if out.suffix == ".safetensors":
            safetensors.stream(out, specs, produce, metadata=metadata)
        else:
            safetensors.stream_sharded(
                out, specs, produce, max_bytes=args.shard_bytes, metadata=metadata
            )
    print(f"wrote {out}: {what}")
    for path in sorted(nonfinite, key=trees.natural_key):
        print(f"warning: {path} holds NaN or infinity", file=sys.stderr)
    return 0


def size(count: int) -> str:
    """A number of bytes for people: `1.5 GB`."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.1f} {unit}"
    return f"{count} bytes"


def progress(total: int, what: str = "") -> Callable[[int], None]:
    """Says on stderr how many of `total` bytes are done, every few seconds."""
    start = last = time.monotonic()
    done = 0

    def add(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last > 3:
            last = now
            share = f"{100 * done / max(total, 1):3.0f} % of {size(total)}"
            print(f"{now - start:6.1f} s  {what}{share}", file=sys.stderr, flush=True)

    return add


def _watched(rewrite: Rewrite, total: int, nonfinite: list[str]) -> Callable[[str], Any]:
    paths = {rewrite.names.get(path, path): path for path in rewrite.specs}
    done = progress(total, "writing: ")

    def watch(path: str, array: Any) -> np.ndarray:
        array = np.asarray(array)
        done(array.nbytes)
        if path not in nonfinite[-1:] and trees.is_inexact(array) and not np.isfinite(array).all():
            nonfinite.append(path)
        return array

    def produce(name: str) -> Any:
        made = rewrite.produce(paths[name])
        if isinstance(made, Iterator):
            return (watch(paths[name], piece) for piece in made)
        return watch(paths[name], made)

    return produce


def _check_place(out: Path, force: bool, total: int) -> None:
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--write {out}: the folder {out.parent} does not exist.")
    if out.is_dir() and (out.suffix == ".safetensors" or any(out.iterdir())):
        raise FileExistsError(f"--write {out} is a folder that exists. Name a new one.")
    if out.is_file() and out.suffix != ".safetensors":
        raise FileExistsError(f"--write {out} is a file; name OUT.safetensors or a new folder.")
    if out.is_file() and not force:
        raise FileExistsError(f"--write {out} exists. Name another file, or pass --force.")
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise OSError(f"--write {out} needs {size(total)}, but its disk has {size(free)} free.")


def _recipe(args: argparse.Namespace, inputs: Sequence[Opened]) -> str:
    """The command, its options and its inputs, as JSON."""
    place = {"command", "action", "write", "force", "shard_bytes", "skip_sha256"}
    options = {k: v for k, v in _config.settings(args).items() if k not in place and v is not None}
    if not args.skip_sha256:
        whole = sum(file.stat().st_size for one in inputs for file in one.checkpoint.files)
        if whole > 1e9:
            print(f"sha256 of {size(whole)} of inputs …", file=sys.stderr, flush=True)
    files = [
        {"file": file.name, "bytes": file.stat().st_size}
        | ({} if args.skip_sha256 else {"sha256": _files.sha256(file)})
        for one in inputs
        for file in one.checkpoint.files
    ]
    command = f"kdtl {args.command} {args.action}"
    before = inputs[0].checkpoint.metadata.get(RECIPE)
    recipe = {"command": command, "options": options, "inputs": files}
    recipe |= {"version": kdtl_jax.__version__} | ({"before": _data(before)} if before else {})
    return json.dumps(recipe)


def _data(text: str) -> Any:
    """JSON data; what is none, because someone else wrote it, stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bytes(spec: Any) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def same_as(one: Opened, plan: Plan) -> Rewrite:
    """A rewrite of a checkpoint in place: its own names, shapes and dtypes."""
    return Rewrite(one.specs, planned(plan, one, one), plan.report, [one], one.names)
