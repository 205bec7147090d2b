"""Intervals and verdicts: by definition, as published, and as often right as they claim."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from kdtl_jax.run import report
from kdtl_jax.run.report import Row
from kdtl_jax.run.report._intervals import spread, wilson

RNG = np.random.default_rng(0)


def row(method: str, examples: Any = None, values: Any = None, **more: Any) -> Row:
    table = None if examples is None else np.asarray(examples, float)
    values = values if table is None else table.mean(axis=1)
    test = report.interval(values, table, is_share=True)
    base = Row(method, "students", method, 1, test, test, 1.0, {}, examples=table)
    return base._replace(**more)


def verdict(baseline: Row, other: Row, **options: Any) -> report.Versus:
    result = report.compared([baseline, other], {"students": baseline.method}, **options)[1].versus
    assert result is not None
    return result


def by_seed(baseline: list[float], values: list[float]) -> report.Versus:
    return verdict(row("alone", values=baseline), row("kd", values=values))


def studies(
    replications: int, seeds: int, examples: int, *, ease: float, spread: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Two equally good methods: right or wrong `[R, S, N]` by hardness, seed and chance."""
    hard = RNG.normal(0, 2, (replications, 1, examples))

    def method() -> np.ndarray:
        own = RNG.normal(0, 0.5, (replications, 1, examples))
        seed = RNG.normal(0, spread, (replications, seeds, 1))
        chance = RNG.normal(0, 0.5, (replications, seeds, examples))
        return (hard + own + seed + chance + ease > 0).astype(float)

    return method(), method()


# Of seeds alone.


@pytest.mark.parametrize("size", [2, 3, 5, 30])
def test_intervals_are_students(size: int) -> None:
    values = np.random.default_rng(size).normal(3, 2, size)
    actual = report.interval(values)
    expected = scipy.stats.t.interval(
        0.95, size - 1, loc=values.mean(), scale=scipy.stats.sem(values)
    )
    assert actual.low is not None and actual.high is not None
    np.testing.assert_allclose([actual.low, actual.high], expected)
    assert actual.values == tuple(values)


def test_intervals_cover_the_mean_as_often_as_they_claim() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 4))
    results = [report.interval(draw) for draw in draws]
    covered = np.mean([(x.low or 0) <= 0 <= (x.high or 0) for x in results])
    assert abs(covered - 0.95) < 0.015  # three standard deviations of 2000 trials


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert report.interval(0.5) == report.Interval(0.5, None, None, (0.5,))
    assert report.percent(report.interval(0.5)) == "50.0"
    assert report.percent(report.Interval(0.906, 0.897, 0.915, ())) == "90.6 (89.7–91.5)"
    r2 = report.Score("r2", "R²", is_share=False)
    assert report.percent(report.Interval(-0.4, -0.9, 0.1, ()), r2) == "-0.400 (-0.900 to 0.100)"
    with pytest.raises(ValueError, match="at least one value"):
        report.interval([])
    with pytest.raises(
        ValueError, match=r"examples must be \[2, N\], a row per seed, got \[3, 4\]"
    ):
        report.interval([0.5, 0.5], np.ones((3, 4)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.85, 0.88, 0.86], "better"),
        ([0.75, 0.78, 0.76], "worse"),
        ([0.80, 0.82, 0.81], "no clear difference"),
        ([0.90, 0.80, 0.79], "no clear difference"),  # larger mean, but one seed makes it
    ],
)
def test_verdicts_are_of_paired_differences(values: list[float], expected: str) -> None:
    baseline = [0.80, 0.82, 0.81]
    actual = by_seed(baseline, values)
    assert (actual.baseline, actual.verdict) == ("alone", expected)
    difference = report.interval(np.subtract(values, baseline))
    assert actual.difference == difference
    if difference.low != difference.high:
        paired: Any = scipy.stats.ttest_rel(values, baseline)
        assert actual.p_value == pytest.approx(paired.pvalue)


def test_pairing_finds_what_spread_over_seeds_would_hide() -> None:
    baseline, values = [0.5, 0.7, 0.9], [0.51, 0.712, 0.911]
    assert by_seed(baseline, values).verdict == "better"
    unpaired: Any = scipy.stats.ttest_ind(values, baseline)
    assert unpaired.pvalue > 0.9


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_are_not_tested(seeds: int) -> None:
    actual = by_seed([0.1] * seeds, [0.9] * seeds)
    assert actual.verdict == "not tested" and math.isnan(actual.p_value)
    rights = np.repeat([[0] * 50, [1] * 50], seeds, axis=0).reshape(2, seeds, 50)
    assert verdict(row("alone", rights[0]), row("kd", rights[1])).verdict == "not tested"


