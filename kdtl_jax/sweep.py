"""Whole sweeps as one compiled program.

An *experiment* is a pure function of one point, `experiment(point, *shared) -> results`, where a
point is a dict of scalars (`{"seed": ..., "temperature": ...}`) and `shared` arrays are the same
for all. Whatever is traceable can be swept: seeds, temperatures, loss weights, alpha, learning
rates (`optax.sgd(point["rate"])` takes a traced rate). What must be static (widths, methods)
is an ordinary Python loop around `run`.

    points = sweep.grid(seed=range(8), temperature=[1.0, 4.0])
    accuracy = sweep.run(experiment, points, data)        # every leaf [16, ...]
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax._types import PyTree

Points = Mapping[str, Array]
Experiment = Callable[..., PyTree]
Runner = Callable[[Experiment], Callable[..., PyTree]]


def grid(**axes: Iterable[Any]) -> dict[str, Array]:
    """Every combination of the axes' values, the last axis fastest.

    Returns:
      `{name: [N]}` with N the product of the axes' lengths; ints as int32, floats as float32.

    Raises:
      ValueError: if an axis is empty.
    """
    lists = {name: list(values) for name, values in axes.items()}
    for name, values in lists.items():
        if not values:
            raise ValueError(f"sweep.grid: axis {name!r} is empty; give it at least one value.")
    rows = list(itertools.product(*lists.values()))
    columns = zip(*rows, strict=True)
    return {name: _column(name, column) for name, column in zip(lists, columns, strict=True)}


def size(points: Points) -> int:
    """Number of points.

    Raises:
      ValueError: if there are none, or the columns' lengths differ.
    """
    lengths = {name: len(column) for name, column in points.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(
            f"sweep: points must be equally long, non-empty columns, got lengths {lengths}."
        )
    return next(iter(lengths.values()))


def vectorized(experiment: Experiment) -> Callable[..., PyTree]:
    """All points at once by `vmap`: small matmuls become one batched matmul."""

    def every(points: Points, *shared: Any) -> PyTree:
        return jax.vmap(lambda point: experiment(point, *shared))(points)

    return jax.jit(every)


def mapped(experiment: Experiment) -> Callable[..., PyTree]:
    """One point after another inside one program (`lax.map`): one point's memory."""

    def every(points: Points, *shared: Any) -> PyTree:
        return jax.lax.map(lambda point: experiment(point, *shared), points)

    return jax.jit(every)


def sequential(experiment: Experiment) -> Callable[..., PyTree]:
    """One call of the compiled experiment per point: the fallback no runner may be slower than."""
    compiled = jax.jit(experiment)

    def every(points: Points, *shared: Any) -> PyTree:
        results = [
            compiled({name: column[i] for name, column in points.items()}, *shared)
            for i in range(size(points))
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return every


def run(
    experiment: Experiment,
    points: Points,
    *shared: Any,
    chunk: int | None = None,
    runner: Runner = vectorized,
) -> PyTree:
    """Runs the experiment at every point.

    Args:
      experiment: `experiment(point, *shared) -> pytree of arrays`.
      points: `{name: [N]}`, from `grid` or your own columns.
      *shared: data and weights that all points read, passed once.
      chunk: points per call, to bound memory; the last chunk is padded with its first point, so
        that there is one compile. None runs all at once.
      runner: `vectorized`, `mapped` or `sequential`.

    Returns:
      The results stacked along a leading axis `[N, ...]`.

    Raises:
      ValueError: if columns differ in length, or the chunk is not positive.
    """
    total = size(points)
    columns = {name: jnp.asarray(column) for name, column in points.items()}
    every = runner(experiment)
    if chunk is None or chunk >= total:
        return every(columns, *shared)
    if chunk < 1:
        raise ValueError(f"sweep.run: chunk must be at least 1, got {chunk}.")
    parts = []
    for start in range(0, total, chunk):
        index = np.arange(start, start + chunk)
        index[index >= total] = start
        part = every({name: column[index] for name, column in columns.items()}, *shared)
        keep = min(chunk, total - start)
        parts.append(jax.tree.map(lambda leaf, keep=keep: leaf[:keep], part))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _column(name: str, values: Iterable[Any]) -> Array:
    column = np.asarray(values)
    if column.dtype.kind not in "iufb":
        raise ValueError(
            f"sweep.grid: axis {name!r} holds {column.dtype}, not numbers. What is not a number "
            "is static: loop over it in Python, one run each."
        )
    return jnp.asarray(column, {"f": jnp.float32, "b": jnp.bool_}.get(column.dtype.kind, jnp.int32))
