"""The sequence encoder on a planted order: it learns, it repeats, and padding changes nothing."""

import numpy as np
import pytest
import torch
from conftest import build_model

from paper_src.compaction import compact
from paper_src.recommendation import encoders
from paper_src.recommendation.encoders import Training
from paper_src.recommendation.ranking import metrics_of, target_ranks

ITEMS = 12


def chains(users=60, length=8, seed=0):
    """Planted: item i is always followed by i + 1."""
    starts = np.random.default_rng(seed).integers(0, ITEMS, users)
    return [(start + np.arange(length)) % ITEMS for start in starts]


def dies_in_its_second_epoch(measure):
    def dying(trainer):
        if trainer.state.epoch == 2:
            raise KeyboardInterrupt
        return measure(trainer)

    return dying


class TestTrained:
    def fit(self, folder, body=None, seed=0, **settings):
        train = chains()
        validation = ([items[:4] for items in chains(seed=1)], np.array([items[4] for items in chains(seed=1)]))
        torch.manual_seed(seed)
        body = body or encoders.sasrec_body(16, 1, 2, 8, dropout=0.0)
        chosen = Training(
            **({"length": 8, "learning_rate": 1e-2, "body_rate": 1e-2, "epochs": 12, "patience": 12} | settings),
            seed=seed,
        )
        vectors = encoders.random_vectors(ITEMS, 16)
        return encoders.train(body, vectors, train, validation, folder, chosen)

    def score(self, model):
        histories = [items[:5] for items in chains(seed=2)]
        return metrics_of(
            target_ranks(encoders.as_scorer(model, 8), histories, np.array([i[5] for i in chains(seed=2)]))
        )

    def test_a_planted_order_is_learned(self, tmp_path):
        model, history = self.fit(tmp_path)
        assert self.score(model)["hr5"].mean() > 0.95
        assert (metrics_of(target_ranks(encoders.as_scorer(model, 8), [i[:5] for i in chains(seed=2)],
                                 np.array([i[5] for i in chains(seed=2)])))["mrr"] == 1).mean() > 0.9  # fmt: skip
        assert history[-1]["ndcg10"] > history[0]["ndcg10"]

    def test_a_compact_language_model_is_a_body(self, tmp_path):
        small = compact(build_model("llama"), (0, 3))
        model, _ = self.fit(tmp_path, body=small.model)
        assert self.score(model)["mrr"].mean() > 0.9

    def test_without_layers_only_the_last_item_is_seen(self, tmp_path):
        config = build_model("llama").config
        model, history = self.fit(tmp_path, body=encoders.NoLayers(config), residual=0.0)
        assert history[-1]["ndcg10"] > 0.9  # the planted order asks for no more
        score = encoders.as_scorer(model, 8)
        assert torch.equal(score([np.array([3, 4, 5])]), score([np.array([0, 5])]))

    def test_the_same_seed_gives_the_same_weights(self, tmp_path):
        first, second, third = (self.fit(tmp_path / str(n), seed=seed, epochs=2)[0] for n, seed in enumerate((0, 0, 1)))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert not torch.equal(first.head.weight, third.head.weight)

    def test_the_body_has_a_rate_of_its_own(self, tmp_path):
        torch.manual_seed(0)
        body = encoders.sasrec_body(16, 1, 2, 8, dropout=0.0)
        before = {name: value.clone() for name, value in body.state_dict().items()}
        model, _ = self.fit(tmp_path, body=body, epochs=3, body_rate=0.0, residual=0.0)  # so that gradients reach it
        assert all(torch.equal(value, before[name]) for name, value in model.body.state_dict().items())
        assert not torch.equal(model.items.weight, encoders.random_vectors(ITEMS, 16))

    def test_the_best_epoch_is_kept(self, tmp_path):
        model, history = self.fit(tmp_path, epochs=4)
        validation = [items[:4] for items in chains(seed=1)], np.array([items[4] for items in chains(seed=1)])
        found = metrics_of(target_ranks(encoders.as_scorer(model, 8), *validation))["ndcg10"].mean()
        assert found == pytest.approx(max(row["ndcg10"] for row in history), rel=1e-6)

    def test_a_killed_run_resumes_to_the_same_weights(self, tmp_path, monkeypatch):
        whole, history = self.fit(tmp_path / "whole", epochs=4)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(encoders._Trainer, "measure", dies_in_its_second_epoch(encoders._Trainer.measure))
            self.fit(tmp_path / "killed", epochs=4)
        resumed, again = self.fit(tmp_path / "killed", epochs=4)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert [row["ndcg10"] for row in again] == [row["ndcg10"] for row in history]
        assert [row["epoch"] for row in again] == [0, 1, 2, 3, 4]

    def test_steps_that_make_it_worse_are_not_taken(self, tmp_path):
        torch.manual_seed(0)
        body = encoders.sasrec_body(16, 1, 2, 8, dropout=0.0)
        model, history = self.fit(tmp_path, body=body, epochs=2, learning_rate=3.0, body_rate=3.0)
        assert history[0]["ndcg10"] > max(row["ndcg10"] for row in history[1:])
        assert torch.equal(model.items.weight, encoders.random_vectors(ITEMS, 16))

    def test_a_run_that_has_ended_is_read_and_not_repeated(self, tmp_path, monkeypatch):
        model, history = self.fit(tmp_path, epochs=2)
        assert not list(tmp_path.glob("*/checkpoint-*"))
        monkeypatch.setattr(encoders, "_Trainer", None)
        same, again = self.fit(tmp_path, epochs=2)
        assert again == history
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))

    def test_with_a_residual_it_starts_from_the_weighted_mean_of_the_history(self):
        vectors = encoders.random_vectors(ITEMS, 16)
        model = encoders.SequenceModel(encoders.sasrec_body(16, 1, 2, 8), vectors, residual=0.5)
        histories = [np.array([3, 5]), np.array([1, 2, 4])]
        users = torch.stack([vectors[3] * 0.5 + vectors[5], vectors[1] * 0.25 + vectors[2] * 0.5 + vectors[4]])
        expected = torch.nn.functional.normalize(users, dim=-1) @ vectors.T / 0.02  # |x| = sqrt(16), over sqrt(16)
        torch.testing.assert_close(encoders.as_scorer(model, 8)(histories), expected, atol=1e-5, rtol=1e-5)

    def test_a_training_sequence_is_the_last_items_each_followed_by_its_label(self, tmp_path, monkeypatch):
        monkeypatch.setattr(encoders, "trained", lambda model, examples, *rest: seen.extend(examples) or [])
        seen, body = [], encoders.sasrec_body(16, 1, 2, 8)
        encoders.train(body, encoders.random_vectors(ITEMS, 16), [np.arange(9)], ([], []), tmp_path, Training(length=4))
        assert (seen[0]["input_ids"].tolist(), seen[0]["labels"].tolist()) == ([4, 5, 6, 7], [5, 6, 7, 8])

    def test_padding_has_no_label(self):
        rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (2, 4)]
        assert encoders._collate(rows)["labels"][0].tolist() == [0, 1, encoders.IGNORED, encoders.IGNORED]

    def test_first_weights_and_the_order_of_the_text_follow_the_seed(self, tmp_path, monkeypatch):
        heads, vectors = [], encoders.random_vectors(ITEMS, 16)
        monkeypatch.setattr(encoders, "trained", lambda model, *rest: heads.append(model.head.weight.clone()) or [])
        for seed in (0, 1):
            torch.manual_seed(9)
            body, chosen = encoders.sasrec_body(16, 1, 2, 8), Training(residual=0.0, seed=seed)
            encoders.train(body, vectors, [np.arange(3)], ([], []), tmp_path, chosen)
            assert encoders._arguments(tmp_path, chosen).seed == seed
        assert not torch.equal(*heads)

    def test_scores_have_no_dropout_also_of_a_model_in_training(self):
        body = encoders.sasrec_body(16, 1, 2, 8, dropout=0.5)
        model = encoders.SequenceModel(body, encoders.random_vectors(ITEMS, 16))
        score = encoders.as_scorer(model, 8)
        one, two = (score([np.array([1, 2])]) for _ in range(2) if model.train())
        assert torch.equal(one, two)

    def test_of_a_long_history_the_last_items_count(self):
        model = encoders.SequenceModel(encoders.sasrec_body(16, 1, 2, 8), encoders.random_vectors(ITEMS, 16), 0.5)
        score = encoders.as_scorer(model, 2)
        assert torch.equal(score([np.array([5, 6, 1, 2])]), score([np.array([1, 2])]))

    @pytest.mark.parametrize("residual", [0.0, 0.8])
    def test_padding_changes_nothing(self, residual):
        torch.manual_seed(0)
        body, vectors = encoders.sasrec_body(16, 1, 2, 8), encoders.random_vectors(ITEMS, 16)
        model = encoders.SequenceModel(body, vectors, residual).eval()
        torch.nn.init.normal_(model.head.weight)
        short, long = np.array([1, 2]), np.array([3, 4, 5, 6, 7])
        together = encoders.as_scorer(model, 8)([short, long])
        alone = torch.cat([encoders.as_scorer(model, 8)([items]) for items in (short, long)])
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)

    def test_item_vectors_are_white_and_keep_neighbours(self):
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(200, 8, generator=generator) * torch.tensor([9.0, 5, 3, 2, 1, 0.5, 0.1, 0.01])
        vectors = encoders.item_vectors(states, 4)
        torch.testing.assert_close(vectors.T @ vectors / 200, 0.02**2 * torch.eye(4), atol=1e-6, rtol=1e-3)

    def test_bad_input(self, tmp_path, refused):
        with refused("no training sequence has two items"):
            encoders.train(encoders.sasrec_body(16, 1, 2, 8), encoders.random_vectors(4, 16), [np.array([1])],
                            ([np.array([1])], np.array([2])), tmp_path, Training())  # fmt: skip
        with refused("ask for at most 3"):
            encoders.item_vectors(torch.zeros(5, 3), 4)
        with refused("the loss is (nan|inf) at step"):
            self.fit(tmp_path, learning_rate=1e38, batch_size=4)
