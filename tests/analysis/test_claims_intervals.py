"""Intervals: what they cover on synthetic draws, and against scipy's t test; interpolation of shares."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from analysis.claims.intervals import estimate, interval_of_mean
from sae_zoo.frontier.pareto import interpolate_at


def coverage(draw, n_draws=250):
    """Share of draws whose interval holds the true mean 0; its standard error is about 1.4 % at 95 %."""
    return np.mean([low < 0 < high for low, high in (draw() for _ in range(n_draws))])


@pytest.mark.parametrize("n", [3, 5, 6, 9])
def test_intervals_cover_what_they_say(n):
    rng = np.random.default_rng(n)
    assert 0.91 <= coverage(lambda: interval_of_mean(rng.normal(size=n).tolist())[0]) <= 0.98


def test_intervals_cover_skewed_numbers_nearly_so():
    rng = np.random.default_rng(0)
    assert 0.88 <= coverage(lambda: interval_of_mean((rng.exponential(size=9) - 1).tolist())[0]) <= 0.97


@pytest.mark.parametrize("n_groups", [3, 9])
def test_groups_that_differ_are_covered_because_group_means_are_drawn(n_groups):
    rng = np.random.default_rng(n_groups)

    def draw(by_pairs=False):
        site = rng.normal(0, 1, n_groups)
        units = {(g, s): site[g] + rng.normal(0, 0.3) for g in range(n_groups) for s in range(3)}
        return interval_of_mean(list(units.values()))[0] if by_pairs else estimate(units).interval

    assert 0.91 <= coverage(draw) <= 0.98
    assert coverage(lambda: draw(by_pairs=True), 100) < 0.85  # pairs of one site are no independent numbers


def test_few_numbers_get_students_t():
    values = [0.1, 0.25, 0.15, 0.4]
    interval, method = interval_of_mean(values)
    assert interval == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)))
    assert method == "Student's t over 4"
    assert interval_of_mean(values * 2)[1] == "bootstrap over 8"
    assert interval_of_mean(values[:2]) == (None, None)


def test_bootstrap_is_the_same_each_time_and_near_t_for_normal_numbers():
    values = np.random.default_rng(4).normal(2, 1, 40).tolist()
    interval, _ = interval_of_mean(values)
    assert interval == interval_of_mean(values)[0]
    assert interval == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval(0.95)), abs=0.03)


@pytest.mark.parametrize("n", [3, 7])
@pytest.mark.filterwarnings("error")
def test_equal_numbers_have_no_spread(n):
    assert interval_of_mean([1.5] * n)[0] == (1.5, 1.5)


def test_groups_count_alike_whatever_their_seeds():
    units = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 5.0, ("c", 0): 0.0}
    found = estimate(units)
    assert found.effect == pytest.approx((2 + 5 + 0) / 3) and (found.n_pairs, found.n_groups) == (4, 3)
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp([2, 5, 0], 0).confidence_interval(0.95)))
    assert found.method == "Student's t over 3 site/layer means"
    assert found.by_group["a"].effect == 2 and found.by_group["a"].interval is None
    two = estimate({pair: value for pair, value in units.items() if pair[0] != "c"})
    assert two.effect == 3 and two.method == "Student's t over 3 pairs"


def test_ratios_and_bounds():
    found = estimate({("a", seed): math.log(2) + shift for seed, shift in enumerate([-0.1, 0.0, 0.1])})
    ratio = found.transformed(math.exp)
    assert ratio.effect == pytest.approx(2) and ratio.interval == pytest.approx(np.exp(found.interval))
    assert ratio.by_group["a"].effect == pytest.approx(2)
    low, high = ratio.interval
    assert ratio.is_above(low - 1e-6) and not ratio.is_above(low + 1e-6)
    assert ratio.is_below(high + 1e-6) and not ratio.is_below(high - 1e-6)
    none = estimate({("a", 0): 1.0, ("a", 1): 1.0})
    assert none.interval is None and not none.is_below(9) and not none.is_above(-9)
    assert Counter(none.as_json({"a": "residual.3"})["by_group"].keys()) == Counter(["residual.3"])


def test_shares_are_interpolated_linearly_in_log_l0_and_may_be_zero():
    # Halfway in log L0 between 20 and 80 is 40.
    assert interpolate_at([80, 20], [0.0, 0.3], 40, log_values=False) == pytest.approx(0.15)
    assert interpolate_at([80, 20], [0.0, -0.3], 20, log_values=False) == -0.3
    for bad in (None, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            interpolate_at([80, 20], [0.1, bad], 40, log_values=False)
    with pytest.raises(ValueError, match="outside the curve"):
        interpolate_at([80, 20], [0.1, 0.2], 90, log_values=False)
    with pytest.raises(ValueError, match="positive"):
        interpolate_at([0, 20], [0.1, 0.2], 10, log_values=False)
