"""The results record: rows of methods with intervals, and the environment they were obtained in.

`results.json`, schema_version 2:

    {"schema_version": 2, "task": str, "data": {...},
     "rows": [{"method": str, "family": str, "parameters": int, "seeds": int,
               "test_accuracy": {"mean", "ci95", "values": [seeds]},
               "seconds": float, "settings": {...},
               "validation_accuracy", "agreement": as test_accuracy, or null,
               "versus": null or {"baseline", "difference": {"mean", "ci95"}, "p_value",
                                  "p_adjusted", "verdict"}}],
     "curves": {"learning": {method: {"epoch": [...], "validation_accuracy": [...]}},
                "alpha": {method: {"alpha": [...], "validation_accuracy": [...],
                                   "test_accuracy": [...], "best": float}}},
     "notes": [str], "run": {"command", "begun", setting: value}, "environment": {...}}

If the score is not accuracy, its name replaces "accuracy" in these keys, as in "test_r2".

`ci95` is the 95% interval of the mean, [low, high] or null for one seed. It covers other seeds
and, if examples are scored one by one, other test examples (`_intervals`). `agreement` is the
share of test examples on which student and teacher predict the same class. `versus` compares by
seed and by example; `p_adjusted` is corrected for all comparisons in the file (Holm).
`seconds` is the wall time of all seeds and settings of a method, compilation included. A number
that is not finite becomes null.
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

from kdtl_jax import _files
from kdtl_jax.run.record import PACKAGES
from kdtl_jax.run.report._intervals import LEVEL, MIN_SEEDS, Interval, difference, holm

SCHEMA_VERSION = 2  # of results.json; raised when its keys change


class Score(NamedTuple):
    """A score for which larger is better."""

    key: str  # in results.json: test_<key>, validation_<key>
    name: str  # for the page
    is_share: bool = True  # between 0 and 1, shown in percent

    @property
    def unit(self) -> str:
        """`%`, or nothing."""
        return "%" if self.is_share else ""

    @property
    def factor(self) -> float:
        """From the score to the number that is written."""
        return 100.0 if self.is_share else 1.0

    @property
    def axis(self) -> str:
        """The name with its unit, for plots and headings."""
        return f"{self.name}, %" if self.is_share else self.name

    def shown(self, value: float) -> str:
        """`accuracy 90.6%`, `R² 0.873`."""
        return f"{self.name} {self.number(value)}{self.unit}"

    def number(self, value: float, *, sign: bool = False) -> str:
        """`90.6`, `0.873`; with `sign`, also the plus of a difference."""
        if not math.isfinite(value):
            return "nan"
        digits = 1 if self.is_share else 3
        return f"{self.factor * value:{'+' if sign else ''}.{digits}f}"


ACCURACY = Score("accuracy", "accuracy")  # for tasks with one class per example


class Versus(NamedTuple):
    """A comparison with a baseline, paired by seed and, if known, by example."""

    baseline: str
    difference: Interval
    p_value: float  # of this comparison alone; NaN if it was not tested
    p_adjusted: float  # among all comparisons of the table, by Holm
    verdict: str  # "better", "worse", "no clear difference", "not tested" or "not finite"


class Row(NamedTuple):
    """One method's line in the table."""

    method: str
    family: str
    label: str  # for the page
    parameters: int
    test: Interval
    validation: Interval
    seconds: float
    settings: Mapping[str, Any]
    agreement: Interval | None = None
    versus: Versus | None = None
    examples: np.ndarray | None = None  # [S, N], the scores of the test examples
    is_share: bool = True  # scores lie in [0, 1]


class Results(NamedTuple):
    """The results of a run; `to_json` documents the file."""

    task: str
    data: Mapping[str, Any]
    rows: Sequence[Row]
    learning: Mapping[str, Mapping[str, Sequence[float]]]
    alpha: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()
    run: Mapping[str, Any] = {}  # command line, date and all settings
    sections: Sequence[Any] = ()  # more `Section`s of the page, after the curves
    score: Score = ACCURACY


def compared(
    rows: Sequence[Row], baselines: Mapping[str, str], *, minimize: bool = False
) -> list[Row]:
    """Rows with `versus` filled in.

    A difference is claimed if Holm's adjusted p-value is at most 0.05, counting every comparison
    among the rows; fewer than three seeds are not tested.

    Args:
      rows: of all families.
      baselines: the method of each family's baseline.
      minimize: whether smaller scores are better.
    """
    by_method = {row.method: row for row in rows}
    comparisons = [
        None
        if row.family not in baselines or row.method == baselines[row.family]
        else _compare(by_method[baselines[row.family]], row)
        for row in rows
    ]
    adjusted = holm([math.nan if versus is None else versus.p_value for versus in comparisons])
    return [
        row
        if versus is None
        else row._replace(
            versus=versus._replace(p_adjusted=p, verdict=_verdict(versus.difference, p, minimize))
        )
        for row, versus, p in zip(rows, comparisons, adjusted, strict=True)
    ]


def _compare(baseline: Row, row: Row) -> Versus:
    """A single comparison, without a verdict."""
    change, p = difference(
        row.test.values,
        baseline.test.values,
        row.examples,
        baseline.examples,
        is_share=row.is_share,
    )
    is_tested = len(change.values) >= MIN_SEEDS and math.isfinite(p)
    p = p if is_tested else math.nan
    return Versus(baseline.method, change, p, p, "")


def _verdict(difference: Interval, p: float, minimize: bool) -> str:
    if not math.isfinite(difference.mean):
        return "not finite"
    if math.isnan(p):
        return "not tested"
    if p > LEVEL:
        return "no clear difference"
    return "better" if (difference.mean < 0) == minimize else "worse"


def to_json(results: Results) -> dict[str, Any]:
    """The content of `results.json` (see the module's docstring)."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "task": results.task,
        "data": results.data,
        "rows": [_row(row, results.score.key) for row in results.rows],
        "curves": {"learning": results.learning, "alpha": results.alpha},
        "notes": results.notes,
        "run": results.run,
        "environment": environment(),
    }
    return _files.as_json(record)


def environment() -> dict[str, Any]:
    """Versions, devices and processor."""
    devices = jax.devices()
    return {
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def _row(row: Row, score: str) -> dict[str, Any]:
    return {
        "method": row.method,
        "family": row.family,
        "label": row.label,
        "parameters": row.parameters,
        "seeds": len(row.test.values),
        f"test_{score}": _interval(row.test),
        f"validation_{score}": _interval(row.validation),
        "agreement": None if row.agreement is None else _interval(row.agreement),
        "versus": None if row.versus is None else _versus(row.versus),
        "seconds": round(row.seconds, 3),
        "settings": row.settings,
    }


def _versus(versus: Versus) -> dict[str, Any]:
    change = {"mean": versus.difference.mean, "ci95": _bounds(versus.difference)}
    return versus._asdict() | {"difference": change}


def _interval(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": _bounds(interval), "values": list(interval.values)}


def _bounds(interval: Interval) -> list[float] | None:
    if interval.low is None or interval.high is None or math.isnan(interval.low):
        return None
    return [interval.low, interval.high]
