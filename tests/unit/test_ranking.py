"""Ranking by hand and by a library, recommenders on planted data, and what must be refused."""

import numpy as np
import pytest
import torch
from conftest import build_model

from paper_src.recommendation import ranking
from paper_src.recommendation.ranking import metrics_of, target_ranks


def fixed(scores):
    return lambda histories: torch.tensor(scores)


class TestRanks:
    def test_by_hand(self):
        scores = [[0.1, 0.9, 0.5, 0.3], [0.4, 0.3, 0.2, 0.1]]
        histories = [np.array([1]), np.array([3])]
        assert target_ranks(fixed(scores), histories, np.array([3, 2])).tolist() == [2, 3]

    def test_equal_scores_rank_worst(self):
        assert target_ranks(fixed([[1.0, 1.0, 1.0, 0.0]]), [np.array([3])], np.array([0])).tolist() == [3]

    def test_items_already_had_never_rank_before_the_target(self):
        scores = [[9.0, 8.0, 7.0, 1.0]]
        assert target_ranks(fixed(scores), [np.array([0, 1, 2])], np.array([3])).tolist() == [1]

    def test_parts_are_as_the_whole_and_in_the_order_given(self):
        generator = np.random.default_rng(0)
        table = torch.as_tensor(generator.normal(size=(30, 50)))
        histories = [np.array([user, *generator.integers(0, 30, generator.integers(0, 5))]) for user in range(30)]
        targets = generator.integers(30, 50, 30)

        def scorer(part):
            return table[[int(items[0]) for items in part]]

        alone = [target_ranks(scorer, [items], targets[[user]])[0] for user, items in enumerate(histories)]
        for size in (7, 100):
            assert target_ranks(scorer, histories, targets, size).tolist() == alone

    def test_bad_input(self, refused):
        with refused("user 1 has an empty history"):
            target_ranks(fixed([[1.0, 2.0]] * 2), [np.array([0]), np.array([], dtype=int)], np.array([1, 1]))
        with refused("scores of user 1 are NaN"):
            target_ranks(fixed([[1.0, 2.0], [1.0, float("nan")]]), [np.array([0])] * 2, np.array([1, 1]))
        with refused("user 0 has had the target before"):
            target_ranks(fixed([[1.0, 2.0]]), [np.array([1])], np.array([1]))


class TestMetrics:
    def test_by_hand(self):
        found = metrics_of(np.array([1, 7, 11]))
        assert found["hr5"].tolist() == [1, 0, 0]
        assert found["hr10"].tolist() == [1, 1, 0]
        assert found["ndcg10"].tolist() == [1, 1 / 3, 0]  # log2(8) = 3
        assert found["mrr"].tolist() == [1, 1 / 7, 1 / 11]

    def test_ndcg_is_the_librarys(self):
        from implicit.evaluation import ranking_metrics_at_k
        from implicit.nearest_neighbours import CosineRecommender

        generator = np.random.default_rng(0)
        histories = [np.sort(generator.choice(40, 12, replace=False)) for _ in range(80)]
        targets = np.array([generator.choice(np.setdiff1d(np.arange(40), items)) for items in histories])
        model = CosineRecommender(K=40, num_threads=1)
        matrix = ranking._matrix(histories, 40)
        model.fit(matrix, show_progress=False)
        test = ranking._matrix([np.array([target]) for target in targets], 40)
        expected = ranking_metrics_at_k(model, matrix, test, K=10, show_progress=False, num_threads=1)["ndcg"]
        ours = metrics_of(target_ranks(ranking.item_knn(histories, 40, neighbours=40), histories, targets))[
            "ndcg10"
        ].mean()
        assert ours == pytest.approx(expected, rel=1e-6)


class TestWithoutTraining:
    def test_most_popular_by_hand(self):
        scorer = ranking.most_popular([np.array([0, 1]), np.array([1, 2]), np.array([1])], 4)
        assert scorer([np.array([0])] * 2).tolist() == [[1, 3, 1, 0]] * 2

    def test_item_knn_finds_what_goes_together(self):
        train = [np.array([0, 1])] * 5 + [np.array([2, 3])] * 5 + [np.array([0, 3])]
        scores = ranking.item_knn(train, 4)([np.array([0]), np.array([2])])
        assert scores[0, 1] > scores[0, 3] > scores[0, 2]
        assert scores[1, 3] > scores[1, 1]

    def test_item_knn_counts_as_many_neighbours_as_asked_and_a_hundred_by_itself(self):
        train = [np.array([0, n]) for n in range(1, 40) for _ in range(n)]
        scorers = ranking.item_knn(train, 40, neighbours=3), ranking.item_knn(train, 40)
        few, most = (int((scorer([np.array([0])])[0] > 0).sum()) for scorer in scorers)
        assert few <= 3 and most == 40

    @pytest.mark.parametrize(
        ("family", "settings"),
        [("llama", {}), ("gpt2", {}), ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False})],
    )
    def test_text_states_do_not_see_padding_or_order(self, tokenizer, family, settings):
        model = build_model(family, vocab_size=300, **settings)
        texts = ["mid", "longer text", "a", "ünïcode 七人"]  # by length 2, 0, 1, 3: not its own inverse
        together = ranking.text_states(model, tokenizer, texts, batch_size=4)
        alone = torch.cat([ranking.text_states(model, tokenizer, [text]) for text in texts])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)

    def test_text_states_by_hand(self, tokenizer):
        model = build_model("llama", vocab_size=300)
        ids = tokenizer("abc", return_tensors="pt")["input_ids"]
        assert ids.shape == (1, 4)  # <s> goes before, as the tokenizer has it, and does not count
        with torch.no_grad():
            expected = model.model(ids).last_hidden_state[:, 1:].mean(1)
        torch.testing.assert_close(ranking.text_states(model, tokenizer, ["abcdefg"], length=3), expected)

    def test_an_empty_text_is_refused(self, tokenizer, refused):
        with refused("item 1 has an empty text"):
            ranking.text_states(build_model("llama", vocab_size=300), tokenizer, ["a", ""])

    def test_frozen_users_lean_to_their_last_items(self):
        states = torch.eye(6)
        scores = ranking.frozen(states, decay=0.5)([np.array([0, 1, 2])])
        assert scores[0, 2] > scores[0, 1] > scores[0, 0] > scores[0, 3]

    def test_frozen_scores_do_not_see_what_all_states_share(self):
        near, far = (ranking.frozen(torch.eye(6) + shift)([np.array([0, 1])]) for shift in (0, 100))
        torch.testing.assert_close(far, near, atol=1e-3, rtol=1e-3)


def test_samples_are_different_users_and_repeat_with_their_seed():
    split = ranking.Split([np.array([0])] * 50, np.zeros(50), np.zeros(50))
    first, second, other = (ranking.sampled_users(split, 20, seed) for seed in (0, 0, 1))
    assert len(set(first)) == 20
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert len(ranking.sampled_users(split, 99, 0)) == 50
