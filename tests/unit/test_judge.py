"""The judge of sections 5 and 7: of which text, in which order and with which seed its windows are."""

import math

import numpy as np
import pytest
import torch
from conftest import build_model

from paper_src import data, fidelity, stats
from paper_src.compaction import compact
from paper_src.sections import judge
from paper_src.sections.judge import Judge


@pytest.fixture
def full():
    return build_model("llama", vocab_size=300)


@pytest.fixture
def judge_of(full, tokenizer, texts):
    """``judge_of(count, texts=1, seed=0)``: a judge of so many windows of test text of 16 tokens."""

    def make(count, kinds=1, seed=0):
        return Judge(full, tokenizer, texts[:kinds], "test", (count, 16), torch.zeros(32), seed)

    return make


def test_calibration_is_of_training_text(tokenizer, texts):
    found = judge.calibration(tokenizer, texts, 4, 24, seed=0)
    train = [data.load_text(name, "train")[0] for name in texts]
    assert torch.equal(found, judge.mixed_blocks(tokenizer, train, 4, 24, seed=0))
    shown = tokenizer.decode(found.flatten().tolist())
    assert "valid" not in shown and "test" not in shown


def test_windows_of_every_kind_are_of_the_split_and_the_seed(judge_of, tokenizer, texts):
    found = judge_of(3, kinds=2, seed=2).blocks
    for name in texts:
        expected = data.token_blocks(tokenizer, data.load_text(name, "test")[0], 3, 16, seed=2)
        assert sorted(found[judge.kind_of_text(name)].tolist()) == sorted(expected.tolist())


def test_the_first_windows_are_spread_over_the_whole_text(judge_of, tokenizer, texts):
    blocks = data.token_blocks(tokenizer, data.load_text(texts[0], "test")[0], 6, 16, seed=0)
    assert torch.equal(judge_of(6).first_blocks, blocks[[0, 4, 2, 1, 5, 3]])


def test_losses_of_the_full_model_are_in_the_order_of_its_windows(judge_of, full, monkeypatch):
    monkeypatch.setattr(judge, "ALL_METRICS", 32)  # two of five windows
    own = judge_of(5)
    reference = fidelity.reference(full, own.first_blocks, torch.zeros(32))
    expected = fidelity.compare(full, reference, metrics=["nll_nats"])["nll_nats"]
    np.testing.assert_allclose(own.full_nll["plain"], expected, rtol=1e-5)


def test_the_constant_answer_is_set_beside_the_full_model_on_the_same_windows(judge_of, full, monkeypatch):
    monkeypatch.setattr(judge, "ALL_METRICS", 32)
    own = judge_of(5)
    row, few, all_five = own.constant_row(full), own.full_nll["plain"][:2].mean(), own.full_nll["plain"].mean()
    assert row["ppl_ratio"] == pytest.approx(math.exp(row["nll_nats"] - few))
    assert few != pytest.approx(all_five, rel=1e-4)


def test_intervals_follow_the_seed_of_the_judge(judge_of, full):
    own, small = judge_of(9, seed=3), compact(full, (0, 3))
    row, values = own.row(small), own.compare(small)["plain"]["nll_nats"]
    assert (row["nll_nats_lo"], row["nll_nats_hi"]) == pytest.approx(stats.interval(values, seed=3))
    assert stats.interval(values, seed=3) != stats.interval(values, seed=0)
    low, high = np.exp(stats.interval(values - own.full_nll["plain"], seed=3))
    assert (row["ppl_ratio_lo"], row["ppl_ratio_hi"]) == pytest.approx((low, high))
