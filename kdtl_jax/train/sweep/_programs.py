"""Compiles experiments: all points vectorized, mapped in one program, or in sequence."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kdtl_jax import _checks
from kdtl_jax._types import PyTree
from kdtl_jax.train.sweep._points import Points, size

Experiment = Callable[..., PyTree]  # (point, *shared) -> arrays


class Program(Protocol):
    """`(points, *shared) -> results`, every leaf stacked along a leading axis `[N, ...]`."""

    def __call__(self, points: Points, /, *shared: Any) -> PyTree: ...


def vmap(
    experiment: Experiment, *, chunk: int | None = None, devices: Sequence[Any] | None = None
) -> Program:
    """Runs all points at once: small matrix products become one batched product.

    Build it once and call it often: calls with the same number of points share one compilation and,
    with `chunk`, so do all calls with at least that many points.

    Args:
      experiment: `experiment(point, *shared) -> pytree of arrays`.
      chunk: points per call of the compiled program, to bound memory; the last chunk is padded with
        its first point. None runs all points at once.
      devices: spread every chunk's points over these devices (`jax.devices()`).

    Raises:
      ValueError: if the chunk is not positive; when called, if columns differ in length.
    """
    return _in_chunks(all_points(experiment), chunk, devices)


def all_points(experiment: Experiment) -> Any:
    """The compiled function of `(points, *shared)` that runs all points at once."""

    # Not a lambda: logs and reports list programs by name.
    def run_at_once(points: Points, *shared: Any) -> PyTree:
        return jax.vmap(lambda p: experiment(p, *shared))(points)

    return jax.jit(run_at_once)


def map(
    experiment: Experiment, *, chunk: int | None = None, devices: Sequence[Any] | None = None
) -> Program:
    """Runs one point after another in one program (`lax.map`), with the memory of one point.

    Arguments are those of `vmap`; each device maps over its own points.
    """

    def run_in_turn(points: Points, *shared: Any) -> PyTree:
        return jax.lax.map(lambda p: experiment(p, *shared), points)

    return _in_chunks(jax.jit(run_in_turn), chunk, devices)


def sequential(experiment: Experiment) -> Program:
    """Calls the compiled experiment once per point: the baseline for `vmap` and `map`."""
    compiled = jax.jit(experiment)

    def run_each(points: Points, /, *shared: Any) -> PyTree:
        results = [
            compiled(jax.tree.map(lambda x, i=i: x[i], dict(points)), *shared)
            for i in range(size(points))
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return run_each


def select_rows(points: Points, index: np.ndarray) -> dict[str, Any]:
    """Selects points by row."""
    return jax.tree.map(lambda x: x[index], dict(points))


def _in_chunks(
    run: Callable[..., PyTree], chunk: int | None, devices: Sequence[Any] | None
) -> Program:
    """Calls `run` on the same number of points each time, so that it compiles once."""
    if chunk is not None:
        _checks.count(1, chunk=chunk)
    device_count = 1 if devices is None else len(devices)
    place = jnp.asarray
    if devices is not None:
        mesh = Mesh(np.array(devices, dtype=object), ("points",), axis_types=(AxisType.Auto,))
        place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("points")))

    def program(points: Points, /, *shared: Any) -> PyTree:
        total = size(points)
        # Host arrays, from which any chunk can be sliced; PRNG keys stay.
        columns = jax.tree.map(lambda x: x if _checks.is_key(x) else np.asarray(x), dict(points))
        # A multiple of the number of devices.
        width = -(-min(chunk or total, total) // device_count) * device_count
        parts = []
        for start in range(0, total, width):
            index = np.arange(start, start + width)
            index[index >= total] = start
            rows = columns if width == total else select_rows(columns, index)
            part = run(jax.tree.map(place, rows), *shared)
            count = min(width, total - start)
            parts.append(part if count == width else jax.tree.map(lambda x, n=count: x[:n], part))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

    return program
