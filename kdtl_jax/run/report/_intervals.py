"""Confidence intervals of mean scores, and significance of many comparisons.

S seeds scored on the same N test examples form a table `[S, N]`. Both are samples: a claim about a
method has to hold for other seeds and other examples. The design is that of studies in which
several readers see the same cases, and so is the analysis, with seeds as readers and examples as
cases. With the mean squares of seeds, examples and the residual,

    var(mean) = (max(MS_seeds, MS_residual) + max(MS_examples - MS_residual, 0)) / (S N)
    df        = (MS_seeds + max(MS_examples - MS_residual, 0))^2 / (MS_seeds^2 / (S - 1))

and Student's t. In expectation MS_seeds is at least MS_residual, but with three seeds it is often
smaller by chance: without the first maximum, which is not Hillis's, one in ten tables of equal
methods claims a difference. If only one score per seed is known, the variance is that of the seeds.

With few seeds the degrees of freedom are uncertain, too: three scores may be alike by chance, and
with ten methods as good as their baseline, one table in seven would claim that one differs. So a
difference also has to pass the t-test of its seeds alone: the larger p-value and the wider interval
are used (an intersection-union test), and for a mean, the wider interval.

References:
  Dorfman, Berbaum, Metz, Receiver operating characteristic rating analysis, 1992 (the model).
  Hillis, A comparison of denominator degrees of freedom methods for multiple observer ROC analysis,
  Statistics in Medicine 26, 2007 (the degrees of freedom).
  Berger, Multiparameter hypothesis testing and acceptance sampling, Technometrics 24, 1982 (tests
  that must all reject).
  Franco, Little, Louis, Slud, Comparative study of confidence intervals for proportions in complex
  sample surveys, 2019 (Wilson's interval with an effective sample size).
  Holm, A simple sequentially rejective multiple test procedure, 1979.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

MIN_SEEDS = 3  # with fewer, nothing is claimed
LEVEL = 0.05
_QUIET = np.errstate(over="ignore", invalid="ignore")  # scores like -1e200 give NaN


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval (None for one seed)."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]  # by seed


class Spread(NamedTuple):
    """The variance of a mean `[...]` and its degrees of freedom."""

    variance: np.ndarray
    df: np.ndarray


@_QUIET
def interval(values: Any, examples: Any = None, *, is_share: bool = False) -> Interval:
    """The mean over seeds and its 95% interval.

    NaN if a value is not finite, so that a failed seed is not averaged away.

    Args:
      values: one score per seed, `[S]`.
      examples: the scores of single test examples, `[S, N]`; without them, the interval covers
        other seeds but not other examples.
      is_share: scores lie in [0, 1], and so does the interval (Wilson's).

    Raises:
      ValueError: if there are no values, or their seeds are not those of the examples.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if not x.size:
        raise ValueError("needs at least one value.")
    seed_scores = tuple(map(float, x))
    if not np.isfinite(x).all():
        bound = None if x.size == 1 else math.nan
        return Interval(math.nan, bound, bound, seed_scores)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, None, seed_scores)
    spreads = _variances(x, examples)
    if not is_share:
        half = max(float(stdtrit(s.df, 1 - LEVEL / 2) * np.sqrt(s.variance)) for s in spreads)
        return Interval(mean, mean - half, mean + half, seed_scores)
    count = x.size if examples is None else np.shape(examples)[1]
    low, high = zip(*(wilson(mean, each, count) for each in spreads), strict=True)
    return Interval(mean, float(min(low)), float(max(high)), seed_scores)


