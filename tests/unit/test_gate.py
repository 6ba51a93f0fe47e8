"""The gate of section 6, and its interval over trainings and users."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from paper_src.recommendation.gate import FAILS, OPEN, PASSES, gate, two_level_ratio_interval

USERS = np.random.default_rng(1).gamma(2.0, size=(3, 400))


def test_a_design_passes_where_its_layers_surely_help():
    found = gate(USERS * 1.2, USERS)
    assert found.ratio == pytest.approx(1.2)
    assert (found.trainings, found.users, found.verdict) == (3, 400, PASSES)


def test_a_design_whose_layers_may_not_help_fails():
    assert gate(USERS, USERS).verdict == FAILS
    assert gate(USERS * np.array([[0.9], [1.1], [1.3]]), USERS).verdict == FAILS  # 1.1 on average


def test_the_ratio_is_of_means_and_not_the_mean_of_ratios():
    assert gate(np.array([[1.0, 9.0]]), np.array([[1.0, 3.0]])).ratio == 10 / 4


def test_few_trainings_decide_nothing_unless_there_are_none():
    assert gate(USERS[:2] * 1.2, USERS[:2]).verdict == OPEN
    assert gate(USERS[:1] * 1.2, USERS[:1], trained=False).verdict == PASSES


class TestTwoLevels:
    def test_one_training_is_a_paired_bootstrap_over_users(self):
        rng = np.random.default_rng(0)
        b = rng.gamma(2.0, size=(1, 800))
        a = b * 1.2 + rng.normal(0, 0.5, size=(1, 800))
        found = two_level_ratio_interval(a, b, draws=4000)
        paired = bootstrap((a[0], b[0]), lambda x, y, axis: x.mean(axis) / y.mean(axis), paired=True,
                           method="percentile", n_resamples=4000, rng=1).confidence_interval  # fmt: skip
        assert found == pytest.approx((paired.low, paired.high), abs=0.004)

    def test_trainings_that_differ_widen_it(self):
        rng = np.random.default_rng(0)
        b = rng.gamma(2.0, size=(3, 400))
        even, uneven = b * 1.1, b * np.array([[0.9], [1.1], [1.3]])
        narrow, wide = (two_level_ratio_interval(a, b) for a in (even, uneven))
        assert narrow == pytest.approx((1.1, 1.1))
        assert wide[0] < 1.0
        assert wide[1] > 1.2

    def test_it_holds_the_truth_about_as_often_as_it_says(self):
        held = 0
        for trial in range(200):
            rng = np.random.default_rng(trial)
            users, trainings = rng.normal(3, 1, size=(1, 60)), rng.normal(0, 0.2, size=(6, 1))
            a = users + trainings + rng.normal(0, 0.3, size=(6, 60))
            b = users + rng.normal(0, 0.3, size=(6, 60))
            low, high = two_level_ratio_interval(a, b, draws=400)
            held += low <= 1.0 <= high
        assert 0.80 < held / 200 <= 1.0  # six trainings: a bootstrap of few is too narrow

    def test_it_follows_its_seed(self):
        users, other = USERS[:1, :50], USERS[1:2, :50]
        one, same, two = (two_level_ratio_interval(users, other, seed) for seed in (1, 1, 2))
        assert one == same != two

    def test_other_users_are_refused(self, refused):
        with refused("trainings and users of"):
            two_level_ratio_interval(np.ones((2, 3)), np.ones((2, 4)))
