"""Histories and items as texts: vectors by hand, a contrastive loss by hand, and a planted likeness that is learned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CAUSAL, build_model

from paper_src import InputError
from paper_src.baselines.control import without_layers
from paper_src.recommendation.encoders import Training
from paper_src.recommendation.title_pairs import LENGTH, PAIRS, TitlePairs, as_scorer, train

pytestmark = pytest.mark.usefixtures("wide")
TITLES = [f"{colour} {thing}" for colour in ("red", "green", "blue", "white") for thing in ("car", "boat", "kite")]
TRAINING = Training(batch_size=8, learning_rate=5e-3, body_rate=5e-3, epochs=6, patience=6)


def pairs(words, full=None, centre=None, **settings):
    body = (full or build_model("llama")).base_model.float()
    centre = torch.zeros(body.config.hidden_size) if centre is None else centre
    return TitlePairs(body, words, TITLES, centre, **settings).eval()


def by_colour(users, seed):
    """Planted: behind a red thing comes a blue one, behind a green one a white one."""
    rng = np.random.default_rng(seed)
    return [first + np.array([rng.integers(3), 6 + rng.integers(3)]) for first in rng.choice([0, 3], users)]


@torch.no_grad()
def test_a_vector_is_the_weighted_mean_of_the_titles_states(words):
    model, history = pairs(words, centre=torch.ones(1).expand(CAUSAL["llama"]["hidden_size"]) * 0.1), [4, 7]
    ids, weights = model.text(np.array(history))
    states = model.body(input_ids=ids[None]).last_hidden_state[0]
    ends = np.cumsum([len(model.opening)] + [len(model.bullet) + len(model.titles[item]) for item in history])
    means = [states[end - len(model.titles[item]) : end].mean(0) for end, item in zip(ends[1:], history, strict=True)]
    expected = (0.8 * means[0] + means[1]) / 1.8 - 0.1
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(model.read([np.array(history)])[0], expected / expected.norm(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(words):
    model = pairs(words)
    histories = [np.array([1]), np.arange(6), np.array([3, 2])]
    together, alone = model.read(histories), torch.cat([model.read([history]) for history in histories])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_loss_leaves_out_what_is_the_same_item(words):
    model, histories, following = pairs(words), [[0, 1], [4], [7, 8]], [2, 5, 2]
    texts = [(*model.text(np.array(h)), *model.text(np.array([n]))) for h, n in zip(histories, following, strict=True)]
    columns = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*texts, strict=True)]
    users, items = (model.read([np.array(row) for row in part]) for part in (histories, [[n] for n in following]))
    scores = 20 * users @ items.T
    scores[0, 2] = scores[2, 0] = -torch.inf
    expected = -scores.log_softmax(1).diagonal().mean()
    found = model(*columns, torch.tensor(following))["loss"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [True, False])
def test_a_planted_order_is_learned_and_holds_for_an_item_that_nobody_took(layers, words, tmp_path):
    model = pairs(words, build_model("llama") if layers else without_layers(build_model("llama")))
    sequences = [items[items != 8] for items in by_colour(60, seed=0)]  # nobody took the blue kite
    before = as_scorer(model)([np.array([0])])[0]
    train(model, sequences, ([np.array([0])] * 2, np.array([6, 7])), tmp_path, TRAINING)
    after = as_scorer(model)([np.array([0])])[0]
    blue, strange = [6, 7, 8], [3, 4, 5, 9, 10, 11]
    assert before[blue].min() < before[strange].max()
    assert after[blue].min() > after[strange].max()


def test_the_same_seed_trains_the_same_weights_and_an_ended_run_is_read(words, tmp_path, monkeypatch):
    short, validation = replace(TRAINING, epochs=1), ([np.array([3, 4])], np.array([5]))
    models = [pairs(words) for _ in range(3)]
    for model, folder in zip(models, ("one", "other", "one"), strict=True):
        if model is models[2]:
            monkeypatch.setattr("paper_src.recommendation.encoders._Trainer", None)
        train(model, by_colour(20, seed=0), validation, tmp_path / folder, short)
    for other in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), other.parameters(), strict=True))


def test_only_the_last_titles_and_pairs_count(words, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("paper_src.recommendation.title_pairs.trained", lambda model, rows, *others: seen.extend(rows))
    model = pairs(words)
    train(model, [np.arange(12), np.array([3, 4]), np.array([6])], ([], []), tmp_path, TRAINING)
    assert [int(row["items"]) for row in seen] == [9, 10, 11, 4]
    assert len(seen) == PAIRS + 1
    ids, _ = model.text(np.arange(11)[-LENGTH:])
    assert torch.equal(seen[2]["input_ids"], ids)


def test_sequences_without_two_items_are_refused(words, tmp_path):
    with pytest.raises(InputError, match="two items"):
        train(pairs(words), [np.array([1])], ([np.array([1])], np.array([2])), tmp_path, TRAINING)
