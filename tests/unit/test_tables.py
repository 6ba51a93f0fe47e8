"""Rows of tables that are computed and not only laid out."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from paper_src import scoring
from paper_src.coalitions import Cost, ShapleyValues
from paper_src.sections import importance as importance_section
from paper_src.sections import selection as selection_section
from paper_src.sections import worth as worth_section


def test_taus_equal_scipy_with_and_without_ties():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 8, size=(2, 20, 12)).astype(float)
    b[:10] = generator.normal(size=(10, 12))
    expected = [kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(worth_section.taus(a, b), expected, rtol=1e-12)


def test_strategies_by_hand():
    found = [
        {"strategy": "top_k", "score": "combined", "k": 1, "kept": (0,)},
        {"strategy": "shortened_llama_ppl", "k": 1, "kept": (1,)},
        {"strategy": "drop_block", "k": 1, "kept": (1,)},
        {"strategy": "evenly_spaced", "k": 1, "kept": (0,)},
        *({"strategy": "random", "k": 1, "draw": draw, "kept": (draw,)} for draw in range(3)),
        {"strategy": "sleb", "k": 1, "kept": (2,), **vars(Cost(5, 70, 2.5))},
    ]
    selected = selection_section.selections(found)
    nll = {"0 1 2": 1.0, "0": 4.0, "1": 2.0, "2": 3.0}
    measured = {kept: {"nll_nats": np.array([value]), "cosine": np.array([value / 10])} for kept, value in nll.items()}
    costs = importance_section.t1_cost({
        scoring.one_pass: Cost(1, 300, 9.0), scoring.leave_one_out: Cost(4, 40, 1.5),
    })  # fmt: skip
    frame = selection_section.t2_strategies(selected, measured, costs, depth=3).set_index("strategy")
    assert frame["chosen"].to_dict() == {name: name == "shortened_llama_ppl" for name in frame.index}
    assert frame.loc["sleb", "ppl_ratio"] == pytest.approx(math.exp(2))
    assert frame.loc["random", "ppl_ratio"] == pytest.approx(math.exp(3.0 - 1.0))
    assert frame["n_draws"].dropna().to_dict() == {"random": 3}
    assert frame["seconds"].dropna().to_dict() == {
        "shortened_llama_ppl": 1.5, "drop_block": 9.0, "sleb": 2.5, "top_k": 9.0, "evenly_spaced": 0.0,
    }  # fmt: skip
    table = selection_section.t2_selection(selected, frame.reset_index())
    assert table.iloc[-1].dropna().to_dict() == {"strategy": "chosen", "k": 1, "kept": "1"}
    assert len(table) == len(found) + 1


def test_passes_are_named_by_their_score_or_by_themselves():
    costs = importance_section.t1_cost(
        {score.measure: Cost() for score in scoring.SCORES.values() if not score.made_of}
    )
    assert costs["scores"].tolist() == ["one pass", "fisher_true", "weight_taylor", "leave_one_out", "shapley"]
    assert {scoring.passes(name)[0] for name in scoring.SCORES} == set(costs["scores"])
    assert scoring.passes("combined") == scoring.passes("angular") == ["one pass"]


def test_the_agreement_of_a_combined_score_is_that_of_its_parts(monkeypatch):
    """``combined`` with itself: between the combined scores of the two halves, as of any other score."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: torch.rand(n, 5, generator=generator, dtype=torch.float64) for name, n in (("a", 8), ("b", 8), ("c", 3))
    }
    entry = scoring.SCORES["combined"]
    scores = {name: scoring.Score(name, "gradient", "", scoring.one_pass) for name in rows}
    scores["both"] = scoring.Score("both", "combined", "", entry.measure, ("a", "b"))
    monkeypatch.setattr(scoring, "SCORES", scores)
    monkeypatch.setattr(importance_section, "SCORES", scores)
    monkeypatch.setattr(worth_section, "SCORES", scores)
    measured = scoring.LayerScores(rows, torch.zeros(6, 6), torch.ones(5))
    importance = importance_section.t1_importance(measured)
    assert "both_se" not in importance
    assert importance["both"].tolist() == pytest.approx(
        scoring.combined_score({name: rows[name].mean(dim=0) for name in "ab"}).tolist()
    )
    taus = importance_section.t1_agreement(measured, importance).set_index(["score_a", "score_b"])
    halves = [scoring.combined_score({name: rows[name][i::2].mean(dim=0) for name in "ab"}) for i in (0, 1)]
    assert taus.loc[("both", "both"), "kendall_tau"] == kendalltau(*halves).statistic
    assert taus.loc[("a", "c"), "kendall_tau_lo"] <= taus.loc[("a", "c"), "kendall_tau_hi"]


def test_saturation_sums_up_coalitions_of_each_size():
    rows = [[0, 4.0, 9.0], [2, 1.0, 1.0], [2, 3.0, 5.0], [2, 2.0, 2.0]]
    table = worth_section.t1_saturation(ShapleyValues(np.zeros((2, 3, 2)), np.zeros(2), np.array(rows))).set_index(
        "layers"
    )
    assert table["n"].to_dict() == {0: 1, 2: 3}
    assert table.loc[2, "nll_nats_median"] == 2
    assert table.loc[2, "nll_capped_nats_median"] == 2
    assert table.loc[2, "nll_nats_p90"] == pytest.approx(4.4)  # between 2 and 5
