"""Titles by their likelihood: by hand, in one row and in several, candidates and their ranks."""

import numpy as np
import pytest
import torch
from conftest import build_model

from paper_src.baselines.control import without_layers
from paper_src.recommendation.likelihood import BULLET, OPENING, TitleModel, candidates_alike, ranks_within

pytestmark = pytest.mark.usefixtures("wide")
ITEMS = ["Alien", "Heat 2", "Up", "The  long\ngoodbye", "Up"]


def titles(words, **settings):
    return TitleModel(build_model("llama"), words, ITEMS, **settings)


def by_hand(model, words, history, item):
    """The mean log-likelihood of a title's tokens and the next bullet, from logits of the whole text."""

    def ids(text):
        return words(text, add_special_tokens=False)["input_ids"]

    begun = [words.bos_token_id] if words("a")["input_ids"][0] == words.bos_token_id else []
    prompt = begun + ids(OPENING)
    for title in history:
        prompt += ids(BULLET) + ids(f" {title}")
    prompt += ids(BULLET)
    end = ids(f" {item}") + ids(BULLET)
    log_p = model(torch.tensor([prompt + end])).logits[0].log_softmax(-1)
    return float(sum(log_p[len(prompt) + n - 1, token] for n, token in enumerate(end)) / len(end))


@pytest.mark.parametrize(
    ("family", "settings", "packs"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("mistral", {"sliding_window": 256}, True),
        ("mistral", {"sliding_window": 5}, False),  # narrower than a prompt
        ("gemma3_text", {"sliding_window": 256}, True),
        ("falcon", {}, True),
        ("falcon", {"alibi": True}, False),  # which takes no places
    ],
)
@torch.no_grad()
def test_scores_are_the_models_own(words, family, settings, packs):
    model = TitleModel(build_model(family, **settings), words, ITEMS)
    found = model.scores([0, 1], [2, 3, 4])
    assert model.packs == packs
    expected = [by_hand(model.model, words, ITEMS[:2], title) for title in ("Up", "The long goodbye", "Up")]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_a_prompt_that_is_longer_than_the_window_has_rows_of_its_own(words):
    model = TitleModel(build_model("mistral", sliding_window=48), words, ITEMS)
    model.read_alone([3])
    assert model.packs
    found = model.scores([0, 1, 2, 3], [2, 4])
    assert not model.packs
    expected = by_hand(model.model, words, [*ITEMS[:3], "The long goodbye"], "Up")
    assert found.tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_candidates_do_not_see_each_other(words):
    model = titles(words)
    alone = [float(model.scores([0], [item])[0]) for item in (1, 2, 3)]
    assert model.scores([0], [1, 2, 3]).tolist() == pytest.approx(alone, abs=1e-5)


def test_only_the_last_titles_and_the_first_tokens_count(words):
    short = titles(words, length=1, longest=3)
    assert torch.equal(short.scores([0, 1], [2]), short.scores([1], [2]))
    assert max(map(len, short.titles)) == 3
    assert not torch.allclose(titles(words).scores([0, 1], [2]), titles(words).scores([1], [2]))


def test_an_empty_title_is_refused(words, refused):
    with refused("item 1 has an empty text"):
        TitleModel(build_model("llama"), words, ["Alien", " \n "])


@torch.no_grad()
def test_gains_are_by_hand_and_none_without_layers(words):
    model = titles(words)
    found = model.gains([0, 1], [2, 3])
    expected = [by_hand(model.model, words, ITEMS[:2], title) - by_hand(model.model, words, [], title)
                for title in ("Up", "The long goodbye")]  # fmt: skip
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert found.abs().max() > 1e-3
    assert torch.equal(found, found.round(decimals=4))  # so that ties do not hang on the last bits
    bare = TitleModel(without_layers(model.model), words, ITEMS)
    assert bare.gains([0, 1], [2, 3]).tolist() == [0, 0]  # without layers no token sees another


def test_titles_alone_are_read_once(words, monkeypatch):
    model = titles(words)
    model.read_alone([2, 3, 2, 1], batch_size=2)
    assert sorted(model.alone) == [1, 2, 3]
    expected = model.scores([0], [1, 3]) - torch.tensor([model.alone[1], model.alone[3]])
    scores, asked = model.scores, []
    monkeypatch.setattr(model, "scores", lambda history, items: asked.append(history) or scores(history, items))
    assert model.gains([0], [1, 3]).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert asked == [[0]]


def test_candidates_are_drawn_as_they_are_taken():
    counts, users = np.array([0, 30, 10, 10, 50, 0]), 4000
    found = candidates_alike(counts, [np.array([4])] * users, np.full(users, 5), count=2, seed=1)
    assert (found[:, 0] == 5).all()  # the target, which nobody took in training
    drawn = np.bincount(found[:, 1], minlength=6) / users
    assert drawn == pytest.approx([0, 0.6, 0.2, 0.2, 0, 0], abs=0.03)  # never what a user has had
    rows = candidates_alike(counts, [np.array([4])] * 9, np.full(9, 1), count=3)
    assert all(len(set(row)) == 3 for row in rows.tolist())
    assert np.array_equal(rows, candidates_alike(counts, [np.array([4])] * 9, np.full(9, 1), count=3))
    assert not np.array_equal(rows, candidates_alike(counts, [np.array([4])] * 9, np.full(9, 1), count=3, seed=1))


def test_more_candidates_than_items_are_refused(refused):
    with refused("5 candidates, but 4 items are left to user 0"):
        candidates_alike(np.array([1, 1, 1, 1, 1, 0]), [np.array([0])], np.array([5]) - 1, count=5)


def test_ranks_by_hand():
    scores = [torch.tensor(row) for row in ([2.0, 3.0, 1.0], [1.0, 4.0, 2.0], [4.0, 1.0, 3.0])]
    assert ranks_within(scores).tolist() == [2, 3, 1]


def test_equal_scores_stand_in_random_order():
    found = ranks_within([torch.zeros(4)] * 2000)
    assert np.bincount(found, minlength=5)[1:] / 2000 == pytest.approx([0.25] * 4, abs=0.04)


def test_a_score_that_is_nan_is_refused(refused):
    with refused("scores of user 0 are NaN"):
        ranks_within([torch.tensor([1.0, torch.nan])])


def test_lengths_are_the_tokens_that_a_score_is_a_mean_over(words):
    expected = [len(words(f" {title}{BULLET}", add_special_tokens=False)["input_ids"]) for title in ITEMS[:3]]
    assert titles(words, longest=99).lengths([0, 1, 2]).tolist() == expected
