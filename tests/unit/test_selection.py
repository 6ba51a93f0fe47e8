"""Strategies of selection against hand values and brute force."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from paper_src.selection import distributed, drop_block, evenly_spaced, first_and_last, of_kind, random_draws, top_k

BY_SCORE = {
    name: strategy.function for name, strategy in of_kind("score", "published").items() if strategy.needs != "angular"
}
BY_DEPTH = {name: strategy.function for name, strategy in of_kind("rule").items()}


def angular_of(depth):
    return torch.rand(depth + 1, depth + 1, generator=torch.Generator().manual_seed(depth))


def every_strategy(depth, k):
    """What each strategy keeps of ``depth`` layers, from arbitrary scores."""
    scores = torch.rand(depth, generator=torch.Generator().manual_seed(k)).tolist()
    return {
        **{name: strategy(scores, k) for name, strategy in BY_SCORE.items()},
        **{name: strategy(depth, k) for name, strategy in BY_DEPTH.items()},
        "drop_block": drop_block(angular_of(depth), k),
        "random": random_draws(depth, k, 1, seed=0)[0],
    }


@pytest.mark.parametrize("depth", [1, 2, 5, 30, 33])
def test_every_strategy_keeps_k_distinct_layers_in_order(depth):
    for k in range(1, depth + 1):
        for name, kept in every_strategy(depth, k).items():
            assert len(kept) == k, name
            assert set(kept) <= set(range(depth)), name
            assert all(a < b for a, b in pairwise(kept)), name


def test_every_strategy_keeps_all_layers_for_k_equal_to_the_depth():
    assert set(every_strategy(7, 7).values()) == {tuple(range(7))}


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_k_out_of_range_is_refused_by_every_strategy(k, refused):
    calls = [lambda strategy=strategy: strategy([1.0] * 5, k) for strategy in BY_SCORE.values()]
    calls += [lambda strategy=strategy: strategy(5, k) for strategy in BY_DEPTH.values()]
    calls += [lambda: drop_block(angular_of(5), k), lambda: random_draws(5, k, 1, seed=0)]
    for call in calls:
        with refused(f"k = {k} of 5 layers: keep between 1 and 5"):
            call()


@pytest.mark.parametrize("strategy", BY_SCORE.values(), ids=BY_SCORE)
def test_nan_score_is_refused_by_layer(strategy, refused):
    with refused("score of layer 2 is NaN"):
        strategy([1.0, 2.0, float("nan"), 0.0], 2)


@pytest.mark.parametrize("strategy", BY_SCORE.values(), ids=BY_SCORE)
def test_scores_may_be_a_tensor(strategy):
    assert strategy(torch.tensor([3.0, 1.0, 2.0, 0.0]), 2) == strategy([3.0, 1.0, 2.0, 0.0], 2)


def test_top_k_keeps_the_earlier_of_equal_scores():
    assert top_k([1, 2, 2, 2, 3], 3) == (1, 2, 4)
    assert top_k([5] * 6, 2) == (0, 1)


def test_top_k_orders_infinite_scores():
    assert top_k([0.0, float("inf"), float("-inf"), 1.0], 2) == (1, 3)


def test_distributed_gives_the_reported_layers():
    best = [0, 1, 8, 12, 20, 21, 29, 31]  # two of each region of 8, by falling scores over the regions
    scores = [1 / (layer + 1) for layer in range(32)]
    for layer in best:
        scores[layer] += 2 - layer / 32
    assert distributed(scores, k=8, regions=4) == (0, 1, 8, 12, 20, 21, 29, 31)
    assert top_k(scores, 4) == (0, 1, 8, 12)  # without regions the first half would win


def test_distributed_gives_the_remainder_to_the_best_next_layers():
    #         region 0   region 1   region 2
    scores = [9, 5, 0, 8, 7, 0, 3, 2, 1]
    assert distributed(scores, k=4, regions=3) == (0, 3, 4, 6)  # next best are 5, 7 and 2
    assert distributed(scores, k=5, regions=3) == (0, 1, 3, 4, 6)


def test_regions_of_distributed_end_at_the_nearest_whole_layer():
    # 7 layers in 2 regions: 3.5 rounds to 4, so that layer 3 is of the first
    assert distributed([0, 0, 0, 9, 8, 0, 0], k=2, regions=2) == (3, 4)


def test_distributed_passes_on_what_a_region_cannot_give():
    # 5 layers in 2 regions are layers 0 to 1 and 2 to 4: the first has no third layer to give
    assert distributed([9, 9, 1, 1, 1], k=4, regions=2) == (0, 1, 2, 3)
    assert distributed([9, 9, 1, 1, 1], k=5, regions=2) == (0, 1, 2, 3, 4)


def test_distributed_with_fewer_layers_than_regions_uses_k_regions():
    assert distributed([9, 8, 7, 6, 1, 2, 3, 4], k=2, regions=4) == (0, 7)
    assert distributed([1, 3, 2, 9], k=1, regions=4) == (3,)


def test_distributed_keeps_the_earlier_of_equal_scores():
    assert distributed([1] * 8, k=4, regions=2) == (0, 1, 4, 5)


@pytest.mark.parametrize("k", range(4, 13))
def test_distributed_takes_its_share_from_every_region(k):
    kept = distributed([float(layer) for layer in range(12)], k, regions=4)
    counts = Counter(layer // 3 for layer in kept)
    assert all(k // 4 <= counts[region] <= -(-k // 4) for region in range(4))


def test_distributed_without_regions_is_refused(refused):
    with refused("regions = 0: give at least 1"):
        distributed([1.0, 2.0], 1, regions=0)


def test_evenly_spaced_holds_both_ends():
    assert evenly_spaced(9, 3) == (0, 4, 8)
    assert evenly_spaced(9, 1) == (0,)
    assert evenly_spaced(9, 2) == (0, 8)


def test_first_and_last_hand_values():
    assert first_and_last(9, 3) == (0, 1, 8)
    assert first_and_last(9, 1) == (8,)


@pytest.mark.parametrize("k", range(1, 8))
def test_drop_block_agrees_with_brute_force(k):
    depth, angular = 7, angular_of(7)
    n = depth - k
    start = min(range(depth - n + 1), key=lambda first: float(angular[first, first + n]))
    expected = (*range(start), *range(start + n, depth))
    assert drop_block(angular, k) == expected


def test_drop_block_drops_the_earliest_of_equal_blocks():
    assert drop_block(torch.ones(6, 6), 3) == (2, 3, 4)


def test_drop_block_refuses_nan_distances(refused):
    angular = torch.ones(6, 6)
    angular[1, 3] = float("nan")  # one is enough
    with refused("angular distance is NaN"):
        drop_block(angular, 3)


def test_random_draws_follow_their_seed():
    assert random_draws(30, 8, 5, seed=3) == random_draws(30, 8, 5, seed=3)
    assert random_draws(30, 8, 5, seed=3) != random_draws(30, 8, 5, seed=4)
    assert random_draws(30, 8, 5, seed=3) == random_draws(30, 8, 9, seed=3)[:5]


def test_random_draws_give_every_set_the_same_chance():
    counts = Counter(random_draws(6, 2, 3000, seed=0))
    assert len(counts) == 15
    assert max(abs(count - 200) for count in counts.values()) < 68  # 5 standard deviations of 200 draws
