"""Which k of L layers to keep: every strategy returns the sorted tuple of kept layer indices."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paper_src import InputError

KeptLayers = tuple[int, ...]


def top_k(scores: Sequence[float], k: int) -> KeptLayers:
    """The k layers with the highest scores; of equal scores the earlier layer is kept.

    Args:
        scores: L numbers, higher means more important.
        k: number of layers to keep, 1 <= k <= L.

    Raises:
        InputError: k out of range, or a score that is NaN.

    Example:
        >>> top_k([0.1, 0.9, 0.5, 0.9], 2)
        (1, 3)
    """
    scores = _checked(scores)
    _check_k(k, len(scores))
    return tuple(sorted(_ranked(scores, range(len(scores)))[:k]))


def distributed(scores: Sequence[float], k: int, regions: int = 4) -> KeptLayers:
    """The best layers of each of ``regions`` equal stretches of the depth (the earlier report's strategy).

    Every region gives k // regions layers. What is left over goes, one layer a region, to the regions
    whose next-best layer scores highest; a region that runs out passes its share on in the same way.
    Boundaries are at round(i L / regions); with fewer layers than regions, k regions are used.

    Example:
        >>> distributed([9, 8, 1, 2, 5, 1, 1, 6], k=4, regions=2)
        (0, 1, 4, 7)
    """
    scores = _checked(scores)
    depth = len(scores)
    _check_k(k, depth)
    if regions < 1:
        raise InputError(f"regions = {regions}: give at least 1")
    regions = min(regions, k)
    bounds = [round(index * depth / regions) for index in range(regions + 1)]
    queues = [_ranked(scores, range(low, high)) for low, high in pairwise(bounds)]
    kept = [layer for queue in queues for layer in queue[: k // regions]]
    queues = [queue[k // regions :] for queue in queues]
    while len(kept) < k:
        heads = [queue.pop(0) for queue in queues if queue]
        kept += _ranked(scores, heads)[: k - len(kept)]
    return tuple(sorted(kept))


def evenly_spaced(depth: int, k: int) -> KeptLayers:
    """k layers at equal distances from the first to the last; the first alone for k = 1.

    Example:
        >>> evenly_spaced(30, 4)
        (0, 10, 19, 29)
    """
    _check_k(k, depth)
    return tuple(round(index * (depth - 1) / max(k - 1, 1)) for index in range(k))


def first_and_last(depth: int, k: int) -> KeptLayers:
    """The first k - 1 layers and the last one.

    Example:
        >>> first_and_last(30, 4)
        (0, 1, 2, 29)
    """
    _check_k(k, depth)
    return (*range(k - 1), depth - 1)


def drop_block(angular: Tensor, k: int) -> KeptLayers:
    """All layers but the contiguous block [l, l + n), n = L - k, whose input and output are nearest in angle.

    Gromov et al. 2024 (arXiv:2403.17887), section 3: l minimizes the angular distance d(l, l + n).

    Args:
        angular: (L+1, L+1) distances, as in ``LayerScores.angular``.
        k: number of layers to keep.
    """
    depth = len(angular) - 1
    _check_k(k, depth)
    removed = depth - k
    distances = torch.as_tensor(angular).diagonal(removed)  # d(l, l + n) for l = 0 .. L - n
    if torch.isnan(distances).any():
        raise InputError("an angular distance is NaN: the model's states are not finite, check its weights")
    start = int(distances.argmin())
    return tuple(layer for layer in range(depth) if not start <= layer < start + removed)


def random_draws(depth: int, k: int, count: int, seed: int) -> list[KeptLayers]:
    """``count`` uniform random sets of k layers: the control that every strategy is compared with."""
    _check_k(k, depth)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(depth, generator=generator)[:k].tolist() for _ in range(count)]
    return [tuple(sorted(draw)) for draw in draws]


def _ranked(scores: list[float], layers: Sequence[int]) -> list[int]:
    """``layers`` from the highest score to the lowest, the earlier first among equals."""
    return sorted(layers, key=lambda layer: (-scores[layer], layer))


def _checked(scores: Sequence[float]) -> list[float]:
    values = [float(score) for score in scores]
    for layer, value in enumerate(values):
        if math.isnan(value):
            raise InputError(f"the score of layer {layer} is NaN: check the weights and the calibration text")
    return values


def _check_k(k: int, depth: int) -> None:
    if not 1 <= k <= depth:
        raise InputError(f"k = {k} of {depth} layers: keep between 1 and {depth}")
