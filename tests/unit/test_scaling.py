"""How the loss falls with the tokens of training: the power law, its table, and the other starts."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src.compaction import compact
from paper_src.models import decoder_layers, locate_layers
from paper_src.reporting.findings import Findings
from paper_src.sections import scaling

TOKENS = [1000, 4000, 16000]


def made(starts, seed=0):
    """t5_scaling and t5_windows of trainings whose gaps are ``a D^-b`` on average, on 16 windows of uneven text."""
    rng, rows, windows = np.random.default_rng(seed), [], []
    base = rng.uniform(2, 4, 16)
    same = {"text": "plain few", "windows_sha256": "w", "model_sha256": "m", "cosine": 1.0}
    windows.append(pd.DataFrame({"row": "full", "window": range(16), "nll_nats": base, **same}))
    for start, (a, b) in starts.items():
        for count in TOKENS:
            gaps = a * count**-b * rng.permutation(np.linspace(0.5, 1.5, 16))
            name = f"{start} {count}"
            windows.append(pd.DataFrame({"row": name, "window": range(16), "nll_nats": base + gaps, **same}))
            rows.append({"row": name, "selection": start, "k": 2, "training_tokens": count})
    return scaling.t5_scaling(rows), pd.concat(windows, ignore_index=True)


def test_the_line_through_the_logs_is_found_again():
    table, windows = made({"selected": (30.0, 0.4), "random_layers": (200.0, 0.5)})
    laws = scaling.t5_laws(table, windows).set_index("selection")
    for start, a, b in (("selected", 30, 0.4), ("random_layers", 200, 0.5)):
        law = laws.loc[start]
        assert law["exponent"] == pytest.approx(b, abs=1e-6)
        assert law["exponent_lo"] < b < law["exponent_hi"]
        assert law["tokens_for_1.5"] == pytest.approx((a / np.log(1.5)) ** (1 / b), rel=1e-3)
        assert (law["most_tokens"], law["n_runs"], law["n_windows"]) == (16000, 3, 16)


def test_the_interval_of_the_exponent_is_of_windows_drawn_again():
    rng = np.random.default_rng(0)
    gaps = 30 * np.array([[count] for count in TOKENS]) ** -0.4 * rng.uniform(0.5, 1.5, (3, 16))
    found = scaling.power_law(TOKENS, gaps)
    picks = np.random.default_rng(0).integers(16, size=(scaling.DRAWS, 16))
    slopes = [-np.polyfit(np.log(TOKENS), np.log(gaps[:, pick].mean(axis=1)), 1)[0] for pick in picks]
    assert (found["exponent_lo"], found["exponent_hi"]) == pytest.approx(tuple(np.quantile(slopes, [0.025, 0.975])))


def test_the_best_rate_is_that_of_the_lowest_look():
    looks = {1e-3: [3.0, 1.0, 2.0], 1e-4: [3.0, 1.5, 1.4]}
    runs = {rate: scaling.Stage(None, history=[{"kl_nats": kl} for kl in found]) for rate, found in looks.items()}
    assert scaling.best_rate(runs) == 1e-3


def test_two_budgets_are_no_law():
    table, windows = made({"selected": (30.0, 0.4)})
    assert scaling.t5_laws(table.head(2), windows).empty


def test_a_training_that_beats_the_full_model_is_no_part_of_the_law():
    table, windows = made({"selected": (30.0, 0.4)})
    windows.loc[windows["row"] == "selected 16000", "nll_nats"] = 0.5
    assert scaling.t5_laws(table, windows).empty  # two budgets are left


def test_starts_are_compared_after_the_largest_training_that_both_had():
    table, windows = made({"selected": (30.0, 0.4), "random_layers": (60.0, 0.4)})
    table = table[(table["selection"] == "selected") | (table["training_tokens"] < 16000)]
    tables, found = {"t5_scaling": table, "t5_windows": windows, "t5_laws": scaling.t5_laws(table, windows)}, Findings()
    scaling.scaling_findings(found, tables.__getitem__)
    row = found.frame().set_index("name").loc["selected_over_random_layers"]
    assert row["value"] == pytest.approx(np.exp((30 - 60) * 4000**-0.4))
    assert row["text"] == "4,000 tokens" and row["p"] < 0.01


def test_starts_are_compared_at_the_smallest_k():
    small, windows = made({"selected": (30.0, 0.4), "random_layers": (60.0, 0.4)})
    large, more = made({"selected": (3.0, 0.4), "random_layers": (90.0, 0.4)}, seed=1)
    more = more[more["row"] != "full"]
    tables = {
        "t5_scaling": pd.concat([large.assign(k=3, row="large " + large["row"]), small]),
        "t5_windows": pd.concat([windows, more.assign(row="large " + more["row"])]),
        "t5_laws": scaling.t5_laws(small, windows),
    }
    found = Findings()
    scaling.scaling_findings(found, tables.__getitem__)
    row = found.frame().set_index("name").loc["selected_over_random_layers"]
    assert row["value"] == pytest.approx(np.exp((30 - 60) * 16000**-0.4))


def test_random_layers_follow_their_seed(make_blocks):
    full, blocks = build_model("llama"), make_blocks(2, 16)
    one, two = (
        scaling.begun(full, "random_layers", (0, 3), blocks, "down_proj", "gaps", seed).model for seed in (1, 2)
    )
    assert not torch.equal(decoder_layers(one)[0].mlp.up_proj.weight, decoder_layers(two)[0].mlp.up_proj.weight)


def test_random_layers_keep_what_is_around_the_layers(make_blocks):
    full = build_model("llama")
    drawn = scaling.begun(full, "random_layers", (0, 3), make_blocks(2, 16), "down_proj", "gaps", 0).model
    path, _ = locate_layers(full)
    for name, value in compact(full, (0, 3)).named_parameters():
        same = torch.equal(value, drawn.get_parameter(name))
        assert same == (not name.startswith(f"{path}.")), name


def test_the_figure_draws_every_start():
    table, windows = made({"selected": (30.0, 0.4), "random_layers": (60.0, 0.4)})
    for name in ("cosine", "ppl_ratio"):
        table = table.assign(**{name: 2.0, f"{name}_lo": 1.9, f"{name}_hi": 2.1})
    figure = scaling.f5_scaling(table, scaling.t5_laws(table, windows))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["random layers, k = 2", "selected, k = 2"]
