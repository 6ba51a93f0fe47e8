"""Section 1's second half and its combined scores, by hand and by identities on tiny models."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from paper_src import fidelity
from paper_src.compaction import compact
from paper_src.layers import StandIn
from paper_src.models import decoder_layers
from paper_src.scoring import SCORES, LayerScores
from paper_src.sections import formulas, importance, worth


class Linear(StandIn):
    """Answers h + h M instead of what its layer would."""

    def __init__(self, layer, matrix):
        super().__init__(layer)
        self.matrix = matrix

    def forward(self, hidden, *args, **kwargs):
        return hidden + hidden @ self.matrix


def moments(model, blocks, batch_size=8):
    with worth.LinearMaps(model) as maps:
        mean = fidelity.mean_state(model, blocks, batch_size)
    return maps, mean


class TestLinearMaps:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
    def test_never_miss_by_more_than_nothing_on_their_own_text(self, make_model, make_blocks, family):
        maps, _ = moments(make_model(family), make_blocks(16, 12))
        for solution, sums in zip(maps.solve(1e-2), maps.sums, strict=True):
            assert sums.error(solution) < sums.error(0 * solution)
            assert sums.tokens == 16 * 12

    def test_are_the_same_in_batches_and_the_mean_state_is_that_of_the_pass(self, llama, make_blocks):
        blocks = make_blocks(6, 12)
        (one, mean), (other, _) = moments(llama, blocks, 6), moments(llama, blocks, 2)
        for a, b in zip(one.solve(1e-2), other.solve(1e-2), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean, fidelity.mean_state(llama, blocks))

    def test_give_back_a_layer_that_is_linear(self, make_model, make_blocks):
        """Its loss is all repaired, on text that the fit has not seen; that of the layers beside it is not."""
        model = make_model("llama")
        matrix = 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        layers = decoder_layers(model)
        layers[2] = Linear(layers[2], nn.Parameter(matrix))
        maps, _ = moments(model, make_blocks(32, 12))
        solved = maps.solve(1e-9)
        torch.testing.assert_close(solved[2].float(), matrix, rtol=1e-2, atol=1e-3)
        losses = worth.losses_without(model, make_blocks(4, 12, seed=9), solved)
        assert np.abs(losses["repaired"][:, 2]).max() < 1e-3 < np.abs(losses["removed"][:, 2]).min()
        assert np.abs(losses["repaired"][:, 1]).max() > 1e-3


class TestLosses:
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_without_a_layer_are_those_of_the_compact_model(self, make_model, make_blocks, family):
        model, blocks = make_model(family), make_blocks(3, 12)
        zero = [torch.zeros(32, 32)] * 4
        found = worth.losses_without(model, blocks, zero)
        nll = functools.partial(
            fidelity.compare, full=fidelity.reference(model, blocks, metrics=["nll_nats"]), metrics=["nll_nats"]
        )
        whole = nll(model)["nll_nats"]
        for layer in range(4):
            small = nll(compact(model, [other for other in range(4) if other != layer]))["nll_nats"]
            np.testing.assert_allclose(found["removed"][:, layer], small - whole, atol=1e-5)
        np.testing.assert_array_equal(found["removed"], found["repaired"])  # a map of zeros is no repair

    def test_one_window_judges_nothing(self, llama, make_blocks, refused):
        with refused("1 windows judge"):
            worth.losses_without(llama, make_blocks(1, 12), [torch.zeros(32, 32)] * 4)

    def test_table_by_hand(self):
        losses = {"removed": np.array([[1.0, 4.0], [3.0, 4.0]]), "repaired": np.array([[0.5, 1.0], [0.5, 2.0]])}
        eye = torch.eye(2, dtype=torch.float64)
        sums = worth.NormalEquations(eye, 0.5 * eye, 1.0, 1)  # the best D is half the identity, and explains half
        table = worth.t1_repaired(losses, [0.5 * eye, 0 * eye], [sums, sums])
        assert table["removed_nats"].tolist() == [2, 4]
        assert table["removed_nats_se"].tolist() == [1, 0]
        assert table["repaired_nats"].tolist() == [0.5, 1.5]
        assert table["explained"].tolist() == [0.5, 0]


def test_rows_of_the_same_number_are_drawn_together():
    rows = np.arange(12.0).reshape(4, 3)
    first, second = worth.redrawn(rows), worth.redrawn(2 * rows)
    np.testing.assert_allclose(second, 2 * first)
    assert not np.array_equal(first, worth.redrawn(rows, seed=1))


def test_the_best_layers_of_each_third_by_hand():
    rows = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4]], dtype=torch.float64)
    names = {name: rows for name in SCORES if not SCORES[name].made_of} | {"fisher": rows[:1]}
    scores = LayerScores(names, torch.zeros(5, 5), torch.ones(4))
    table = importance.t1_stability(scores, [1, 3]).set_index(["score", "k"])
    assert table.loc[("taylor", 1), ["pairs", "identical"]].tolist() == [3, 1]
    assert table.loc[("taylor", 1), "jaccard"] == pytest.approx(1 / 3)
    assert table.loc[("taylor", 3), "jaccard"] == pytest.approx((1 + 2 / 4 + 2 / 4) / 3)
    assert table.loc[("fisher", 1), "pairs"] == 0  # one row has no parts


def test_formulas_by_hand_on_three_layers():
    parts = pd.DataFrame({"fisher": [1.0, 10.0, 100.0], "grad_norm": [4.0, 2.0, 1.0], "variance": [1.0, 1e4, 1e2]})
    unit = [[0, 1 / 11, 1], [1, 1 / 3, 0], [0, 1, 99 / 9999]]
    logs = [[0, 0.5, 1], [1, 0.5, 0], [0, 1, 0.5]]
    expected = {
        "log_min_max": np.mean(logs, axis=0),
        "log_min_max_mean_abs": np.mean(logs, axis=0),
        "log_min_max_kurtosis": np.mean(logs, axis=0),
        "min_max": np.mean(unit, axis=0),
        "largest": [1, 1, 1],
        "ranks": [(1 + 3 + 1) / 3, (2 + 2 + 3) / 3, (3 + 1 + 2) / 3],
        "product": np.log([4, 2e5, 1e4]),
        "z_score": sum((column - column.mean()) / column.std(ddof=1) for column in parts.to_numpy().T) / 3,
    }
    assert set(expected) == set(formulas.FORMULAS)
    for name, values in expected.items():
        np.testing.assert_allclose(formulas.FORMULAS[name].function(parts), values, rtol=1e-12, err_msg=name)


def test_patterns_under_the_formulas(monkeypatch):
    """On three layers the reported pattern is all of them: take one of the first two instead."""
    monkeypatch.setattr(importance, "reported_pattern", lambda depth: {0})
    columns = {"fisher": [3.0, 2, 1], "grad_norm": [3.0, 2, 1], "activation_variance": [1.0, 1e6, 1.1]}
    columns |= {"activation_mean_abs": [3.0, 2, 1], "activation_kurtosis": [3.0, 2, 1]}
    table = importance.t1_combined(pd.DataFrame(columns).assign(leave_one_out=[3.0, 2, 1], shapley=[1.0, 2, 3]))
    rows = table.set_index("formula")
    assert rows.loc["log_min_max_mean_abs", ["pattern", "layers", "tau_leave_one_out", "tau_shapley"]].tolist() == [
        1, "0", 1.0, -1.0,
    ]  # fmt: skip
    assert rows.loc["product", ["pattern", "layers"]].tolist() == [0, "1"]
    assert (rows["n"] == 1).all()


def test_the_interval_of_a_count_in_the_pattern_is_over_redrawn_sequences():
    sure = pd.DataFrame([[9.0, 5, 1, 0], [8, 6, 2, 1]])
    assert importance._interval(sure, {0, 2}, 0) == {
        "lo": 1.0, "hi": 1.0, "test": "percentile bootstrap over 2 sequences",
    }  # fmt: skip
    unsure = pd.DataFrame([[9.0, 5, 1, 0], [9, 0, 8, 0]])  # layer 1 or layer 2 is second
    found = importance._interval(unsure, {0, 2}, 0)
    assert (found["lo"], found["hi"]) == (1.0, 2.0)
    assert importance._interval(sure[:0], {0, 2}, 0) == {"test": "count"}


def test_a_tau_of_tested_rows_is_that_of_their_means_and_its_interval_follows_the_seed():
    generator = np.random.default_rng(3)
    first, second = (generator.normal(size=(n, 5)) + np.arange(5) for n in (6, 4))
    table = pd.concat(
        pd.DataFrame(rows).add_prefix("layer_").assign(score=name) for name, rows in (("a", first), ("b", second))
    )
    found = [worth.tau_of(table, "a", "b", seed) for seed in (0, 1)]
    expected = kendalltau(first.mean(axis=0), second.mean(axis=0)).statistic
    assert found[0][0] == found[1][0] == expected
    assert found[0] != found[1]
    assert all(low <= high for _, low, high in found)
