"""The plan of a cache: which arrays it stores, cut into which shards, under which names."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdtl_jax import _files, losses, trees
from kdtl_jax._types import Outputs
from kdtl_jax.run.teacher_cache._fingerprint import Fingerprint, from_json

FORMAT = 1
PLAN, MANIFEST = "plan.json", "manifest.json"
SHARD_ROWS = 8192  # a kill loses the shard at work
SHARD_BYTES = 64 * 2**20


class Column(NamedTuple):
    """One stored array `[rows, *shape]`; `field` is a field of `losses.TopK`, or None."""

    tap: str
    field: str | None
    dtype: str
    shape: tuple[int, ...]


class Plan(NamedTuple):
    """What a cache holds; decided before anything is computed, so that a killed run goes on."""

    fingerprint: Fingerprint
    size: int  # examples
    views: int | None
    top_k: int | None
    temperature: float  # of the softmax that was cut to top_k
    shard_rows: int  # shards never cross views
    columns: tuple[Column, ...]


def columns(
    fn: str,
    outputs: Mapping[str, Any],
    batch: int,
    taps: tuple[str, ...],
    top_k: int | None,
    dtype: str,
) -> tuple[Column, ...]:
    """Columns for the (abstract) outputs `[B, ...]` of a batch.

    Raises:
      ValueError: if an output does not exist (the nearest are listed) or has no row per example.
    """
    found = []
    for tap in taps:
        if tap not in outputs:
            near = ", ".join(map(repr, trees.nearest(tap, list(outputs), n=5)))
            raise ValueError(f"the teacher has no output {tap!r}. Nearest: {near}.")
        output = outputs[tap]
        if output.shape[:1] != (batch,):
            raise ValueError(
                f"output {tap!r} must have one row per example, got {list(output.shape)} for "
                f"a batch of {batch}."
            )
        shape = tuple(map(int, output.shape[1:]))
        if tap == "logits" and top_k is not None:
            if not shape or top_k > shape[-1]:
                raise ValueError(
                    f"top_k={top_k} needs logits [B, ..., num_classes] with at least so many "
                    f"classes, got {list(output.shape)}."
                )
            found += [
                Column(tap, "indices", _smallest_unsigned(shape[-1]), (*shape[:-1], top_k)),
                Column(tap, "log_probs", dtype, (*shape[:-1], top_k)),
                Column(tap, "log_tail", "float32", shape[:-1]),
            ]
        else:
            floating = jnp.issubdtype(output.dtype, jnp.floating)
            found.append(Column(tap, None, dtype if floating else output.dtype.name, shape))
    return tuple(found)


def encoded(outputs: Outputs, plan: Plan) -> list[jax.Array]:
    """Inside `jit`: the columns of a batch of outputs, in the stored precision."""
    arrays = []
    for column in plan.columns:
        x = outputs[column.tap]
        if column.field is not None and plan.top_k is not None:
            cut = losses.top_k_targets(x, k=plan.top_k, temperature=plan.temperature)
            x = getattr(cut, column.field)
        arrays.append(x.astype(column.dtype))
    return arrays


def shard_rows(columns: tuple[Column, ...], size: int) -> int:
    """Rows of a shard: at most 8,192, at most about 64 MiB."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, row_bytes(columns)), size))


def row_bytes(columns: tuple[Column, ...]) -> int:
    """Bytes of one example on disk."""
    return sum(math.prod(c.shape) * jnp.dtype(c.dtype).itemsize for c in columns)


def shards_per_view(plan: Plan) -> int:
    return -(-plan.size // plan.shard_rows)


def shard_count(plan: Plan) -> int:
    return shards_per_view(plan) * (plan.views or 1)


def shard_range(plan: Plan, shard: int) -> tuple[int, int, int]:
    """View, first row and row after the last of a shard."""
    view, place = divmod(shard, shards_per_view(plan))
    first = place * plan.shard_rows
    return view, first, min(first + plan.shard_rows, plan.size)


def seal_name(shard: int) -> str:
    return f"{shard:05d}.json"


def file_names(plan: Plan, shard: int) -> list[str]:
    """`00003.0.logits.npy`, one per column; the number keeps odd taps apart."""
    names = []
    for i, column in enumerate(plan.columns):
        word = re.sub(r"[^A-Za-z0-9_-]+", "_", column.tap)[:40]
        words = [word] if column.field is None else [word, column.field]
        names.append(".".join([f"{shard:05d}", str(i), *words, "npy"]))
    return names


def storage_dtype(column: Column) -> np.dtype:
    """bfloat16 has no `.npy` type: its bits are stored as uint16."""
    return np.dtype(np.uint16 if column.dtype == "bfloat16" else column.dtype)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as `plan.json` holds it."""
    value = plan._asdict() | {"format": FORMAT, "fingerprint": plan.fingerprint._asdict()}
    return value | {"columns": [column._asdict() for column in plan.columns]}


def read_plan(value: Mapping[str, Any]) -> Plan:
    """Inverse of `to_json`.

    Raises:
      ValueError: if another version wrote it.
    """
    value = dict(value)
    made_by = value.pop("format", None)
    if made_by != FORMAT:
        raise ValueError(f"format {made_by}, this version reads {FORMAT}")
    stored = tuple(Column(**c)._replace(shape=tuple(c["shape"])) for c in value.pop("columns"))
    return Plan(**value | {"fingerprint": from_json(value["fingerprint"]), "columns": stored})


def seal_problem(folder: Path, plan: Plan, shard: int) -> str | None:
    """Why a shard is not finished and whole, or None; reads all its bytes."""
    try:
        files = _files.read_sealed(folder / seal_name(shard))["files"]
    except ValueError as error:
        return str(error)
    if sorted(files) != sorted(file_names(plan, shard)):
        return f"{seal_name(shard)} names other files"
    return files_problem(folder, files, contents=True)


def files_problem(folder: Path, files: Mapping[str, Any], *, contents: bool) -> str | None:
    """What is wrong with files of a shard, or None; `contents` compares SHA-256 too."""
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
        if contents and _files.sha256(path) != known["sha256"]:
            return f"{name} was altered: its SHA-256 does not match"
    return None


def _smallest_unsigned(classes: int) -> str:
    return next(t for t in ("uint8", "uint16", "uint32") if classes - 1 <= np.iinfo(t).max)