# Of seeds and examples.


def test_the_analysis_is_that_of_readers_and_cases() -> None:
    """Two treatments, readers and cases: F and its degrees of freedom as Hillis (2007) has them."""
    x = np.stack([part[0] for part in studies(1, 4, 30, ease=1.0)])  # [treatment, reader, case]
    _, r, c = x.shape

    def effect(*axes: int) -> np.ndarray:
        """The interaction of axes: means over the others, less all lower ones."""
        out = np.zeros_like(x)
        for chosen in range(2 ** len(axes)):
            kept = [axis for i, axis in enumerate(axes) if chosen >> i & 1]
            others = tuple(axis for axis in range(3) if axis not in kept)
            mean = x.mean(axis=others, keepdims=True) if others else x
            out = out + (-1) ** (len(axes) - len(kept)) * mean
        return out

    ms_t = (effect(0) ** 2).sum()
    ms_tr = (effect(0, 1) ** 2).sum() / (r - 1)
    ms_tc = (effect(0, 2) ** 2).sum() / (c - 1)
    ms_trc = (effect(0, 1, 2) ** 2).sum() / ((r - 1) * (c - 1))
    below = ms_tr + max(ms_tc - ms_trc, 0)
    df = below**2 / (ms_tr**2 / (r - 1))
    assert df < c - 1, "else the bound by the number of cases is what is compared"
    expected = scipy.stats.f.sf(ms_t / below, 1, df)
    assert verdict(row("a", x[0]), row("b", x[1])).p_value == pytest.approx(expected)


def test_the_variance_is_unbiased() -> None:
    seeds, count, of_seed, of_example, rest = 4, 25, 0.3, 1.0, 0.7
    shape = (4000, seeds, count)
    x = (
        RNG.normal(0, of_seed, (shape[0], seeds, 1))
        + RNG.normal(0, of_example, (shape[0], 1, count))
        + RNG.normal(0, rest, shape)
    )
    true = of_seed**2 / seeds + of_example**2 / count + rest**2 / (seeds * count)
    assert x.mean(axis=(1, 2)).var() == pytest.approx(true, rel=0.08)
    assert spread(x).variance.mean() == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize(("seeds", "count"), [(3, 100), (5, 300), (10, 100)])
def test_shares_and_differences_are_covered_as_often_as_claimed(seeds: int, count: int) -> None:
    ours, theirs = studies(1000, seeds, count, ease=2.0)
    true = scipy.stats.norm.cdf(2 / math.sqrt(2**2 + 0.5**2 + 0.2**2 + 0.5**2))
    low, high = wilson(ours.mean(axis=(1, 2)), spread(ours), count)
    covered = np.mean((low <= true) & (true <= high))
    assert 0.925 <= covered <= 0.985
    both = ours - theirs  # nothing to find
    result = spread(both)
    varied = result.variance > 0  # else all differences are 0
    t = np.abs(both.mean(axis=(1, 2))) / np.sqrt(np.where(varied, result.variance, np.inf))
    wrong = np.mean(2 * scipy.stats.t.sf(t, result.df) <= 0.05)
    assert 0.02 <= wrong <= 0.08
    # What seeds alone would claim: the test set is one draw, and they do not see it.
    alone = spread(ours.mean(axis=2, keepdims=True))
    half = scipy.stats.t.ppf(0.975, seeds - 1) * np.sqrt(alone.variance)
    assert np.mean(np.abs(ours.mean(axis=(1, 2)) - true) <= half) < 0.85


@pytest.mark.parametrize(("seeds", "spread_of_seeds"), [(3, 0.1), (3, 1.0), (5, 0.2)])
def test_tables_of_equal_methods_rarely_claim_a_difference(
    seeds: int, spread_of_seeds: float
) -> None:
    """Three methods against one baseline, all as good as another, corrected as a page corrects."""
    rng, tables, count = np.random.default_rng(11), 2000, 100
    ease = 1 + rng.normal(0, 1.4, (tables, 1, 1, count)) + rng.normal(0, 0.5, (tables, 4, 1, count))
    ease = ease + rng.normal(0, spread_of_seeds, (tables, 4, seeds, 1))
    right = rng.random(ease.shape) < 1 / (1 + np.exp(-ease))
    difference = right[:, 1:].astype(float) - right[:, :1]
    result = spread(difference)
    t = np.abs(difference.mean((-2, -1))) / np.sqrt(result.variance)
    smallest = (2 * scipy.stats.t.sf(t, result.df)).min(axis=1)
    assert np.mean(smallest * 3 <= 0.05) <= 0.06