@_QUIET
def difference(
    values: Any, baseline: Any, examples: Any = None, baseline_examples: Any = None,
    *, is_share: bool = False,
) -> tuple[Interval, float]:  # fmt: skip
    """The mean difference, seed by seed and example by example, and its two-sided p-value.

    Args:
      values: one score per seed, `[S]`.
      baseline: the baseline's, of the same seeds.
      examples: scores of the same test examples, `[S, N]`, or None.
      baseline_examples: the baseline's.
      is_share: scores lie in [0, 1], so differences lie in [-1, 1] and the interval is cut there.

    Raises:
      ValueError: as `interval`, or if the two cannot be paired.
    """
    paired = None
    if examples is not None and baseline_examples is not None:
        paired = np.asarray(examples, np.float64) - np.asarray(baseline_examples, np.float64)
    x = np.subtract(values, baseline)
    result = interval(x, paired)
    if result.low is None or result.high is None or math.isnan(result.low):
        return result, math.nan
    if is_share:
        result = result._replace(low=max(result.low, -1.0), high=min(result.high, 1.0))
    p_values = [
        float(2 * stdtr(estimate.df, -abs(result.mean) / np.sqrt(estimate.variance)))
        for estimate in _variances(x, paired)
        if estimate.variance > 0
    ]
    if p_values:
        return result, max(p_values)
    # All differences are equal: a coin toss for each of them.
    count = x.size if paired is None else paired.shape[1]
    return result, 1.0 if result.mean == 0 else 2.0 ** (1 - count)


def spread(table: Any) -> Spread:
    """The variance of the mean of tables `[..., S, N]`, and its degrees of freedom.

    One column (`N = 1`) is one score per seed: the variance is `s^2 / S`, with `S - 1`.
    """
    x = np.asarray(table, np.float64)
    seeds, count = x.shape[-2:]
    mean = x.mean((-2, -1), keepdims=True)
    by_seed = x.mean(-1, keepdims=True) - mean
    ms_seeds = count * (by_seed**2).sum((-2, -1)) / (seeds - 1)
    if count == 1:
        return Spread(ms_seeds / seeds, np.full(ms_seeds.shape, seeds - 1.0))
    by_example = x.mean(-2, keepdims=True) - mean
    residual = x - mean - by_seed - by_example
    ms_examples = seeds * (by_example**2).sum((-2, -1)) / (count - 1)
    ms_residual = (residual**2).sum((-2, -1)) / ((seeds - 1) * (count - 1))
    example_variance = np.maximum(ms_examples - ms_residual, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (seeds - 1) * ((ms_seeds + example_variance) / ms_seeds) ** 2
    total = np.maximum(ms_seeds, ms_residual) + example_variance
    # A value estimated from N examples has no more degrees of freedom than they give.
    df = np.where(ms_seeds > 0, np.minimum(df, count - 1), count - 1.0)
    return Spread(total / (seeds * count), df)


def wilson(share: Any, estimate: Spread, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share with the effective sample size `p (1 - p) / variance`.

    It stays within 0 and 1. At both it has a width, from a sample size of `count` examples.
    """
    p, t = np.clip(share, 0.0, 1.0), stdtrit(estimate.df, 1 - LEVEL / 2)
    pq = p * (1 - p)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where((estimate.variance > 0) & (pq > 0), pq / estimate.variance, count)
    center = (p + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t / (1 + t**2 / size) * np.sqrt(pq / size + t**2 / (4 * size**2))
    # The formula's ends are exactly 0 and 1 there, except for rounding.
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons (Holm's step-down); NaN is not counted."""
    finite = sorted((p, i) for i, p in enumerate(p_values) if math.isfinite(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(finite):
        largest = max(largest, min(1.0, (len(finite) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _variances(values: np.ndarray, examples: Any) -> list[Spread]:
    """The variances of the mean: from the seeds' scores alone, and with their examples."""
    by_seed = spread(values[:, None])
    if examples is None:
        return [by_seed]
    table = np.asarray(examples, np.float64)
    if table.ndim != 2 or len(table) != len(values):
        raise ValueError(
            f"examples must be [{len(values)}, N], a row per seed, got {list(table.shape)}."
        )
    return [by_seed, spread(table)]
