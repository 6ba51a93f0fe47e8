"""The wrong practices of notebook 8: each does what it is said to do, and the right one sees through it."""

import json
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from paper_src import data, models
from paper_src.baselines import earlier_practice
from paper_src.compaction import compact
from paper_src.sections import controls as rows
from paper_src.sections.windows import losses
from paper_src.selection import kept_tuple
from paper_src.stats import paired

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def trained():
    """The small trained model with 16 calibration and 16 test blocks."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny-llama").eval()
    texts = (data.load_text(str(DATA / "tiny-text"), split)[0] for split in ("train", "test"))
    return model, *(data.token_blocks(tokenizer, text, 16, 64, 0) for text in texts)


def test_made_up_scores_are_uniform_random_selections():
    drawn = earlier_practice.made_up_scores(6, 2, 3000, seed=0)
    counts = pd.Series(drawn).value_counts()
    assert len(counts) == 15
    assert counts.between(140, 260).all()


def test_idle_layers_change_nothing(llama, make_blocks):
    deep = earlier_practice.with_idle_layers(llama, [1, 2, 5, 8], 9)
    blocks = make_blocks(2, 12)
    torch.testing.assert_close(models.last_hidden(deep, blocks), models.last_hidden(llama, blocks))
    kept = compact(deep, [1, 2, 5, 8])
    torch.testing.assert_close(kept(blocks).logits, llama(blocks).logits)
    assert not torch.allclose(compact(deep, [1, 2, 5, 7])(blocks).logits, llama(blocks).logits)


@pytest.mark.parametrize("places", [[0, 1, 2], [0, 1, 2, 9], [0, 2, 1, 3], [0, 1, 1, 2]])
def test_places_that_do_not_fit_are_refused(llama, refused, places):
    with refused("give 4 increasing positions below 9"):
        earlier_practice.with_idle_layers(llama, places, 9)


def test_a_fixed_list_fails_where_layers_have_moved_and_a_causal_score_does_not(trained):
    model, calibration, test = trained
    places = earlier_practice.random_places(["first", "second"], 8, 16, seed=0)
    deep = {name: earlier_practice.with_idle_layers(model, at, 16) for name, at in places.items()}
    table, windows = rows.t8_permuted(deep, places, calibration, test, "a text", "ab" * 32)
    table = table.set_index(["model", "chosen_by"])
    ratio, working = table["ppl_ratio"], table["working_kept"]
    assert ratio["first", "fixed_list"] == pytest.approx(1, rel=1e-4)
    assert working["second", "fixed_list"] < 8
    assert ratio["second", "fixed_list"] > 1.5
    for order in ("first", "second"):
        assert ratio[order, "leave_one_out"] == pytest.approx(1, rel=1e-4)
        assert kept_tuple(table["kept"][order, "leave_one_out"]) == kept_tuple(table["working_layers"][order, "fisher"])
    pair = paired(*(losses(windows, f"second {way}") for way in ("fixed_list", "leave_one_out")))
    assert pair.ratio()[0] == pytest.approx(ratio["second", "fixed_list"] / ratio["second", "leave_one_out"])
    assert pair.n == 16 and pair.p < 0.001 and pair.lo > 0


def test_a_masked_model_answers_as_the_compact_one_and_runs_every_layer(make_blocks):
    model, blocks, calls = build_model("llama"), make_blocks(2, 10), []
    veiled = earlier_practice.masked(model, (0, 3))
    torch.testing.assert_close(veiled(blocks).logits, compact(model, (0, 3))(blocks).logits)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    veiled(blocks)
    assert len(calls) == 4


def test_a_sharpened_model_has_the_same_states_and_greedy_tokens_and_other_logits(llama, make_blocks):
    blocks, sharp = make_blocks(2, 10), earlier_practice.sharpened(llama, 4.0)
    torch.testing.assert_close(sharp(blocks).logits, 4 * llama(blocks).logits)
    assert torch.equal(models.last_hidden(sharp, blocks), models.last_hidden(llama, blocks))
    assert llama.lm_head.weight.requires_grad


def test_requests_give_the_states_and_take_longer_than_the_forward_pass(llama):
    with earlier_practice.served({"full": llama}) as port:
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/full", json.dumps([5, 6, 7]))
        states = json.loads(connection.getresponse().read())
        connection.close()
        assert earlier_practice.request_seconds(port, "none", [1]) > 0
    expected = models.last_hidden(llama, torch.tensor([[5, 6, 7]]))[0].tolist()
    np.testing.assert_allclose(states, expected, rtol=1e-5)
    seconds = earlier_practice.time_requests(llama, compact(llama, (0,)), tokens=8, rounds=3, seed=0)
    assert {len(values) for values in seconds.values()} == {3}
    assert np.median(seconds["request_full"]) > np.median(seconds["full"])


def test_text_similarity_by_hand():
    assert earlier_practice.text_similarity(["abcd", "same"], ["abxd", "same"]) == pytest.approx((0.75 + 1) / 2)
    assert earlier_practice.text_similarity(["aaa"], ["bbb"]) == 0


def test_score_tests_by_hand():
    table = pd.DataFrame({
        "score": ["fisher", "normal", "normal", "normal"], "draw": [None, 0, 1, 2], "kept": ["0", "1", "2", "3"],
    })  # fmt: skip
    nll = {"0 1 2 3": 1.0, "0": 3.0, "1": 2.0, "2": 4.0, "3": 5.0}
    measured = {kept: {"nll_nats": np.array([value, value])} for kept, value in nll.items()}
    drawn, scores = rows.score_tests(table, measured)
    assert drawn["ppl_ratio"].tolist() == pytest.approx(np.exp([1, 3, 4]).tolist())
    assert scores["p_ppl"].item() == pytest.approx((1 + 1) / (1 + 3))
