"""Subsets of layers: equality with the compacted model, leave-one-out, Shapley values by brute force."""

import itertools
import math
import sqlite3
import time

import numpy as np
import pytest
import torch
from conftest import CAUSAL, build_model
from transformers import AutoConfig, AutoModelForCausalLM

from paper_src import NotSupported, coalitions, fidelity, layers, models, scoring
from paper_src.coalitions import Evaluator, leave_one_out, shapley
from paper_src.compaction import compact
from paper_src.layers import SubsetRunner
from paper_src.scale.store import Store

METRICS = ("nll_nats", "kl_nats", "cosine", "cosine_centred", "nll_capped_nats", "mse", "top1_agreement")


def subsets(depth, least=0):
    """All subsets of ``depth`` layers with at least ``least`` members."""
    return [kept for n in range(least, depth + 1) for kept in itertools.combinations(range(depth), n)]


class Game:
    """Stands for an evaluator: any function of a subset, and a count of what was asked."""

    def __init__(self, depth, function, metrics=("nll_nats",)):
        self.depth, self.function, self.metrics = depth, function, metrics

    def evaluate(self, asked):
        return np.array([[self.function(frozenset(kept))] for kept in asked], dtype=float)

    def losses(self, asked):
        return self.evaluate(asked)[:, 0].tolist()


def exact_shapley(depth, value):
    """Shapley values by the formula, from all 2^L values."""
    values = np.zeros(depth)
    for layer in range(depth):
        others = [other for other in range(depth) if other != layer]
        for kept in (kept for n in range(depth) for kept in itertools.combinations(others, n)):
            weight = math.factorial(len(kept)) * math.factorial(depth - 1 - len(kept)) / math.factorial(depth)
            values[layer] += weight * (value(tuple(sorted((*kept, layer)))) - value(kept))
    return values


