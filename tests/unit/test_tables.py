"""Rows of tables that are computed and not only laid out."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau

from paper_src.coalitions import Cost, ShapleyValues
from paper_src.sections import fidelity as fidelity_section
from paper_src.sections import importance as importance_section
from paper_src.sections import selection as selection_section


def test_taus_equal_scipy_with_and_without_ties():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 8, size=(2, 20, 12)).astype(float)
    b[:10] = generator.normal(size=(10, 12))
    expected = [kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(importance_section._taus(a, b), expected, rtol=1e-12)


def test_strategies_by_hand():
    rows = [
        {"strategy": "top_k", "score": "fisher", "k": 1, "kept": "0"},
        {"strategy": "shortened_llama_ppl", "k": 1, "kept": "1"},
        {"strategy": "sleb", "k": 1, "kept": "2"},
        {"strategy": "evenly_spaced", "k": 1, "kept": "0"},
        *({"strategy": "random", "k": 1, "draw": draw, "kept": kept} for draw, kept in enumerate("012")),
    ]
    nll = {"0 1 2": 1.0, "0": 4.0, "1": 2.0, "2": 3.0}
    measured = {kept: {"nll_nats": np.array([value]), "cosine": np.array([value / 10])} for kept, value in nll.items()}
    searched = pd.DataFrame([{"strategy": "sleb", "k": 1, "kept": "2", **vars(Cost(5, 70, 2.5))}])
    costs = importance_section.t1_cost({"one pass": Cost(1, 300, 9.0), "leave_one_out": Cost(4, 40, 1.5)})
    frame = selection_section.t2_strategies(pd.DataFrame(rows), measured, searched, costs, depth=3).set_index(
        "strategy"
    )
    assert frame["chosen"].to_dict() == {name: name == "shortened_llama_ppl" for name in frame.index}
    assert frame.loc["sleb", "ppl_ratio"] == pytest.approx(math.exp(2))
    assert frame.loc["random", "ppl_ratio"] == pytest.approx(math.exp(3.0 - 1.0))
    assert frame["p_ppl"].dropna().to_dict() == {
        "shortened_llama_ppl": 0.5, "sleb": 0.75, "top_k": 1.0, "evenly_spaced": 1.0,
    }  # fmt: skip
    assert frame["seconds"].dropna().to_dict() == {
        "shortened_llama_ppl": 1.5, "sleb": 2.5, "top_k": 9.0, "evenly_spaced": 0.0,
    }  # fmt: skip


def test_the_chosen_rows_keep_what_validation_found_best():
    selection = pd.DataFrame({"strategy": ["top_k"], "k": [1], "kept": ["0"]})
    strategies = pd.DataFrame({"strategy": ["a", "b"], "k": [1, 1], "kept": ["0", "2"], "chosen": [False, True]})
    assert selection_section.with_chosen(selection, strategies).iloc[-1].to_dict() == {
        "strategy": "chosen",
        "k": 1,
        "kept": "2",
    }


def test_saturation_sums_up_coalitions_of_each_size():
    rows = [[0, 4.0, 9.0], [2, 1.0, 1.0], [2, 3.0, 5.0], [2, 2.0, 2.0]]
    table = importance_section.t1_saturation(ShapleyValues(np.zeros((2, 3, 2)), np.zeros(2), np.array(rows))).set_index(
        "layers"
    )
    assert table["n"].to_dict() == {0: 1, 2: 3}
    assert table.loc[2, "nll_nats_median"] == 2
    assert table.loc[2, "nll_capped_nats_median"] == 2
    assert table.loc[2, "nll_nats_p90"] == pytest.approx(4.4)  # between 2 and 5


def test_on_long_text_the_interval_is_of_the_paired_difference():
    hard = np.array([1.0, 5.0, 9.0])  # blocks differ by far more than the two models do
    measured = {
        "0 1": {"nll_nats": hard, "cosine": np.ones(3)},
        "0": {"nll_nats": hard + 0.5, "cosine": np.array([0.1, 0.2, 0.3])},
        "1": {"nll_nats": hard + np.array([0.0, 1.0, 2.0]), "cosine": np.zeros(3)},
    }
    strategies = pd.DataFrame({
        "strategy": ["a", "b", "random"], "score": None, "k": 1, "kept": ["1", "0", None],
        "chosen": [False, True, None],
    })  # fmt: skip
    frame = fidelity_section.t4_strategies(measured, strategies, torch.zeros(3, 4), seed=0).set_index("strategy")
    assert list(frame.index) == ["b", "a"]  # the random rows are no selection; best first
    assert frame.loc["b", ["ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi"]].tolist() == pytest.approx([math.exp(0.5)] * 3)
    assert frame.loc["a", "ppl_ratio"] == pytest.approx(math.e)
    assert 1 <= frame.loc["a", "ppl_ratio_lo"] < math.e < frame.loc["a", "ppl_ratio_hi"] <= math.exp(2)
    assert frame.loc["b", "cosine"] == pytest.approx(0.2)
    assert (frame["n_tokens"] == 12).all()
