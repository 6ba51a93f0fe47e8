"""Section 4's tables and findings: what is measured where, and every test by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from paper_src import fidelity
from paper_src.compaction import compact
from paper_src.reporting.findings import Findings
from paper_src.scoring import SCORES
from paper_src.sections import fidelity as rows
from paper_src.sections import fidelity_findings
from paper_src.sections.windows import losses, window_rows
from paper_src.selection import kept_tuple
from paper_src.stats import paired

MODEL = "ab" * 32


# What is measured


@pytest.fixture
def blocks(make_blocks):
    return make_blocks(4, 12)


@pytest.fixture
def measured(llama, blocks):
    groups = [
        rows.Group(["0 3"], range(4), fidelity.METRICS),
        rows.Group(["0 3", "1 2"], [0, 2], fidelity.METRICS),
        rows.Group(["2 3"], [0], ["nll_nats"]),
    ]
    return rows.measure_groups(llama, blocks, fidelity.mean_state(llama, blocks), groups)


def test_every_row_has_the_values_of_the_compacted_model_on_its_own_windows(llama, blocks, measured):
    full = fidelity.reference(llama, blocks, fidelity.mean_state(llama, blocks))
    for kept, windows in {"0 3": [0, 1, 2, 3], "1 2": [0, 2], "2 3": [0]}.items():
        expected = fidelity.compare(compact(llama, kept_tuple(kept)), full)
        for metric, column in measured[kept].items():
            np.testing.assert_allclose(column[windows], expected[metric][windows], rtol=1e-3, atol=1e-6)
            assert np.isnan(np.delete(column, windows)).all()
    assert set(measured["2 3"]) == {"nll_nats"}
    whole = {rows.FULL: fidelity.compare(llama, full), rows.TRIVIAL: fidelity.compare_constant(llama, full)}
    for row, values in whole.items():
        for metric in fidelity.METRICS:
            np.testing.assert_allclose(measured[row][metric], values[metric], rtol=1e-3, atol=1e-5)


def test_a_window_and_selection_of_two_groups_is_measured_once(llama, blocks, monkeypatch):
    seen, compare = [], fidelity.compare_states
    monkeypatch.setattr(fidelity, "compare_states", lambda *of: seen.append(1) or compare(*of))
    group = rows.Group(["0 3"], [0, 1], ["nll_nats"])
    rows.measure_groups(llama, blocks, torch.zeros(32), [group, group])
    assert len(seen) == 4 * 2 + 2  # full model and trivial predictor on each of four windows, the selection on two


def test_windows_of_every_selection_are_spread_over_those_of_the_headline(refused):
    assert rows.spread(64, 4) == [0, 16, 32, 48]
    assert rows.spread(3, 3) == [0, 1, 2]
    with refused("blocks = 5 of 4 headline windows: give 1 to 4"):
        rows.spread(4, 5)


# Tables by hand: a full model of two layers, three windows


def at(*nll, cosine=None):
    values = np.array(nll, dtype=float)
    return dict.fromkeys(fidelity.METRICS, values) | {"cosine": np.array(cosine or nll, dtype=float)}


@pytest.fixture
def made_up():
    hard = np.array([1.0, 5.0, 9.0])  # windows differ by far more than the models do
    return {"full": at(*hard), "trivial": at(*(hard + 9)), "0 1": at(*hard), "0": at(*(hard + 0.5)),
            "1": at(*(hard + np.array([0.0, 1.0, 2.0])))}  # fmt: skip


SELECTION = pd.DataFrame(
    [("top_k", "fisher", 1, "0"), ("distributed", "combined", 1, "1"), ("chosen", None, 1, "0"),
     ("random", None, 1, "0"), ("random", None, 1, "1"), ("random", None, 1, "1")],
    columns=["strategy", "score", "k", "kept"],
).assign(draw=[None, None, None, 0, 1, 2])  # fmt: skip


def test_intervals_are_of_the_paired_differences(made_up):
    draws = rows.t4_random(made_up, SELECTION, [0])
    table = rows.t4_fidelity(made_up, SELECTION, draws, [0, 1, 2], 10, "a text", seed=0).set_index("strategy")
    chosen, spread = table.loc["chosen"], table.loc["distributed"]
    assert chosen[["ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi"]].tolist() == pytest.approx([math.exp(0.5)] * 3)
    assert spread["ppl_ratio"] == pytest.approx(math.e)
    assert 1 <= spread["ppl_ratio_lo"] < math.e < spread["ppl_ratio_hi"] <= math.exp(2)
    assert (table["n_tokens"] == table["n_blocks"] * 10).all()
    assert table.loc["full", "k"] == 2 and table.loc["trivial", "k"] == 0


def test_p_values_are_of_the_windows_of_the_draws_by_hand(made_up):
    """On window 0 the losses are 1.5 (layer 0) and 1.0 (layer 1), so that one of three draws is as bad as layer 0."""
    draws = rows.t4_random(made_up, SELECTION, [0])
    assert draws["nll_nats"].tolist() == [1.5, 1.0, 1.0]
    assert draws["ppl_ratio"].tolist() == pytest.approx([math.exp(0.5), 1, 1])
    table = rows.t4_fidelity(made_up, SELECTION, draws, [0, 1, 2], 10, "a text", seed=0).set_index("strategy")
    assert table.loc["chosen", ["p_ppl", "p_ppl_worse"]].tolist() == [(1 + 3) / (1 + 3), (1 + 1) / (1 + 3)]
    assert table.loc["distributed", ["p_ppl", "p_ppl_worse"]].tolist() == [(1 + 2) / (1 + 3), (1 + 3) / (1 + 3)]
    assert table.loc["random", ["n_draws", "n_blocks"]].tolist() == [3, 1]


def test_headline_rows_are_the_chosen_and_the_recommended_ones_where_something_was_chosen():
    larger = SELECTION.assign(k=2)
    found = rows.headline(pd.concat([SELECTION, larger[larger["strategy"] != "chosen"]]))
    assert list(zip(found["strategy"], found["k"], strict=True)) == [("chosen", 1), ("distributed", 1)]


def test_sizes_that_were_not_selected_are_refused(refused):
    assert len(rows.of_sizes(SELECTION, [1])) == len(SELECTION)
    with refused(r"keep = 2 layers: give some of those of notebook 2, \[1\]"):
        rows.of_sizes(SELECTION, [1, 2])


def test_the_losses_of_every_window_are_kept_under_a_name_for_each_set_of_windows(made_up):
    blocks = torch.arange(6).reshape(3, 2)
    groups = {"a text": rows.Group(["0", "1", "0"], [0, 2], ()), "all of it": rows.Group(["0"], range(3), ())}
    table = rows.t4_windows(made_up, groups, blocks, MODEL)
    assert table.groupby("text", sort=False)["row"].unique().map(list).tolist() == [
        ["full", "trivial", "0", "1"], ["full", "trivial", "0"],
    ]  # fmt: skip
    assert losses(table, "1").values.tolist() == [1.0, 11.0]
    assert paired(losses(table, "0", "all of it"), losses(table, "full", "all of it")).difference == 0.5


# Findings by hand


def counted(add, *arguments):
    found = Findings()
    add(found, *arguments)
    return found.frame().set_index("name")


def test_both_sides_against_random_selections_go_by_one_rule():
    """Ten selections: with 5% false discoveries the i-th smallest p-value counts up to i / 10 of 0.05."""
    score = next(name for name, score in SCORES.items() if score.kind == "gradient")
    table = pd.DataFrame({
        "strategy": ["top_k"] * 6 + ["distributed"] * 4, "score": score, "kept": [str(n) for n in range(10)],
        "p_ppl": [0.005, 0.009, 0.02, *[0.9] * 7], "p_ppl_worse": [*[0.9] * 6, *[0.01] * 4],
    })  # fmt: skip
    found = counted(fidelity_findings._against_random, table)
    sides = [f"{strategy}_{side}_than_random" for strategy in ("top_k", "distributed") for side in ("better", "worse")]
    assert found.loc[sides, "value"].tolist() == [2, 0, 0, 4]  # 0.02 > 3/10 of 0.05; 0.01 <= 4/10 of 0.05
    assert found.loc[sides, "n"].tolist() == [6, 6, 4, 4]
    assert set(found["test"]) == {"random selections, false discovery rate over 10"}


def pairs_of(gaps, score):
    """t4_fidelity and t4_windows of a Top-K and a distributed selection at each k, which differ by these losses."""
    table, parts = [], []
    for k, gap in enumerate(gaps, start=1):
        for strategy, kept, loss in (("top_k", f"{k}", np.zeros(len(gap))), ("distributed", f"0 {k}", np.array(gap))):
            table.append({"strategy": strategy, "score": score, "k": k, "kept": kept, "text": "a text"})
            parts.append(pd.DataFrame({"row": kept, "text": "a text", "window": range(len(gap)), "nll_nats": loss,
                                       "windows_sha256": "0", "model_sha256": "1"}))  # fmt: skip
    return pd.DataFrame(table), pd.concat(parts)


def test_pairs_are_won_lost_or_undecided_after_holm():
    """Nine windows, all of one sign: p = 2 / 512, and four times that after Holm; the last pair decides nothing."""
    score = next(name for name, score in SCORES.items() if score.kind == "gradient")
    wins = [[-1.0] * 8 + [-2.0], [-1.0] * 8 + [-3.0]]
    table, windows = pairs_of([*wins, [1.0] * 8 + [2.0], [1.0, -1.0] * 4 + [0.1]], score)
    found = counted(fidelity_findings._spread_against_top_k, table, windows, 0)
    assert found.loc[["distributed_wins_gradient", "distributed_losses_gradient"], "value"].tolist() == [2, 1]
    assert found.loc["distributed_wins_gradient", ["n", "test"]].tolist() == [
        4, "sign-flip permutation over windows, Holm over 4"
    ]  # fmt: skip
    assert found.loc["distributed_wins_activation", "n"] == 0


def test_with_few_windows_a_family_of_pairs_stays_undecided():
    score = next(name for name, score in SCORES.items() if score.kind == "gradient")
    table, windows = pairs_of([[-1.0, -2.0, -1.0, -1.0, -1.0, -1.5]] * 2, score)  # p = 2 / 64, twice that after Holm
    found = counted(fidelity_findings._spread_against_top_k, table, windows, 0)
    assert found.loc["distributed_wins_gradient", "value"] == 0


def test_two_rows_of_a_verdict_are_tested_against_each_other(made_up):
    """Layer 1 costs 0, 1 and 2 nats and layer 0 half a nat each time: e^0.5 times, which three windows leave open."""
    blocks = torch.arange(6).reshape(3, 2)
    windows = rows.t4_windows(made_up, {"all": rows.Group(["0", "1"], range(3), ())}, blocks, MODEL)
    named = rows.t4_headline(made_up, rows.headline(SELECTION), 2, "all", seed=0).set_index("strategy")
    roles = {"trivial": named.loc["trivial"], "chosen": named.loc["chosen"], "recommended": named.loc["distributed"]}
    found = counted(fidelity_findings._two_rows, roles, windows, 0)
    row = found.loc["ppl_recommended_over_chosen"]
    assert row["value"] == pytest.approx(math.exp(0.5))
    assert row["lo"] < 1 < row["hi"]
    assert row["n"] == 3 and row["test"] == "sign-flip permutation over windows"
    assert row["p"] == pytest.approx(6 / 8)  # signs of (0.5, 0.5, 1.5): 2.5, 1.5 and 1.5 are as far from 0
    cosine = found.loc["cosine_recommended_over_trivial"]
    assert cosine["value"] == pytest.approx(-8)


def test_random_selections_have_a_geometric_mean_of_ratios_and_a_plain_one_of_cosines():
    draws = pd.DataFrame({"ppl_ratio": [1.0, 4.0, 16.0], "cosine": [0.1, 0.2, 0.3]})
    found = counted(fidelity_findings._random, draws, 0)
    assert found.loc[["ppl_ratio_random", "cosine_random"], "value"].tolist() == pytest.approx([4, 0.2])


def test_the_smallest_p_of_19_draws_is_one_in_20():
    same = {"n_blocks": [4], "n_tokens": [40]}
    table = pd.DataFrame({"strategy": ["random"], "k": [2], "n_draws": [19], **same})
    full = pd.DataFrame({"strategy": ["full"], "ppl": [3.0], "ppl_lo": [2.0], "ppl_hi": [4.0], **same})
    assert counted(fidelity_findings._sizes, table, full).loc["smallest_p", "value"] == 1 / 20


def test_a_selection_of_two_scores_counts_once_against_random_ones():
    score = [name for name, score in SCORES.items() if score.kind == "gradient"][:2]
    table = pd.DataFrame({"strategy": "top_k", "score": score, "kept": "0 1", "p_ppl": 0.01, "p_ppl_worse": 0.9})
    assert counted(fidelity_findings._against_random, table).loc["top_k_better_than_random", "n"] == 1


def test_the_ratio_of_a_row_is_its_own_loss_above_the_full_models():
    windows = pd.concat([
        window_rows(row, "t", torch.zeros(3, 2).long(), MODEL, {"nll_nats": np.arange(3.0) + gap, "cosine": np.ones(3)})
        for row, gap in (("full", 0.0), ("0 1", 0.5))
    ])  # fmt: skip
    row = pd.Series({"kept": "0 1", "text": "t", "cosine_centred": 0.5}, name=0)
    found = counted(fidelity_findings._quality, "t4_fidelity", "best", row, windows, 0)
    assert found.loc["ppl_ratio_best", "value"] == pytest.approx(math.exp(0.5))


def test_findings_are_of_the_smallest_k_and_of_the_row_of_highest_cosine(made_up):
    blocks, draws = torch.arange(6).reshape(3, 2), rows.t4_random(made_up, SELECTION, [0])
    tables = {
        "t4_windows": rows.t4_windows(made_up, {"a text": rows.Group(["0", "1"], range(3), ())}, blocks, MODEL),
        "t4_random": pd.concat([draws, draws.assign(k=2, ppl_ratio=100.0)]),
        "t4_fidelity": rows.t4_fidelity(made_up, SELECTION, draws, [0, 1, 2], 10, "a text", seed=0),
        "t4_headline": rows.t4_headline(made_up, rows.headline(SELECTION), 2, "a text", seed=0),
    }
    found = fidelity_findings.t4_findings(tables.__getitem__).set_index("name")
    assert found.loc["ppl_ratio_random", "value"] == pytest.approx(math.exp(0.5 / 3))  # of draws of one layer
    assert found.loc["ppl_ratio_best", "value"] == pytest.approx(math.e)  # layer 1 has the highest cosine
    assert found.loc["distributed_over_chosen", "value"] == pytest.approx(math.exp(0.5))