class TestEvaluator:
    @pytest.mark.parametrize("family", CAUSAL)
    def test_equals_the_compacted_model_for_every_subset(self, family, make_blocks):
        model, blocks = build_model(family), make_blocks(3, 12)
        mean = torch.linspace(-1, 1, 32)
        full = fidelity.reference(model, blocks, mean)
        asked = subsets(4, least=1)
        found = Evaluator(model, blocks, METRICS, mean).evaluate(asked)
        for kept, row in zip(asked, found, strict=True):
            expected = fidelity.compare(compact(model, kept), full) | {"nll_capped_nats": None}
            for name, value in zip(METRICS, row, strict=True):
                if expected[name] is not None:
                    assert value == pytest.approx(expected[name].mean(), rel=1e-4, abs=1e-6), (kept, name)

    @pytest.mark.parametrize("family", ["bloom", "mpt"])
    def test_layers_whose_masks_have_an_entry_for_each_sequence(self, family, make_blocks):
        shape = {"hidden_size": 32, "n_layer": 3, "n_head": 4} | {"d_model": 32, "n_layers": 3, "n_heads": 4}
        config = AutoConfig.for_model(family, vocab_size=96, max_seq_len=64, **shape)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        blocks, asked = make_blocks(2, 8), sorted(subsets(3, least=1))
        for kept, hidden in zip(asked, SubsetRunner(model, blocks).last_hidden(asked), strict=True):
            torch.testing.assert_close(hidden, models.last_hidden(compact(model, kept), blocks), rtol=1e-4, atol=1e-5)

    def test_reuse_equals_no_reuse(self, llama, make_blocks):
        blocks = make_blocks(2, 10)
        together = Evaluator(llama, blocks).evaluate(subsets(4))
        alone = Evaluator(llama, blocks, memory_bytes=1)
        apart = np.array([alone.evaluate([kept])[0] for kept in subsets(4)])
        np.testing.assert_allclose(together, apart, rtol=1e-6)

    def test_as_many_subsets_at_a_time_as_the_memory_bound_allows(self, llama, make_blocks):
        blocks = make_blocks(2, 10)
        state_bytes = 2 * 10 * 32 * 4
        runner = SubsetRunner(llama, blocks, memory_bytes=3 * state_bytes)
        sizes = [len(batch) for batch in runner.batches(subsets(4))]
        assert sizes == [3, 3, 3, 3, 3, 1]

    def test_no_layers_leaves_embedding_and_final_norm(self, llama, make_blocks):
        blocks = make_blocks(2, 10)
        embedded = llama.model.norm(llama.model.embed_tokens(blocks))
        logits = llama.lm_head(embedded)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten()).item()
        assert Evaluator(llama, blocks)(()) == pytest.approx(expected, rel=1e-6)

    def test_the_model_is_not_changed(self, llama, make_blocks):
        blocks = make_blocks(2, 10)
        before, layers = models.last_hidden(llama, blocks), list(llama.model.layers)
        Evaluator(llama, blocks).evaluate(subsets(4))
        assert list(llama.model.layers) == layers
        assert torch.equal(models.last_hidden(llama, blocks), before)

    def test_only_the_last_tokens_are_scored(self, llama, make_blocks):
        blocks = make_blocks(2, 12)
        logits = llama(blocks).logits[:, -5:-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, blocks[:, -4:].flatten()).item()
        assert Evaluator(llama, blocks, scored=5)(range(4)) == pytest.approx(expected, rel=1e-5)

    def test_a_capped_token_counts_at_most_as_a_uniform_guess(self, llama, make_blocks):
        blocks = make_blocks(2, 12)
        with torch.no_grad():
            llama.lm_head.weight.mul_(0.5)
            logits = llama(blocks).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten(), reduction="none")
        assert losses.max() > math.log(96) > losses.min()
        capped, plain = Evaluator(llama, blocks, ["nll_capped_nats", "nll_nats"]).evaluate([range(4)])[0]
        assert capped == pytest.approx(losses.clamp(max=math.log(96)).mean().item(), rel=1e-5)
        assert plain == pytest.approx(losses.mean().item(), rel=1e-5)

    @pytest.mark.parametrize("metric", [name for name in METRICS if "nll" not in name])
    def test_losses_are_lower_for_the_better_subset_whatever_the_metric(self, llama, make_blocks, metric):
        evaluator = Evaluator(llama, make_blocks(2, 12), [metric], torch.zeros(32))
        everything, some = evaluator.losses([range(4), (0, 3)])
        assert everything < some

    def test_a_metric_that_is_not_finite_is_reported_with_its_subset(self, llama, make_blocks, refused):
        evaluator = Evaluator(llama, make_blocks(2, 12))
        evaluator.evaluate([(0, 1)])
        with torch.no_grad():
            llama.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
        evaluator.evaluate([(0, 3)])
        with refused(r"nll_nats of kept layers \(0, 2\) is nan"):
            evaluator.evaluate([(0, 2)])

    @pytest.mark.parametrize("kept", [(1, 0), (0, 0), (4,), (-1, 2)])
    def test_wrong_indices_are_refused(self, llama, make_blocks, refused, kept):
        with refused("give increasing indices in 0 to 3"):
            Evaluator(llama, make_blocks(2, 12))(kept)

    def test_wrong_metrics_are_refused(self, llama, make_blocks, refused):
        with refused("metric 'accuracy': use one of"):
            Evaluator(llama, make_blocks(2, 12), ["accuracy"])
        with refused("needs the mean state"):
            Evaluator(llama, make_blocks(2, 12), ["cosine_centred"])

    def test_layers_that_hand_on_more_than_their_states_are_refused(self, llama, make_blocks, monkeypatch):
        class HandsOn(layers.LayerRunner):
            def __init__(self, model):
                super().__init__(model)
                self.hands_on = True

        monkeypatch.setattr(layers, "LayerRunner", HandsOn)
        with pytest.raises(NotSupported, match="hand on more than their states"):
            Evaluator(llama, make_blocks(2, 8))

    def test_layers_that_take_one_block_alone_are_refused_also_for_one_block(self, llama, make_blocks):
        def one(module, arguments):
            assert len(arguments[0]) == 1  # as in families that shape states by their masks

        llama.model.layers[2].register_forward_pre_hook(one)
        with pytest.raises(NotSupported, match="does more than run its layers"):
            Evaluator(llama, make_blocks(1, 8))

    def test_a_model_that_does_more_than_run_its_layers_is_refused(self, llama, make_blocks, monkeypatch):
        def scaled(model, ids):  # of the model alone, not of its layers run one by one
            return last_hidden(model, ids) * (1.01 if model is llama else 1)

        last_hidden = layers.last_hidden
        monkeypatch.setattr(layers, "last_hidden", scaled)
        with pytest.raises(NotSupported, match="does more than run its layers"):
            Evaluator(llama, make_blocks(2, 8))

    def test_seconds_of_all_subsets_are_no_more_than_have_passed(self, llama, make_blocks):
        evaluator, start = Evaluator(llama, make_blocks(2, 12)), time.perf_counter()
        with coalitions.cost_of([evaluator]) as cost:
            evaluator.evaluate(subsets(4))
        assert 0 < cost.seconds <= time.perf_counter() - start

    def test_cost_counts_each_subset_once_and_shared_prefixes_once(self, llama, make_blocks):
        evaluator = Evaluator(llama, make_blocks(2, 12))
        with coalitions.cost_of([evaluator]) as first:
            leave_one_out([evaluator])
        with coalitions.cost_of([evaluator]) as again:
            leave_one_out([evaluator])
            evaluator(range(4))
        # the full model runs 4 layers; leaving out layer i runs those behind it: 3 + 2 + 1 + 0
        assert (first.evaluations, first.forward_tokens) == (5, round((4 + 6) * 24 / 4))
        assert again == first

    def test_a_count_around_others_has_each_subset_once(self, llama, make_blocks):
        """What a search costs that builds on others: ask for the same subsets twice, inside one count."""
        evaluator = Evaluator(llama, make_blocks(2, 12))
        with coalitions.cost_of([evaluator]) as whole:
            with coalitions.cost_of([evaluator]) as first:
                evaluator.losses([(0, 1), (0, 2)])
            with coalitions.cost_of([evaluator]) as second:
                evaluator.losses([(0, 2), (1, 3)])
        assert (first.evaluations, second.evaluations, whole.evaluations) == (2, 2, 3)
        assert whole.forward_tokens == round((2 + 1 + 2) * 24 / 4)  # (0, 2) shares layer 0


