"""Searches and published strategies against hand values and brute force."""

import itertools
from collections import Counter
from random import Random

import pytest
from conftest import build_model

from paper_src import scoring, selection
from paper_src.coalitions import Evaluator


class Planted:
    """An evaluator whose loss is known, and which counts the different subsets it was asked about."""

    def __init__(self, depth, loss):
        self.depth, self.loss, self.asked = depth, loss, set()

    def losses(self, subsets):
        self.asked.update(subsets)
        return [self.loss(set(kept)) for kept in subsets]

    def best(self, k):
        return min(itertools.combinations(range(self.depth), k), key=lambda kept: self.loss(set(kept)))


def additive(kept):
    """Layers 1, 4 and 6 are worth most, each by itself."""
    return 10 - sum({1: 3, 4: 2, 6: 4, 2: 0.5}.get(layer, 0.1 * layer / 10) for layer in kept)


def paired(kept):
    """Layers 2 and 5 are worth much together and nothing alone; 0 and 7 are worth a little alone."""
    return 10 - 5 * ({2, 5} <= kept) - (0 in kept) - (7 in kept) - 0.01 * sum(kept)


class TestPublished:
    def test_taylor_plus_keeps_the_first_four_and_last_two(self):
        taylor = [0, 0, 0, 0, 5, 9, 7, 8, 0, 0]
        assert selection.shortened_llama_taylor_plus(taylor, 8) == (0, 1, 2, 3, 5, 7, 8, 9)

    @pytest.mark.parametrize(("k", "kept"), [(1, (9,)), (2, (8, 9)), (4, (0, 1, 8, 9)), (6, (0, 1, 2, 3, 8, 9))])
    def test_taylor_plus_with_less_than_six_layers(self, k, kept):
        assert selection.shortened_llama_taylor_plus(range(10), k) == kept

    @pytest.mark.parametrize(
        ("name", "needs"), [("shortgpt", "block_influence"), ("shortened_llama_ppl", "leave_one_out")]
    )
    def test_the_highest_of_one_score(self, name, needs):
        strategy = selection.STRATEGIES[name]
        assert strategy.needs == needs
        assert strategy.function([0.3, 0.1, 0.2, 0.9], 2) == (0, 3)


class TestRegistry:
    def test_searches_ask_the_looks_that_they_are_given(self):
        looks = [Planted(8, paired) for _ in range(3)]
        search = selection.Search(looks, 3, {"generations": 2, "offspring": 4, "initial": 4})
        asked = {}
        for name, strategy in selection.of_kind("search").items():
            if strategy.needs == "fresh":
                continue
            for look in looks:
                look.asked.clear()
            search.found[name] = strategy.function(search, 4)
            asked[name] = [bool(look.asked) for look in looks]
        assert asked == {
            "sleb": [False, True, False], "evopress": [True, True, False],
            "staged": [True, False, True], "swap": [True, False, True],
        }  # fmt: skip
        assert search.found["sleb"] == selection.sleb(Planted(8, paired), 4)
        assert paired(set(search.found["swap"])) <= min(paired(set(kept)) for kept in search.found.values())

    def test_the_best_found_so_far_is_that_of_the_last_look(self):
        looks = [Planted(8, loss) for loss in (lambda kept: 0 in kept, lambda kept: 0, lambda kept: 0 not in kept)]
        assert selection.Search(looks, found={"a": (0, 1), "b": (1, 2)}).best == (0, 1)

    def test_evolution_spends_the_second_look_on_survivors_alone(self):
        looks = [Planted(8, paired) for _ in range(3)]
        selection.STRATEGIES["evopress"].function(selection.Search(looks, evolution={"generations": 3}), 4)
        assert 0 < len(looks[1].asked) < len(looks[0].asked)

    @pytest.mark.parametrize("k", [2, 5])
    def test_the_released_budget_of_evopress_sees_other_text_in_each_generation(self, k):
        def fresh():
            for _ in range(100):
                made.append([Planted(8, additive), Planted(8, additive)])
                yield [(made[-1][0], 2), (made[-1][1], 1)]

        made, search = [], selection.Search([Planted(8, additive)], evolution={"seed": 0}, fresh=fresh)
        assert selection.STRATEGIES["evopress_paper"].function(search, k) == made[0][0].best(k)
        assert len(made) == 1 + round(k * (8 - k) / 1.5)  # the first judges the random subsets
        assert made[0][0].asked and not made[0][1].asked and not search.looks[0].asked
        assert all(len(few.asked) <= 32 and len(many.asked) <= 3 for few, many in made[1:])  # two children, the parent

    def test_every_entry_says_what_it_is(self):
        needed = {"score": ("score",), "rule": ("depth",), "search": ("search", "fresh")}
        for name, strategy in selection.STRATEGIES.items():
            assert strategy.title and strategy.source, name
            expected = needed.get(strategy.kind, (*scoring.SCORES, "angular"))
            assert strategy.needs in expected, name


