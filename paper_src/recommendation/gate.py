"""The gate: can a design judge compaction at all?

Only where the full model recommends better than the same recipe without its layers. Where layers have no say, a cut
model loses nothing because there was nothing to lose; published recommenders of language models have been found so
(The Elephant in the Room, arXiv:2404.08796).
"""

import functools
from typing import NamedTuple

import numpy as np

from paper_src import InputError
from paper_src.stats import BOUNDS, Interval

TRAININGS = 3  # fewer say nothing of what a seed does
PASSES, FAILS, OPEN = "passes", "fails", "too few trainings"


class Gate(NamedTuple):
    """What a design's full model has over the same recipe without layers, with its 95% interval, and the verdict."""

    ratio: float
    lo: float
    hi: float
    trainings: int
    users: int
    verdict: str


def gate(full: np.ndarray, without: np.ndarray, trained: bool = True, seed: int = 0) -> Gate:
    """Whether the lower end of the interval of mean(full) / mean(without) is above 1.

    Args:
        full: (S, U) values of U users after S trainings; ``without`` the same without layers.
        trained: whether the design is trained at all; one that is passes or fails by ``TRAININGS`` of them at least.

    Raises:
        InputError: the two are of other users or trainings.
    """
    full, without = np.asarray(full, dtype=float), np.asarray(without, dtype=float)
    low, high = two_level_ratio_interval(full, without, seed)
    few = trained and len(full) < TRAININGS
    verdict = OPEN if few else PASSES if low > 1 else FAILS
    return Gate(full.mean() / without.mean(), low, high, *full.shape, verdict)


def two_level_ratio_interval(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 2000) -> Interval:
    """95% percentile bootstrap interval of mean(a) / mean(b), both (S, U): values of U users after S trainings.

    Users and trainings are drawn anew, each for all of the other: users are the same in every training, and what a
    training's seed does is the same for all users. With one training its part of the spread is not known, nor shown.

    Raises:
        InputError: the two are of other users or trainings.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2:
        raise InputError(f"trainings and users of {a.shape} and {b.shape}: compare the same ones")
    trainings, users = _counts(a.shape, seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.divide(*((trainings * (users @ values.T)).sum(1) for values in (a, b)))  # (D,)
    low, high = np.nanquantile(found, BOUNDS)
    return float(low), float(high)


@functools.lru_cache(maxsize=2)  # every metric and row of one data set asks for the same
def _counts(shape: tuple[int, int], seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """(D, S) and (D, U): how often each training and each user is in each draw."""
    rng, found = np.random.default_rng(seed), tuple(np.empty((draws, size)) for size in shape)
    for draw in range(draws):
        for counts, size in zip(found, shape, strict=True):
            counts[draw] = np.bincount(rng.integers(size, size=size), minlength=size)
    return found