class TestStore:
    def ask(self, model, blocks, path, metrics=("nll_nats",), scored=None):
        """Values of three subsets, and how many of them had to be computed."""
        evaluator = Evaluator(model, blocks, metrics, scored=scored, store=Store(path, model))
        before = len(evaluator._known)
        return evaluator.evaluate([(0, 1), (0, 2), ()]), 3 - before

    def test_an_interrupted_search_goes_on(self, llama, make_blocks, tmp_path, monkeypatch):
        blocks, path = make_blocks(2, 12), tmp_path / "folder" / "store.sqlite"
        expected, computed = self.ask(llama, blocks, path)
        assert computed == 3
        monkeypatch.setattr(Evaluator, "_evaluate", None)  # nothing is computed again
        found, computed = self.ask(llama, blocks, path)
        assert computed == 0
        np.testing.assert_array_equal(found, expected)

    def test_other_weights_texts_metrics_and_scored_tokens_are_not_mixed_in(self, llama, make_blocks, tmp_path):
        path = tmp_path / "store.sqlite"
        self.ask(llama, make_blocks(2, 12), path)
        assert self.ask(llama, make_blocks(2, 12, seed=1), path)[1] == 3
        assert self.ask(llama, make_blocks(2, 12), path, ["cosine"])[1] == 3
        assert [self.ask(llama, make_blocks(2, 12), path, scored=count)[1] for count in (5, 7, 5)] == [3, 3, 0]
        with torch.no_grad():
            llama.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
        assert self.ask(llama, make_blocks(2, 12), path)[1] == 3

    @pytest.mark.parametrize("harm", ["truncated", "no database", "emptied"])
    def test_a_damaged_file_is_computed_anew(self, llama, make_blocks, tmp_path, harm):
        path = tmp_path / "store.sqlite"
        expected, _ = self.ask(llama, make_blocks(2, 12), path)
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:5000], "no database": b"x" * 9000, "emptied": b""}[harm])
        if harm == "emptied":  # an empty file is an empty database
            found, computed = self.ask(llama, make_blocks(2, 12), path)
        else:
            with pytest.warns(
                UserWarning, match=r"store.sqlite is damaged .*: moved to store.sqlite.damaged, computed anew"
            ):
                found, computed = self.ask(llama, make_blocks(2, 12), path)
        assert computed == 3
        np.testing.assert_array_equal(found, expected)

    def test_a_folder_that_cannot_be_made_is_refused(self, llama, tmp_path, refused):
        (tmp_path / "file").write_text("")
        with refused("cannot write .*choose another folder"):
            Store(tmp_path / "file" / "store.sqlite", llama)

    def test_what_cannot_be_opened_is_refused_and_not_removed(self, llama, tmp_path, refused):
        with refused("cannot write .*unable to open"):
            Store(tmp_path, llama)
        assert tmp_path.is_dir()

    def test_a_file_in_use_elsewhere_is_refused_and_not_removed(self, llama, tmp_path, refused, monkeypatch):
        path = tmp_path / "store.sqlite"
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE mine (x)")
        other.execute("BEGIN EXCLUSIVE")
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, timeout=0, **kwargs))
        with refused("cannot write .*locked"):
            Store(path, llama)
        other.rollback()
        assert other.execute("SELECT name FROM sqlite_master").fetchone() == ("mine",)


