"""Intervals and paired tests: coverage, weights, groups, against SciPy."""

import numpy as np
import pytest
import scipy.stats

from loki_jax.metrics.intervals import bootstrap_interval, paired_difference, weighted_interval


def test_intervals_cover_the_mean_in_most_experiments():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        _, low, high = weighted_interval(rng.normal(1, 2, 40))
        inside += low < 1 < high
    assert 88 <= inside <= 99  # 95 of 100, two standard deviations of a binomial aside


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(1).exponential(size=60)
    mean, low, high = weighted_interval(values)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert mean == pytest.approx(values.mean())
    # Two draws of 4,000: a few percent of the interval's width.
    assert abs(low - theirs.low) + abs(high - theirs.high) < 0.06 * (high - low)


def test_weights_and_groups():
    values = np.array([1.0, 5, 9])
    assert weighted_interval(values, np.array([1.0, 3, 0]))[0] == 4
    assert weighted_interval(values) == weighted_interval(values)
    rng = np.random.default_rng(2)
    people = np.repeat(rng.normal(size=12), 10)
    groups = [f"person {k // 10}" for k in range(120)]
    alone, together = weighted_interval(people), weighted_interval(people, groups=groups)
    assert together[0] == pytest.approx(alone[0])
    # Ten equal samples of a person say no more than one.
    assert together[2] - together[1] > 2.5 * (alone[2] - alone[1])
    for wrong in ((np.zeros(0), None), (np.array([np.nan]), None), (values, np.zeros(3)), (values, -values)):
        with pytest.raises(ValueError, match="a weighted mean needs"):
            weighted_interval(*wrong)


def test_paired_differences_see_what_unpaired_means_do_not():
    rng = np.random.default_rng(3)
    hard = rng.normal(10, 5, 30)
    ours = {f"s{k}": value + 0.5 + rng.normal(0, 0.2) for k, value in enumerate(hard)}
    theirs = {f"s{k}": value for k, value in enumerate(hard)} | {"only theirs": 0.0}
    found = paired_difference(ours, theirs)
    mean, low, high = found["difference"]
    assert found["samples"] == 30 and 0.3 < low < mean < high < 0.7
    difference = [ours[name] - theirs[name] for name in ours]
    assert found["p"] == pytest.approx(scipy.stats.wilcoxon(difference).pvalue) and found["p"] < 1e-5
    assert paired_difference(ours, ours)["p"] == 1
    assert paired_difference(ours, {"s0": 1.0}) is None


def test_intervals_over_seeds_and_pairs():
    values = np.array([[1.0, 2], [3, 4]])
    mean, low, high = bootstrap_interval(values, np.random.default_rng(0))
    assert mean == 2.5 and low == 1 and high == 4