@pytest.mark.parametrize(
    ("seeds", "spread_of_seeds", "methods", "count", "chance"),
    [(3, 0.1, 3, 100, 1.0), (3, 1.0, 3, 100, 1.0), (3, 0.25, 10, 300, 0.2)],
)
def test_many_methods_of_few_seeds_rarely_claim_a_difference(
    seeds: int, spread_of_seeds: float, methods: int, count: int, chance: float
) -> None:
    """Methods against one baseline, all as good as another, corrected as a page corrects."""
    rng, tables = np.random.default_rng(11), 150
    shape = (tables, methods + 1, seeds, count)
    ease = 1 + rng.normal(0, 1.4, (tables, 1, 1, count))
    ease = ease + rng.normal(0, 0.5, (tables, methods + 1, 1, count))
    ease = ease + rng.normal(0, spread_of_seeds, shape[:3])[..., None]
    right = (ease + rng.logistic(0, chance, shape) > 0).astype(float)
    wrong = 0
    for baseline, *others in right:
        actual = [
            report.difference(each.mean(1), baseline.mean(1), each, baseline) for each in others
        ]
        wrong += min(report.holm([p for _, p in actual])) <= 0.05
        assert all(((x.low or 0) > 0 or (x.high or 0) < 0) == (p <= 0.05) for x, p in actual)
    assert wrong / tables <= 0.085  # two standard deviations of 150 tables above 0.05


def test_a_test_set_too_small_for_a_claim_is_seen() -> None:
    """One example more, for every seed: certain for these examples, and nothing for others."""
    rights = np.tile(np.arange(40) < 30, (5, 1)).astype(float)
    more = rights.copy()
    more[:, 30] = 1
    assert by_seed(list(rights.mean(1)), list(more.mean(1) + 1e-9 * np.arange(5))).p_value < 1e-3
    actual = verdict(row("alone", rights), row("kd", more))
    assert actual.verdict == "no clear difference" and actual.p_value > 0.3


@pytest.mark.parametrize("share", [0.0, 1.0, 0.99, 0.02])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_intervals_of_shares_stay_within_0_and_1(share: float, seeds: int) -> None:
    rights = RNG.random((seeds, 50)) < share
    actual = report.interval(rights.mean(axis=1), rights, is_share=True)
    assert actual.low is not None and actual.high is not None
    assert 0 <= actual.low <= actual.mean <= actual.high <= 1
    assert actual.high - actual.low > 0.02, "a perfect score on 50 examples is not certain"
    alone = report.interval([share] * seeds, is_share=True)
    assert alone.low is not None and alone.high is not None and 0 <= alone.low <= alone.high <= 1


def test_differences_of_shares_stay_within_their_range() -> None:
    actual = by_seed([0.0, 0.1, 0.9], [1.0, 1.0, 1.0]).difference
    assert actual.low is not None and actual.high == 1.0 and actual.low >= -1


def test_all_examples_turned_around_is_decided_by_their_number() -> None:
    nothing, everything = np.zeros((3, 4)), np.ones((3, 4))
    actual = verdict(row("alone", nothing), row("kd", everything))
    assert actual.p_value == 2**-3 and actual.verdict == "no clear difference"
    assert verdict(row("alone", nothing), row("kd", nothing)).p_value == 1
    wide = verdict(row("alone", np.zeros((3, 40))), row("kd", np.ones((3, 40))))
    assert wide.verdict == "better"


# Of many comparisons.


def test_holm_by_hand_and_against_scipy() -> None:
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([]) == [] and report.holm([0.7, 0.9]) == [1.0, 1.0]
    mixed = report.holm([math.nan, 0.02, 0.03])
    assert math.isnan(mixed[0]) and mixed[1:] == pytest.approx([0.04, 0.04])


def test_many_comparisons_are_corrected() -> None:
    baseline, values = [0.80, 0.82, 0.81], [0.85, 0.88, 0.86]  # p = 0.004
    rows = [row("alone", values=baseline), row("kd", values=values)]
    others = [row(f"m{i}", values=[0.81, 0.80, 0.82]) for i in range(14)]
    actual = report.compared([*rows, *others], {"students": "alone"})[1].versus
    assert actual is not None and actual.verdict == "no clear difference"
    assert actual.p_adjusted == pytest.approx(15 * actual.p_value)
    few = report.compared(rows, {"students": "alone"})[1].versus
    assert few is not None and few.verdict == "better"


def test_smaller_may_be_better() -> None:
    baseline, smaller = (
        row(name, values=values, is_share=False)
        for name, values in (("alone", [3.0, 3.1, 2.9]), ("kd", [1.0, 1.2, 0.8]))
    )
    assert verdict(baseline, smaller, minimize=True).verdict == "better"
    assert verdict(smaller, baseline, minimize=True).verdict == "worse"
