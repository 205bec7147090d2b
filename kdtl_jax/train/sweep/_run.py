"""Runners: all points at once, mapped, one after another, and the choice between them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdtl_jax._types import PyTree
from kdtl_jax.train.sweep._points import Points, size

Experiment = Callable[..., PyTree]
Runner = Callable[[Experiment], Callable[..., PyTree]]


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
            compiled(jax.tree.map(lambda x, i=i: x[i], dict(points)), *shared)
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
    devices: Sequence[Any] | None = None,
) -> PyTree:
    """Runs the experiment at every point.

    Args:
      experiment: `experiment(point, *shared) -> pytree of arrays`.
      points: `{name: [N]}`, from `grid` or your own columns; a column may be a whole pytree of
        arrays `[N, ...]`, such as states to go on from.
      *shared: data and weights that all points read, passed once.
      chunk: points per call, to bound memory; the last chunk is padded with its first point, so
        that there is one compile. None runs all at once.
      runner: `vectorized`, `mapped` or `sequential`; `fastest` measures which.
      devices: spread every chunk's points over these devices (`jax.devices()`).

    Returns:
      The results stacked along a leading axis `[N, ...]`.

    Raises:
      ValueError: if columns differ in length, or the chunk is not positive.
    """
    total = size(points)
    chunk = total if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    columns = jax.tree.map(_column, dict(points))
    every = runner(experiment)
    many = 1 if devices is None else len(devices)
    chunk = -(-min(chunk, total) // many) * many  # a multiple of the devices, all of one size
    parts = []
    for start in range(0, total, chunk):
        index = np.arange(start, start + chunk)
        index[index >= total] = start
        here = columns if len(index) == total else _taken(columns, index)
        part = every(_placed(here, devices), *shared)
        keep = min(chunk, total - start)
        parts.append(part if keep == chunk else jax.tree.map(lambda x, keep=keep: x[:keep], part))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def vmap(
    experiment: Experiment, *, chunk: int | None = None, devices: Sequence[Any] | None = None
) -> Callable[..., PyTree]:
    """`fn(points, *shared)`: all points at once by `vmap`, compiled once and called often.

    Args:
      experiment: `experiment(point, *shared) -> pytree of arrays`.
      chunk: points per call, to bound memory; None runs all at once.
      devices: spread every chunk's points over these devices.
    """
    every = vectorized(experiment)

    def fn(points: Points, *shared: Any) -> PyTree:
        runner = lambda _: every  # noqa: E731
        return run(experiment, points, *shared, chunk=chunk, runner=runner, devices=devices)

    return fn


map = mapped


def timings(
    experiment: Experiment,
    points: Points,
    *shared: Any,
    candidates: Sequence[Runner] = (vectorized, mapped, sequential),
    probe: int = 16,
    repeats: int = 3,
) -> list[float]:
    """Seconds per point of every candidate on the first `probe` points, compilation excluded.

    Candidates take turns, and the shortest of `repeats` runs counts: what else the machine does
    then touches all alike. Give it a short form of the experiment (fewer steps): the order of the
    candidates is the same.
    """
    some = _taken(dict(points), np.arange(min(probe, size(points))))
    programs = [runner(experiment) for runner in candidates]
    best = [float("inf")] * len(programs)
    for turn in range(1 + repeats):
        for i, every in enumerate(programs):
            start = time.perf_counter()
            jax.block_until_ready(every(some, *shared))
            if turn:  # the first run compiles
                best[i] = min(best[i], time.perf_counter() - start)
    return [seconds / size(some) for seconds in best]


def fastest(
    experiment: Experiment,
    points: Points,
    *shared: Any,
    candidates: Sequence[Runner] = (vectorized, mapped, sequential),
    probe: int = 16,
    repeats: int = 3,
) -> Runner:
    """The candidate with the shortest of `timings`.

    Batched convolutions become grouped ones, which some back ends run more slowly than one
    model after another: there, only a measurement tells. Its `__name__` says what was chosen.
    """
    seconds = timings(
        experiment, points, *shared, candidates=candidates, probe=probe, repeats=repeats
    )
    return candidates[int(np.argmin(seconds))]


def chunk_for_memory(experiment: Experiment, points: Points, *shared: Any, bytes: int) -> int:
    """The largest chunk whose `vectorized` run fits in `bytes` of temporaries and results.

    By the compiler's own account of two small chunks; nothing is run.

    Raises:
      ValueError: if not even one point fits.
    """

    every = jax.jit(lambda points, *shared: jax.vmap(lambda p: experiment(p, *shared))(points))

    def needs(n: int) -> int:
        some = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, *np.shape(x)[1:]), jnp.asarray(x).dtype),
            dict(points),
        )
        lowered = every.lower(some, *shared)
        memory = lowered.compile().memory_analysis()
        if memory is None:
            raise ValueError("this back end reports no memory; pass chunk=.")
        return int(memory.temp_size_in_bytes + memory.output_size_in_bytes)

    two, four = needs(2), needs(4)
    per_point = max((four - two) / 2, 1.0)
    fixed = max(two - 2 * per_point, 0.0)
    chunk = int((bytes - fixed) // per_point)
    if chunk < 1:
        raise ValueError(
            f"one point needs about {int(fixed + per_point)} bytes, "
            f"{bytes} are allowed. Use the `mapped` runner or smaller batches."
        )
    return min(chunk, size(points))


def _column(column: Any) -> Any:
    """On the host, where any chunk can be cut out of it; PRNG keys stay what they are."""
    is_key = hasattr(column, "dtype") and jnp.issubdtype(column.dtype, jax.dtypes.prng_key)
    return column if is_key else np.asarray(column)


def _taken(points: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    return jax.tree.map(lambda x: x[index], points)


def _placed(columns: dict[str, Any], devices: Sequence[Any] | None) -> Points:
    arrays = jax.tree.map(jnp.asarray, columns)
    if devices is None:
        return arrays
    mesh = Mesh(np.array(devices, dtype=object), ("points",), axis_types=(AxisType.Auto,))
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("points")))