class TestLeaveOneOut:
    def test_is_the_loss_without_the_layer_minus_the_loss(self, llama, make_blocks):
        evaluator = Evaluator(llama, make_blocks(3, 12))
        expected = [evaluator([o for o in range(4) if o != layer]) - evaluator(range(4)) for layer in range(4)]
        np.testing.assert_allclose(leave_one_out([evaluator, evaluator]), [expected, expected], rtol=1e-9)

    def test_one_row_an_evaluator_and_their_cost(self, llama, make_blocks):
        cost = coalitions.Cost()
        rows = leave_one_out(coalitions.on_each(llama, make_blocks(4, 12).split(2), cost))
        assert rows.shape == (2, 4)
        assert not np.allclose(rows[0], rows[1])
        assert cost.evaluations == 10


class TestShapley:
    def test_the_cost_is_of_all_groups_also_where_the_target_ends_it(self, llama, make_blocks):
        stopped, whole = coalitions.Cost(), coalitions.Cost()
        batches = make_blocks(8, 12).split(1)
        evaluators = coalitions.on_each(llama, batches, stopped)  # a name keeps it from being closed by itself
        found = shapley(evaluators, target=1e9, least=2)
        again = shapley(coalitions.on_each(llama, batches[:2], whole), target=0.0)
        assert len(found.groups) == len(again.groups) == 2
        assert stopped.evaluations == whole.evaluations > 0

    def test_a_group_of_permutations_is_walked_on_all_windows_that_share_it(self, llama, make_blocks):
        windows = make_blocks(5, 12)
        values, _ = scoring.Calibration(llama, windows, windows, shared=2, target=0.0).shapley
        parts = [Evaluator(llama, part) for part in (windows[:2], windows[2:4], windows[4:])]
        np.testing.assert_allclose(
            values.groups[:, :, 1].sum(axis=1), [part(()) - part(range(4)) for part in parts], rtol=1e-4
        )

    def test_sampled_values_equal_the_exact_ones_within_their_errors(self, make_blocks):
        model = build_model("llama", num_hidden_layers=5, seed=3)
        with torch.no_grad():
            model.lm_head.weight.mul_(5)
        evaluator = Evaluator(model, make_blocks(3, 12))
        exact = exact_shapley(5, lambda kept: -evaluator(kept))
        found = shapley(itertools.repeat(evaluator, 200), target=0.05, seed=1)
        error = found.standard_error[:, 0]
        assert found.relative_error() < 0.05
        assert (error > 0).all()
        assert (np.abs(found.mean[:, 0] - exact) < 4 * error).all()
        assert found.mean.sum() == pytest.approx(evaluator(()) - evaluator(range(5)), rel=1e-4)
        assert len(found.coalitions) > 0

    def test_in_an_additive_game_one_group_is_exact(self):
        worth = np.array([3.0, -1.0, 0.5, 0.0])
        found = shapley([Game(4, lambda kept: -sum(worth[list(kept)]))] * 2)
        np.testing.assert_allclose(found.groups[:, :, 0], [worth, worth], atol=1e-6)

    def test_in_the_glove_game(self):
        # worth 1 with glove 0 and one of gloves 1, 2: values 2/3, 1/6, 1/6
        game = Game(3, lambda kept: -float(0 in kept and len(kept) > 1))
        found = shapley([game] * 400, target=0, seed=5)
        np.testing.assert_allclose(found.mean[:, 0], [2 / 3, 1 / 6, 1 / 6], atol=0.03)
        assert len(found.groups) == 400

    def test_sampling_goes_on_until_the_halves_rank_alike(self):
        """Additive games, of which one group is exact: odd groups put layer 1 first, until the sixth turns it round."""
        early, late = [2, 3, 1, 0], [5, 0, 1, 0]
        worths = [[3, 2, 1, 0] if group % 2 == 0 else early if group < 5 else late for group in range(9)]
        games = [Game(4, lambda kept, worth=worth: -sum(worth[layer] for layer in kept)) for worth in worths]
        found = {halves: shapley(games, target=9, halves=halves) for halves in (0, 0.5, 0.9)}
        assert {halves: len(values.groups) for halves, values in found.items()} == {0: 4, 0.5: 4, 0.9: 6}
        assert found[0.5].half_split_tau() == pytest.approx((5 - 1) / 6)  # one pair of six the other way round
        assert found[0.9].half_split_tau() == pytest.approx(1)
        assert len(shapley(games[:5], target=9, halves=0.9).groups) == 5  # the windows are the limit

    def test_the_seed_decides(self):
        game = Game(5, lambda kept: float(len(kept) > 2 and 0 in kept))
        one, same, other = (shapley([game] * 6, target=0, seed=seed).groups for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)

    def test_the_standard_error_is_that_of_the_groups(self):
        game = Game(5, lambda kept: float(len(kept) > 2 and 0 in kept))
        found = shapley([game] * 6, target=0)
        by_hand = np.std(found.groups[:, 2, 0], ddof=1) / math.sqrt(6)
        assert found.standard_error[2, 0] == pytest.approx(by_hand)

    def test_one_group_has_no_error(self, refused):
        with refused("fewer than 2 groups"):
            shapley([Game(3, len)])

    def test_values_that_do_not_add_up_are_refused(self, refused):
        counter = itertools.count()
        with refused("the sampling is broken"):
            shapley([Game(3, lambda kept: next(counter))] * 2)

    def test_values_of_a_second_metric_that_do_not_add_up_are_refused(self, refused):
        counter, game = itertools.count(), Game(3, None, ("nll_nats", "kl_nats"))
        game.evaluate = lambda asked: np.array([[len(kept), next(counter)] for kept in asked], dtype=float)
        with refused("the sampling is broken"):
            shapley([game] * 2)

    def test_the_gap_is_the_largest_of_all_groups(self):
        counter = itertools.count()
        exact, noisy = Game(3, len), Game(3, lambda kept: 1 + 1e-6 * next(counter))
        assert shapley([exact, noisy, exact], target=0).gap[0] > 1e-6

    def test_the_relative_error_is_of_the_largest_value_of_either_sign(self):
        groups = np.array([[[-4.0], [1.0]], [[-6.0], [1.0]]])
        found = coalitions.ShapleyValues(groups, np.zeros(1), np.zeros((0, 2)))
        assert found.relative_error() == pytest.approx(1 / 5)  # the error of -5 is 1

    def test_of_six_layers_each_begins_one_walk_of_a_group(self):
        """Three shifts of one permutation, each forth and back: a third of the depth lies between their beginnings."""
        asked = []
        coalitions._shapley_group(Game(6, lambda kept: asked.append(kept) or 0), list(range(6)))
        assert {kept for kept in asked if len(kept) == 1} == {frozenset([layer]) for layer in range(6)}
