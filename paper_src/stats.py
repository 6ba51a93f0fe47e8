"""Intervals and tests: percentile bootstraps, paired tests, p-values against random controls."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

BOUNDS = (0.025, 0.975)  # of a 95% interval
Interval = tuple[float, float]  # low, high


def interval(values: Sequence[float], statistic: Callable = np.mean, seed: int = 0, draws: int = 2000) -> Interval:
    """95% percentile bootstrap interval of ``statistic`` (array, axis); a single value is its own interval."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values[0]), float(values[0])
    low, high = np.quantile(_redrawn((values,), statistic, seed, draws), BOUNDS)
    return float(low), float(high)


def paired_ratio_interval(a: Sequence[float], b: Sequence[float], seed: int = 0, draws: int = 2000) -> Interval:
    """95% percentile bootstrap interval of mean(a) / mean(b), whose entries belong to the same users or blocks.

    Draws in which mean(b) and mean(a) are both 0 are left out.
    """

    def ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return x.mean(axis=axis) / y.mean(axis=axis)

    low, high = np.nanquantile(_redrawn((np.asarray(a), np.asarray(b)), ratio, seed, draws), BOUNDS)
    return float(low), float(high)


def _redrawn(samples: tuple[np.ndarray, ...], statistic: Callable, seed: int, draws: int) -> np.ndarray:
    """(draws,) values of ``statistic`` on bootstrap samples; several samples are drawn together."""
    how = {"n_resamples": draws, "paired": len(samples) > 1, "method": "percentile"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal values and of 0 / 0, which the callers expect
        return stats.bootstrap(samples, statistic, **how, rng=np.random.default_rng(seed)).bootstrap_distribution


def control_p_value(value: float, controls: Sequence[float], higher_is_better: bool) -> float:
    """P that a random selection does at least as well: (1 + #controls as good or better) / (1 + #controls).

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
