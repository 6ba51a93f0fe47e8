"""Intervals and tests: bootstraps, paired tests of two models on the same windows, p-values against random controls."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from paper_src import InputError

BOUNDS = (0.025, 0.975)  # of a 95% interval
ROUNDS = 6  # fewer values have no 95% interval of their median: their range is given, and called so
MANY = 500  # values; the jackknife of BCa takes the square of their number
Interval = tuple[float, float]  # low, high


def interval(values: Sequence[float], statistic: Callable = np.mean, seed: int = 0, draws: int = 2000) -> Interval:
    """95% BCa bootstrap interval of ``statistic`` (array, axis); a single value is its own interval.

    Bias-corrected and accelerated (Efron 1987): the percentile bootstrap of few and skewed values, which losses of
    windows are, is too narrow. Of over 500 values it is of percentiles, which then hardly differ.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    method = "BCa" if len(values) <= MANY else "percentile"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal values and of 0 / 0
        found = stats.bootstrap((values,), statistic, n_resamples=draws, method=method, rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    if math.isnan(low) or math.isnan(high):  # no BCa
        low, high = np.nanquantile(found.bootstrap_distribution, BOUNDS)
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> Interval:
    """95% interval of the median by order statistics, exact for any distribution; of fewer than 6 values their range.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9])  # the second and the last but one of nine: 96%
        (2.0, 8.0)
    """
    values = np.asarray(values, dtype=float)
    if len(values) < ROUNDS:
        return float(values.min()), float(values.max())
    found = stats.quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Losses:
    """(N,) nats/token of one model on N windows, and the digest of those windows and the full model."""

    values: np.ndarray
    of: str

    def __post_init__(self) -> None:
        if not np.isfinite(self.values).all():
            raise InputError("a loss is NaN or Inf: check the weights of the model")


class Paired(NamedTuple):
    """Mean difference of two models' losses on the same windows, nats/token, with its 95% interval and p-value."""

    difference: float
    lo: float
    hi: float
    p: float
    n: int

    def ratio(self) -> tuple[float, float, float]:
        """The same as a ratio of perplexities, with its interval."""
        return math.exp(self.difference), math.exp(self.lo), math.exp(self.hi)


def paired(first: Losses, second: Losses, seed: int = 0) -> Paired:
    """``first`` minus ``second``, window by window: a BCa interval and a two-sided sign-flip permutation test.

    Raises:
        InputError: the two were measured on different windows, or beside different full models.
    """
    if first.of != second.of or len(first.values) != len(second.values):
        raise InputError(f"a paired test needs the same windows: these are {len(first.values)} of {first.of} and "
                         f"{len(second.values)} of {second.of}; measure both models in one run")  # fmt: skip
    gap = first.values - second.values
    return Paired(float(gap.mean()), *interval(gap, seed=seed, draws=9999), sign_flip(gap, seed), len(gap))


def control_p_value(value: float, controls: Sequence[float], higher_is_better: bool) -> float:
    """P that a random selection does at least as well: (1 + #controls as good or better) / (1 + #controls).

    The same rule from the other side, with ``higher_is_better`` turned, says whether it is worse than random ones.

    Example:
        >>> control_p_value(0.5, [0.1, 0.2, 0.6], higher_is_better=True)
        0.5
    """
    controls = np.asarray(controls, dtype=float)
    as_good = controls >= value if higher_is_better else controls <= value
    return float((1 + as_good.sum()) / (1 + len(controls)))


def sign_flip(differences: Sequence[float], seed: int = 0, draws: int = 9999) -> float:
    """Two-sided p-value that paired differences have mean zero: their signs are flipped at random, or in all ways.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0, 4.0])  # 2 of 16 ways to put the signs are as far from zero
        0.125
    """
    sample = (np.asarray(differences, dtype=float),)
    rng = np.random.default_rng(seed)
    test = stats.permutation_test(sample, np.mean, permutation_type="samples", n_resamples=draws, rng=rng)
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p-values, in their order: reject where it is below the level.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(steps)
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()
