"""Points of a sweep: grids, low-discrepancy samples, rows for tables."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kdtl_jax import _checks, trees
from kdtl_jax._types import PyTree

# `{name: [N]}`; a column may be a whole pytree of arrays [N, ...].
Points = Mapping[str, Any]


class Range(NamedTuple):
    """An interval to sample from, evenly or (`log=True`) evenly in the logarithm."""

    low: float
    high: float
    log: bool = False


def grid(**axes: Iterable[Any]) -> dict[str, Array]:
    """Every combination of the axes' values, the last axis fastest.

    Returns:
      `{name: [N]}` with N the product of the axes' lengths; ints as int32, floats as float32.

    Raises:
      ValueError: if an axis is empty, or its values are not numbers of one shape within int32 or
        float32.
      TypeError: if an axis is not a sequence.
    """
    lists = [_as_list(name, values) for name, values in axes.items()]
    columns = zip(*itertools.product(*lists), strict=True)
    return {name: _column(name, column) for name, column in zip(axes, columns, strict=True)}


def size(points: Points) -> int:
    """The number of points.

    Raises:
      ValueError: if there are none, the columns' lengths differ, or one is not an array.
    """
    leaves = trees.flatten(dict(points))
    numbers = [name for name, leaf in leaves.items() if not np.ndim(leaf)]
    if numbers:
        raise ValueError(
            f"points must be columns, arrays [N, ...], got single values at {numbers[:6]}. "
            "JAX treats a list as a tree, not as an array: pass jnp.asarray(values)."
        )
    lengths = {name: len(leaf) for name, leaf in leaves.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise ValueError(f"points must be equally long, non-empty columns, got lengths {lengths}.")
    return next(iter(lengths.values()))


def sample(n: int, draw: int = 0, /, **axes: Range | Sequence[Any]) -> dict[str, Array]:
    """`n` points that fill the axes evenly: a shifted additive-recurrence sequence.

    Any number of points covers every axis and every pair of axes more evenly than independent
    draws or a grid of the same size; another `draw` shifts the whole sequence.

    Args:
      n: number of points.
      draw: index of the random shift.
      axes: a `Range`, or a sequence of values, each used about equally often.

    Returns:
      `{name: [n]}`.

    Raises:
      ValueError: if n < 1, a range or axis is empty, a logarithmic range is not positive, or values
        are not numbers of one shape within int32 or float32.
      TypeError: if an axis is neither a range nor a sequence.

    References:
      Roberts, The unreasonable effectiveness of quasirandom sequences, 2018; Cranley and
      Patterson, Randomization of number theoretic methods for multiple integration, 1976.
    """
    _checks.count(1, n=n)
    _checks.count(0, draw=draw)
    # The generalized golden ratio: the root of x^(d + 1) = x + 1.
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (len(axes) + 1))
    shifts = np.random.default_rng(draw).random(len(axes))
    points = {}
    for k, (name, axis) in enumerate(axes.items()):
        unit = (shifts[k] + np.arange(1, n + 1) * ratio ** -(k + 1)) % 1
        points[name] = _spread_over(name, axis, unit)
    return points


def rows(points: Points, results: PyTree) -> list[dict[str, Any]]:
    """One flat dict of Python numbers per point, for tables and CSV.

    Args:
      points: as given to a program.
      results: as returned by the program; array results with more axes contribute their last value.

    Raises:
      TypeError: if `points` are not a dict.
    """
    _checks.mappings(points=points)
    columns = {name: np.asarray(column) for name, column in points.items()}
    for path, leaf in trees.flatten(results).items():
        value = np.asarray(leaf)
        columns[path or "result"] = value.reshape(len(value), -1)[:, -1]
    return [
        {name: column[i].item() for name, column in columns.items()} for i in range(size(points))
    ]


def _spread_over(name: str, axis: Range | Sequence[Any], unit: np.ndarray) -> Array:
    if not isinstance(axis, Range):
        values = _column(name, _as_list(name, axis))
        return values[np.minimum((unit * len(values)).astype(int), len(values) - 1)]
    _checks.scalar(low=axis.low, high=axis.high)
    _checks.finite(low=axis.low, high=axis.high)
    if not axis.low < axis.high or (axis.log and axis.low <= 0):
        need = "0 < low < high" if axis.log else "low < high"
        raise ValueError(f"{name} needs {need}, got {axis.low:g} and {axis.high:g}.")
    _single(name, np.asarray([axis.low, axis.high], np.float64))
    low, high = (np.log(axis.low), np.log(axis.high)) if axis.log else (axis.low, axis.high)
    value = low + unit * (high - low)
    return jnp.asarray(np.exp(value) if axis.log else value, jnp.float32)


def _as_list(name: str, values: Any) -> list[Any]:
    if not np.iterable(values):
        raise TypeError(f"axis {name!r} must be a sequence, got {values!r}: give [{values!r}].")
    values = list(values)
    if not values:
        raise ValueError(f"axis {name!r} is empty; give it at least one value.")
    return values


def _column(name: str, values: Sequence[Any]) -> Array:
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise ValueError(f"the values of axis {name!r} must have one shape, got {shapes}.")
    column = np.asarray(values)
    if column.dtype.kind not in "iufb":
        raise ValueError(
            f"axis {name!r} holds {column.dtype}, not numbers. Other values are "
            "static: loop over them in Python, one run each."
        )
    int32 = np.iinfo(np.int32)
    if column.dtype.kind in "iu" and (column.min() < int32.min or column.max() > int32.max):
        raise ValueError(
            f"the integers of axis {name!r} must fit int32, got "
            f"{column.min()}..{column.max()}. Give floats, or seeds below 2**31."
        )
    if column.dtype.kind == "f":
        return _single(name, column)
    return jnp.asarray(column, jnp.bool_ if column.dtype.kind == "b" else jnp.int32)


def _single(name: str, column: np.ndarray) -> Array:
    """The column in float32, which must not turn a finite number infinite or another one to 0."""
    with np.errstate(over="ignore", under="ignore"):
        single = column.astype(np.float32)
    lost = (np.isfinite(column) & ~np.isfinite(single)) | ((column != 0) & (single == 0))
    if lost.any():
        info = np.finfo(np.float32)
        raise ValueError(
            f"the values of axis {name!r} must fit float32, 0 or {info.smallest_subnormal:.1e} to "
            f"{info.max:.1e} in size, got {column[lost].flat[0]:g}."
        )
    return jnp.asarray(single)
