"""Intervals and tests, against hand numbers and against the formula written out."""

import numpy as np
import pytest

from paper_src import stats


def written_out(values: np.ndarray, statistic, seed: int, draws: int = 2000) -> list[float]:
    """The percentile bootstrap in numpy alone."""
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    return np.quantile(statistic(values[picks], axis=1), [0.025, 0.975]).tolist()


@pytest.mark.parametrize("statistic", [np.mean, np.median])
@pytest.mark.parametrize("n", [2, 3, 8, 9, 101, 3000])
def test_interval_is_the_percentile_bootstrap_to_the_last_digit(statistic, n):
    values = np.random.default_rng(n).exponential(size=n)
    assert list(stats.interval(values, statistic, seed=n)) == written_out(values, statistic, n)


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


def test_paired_ratio_is_of_the_same_draws():
    a, b = np.random.default_rng(0).exponential(size=(2, 50))
    picks = np.random.default_rng(3).integers(50, size=(2000, 50))
    expected = np.quantile(a[picks].mean(1) / b[picks].mean(1), [0.025, 0.975])
    assert list(stats.paired_ratio_interval(a, b, seed=3)) == expected.tolist()
    assert stats.paired_ratio_interval(2 * b, b) == pytest.approx((2, 2))  # equal in every draw


def test_paired_ratio_leaves_out_draws_without_any_hit():
    assert stats.paired_ratio_interval([0.0, 1.0], [0.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize(("value", "higher", "expected"), [(0.5, True, 3 / 5), (0.1, True, 1), (0.1, False, 1 / 5)])
def test_control_p_value_by_hand(value, higher, expected):
    assert stats.control_p_value(value, [0.2, 0.4, 0.5, 0.7], higher) == pytest.approx(expected)


def test_control_p_value_without_controls_is_one():
    assert stats.control_p_value(0.5, [], higher_is_better=True) == 1


def test_sign_flip_by_hand():
    assert stats.sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert stats.sign_flip([1.0, -1.0]) == 1


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.6]) == [1, 1]
    assert stats.holm([]) == []