class TestSearches:
    @pytest.mark.parametrize("k", [1, 3, 5, 8])
    def test_all_find_the_optimum_where_layers_are_worth_something_each_by_itself(self, k):
        game = Planted(8, additive)
        best = game.best(k)
        assert selection.sleb(game, k) == best
        assert selection.beam_search([(game, 2)], k) == best
        assert selection.swap_refinement([(game, 1)], range(k)) == best
        assert selection.evopress([(game, 2), (game, 1)], k, generations=15, offspring=8, initial=8) == best

    def test_sleb_is_greedy_removal(self):
        kept = set(range(8))
        while len(kept) > 3:
            kept.remove(min(sorted(kept), key=lambda layer: paired(kept - {layer})))
        assert selection.sleb(Planted(8, paired), 3) == tuple(sorted(kept))

    def test_sleb_asks_about_each_candidate_of_each_round(self):
        game = Planted(8, additive)
        selection.sleb(game, 5)
        assert len(game.asked) == 8 + 7 + 6

    def test_a_wider_beam_and_evolution_find_what_greedy_removal_misses(self):
        def trap(kept):  # dropping 7 first looks best, and the pair 6, 7 is the answer
            if len(kept) == 7:
                return {7: 0.0, 6: 0.2}.get(*(set(range(8)) - kept), 1.0)
            return -float({6, 7} <= kept)

        game = Planted(8, trap)
        assert game.loss(set(selection.sleb(game, 2))) == 0
        assert selection.beam_search([(game, 8)], 2) == (6, 7)
        assert selection.evopress([(game, 1)], 2, generations=20, offspring=16, initial=16) == (6, 7)

    def test_stages_spend_the_last_look_on_the_survivors_of_the_first(self):
        rough, fine = Planted(8, lambda kept: paired(kept) + 0.02 * len(kept & {3, 4})), Planted(8, paired)
        assert selection.beam_search([(rough, 3), (fine, 1)], 4) == selection.sleb(Planted(8, paired), 4)
        assert [len(look.asked) for look in (rough, fine)] == [8 + 7 + 6 + 5, 3 * 4]

    @pytest.mark.parametrize("start", [(0, 1, 3), (2, 3, 5), (2, 5, 7), (4, 6, 7)])
    def test_swaps_never_make_it_worse_whatever_the_first_look_says(self, start):
        stages = [(Planted(8, lambda kept: -paired(kept)), 1), (Planted(8, paired), 1)]
        assert paired(set(selection.swap_refinement(stages, start))) <= paired(set(start))

    def test_swaps_stop_when_nothing_changes(self):
        game = Planted(8, additive)
        best = game.best(3)
        game.asked.clear()
        assert selection.swap_refinement([(game, 1)], best) == best
        assert len(game.asked) <= 5 + 4 + 1

    def test_swaps_leave_all_layers_as_they_are(self):
        assert selection.swap_refinement([(Planted(4, additive), 1)], range(4)) == (0, 1, 2, 3)

    def test_swaps_do_not_change_what_others_only_equal(self):
        assert selection.swap_refinement([(Planted(8, lambda kept: 1.0), 1)], (0, 1)) == (0, 1)

    def test_evolution_repeats_with_its_seed_and_keeps_k_layers(self):
        results = [selection.evopress([(Planted(12, paired), 1)], 4, 1, 2, 1, seed=seed) for seed in (0, 0, 5)]
        assert results[0] == results[1] != results[2]
        assert all(len(kept) == 4 for kept in results)

    def test_a_child_differs_in_the_lesser_of_two_draws_of_one_to_three_layers(self):
        generator, kept = Random(0), tuple(range(10))
        swaps = Counter(len({*kept} - {*selection._mutated(kept, 20, generator)}) for _ in range(3000))
        shares = [swaps[count] / 3000 for count in (1, 2, 3)]
        assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.03)

    def test_evolution_never_gets_worse(self):
        game = Planted(8, paired)
        losses = [paired(set(selection.evopress([(game, 2), (game, 1)], 3, n, 6, 6))) for n in range(5)]
        assert losses == sorted(losses, reverse=True)

    def test_k_out_of_range_is_refused(self, refused):
        game = Planted(5, additive)
        for search in (
            lambda: selection.sleb(game, 0),
            lambda: selection.evopress([(game, 1)], 6),
            lambda: selection.swap_refinement([(game, 1)], ()),
        ):
            with refused("of 5 layers: keep between 1 and 5"):
                search()


@pytest.mark.parametrize("objective", ["nll_nats", "kl_nats"])
def test_on_a_model_searches_reach_the_brute_force_optimum(make_blocks, objective):
    model = build_model("llama", num_hidden_layers=6, seed=2)
    evaluator = Evaluator(model, make_blocks(4, 12), [objective])
    subsets = list(itertools.combinations(range(6), 3))
    best = min(evaluator.losses(subsets))
    found = selection.evopress([(evaluator, 1)], 3, generations=15, offspring=12, initial=12)
    assert evaluator(found) == best
    assert (
        best
        <= evaluator(selection.swap_refinement([(evaluator, 1)], selection.sleb(evaluator, 3)))
        <= max(evaluator.losses(subsets))
    )
