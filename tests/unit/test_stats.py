"""Intervals and tests, against hand numbers and against the formula written out."""

import numpy as np
import pytest
import scipy

from paper_src import InputError, stats


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("n", [2, 3, 8, 9, 101])
def test_interval_is_scipys_bca(statistic, n):
    values = np.random.default_rng(n).exponential(size=n)
    rng = np.random.default_rng(n)
    found = scipy.stats.bootstrap((values,), statistic, n_resamples=2000, method="BCa", rng=rng).confidence_interval
    if not np.isnan(found.low):
        assert stats.interval(values, statistic, seed=n) == (found.low, found.high)


def test_interval_of_few_skewed_values_covers_more_often_than_percentiles_do():
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for draw in range(200):
        values = rng.exponential(size=8)
        percentiles = np.quantile(values[rng.integers(8, size=(2000, 8))].mean(axis=1), [0.025, 0.975])
        for place, (low, high) in enumerate((stats.interval(values, seed=draw), percentiles)):
            hits[place] += low <= 1 <= high
    assert hits[0] > hits[1]


def test_interval_of_many_values_is_of_percentiles():
    values = np.random.default_rng(3).exponential(size=3000)
    picks = np.random.default_rng(3).integers(3000, size=(2000, 3000))
    expected = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    assert stats.interval(values, seed=3) == pytest.approx(tuple(expected), rel=1e-12)


def test_median_interval_by_hand():
    values = [5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0]
    assert stats.median_interval(values) == (2.0, 8.0)  # P(2nd < median < 8th) = 1 - 2 (1 + 9) / 512 = 0.961
    assert stats.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)  # a range: 75% is no interval


def losses(values, of="same windows"):
    return stats.Losses(np.asarray(values, dtype=float), of)


def test_paired_by_hand():
    found = stats.paired(losses([2.0, 3.0, 4.0]), losses([1.0, 1.0, 1.0]))
    assert (found.difference, found.n, found.p) == (2.0, 3, pytest.approx(2 / 8))
    assert found.ratio()[0] == pytest.approx(np.exp(2.0))
    swapped = stats.paired(losses([1.0, 1.0, 1.0]), losses([2.0, 3.0, 4.0]))
    assert swapped.difference == -found.difference and swapped.p == found.p


def test_pairing_decides_what_two_intervals_apart_do_not():
    hard = np.random.default_rng(0).normal(4, 1, size=32)  # what is hard for one is hard for the other
    first, second = losses(hard + 0.1 + np.random.default_rng(1).normal(0, 0.02, size=32)), losses(hard)
    assert stats.interval(first.values)[0] < stats.interval(second.values)[1]
    assert stats.paired(first, second).lo > 0


@pytest.mark.parametrize("other", [losses([1.0, 2.0], "other windows"), losses([1.0])])
def test_paired_refuses_different_windows(other):
    with pytest.raises(InputError, match="the same windows"):
        stats.paired(losses([1.0, 2.0]), other)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="NaN or Inf"):
        losses([1.0, np.nan])


def test_interval_by_hand():
    # two values: the mean of a redrawn pair is 0, 1/2 or 1, the ends a quarter of the time
    assert stats.interval([0.0, 1.0]) == (0.0, 1.0)
    assert stats.interval([2.5] * 7) == (2.5, 2.5)
    assert stats.interval([4.0]) == (4.0, 4.0)


def test_interval_nears_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    low, high = stats.interval(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_interval_follows_its_seed():
    values = np.arange(20.0)
    assert stats.interval(values, seed=1) == stats.interval(values, seed=1)
    assert stats.interval(values, seed=1, draws=50) != stats.interval(values, seed=2, draws=50)


def test_where_bca_is_undefined_the_ends_are_the_2_5_and_97_5_percentiles():
    """Without any one of the nine values the median is 2, so that it has no skewness.

    Of nine drawn again five or more are 1 with probability 0.030: more than 2.5% and less than 5%.
    """
    values = [1.0] * 2 + [2.0] * 5 + [3.0] * 2
    assert stats.interval(values, np.median, draws=20000) == (1.0, 3.0)


def test_a_paired_test_follows_its_seed():
    gap = np.random.default_rng(0).normal(0.1, 1, 30)
    found = stats.paired(losses(gap), losses(np.zeros(30)), seed=4)
    assert (found.p, found.lo, found.hi) == (stats.sign_flip(gap, 4), *stats.interval(gap, seed=4, draws=9999))
    assert stats.sign_flip(gap, 4) != stats.sign_flip(gap, 0)


@pytest.mark.parametrize(
    ("value", "higher", "expected"),
    [(0.5, True, 3 / 5), (0.1, True, 1), (0.1, False, 1 / 5), (0.2, False, 2 / 5)],  # an equal one counts
)
def test_control_p_value_by_hand(value, higher, expected):
    assert stats.control_p_value(value, [0.2, 0.4, 0.5, 0.7], higher) == pytest.approx(expected)


def test_control_p_value_without_controls_is_one():
    assert stats.control_p_value(0.5, [], higher_is_better=True) == 1


def test_sign_flip_by_hand():
    assert stats.sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.sign_flip([1.0, -1.0]) == 1


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1, 1]  # twice 0.8 is no probability
    assert stats.holm([]) == []
