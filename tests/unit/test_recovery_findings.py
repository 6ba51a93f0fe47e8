"""Section 5's findings by hand: what each stage brings, and what a refit changes about the selection."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from paper_src.reporting.findings import Findings
from paper_src.sections import recovery_findings
from paper_src.sections.windows import window_rows

BLOCKS = torch.zeros(16, 10, dtype=torch.long)


def windows_of(row, gap):
    """Losses on 16 windows of uneven text, ``gap`` nats above the full model's."""
    values = {"nll_nats": np.linspace(2, 4, 16) + gap, "cosine": np.ones(16)}
    return window_rows(row, "plain few", BLOCKS, "m", values)


@pytest.fixture
def tables():
    rows, windows = [], [windows_of("full", 0.0)]
    for selection, k, gap in (("selected", 2, 1.0), ("selected", 3, 0.5), ("distributed", 2, 1.5)):
        for recovery in ("none", "closed_form", "distilled"):
            ratio = math.exp(gap)
            rows.append({"row": f"{selection} k={k} {recovery}", "selection": selection, "k": k, "recovery": recovery,
                         "tokens": 9, "seconds": 1.0, "cosine": 0.5, "cosine_centred": 0.4, "top1_agreement": 0.3,
                         "ppl_ratio": ratio, "ppl_ratio_mean": ratio})  # fmt: skip
            windows.append(windows_of(rows[-1]["row"], gap))
    rows.append({"row": "trivial", "selection": "trivial", "k": 0, "recovery": "none", "cosine": 0.3})
    choice = {"k": [2, 2], "strategy": ["a", "random"], "rank_cut": 1, "rank_refitted": 1, "ppl_ratio_refitted": 2.0}
    return {
        "t5_recovery": pd.DataFrame(rows).assign(n_tokens=160, n_windows=16),
        "t5_windows": pd.concat(windows),
        "t5_selection": pd.DataFrame(choice),
        "t5_scaling": pd.DataFrame(columns=["row", "selection", "k", "training_tokens"]),
        "t5_laws": pd.DataFrame(columns=["k", "selection", "exponent"]),
        "t5_mix": pd.DataFrame({"mix": ["a"], "ppl_ratio_x": [1.0], "ppl_ratio_mean": [1.0], "chosen": [True]}),
    }


def test_evenly_distributed_layers_stand_over_the_selected_ones(tables):
    found = recovery_findings.t5_findings(tables.__getitem__).set_index("name")
    for stage in ("cut", "refitted"):
        row = found.loc[f"distributed_over_selected_{stage}"]
        assert row[["value", "lo", "hi"]].tolist() == pytest.approx([math.exp(0.5)] * 3)  # of 1.5 nats and 1
        assert row["n"] == 16 and row["p"] < 0.01


def test_the_smallest_and_the_largest_model_have_their_own_stages(tables):
    found = recovery_findings.t5_findings(tables.__getitem__).set_index("name")["value"]
    assert found[["recovered_smallest_k", "recovered_largest_k"]].tolist() == [2, 3]
    ratios = found[["ppl_ratio_cut_smallest", "ppl_ratio_cut_largest"]].tolist()
    assert ratios == pytest.approx([math.e, math.exp(0.5)])


def test_sizes_whose_best_selection_is_another_one_after_the_refit_are_counted():
    rows = [(2, "a", 1, 2, 3.0), (2, "b", 2, 1, 2.0), (4, "a", 1, 1, 1.5), (4, "b", 2, 2, 1.7),
            (2, "random", np.nan, np.nan, 5.0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["k", "strategy", "rank_cut", "rank_refitted", "ppl_ratio_refitted"])
    found = Findings()
    recovery_findings._selections(found, table)
    frame = found.frame().set_index("name")
    assert frame.loc["best_changes_by_refit", ["value", "n", "text"]].tolist() == [1, 2, "2"]
    assert frame.loc["small_refit_selected", "value"] == 2.0
