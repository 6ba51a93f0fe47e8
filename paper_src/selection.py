"""Which layers stay: (scores, or an evaluator of subsets, and k) -> kept layers.

``STRATEGIES`` names them all. A new strategy is its function and its entry there: tables, figures and sweeps loop
over the entries, and set random selections beside each.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from paper_src import InputError

KeptLayers = tuple[int, ...]


class Evaluator(Protocol):
    """What a search asks: ``losses`` of subsets of ``depth`` layers, one number a subset, lower is better."""

    depth: int

    def losses(self, subsets: Iterable[KeptLayers]) -> list[float]: ...


Stages = Sequence[tuple[Evaluator, int]]


@dataclass
class Search:
    """What a search is given: evaluators, a budget, and what the searches before it found."""

    looks: Sequence[Evaluator]  # on more and more calibration text: a first look, a middle one, all
    survivors: int = 6  # candidates that get from the first look to the last
    evolution: dict[str, int] = field(default_factory=dict)  # generations, offspring, initial, seed of evopress
    fresh: Callable[[], Iterator[Stages]] | None = None  # looks at other text for each generation; where asked for
    found: dict[str, KeptLayers] = field(default_factory=dict)  # strategy -> kept layers, at the same k

    @property
    def stages(self) -> Stages:
        """All candidates are seen by the first look, and the best of them by the last."""
        return [(self.looks[0], self.survivors), (self.looks[-1], 1)]

    @property
    def best(self) -> KeptLayers:
        """The best of ``found``, as the last look judges it."""
        return min(self.found.values(), key=lambda kept: self.looks[-1].losses([kept])[0])


@dataclass(frozen=True)
class Strategy:
    """One way to choose layers."""

    function: Callable[..., KeptLayers]  # of what it needs and k
    title: str  # in figures
    kind: str  # score: of any; published: of what the paper says; rule: no score; search: asks the model
    needs: str  # score (L,), the name of one, angular (L+1, L+1), depth, search (a Search), fresh (one with that)
    source: str
    builds_on: bool = False  # a search that starts from what those before it found: their cost is its own too


def of_kind(*kinds: str) -> dict[str, Strategy]:
    """The entries of ``STRATEGIES`` of these kinds, in its order."""
    return {name: strategy for name, strategy in STRATEGIES.items() if strategy.kind in kinds}


def kept_text(kept: Iterable[int]) -> str:
    """Kept layers as they stand in tables: ``0 1 8``."""
    return " ".join(map(str, kept))


def kept_tuple(text: str) -> KeptLayers:
    """The inverse of :func:`kept_text`."""
    return tuple(map(int, str(text).split()))


def top_k(scores: Sequence[float], k: int) -> KeptLayers:
    """The k of L layers with the highest scores; of equal scores the earlier layer is kept.

    Raises:
        InputError: k out of range, or a score that is NaN.

    Example:
        >>> top_k([0.1, 0.9, 0.5, 0.9], 2)
        (1, 3)
    """
    scores = _checked(scores, k)
    return tuple(sorted(_ranked(scores, range(len(scores)))[:k]))


def distributed(scores: Sequence[float], k: int, regions: int = 4) -> KeptLayers:
    """The best layer of each of ``regions`` equal stretches of the depth, then the second best of each, and so on.

    Of layers at the same place in their regions the higher scores go first. Boundaries are at round(i L / regions);
    with fewer layers to keep than regions, k regions are used.

    Example:
        >>> distributed([9, 8, 1, 2, 5, 1, 1, 6], k=4, regions=2)
        (0, 1, 4, 7)
    """
    scores = _checked(scores, k)
    if regions < 1:
        raise InputError(f"regions = {regions}: give at least 1")
    depth, regions = len(scores), min(regions, k)
    bounds = [round(index * depth / regions) for index in range(regions + 1)]
    place = {}  # layer -> its rank in its region
    for low, high in pairwise(bounds):
        place |= {layer: rank for rank, layer in enumerate(_ranked(scores, range(low, high)))}
    return tuple(sorted(sorted(_ranked(scores, range(depth)), key=place.get)[:k]))


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
    """All but the block of layers [l, l + n), n = L - k, of least ``LayerScores.angular`` (L+1, L+1) at (l, l + n).

    The states are those before the final norm and l may be 0; released code takes the last ones behind it and l > 0.
    """
    depth = len(angular) - 1
    _check_k(k, depth)
    removed = depth - k
    distances = torch.as_tensor(angular).diagonal(removed)  # of l = 0 .. L - n
    if torch.isnan(distances).any():
        raise InputError("an angular distance is NaN: the model's states are not finite, check its weights")
    start = int(distances.argmin())
    return tuple(layer for layer in range(depth) if not start <= layer < start + removed)


def shortened_llama_taylor_plus(taylor: Sequence[float], k: int, first: int = 4, last: int = 2) -> KeptLayers:
    """The first 4 and last 2 layers, then the highest of ``taylor``.

    Where k is below ``first + last``, the first layers go before the last ones: k = 4 keeps the first 2 and last 2.

    Example:
        >>> shortened_llama_taylor_plus([1, 1, 1, 1, 5, 9, 7, 1, 1], 7)
        (0, 1, 2, 3, 5, 7, 8)
    """
    scores = _checked(taylor, k)
    depth, tail = len(scores), min(last, k)
    always = {*range(min(first, k - tail)), *range(depth - tail, depth)}
    others = _ranked(scores, [layer for layer in range(depth) if layer not in always])
    return tuple(sorted([*always, *others[: k - len(always)]]))


def sleb(evaluator: Evaluator, k: int) -> KeptLayers:
    """Greedy removal: drop the layer whose loss is least, again and again; of equal losses the earlier layer.

    The released code never drops the first or the last layer; here any may go.
    """
    return beam_search([(evaluator, 1)], k)


def beam_search(stages: Stages, k: int) -> KeptLayers:
    """Removal of one layer a round from the best subsets so far; :func:`sleb` is one stage with one survivor.

    ``stages`` are (evaluator, survivors) from little to much text: each judges what the one before let through; the
    survivors of the last are the beam.
    """
    depth = stages[0][0].depth
    _check_k(k, depth)
    beam = [tuple(range(depth))]
    for _ in range(depth - k):
        beam = _survivors(stages, [_without(kept, layer) for kept in beam for layer in kept])
    return beam[0]


def swap_refinement(stages: Stages, kept: Sequence[int]) -> KeptLayers:
    """``kept`` improved: add the layer that helps most, drop the one that costs least, until nothing changes, at most
    ten times.

    A swap is accepted only if it lowers the loss of the last stage, so the result is never worse than the start.
    """
    kept, depth = tuple(sorted(kept)), stages[0][0].depth
    _check_k(len(kept), depth)
    for _ in range(10):
        if not (missing := sorted({*range(depth)} - {*kept})):
            break
        larger = _survivors(stages, [tuple(sorted({*kept, layer})) for layer in missing])[0]
        better = _survivors(stages, [_without(larger, layer) for layer in larger], kept)[0]
        if better == kept:
            break
        kept = better
    return kept


def evopress(
    stages: Stages, k: int, generations: int = 20, offspring: int = 32, initial: int = 64, seed: int = 0,
    fresh: Iterable[Stages] | None = None,
) -> KeptLayers:  # fmt: skip
    """Evolutionary search at fixed k (algorithm 1 of the paper, "level switch").

    The best of ``initial`` random subsets becomes the parent. Each generation makes ``offspring`` copies with
    min(U{1..3}, U{1..3}) swaps of a kept for a dropped layer, and selects in stages; the parent takes part in the
    last. With ``fresh``, each generation has looks of its own (the released code draws other text for each).
    """
    depth = stages[0][0].depth
    _check_k(k, depth)
    generator = Random(seed)
    subsets = {tuple(sorted(generator.sample(range(depth), k))) for _ in range(initial)}
    parent = _best(stages[0][0], sorted(subsets), 1)[0]
    for _, looks in zip(range(generations), fresh or repeat(stages), strict=False):
        children = {_mutated(parent, depth, generator) for _ in range(offspring)} - {parent}
        parent = _survivors(looks, sorted(children), parent)[0]
    return parent


def evopress_paper(search: Search, k: int) -> KeptLayers:
    """:func:`evopress` with the budget of the released script: 64 random subsets, k (L - k) / 1.5 generations of 32.

    There the loss is the KL divergence to the full model, on 2,048 tokens and then 32,768, drawn anew each time from
    131,072; how many ``search.fresh`` gives is the caller's choice.
    """
    fresh, depth = search.fresh(), search.looks[0].depth
    return evopress(next(fresh), k, round(k * (depth - k) / 1.5), seed=search.evolution["seed"], fresh=fresh)


def random_draws(depth: int, k: int, count: int, seed: int) -> list[KeptLayers]:
    """``count`` uniform random sets of k layers: the control that every strategy is compared with."""
    _check_k(k, depth)
    generator = torch.Generator().manual_seed(seed)
    return [tuple(sorted(torch.randperm(depth, generator=generator)[:k].tolist())) for _ in range(count)]


def _best(evaluator: Evaluator, subsets: Sequence[KeptLayers], count: int) -> list[KeptLayers]:
    """The ``count`` different subsets of lowest loss; of equal ones the first given."""
    subsets = list(dict.fromkeys(subsets))
    losses = dict(zip(subsets, evaluator.losses(subsets), strict=True))
    return sorted(subsets, key=losses.get)[:count]


def _survivors(stages: Stages, subsets: Sequence[KeptLayers], *finalists: KeptLayers) -> list[KeptLayers]:
    """What is left when each stage has kept its best few; ``finalists`` take part in the last one only."""
    *early, (last, count) = stages
    for evaluator, survivors in early:
        subsets = _best(evaluator, subsets, survivors)
    return _best(last, [*finalists, *subsets], count)


def _without(kept: KeptLayers, layer: int) -> KeptLayers:
    return tuple(other for other in kept if other != layer)


def _mutated(kept: KeptLayers, depth: int, generator: Random) -> KeptLayers:
    """``kept`` with one to three layers swapped for others."""
    dropped = sorted({*range(depth)} - {*kept})
    swaps = min(generator.randint(1, 3), generator.randint(1, 3), len(dropped), len(kept))
    out = set(generator.sample(kept, swaps))
    return tuple(sorted({*kept} - out | set(generator.sample(dropped, swaps))))


def _ranked(scores: list[float], layers: Sequence[int]) -> list[int]:
    """``layers`` from the highest score to the lowest, the earlier first among equals."""
    return sorted(layers, key=lambda layer: (-scores[layer], layer))


def _checked(scores: Sequence[float], k: int) -> list[float]:
    values = [float(score) for score in scores]
    for layer, value in enumerate(values):
        if math.isnan(value):
            raise InputError(f"the score of layer {layer} is NaN: check the weights and the calibration text")
    _check_k(k, len(values))
    return values


def _check_k(k: int, depth: int) -> None:
    if not 1 <= k <= depth:
        raise InputError(f"k = {k} of {depth} layers: keep between 1 and {depth}")


SHORTENED_LLAMA = "Kim et al. 2024, arXiv:2402.02834, section 3.1"
EVEN_PPL = "the released scripts keep the first 4 and last 2 layers by it as well"
GROMOV = "Gromov et al. 2024, arXiv:2403.17887, section 3"
EVOPRESS = "Sieberling et al. 2024, arXiv:2410.14649"
STRATEGIES = {
    "top_k": Strategy(top_k, "top k", "score", "score", "the earlier report"),
    "distributed": Strategy(distributed, "distributed", "score", "score", "the earlier report"),
    "shortgpt": Strategy(top_k, "ShortGPT", "published", "block_influence", "Men et al. 2024, arXiv:2403.03853"),
    "shortened_llama_ppl": Strategy(top_k, "PPL", "published", "leave_one_out",
                                    f"{SHORTENED_LLAMA}; {EVEN_PPL}"),
    "shortened_llama_taylor_plus": Strategy(
        shortened_llama_taylor_plus, "Taylor+", "published", "weight_taylor", SHORTENED_LLAMA),
    "drop_block": Strategy(drop_block, "angular block", "published", "angular", GROMOV),
    "evenly_spaced": Strategy(evenly_spaced, "evenly spaced", "rule", "depth", "control without a score"),
    "first_and_last": Strategy(first_and_last, "first and last", "rule", "depth", "control without a score"),
    "sleb": Strategy(lambda search, k: sleb(search.looks[1], k),
                     "SLEB", "search", "search", "Song et al. 2024, arXiv:2402.09025"),
    "evopress": Strategy(
        lambda search, k: evopress([(search.looks[0], 2), (search.looks[1], 1)], k, **search.evolution),
        "EvoPress", "search", "search", f"{EVOPRESS}, by NLL and with a smaller budget"),
    "staged": Strategy(lambda search, k: beam_search(search.stages, k),
                       "staged removal", "search", "search", "ours: greedy removal that spends most text on the best"),
    "swap": Strategy(lambda search, k: swap_refinement(search.stages, search.best),
                     "swaps", "search", "search", "ours: improves the best of the searches before it", builds_on=True),
    "evopress_paper": Strategy(evopress_paper, "EvoPress, its budget", "search", "fresh", EVOPRESS),
}  # fmt: skip
