"""The results record: rows of methods with intervals, and the environment they were obtained in.

`results.json`, schema_version 1:

    {"schema_version": 1, "task": str, "data": {...},
     "rows": [{"method": str, "family": str, "parameters": int, "seeds": int,
               "test_accuracy": {"mean", "ci95", "values": [seeds]},
               "seconds": float, "settings": {...},
               "validation_accuracy", "agreement": as test_accuracy, or null,
               "versus": null or {"baseline", "difference": {"mean", "ci95"}, "verdict"}}],
     "curves": {"learning": {method: {"epoch": [...], "validation_accuracy": [...]}},
                "alpha": {method: {"alpha": [...], "validation_accuracy": [...],
                                   "test_accuracy": [...], "best": float}}},
     "notes": [str], "environment": {...}}

`ci95` is the half-width of the 95 % interval of the mean, by Student's t over seeds. `agreement` is
the share of test examples on which student and teacher name the same class. `versus` compares
seed by seed (both methods of a seed share data and teacher). `seconds` is the wall time of all
seeds and settings of a method, compilation included. A number that is not finite is null.
"""

import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from kdtl_jax import _files

SCHEMA_VERSION = 1


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval (None for one seed)."""

    mean: float
    ci95: float | None
    values: tuple[float, ...]


class Versus(NamedTuple):
    """A paired comparison with a baseline."""

    baseline: str
    difference: Interval
    verdict: str  # "better", "worse", "no clear difference" or "not finite"


class Row(NamedTuple):
    """One method's line in the table."""

    method: str
    family: str
    label: str  # in words
    parameters: int
    test: Interval
    validation: Interval
    seconds: float
    settings: Mapping[str, Any]
    agreement: Interval | None = None
    versus: Versus | None = None


class Results(NamedTuple):
    """What a run found; `to_json` documents the file."""

    task: str
    data: Mapping[str, Any]
    rows: Sequence[Row]
    learning: Mapping[str, Mapping[str, Sequence[float]]]
    alpha: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()


def interval(values: Any) -> Interval:
    """Mean and 95 % half-width `t(0.975, n - 1) s / sqrt(n)` over independent seeds.

    NaN where a value is not finite: one failed seed is not averaged away.

    Raises:
      ValueError: if there are no values.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if not x.size:
        raise ValueError("needs at least one value.")
    if not np.isfinite(x).all():
        return Interval(math.nan, None if x.size == 1 else math.nan, tuple(map(float, x)))
    half = None
    if x.size > 1:
        half = float(stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / np.sqrt(x.size))
    return Interval(float(x.mean()), half, tuple(map(float, x)))


def versus(baseline: Row, values: Sequence[float]) -> Versus:
    """Whether a method differs from a baseline: the interval of seed-by-seed differences."""
    difference = interval(np.subtract(values, baseline.test.values))
    mean, half = difference.mean, difference.ci95
    if not math.isfinite(mean):
        verdict = "not finite"
    elif half is None or abs(mean) <= half:
        verdict = "no clear difference"
    else:
        verdict = "better" if mean > 0 else "worse"
    return Versus(baseline.method, difference, verdict)


def compared(rows: Sequence[Row], baselines: Mapping[str, str]) -> list[Row]:
    """Rows with `versus` filled in; `baselines` maps a family to its baseline's method."""
    by_method = {row.method: row for row in rows}
    return [
        row
        if row.family not in baselines or row.method == baselines[row.family]
        else row._replace(versus=versus(by_method[baselines[row.family]], row.test.values))
        for row in rows
    ]


def ranked(values: Sequence[float]) -> list[int]:
    """Places of the values, the largest first; those that are not finite come last."""
    keys = [value if math.isfinite(value) else -math.inf for value in values]
    return sorted(range(len(keys)), key=lambda i: -keys[i])


def to_json(results: Results) -> dict[str, Any]:
    """The content of `results.json` (see the module's first lines)."""
    return _files.as_json(_record(results))


def _record(results: Results) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "task": results.task,
        "data": dict(results.data),
        "rows": [_row(row) for row in results.rows],
        "curves": {
            "learning": {k: dict(v) for k, v in results.learning.items()},
            "alpha": {k: dict(v) for k, v in results.alpha.items()},
        },
        "notes": list(results.notes),
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, devices and processor."""
    packages = ("kdtl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in packages},
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "family": row.family,
        "label": row.label,
        "parameters": row.parameters,
        "seeds": len(row.test.values),
        "test_accuracy": _interval(row.test),
        "validation_accuracy": _interval(row.validation),
        "agreement": None if row.agreement is None else _interval(row.agreement),
        "versus": None if row.versus is None else _versus(row.versus),
        "seconds": round(row.seconds, 3),
        "settings": dict(row.settings),
    }


def _versus(found: Versus) -> dict[str, Any]:
    difference = {"mean": found.difference.mean, "ci95": found.difference.ci95}
    return {"baseline": found.baseline, "difference": difference, "verdict": found.verdict}


def _interval(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "ci95": found.ci95, "values": list(found.values)}
