"""How far a mean score can be trusted, and which of many comparisons hold.

S seeds scored on the same N test examples form a table `[S, N]`. Both are samples: a claim about a
method has to hold for other seeds and other examples. Studies in which several readers see the same
cases have this design, and their analysis is used here, with seeds as readers and examples as
cases. With the mean squares of seeds, examples and the remainder,

    var(mean) = (max(MS_seeds, MS_rest) + max(MS_examples - MS_rest, 0)) / (S N)
    df        = (MS_seeds + max(MS_examples - MS_rest, 0))^2 / (MS_seeds^2 / (S - 1))

and Student's t. In expectation MS_seeds is at least MS_rest, but with three seeds it is often
smaller by chance: without the first maximum, which is not Hillis's, one in ten tables of equal
methods claims a difference. If only one score per seed is known, the variance is that of the seeds.

With few seeds the degrees of freedom are uncertain, too: three scores that are alike by chance look
like certainty, and with ten methods as good as their baseline, one table in seven named one that
differs. So a difference also has to pass the t-test of its seeds alone: the larger p-value and the
wider interval are used (an intersection-union test), and for a mean, the wider interval.

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

FEWEST_SEEDS = 3  # with fewer, nothing is claimed
LEVEL = 0.05
_QUIET = np.errstate(over="ignore", invalid="ignore")  # for scores like -1e200: NaN says enough


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
      examples: the scores of the test examples behind them, `[S, N]`; without them, the interval
        is for these examples and other seeds.
      is_share: scores lie in [0, 1], and so does the interval (Wilson's).

    Raises:
      ValueError: if there are no values, or their seeds are not those of the examples.
    """
    x = np.asarray(values, np.float64).reshape(-1)
    if not x.size:
        raise ValueError("needs at least one value.")
    own = tuple(map(float, x))
    if not np.isfinite(x).all():
        nothing = None if x.size == 1 else math.nan
        return Interval(math.nan, nothing, nothing, own)
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, None, own)
    spreads = _spreads(x, examples)
    if not is_share:
        half = max(float(stdtrit(s.df, 1 - LEVEL / 2) * np.sqrt(s.variance)) for s in spreads)
        return Interval(mean, mean - half, mean + half, own)
    count = x.size if examples is None else np.shape(examples)[1]
    low, high = zip(*(wilson(mean, each, count) for each in spreads), strict=True)
    return Interval(mean, float(min(low)), float(max(high)), own)


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
    found = interval(x, paired)
    if found.low is None or found.high is None or math.isnan(found.low):
        return found, math.nan
    if is_share:
        found = found._replace(low=max(found.low, -1.0), high=min(found.high, 1.0))
    p_values = [
        float(2 * stdtr(of_mean.df, -abs(found.mean) / np.sqrt(of_mean.variance)))
        for of_mean in _spreads(x, paired)
        if of_mean.variance > 0
    ]
    if p_values:
        return found, max(p_values)
    # All differences are equal: a coin toss for each of them.
    count = x.size if paired is None else paired.shape[1]
    return found, 1.0 if found.mean == 0 else 2.0 ** (1 - count)


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
    rest = x - mean - by_seed - by_example
    ms_examples = seeds * (by_example**2).sum((-2, -1)) / (count - 1)
    ms_rest = (rest**2).sum((-2, -1)) / ((seeds - 1) * (count - 1))
    of_examples = np.maximum(ms_examples - ms_rest, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = (seeds - 1) * ((ms_seeds + of_examples) / ms_seeds) ** 2
    whole = np.maximum(ms_seeds, ms_rest) + of_examples
    # A value estimated from N examples has no more degrees of freedom than they give.
    df = np.where(ms_seeds > 0, np.minimum(df, count - 1), count - 1.0)
    return Spread(whole / (seeds * count), df)


def wilson(share: Any, found: Spread, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a share with the effective sample size `p (1 - p) / variance`.

    It stays within 0 and 1. At both it has a width, from a sample size of `count` examples.
    """
    p, t = np.clip(share, 0.0, 1.0), stdtrit(found.df, 1 - LEVEL / 2)
    inner = p * (1 - p)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = np.where((found.variance > 0) & (inner > 0), inner / found.variance, count)
    middle = (p + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t / (1 + t**2 / size) * np.sqrt(inner / size + t**2 / (4 * size**2))
    # The formula's ends are exactly 0 and 1 there, except for rounding.
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for the number of comparisons (Holm's step-down); NaN is not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if math.isfinite(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _spreads(values: np.ndarray, examples: Any) -> list[Spread]:
    """From the seeds' scores alone, and with their examples."""
    alone = spread(values[:, None])
    return [alone] if examples is None else [alone, spread(_table(values, examples))]


def _table(values: np.ndarray, examples: Any) -> np.ndarray:
    found = np.asarray(examples, np.float64)
    if found.ndim != 2 or len(found) != len(values):
        raise ValueError(
            f"examples must be [{len(values)}, N], a row per seed, got {list(found.shape)}."
        )
    return found
