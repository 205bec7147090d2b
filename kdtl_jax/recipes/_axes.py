"""The axes of a sweep, as text and as columns.

An axis is one of `AXES` or the name of a method's term. A setting is one value on every axis.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from kdtl_jax.methods import Entry, Setup
from kdtl_jax.recipes import settings as types
from kdtl_jax.recipes.settings import UsageError
from kdtl_jax.train import sweep as sweeps

# Axes that are not names of terms. "weight" multiplies the weights of a method's terms.
AXES = ("temperature", "weight", "learning_rate", "weight_decay", "alpha")
POSITIVE = ("temperature", "learning_rate", "alpha")
MOST = 10**6  # students of one method
DEFAULT = {"temperature": (1.0, 2.0, 4.0, 8.0)}


def grid(value: Any) -> dict[str, tuple[float, ...]]:
    """`axis=number,…` words, or a mapping."""
    value = value.split() if isinstance(value, str) else value

    def parse(values: Any) -> tuple[float, ...]:
        if not (numbers := types.numbers(values)):
            raise ValueError("no number")
        return numbers

    return _by_axis(value, parse, "axis=number,… as in temperature=1,2,4")


def ranges(value: Any) -> dict[str, str]:
    """`axis=low..high[:log]` words, or a mapping; ranges stay text, as recorded."""

    def parse(text: Any) -> str:
        _range(text)
        return str(text)

    expected = "axis=low..high or axis=low..high:log, as in temperature=1..20:log"
    return _by_axis(value, parse, expected)


def columns_of(settings: Any) -> dict[str, np.ndarray]:
    """The points of the sweep as columns, `{axis: [K]}`.

    Raises:
      UsageError: if grid and sample are mixed, or an axis is out of its range.
    """
    if settings.sample is None and settings.range:
        raise UsageError("--range needs --sample N: say how many settings to draw.")
    if settings.sample is not None and (settings.grid or not settings.range):
        raise UsageError(
            "--sample needs --range and excludes --grid. Write one value as a range of two."
        )
    try:
        if settings.sample is None:
            axes = settings.grid or DEFAULT
            if np.prod([float(len(values)) for values in axes.values()]) > MOST:
                raise UsageError(f"--grid has more than {MOST:,} settings.")
            points = sweeps.grid(**axes)
        else:
            distributions = {name: _range(text) for name, text in settings.range.items()}
            points = sweeps.sample(settings.sample, **distributions)
    except ValueError as error:
        raise UsageError(f"--range: {error}" if settings.sample else f"--grid: {error}") from None
    columns = {name: np.asarray(column, np.float32) for name, column in points.items()}
    for name, column in columns.items():
        if (column < 0).any() or (name in POSITIVE and (column == 0).any()):
            least = "above 0" if name in POSITIVE else "0 or more"
            raise UsageError(f"--grid: {name} must be {least}, got {column.min():g}.")
    return columns


def axes_of_method(entry: Entry, setup: Setup, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of the axes that apply to the method, with duplicate settings removed."""
    axes = {*AXES, *entry.build(setup).weights}
    applicable = {name: np.asarray(column) for name, column in columns.items() if name in axes}
    rows = list(zip(*applicable.values(), strict=True))
    first_rows = sorted({row: i for i, row in reversed([*enumerate(rows)])}.values())
    return {name: column[first_rows] for name, column in applicable.items()}


def check(columns: Collection[str], axes_by_method: Mapping[str, Collection[str]]) -> None:
    """Raises UsageError if an axis is neither in `AXES` nor an axis, or a term, of a method."""
    valid = {*AXES, *(name for axes in axes_by_method.values() for name in axes)}
    if unknown := [axis for axis in columns if axis not in valid]:
        are = "are not axes" if unknown[1:] else "is not an axis"
        raise UsageError(
            f"{', '.join(map(repr, unknown))} {are} of {', '.join(axes_by_method)}. Axes are "
            f"{', '.join(AXES)}, task, and the names of a method's terms."
        )


def _by_axis(value: Any, parse: Callable[[Any], Any], form: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, text in types.pairs(value or {}, "=").items():
        name = {"lr": "learning_rate"}.get(key, key)
        try:
            parsed = parse(text)
        except ValueError:
            raise ValueError(f"'{key}={text}' is not {form}") from None
        if name in out:
            raise ValueError(f"axis {name!r} is given twice")
        if name == "seed":
            raise ValueError("seeds are given by --seeds N")
        out[name] = parsed
    return out


def _range(text: str) -> sweeps.Range:
    bounds, log, extra = str(text).partition(":log")
    low, dots, high = bounds.partition("..")
    if not dots or extra:
        raise ValueError(f"{text!r} is not a range")
    return sweeps.Range(types.number(low), types.number(high), bool(log))
