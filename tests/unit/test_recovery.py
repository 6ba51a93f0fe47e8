"""Closed-form refits against gaps that can be bridged exactly, brute force, and what must not change."""

import math

import pytest
import torch
from conftest import build_model
from torch import nn

from paper_src import compaction, models, recovery, side_by_side
from paper_src.layers import StandIn


class LinearLayer(StandIn):
    """In place of a layer: h + h A."""

    def __init__(self, layer, matrix):
        super().__init__(layer)
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, hidden, *args, **kwargs):
        return hidden + hidden @ self.matrix


class EchoLayer(LinearLayer):
    """In place of a layer: h + x A, where x is what another layer's MLP matrix was given."""

    def __init__(self, layer, matrix, writer):
        super().__init__(layer, matrix)
        self.seen = []
        writer.register_forward_pre_hook(lambda module, inputs: self.seen.append(inputs[0]))

    def forward(self, hidden, *args, **kwargs):
        return hidden + self.seen[-1] @ self.matrix


class _Replaces(StandIn):
    """In place of a layer: what ``other`` makes of the state that ``before`` was given."""

    def __init__(self, layer, other, before):
        super().__init__(layer)
        self.other, self.given = other, []
        before.register_forward_pre_hook(lambda module, inputs: self.given.append(inputs[0]))

    def forward(self, hidden, *args, **kwargs):
        return self.other(self.given[-1], *args, **kwargs)


def states(model, blocks):
    with torch.no_grad():
        return models.last_hidden(model, blocks)


class TestClosedForm:
    def test_a_gap_that_a_linear_map_bridges_is_bridged_exactly(self, llama, make_blocks):
        blocks = make_blocks(64, 16)
        llama.model.layers[1] = LinearLayer(llama.model.layers[1], 0.1 * torch.randn(32, 32))
        full = states(llama, blocks)
        cut = compaction.compact(llama, (0, 2, 3))
        found = recovery.closed_form(llama, (0, 2, 3), blocks, form="linear", reach="gaps")
        assert (states(cut, blocks) - full).abs().mean() > 0.05
        torch.testing.assert_close(states(found.model, blocks), full, atol=2e-3, rtol=1e-2)
        assert found.added == 32 * 32

    def test_a_gap_that_the_mlp_matrix_bridges_is_bridged_exactly_and_merged(self, llama, make_blocks):
        blocks = make_blocks(64, 16)
        writer = llama.model.layers[0].mlp.down_proj
        change = 0.1 * torch.randn(48, 32)
        llama.model.layers[1] = EchoLayer(llama.model.layers[1], change, writer)
        full = states(llama, blocks)
        found = recovery.closed_form(llama, (0, 2, 3), blocks, reach="gaps").model
        assert type(found.model.layers[0]) is type(found.model.layers[1])
        torch.testing.assert_close(
            found.model.layers[0].mlp.down_proj.weight, writer.weight + change.T, atol=1e-2, rtol=0
        )
        torch.testing.assert_close(states(found, blocks), full, atol=2e-3, rtol=1e-2)

    @pytest.mark.parametrize("form", recovery.FORMS)
    def test_nothing_is_changed_where_nothing_is_cut(self, llama, make_blocks, form):
        found = recovery.closed_form(llama, range(4), make_blocks(16, 8), form=form)
        assert found.refits == []
        assert torch.equal(states(found.model, make_blocks(2, 8)), states(llama, make_blocks(2, 8)))

    @pytest.mark.parametrize("form", recovery.FORMS)
    def test_the_full_model_is_left_alone(self, llama, make_blocks, form):
        before = {name: value.clone() for name, value in llama.state_dict().items()}
        recovery.closed_form(llama, (0, 3), make_blocks(32, 16), form=form)
        after = llama.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("form", ["down_proj", "mlp_map", "linear"])
    def test_fewer_tokens_than_features_do_not_blow_up(self, llama, make_blocks, form):
        few, other = make_blocks(16, 2), make_blocks(32, 8, seed=1)
        found = recovery.closed_form(llama, (0, 3), few, form=form)
        assert all(row["error_after"] <= row["error_before"] for row in found.refits)
        assert states(found.model, other).isfinite().all()
        cut = (states(compaction.compact(llama, (0, 3)), other) - states(llama, other)).square().mean()
        assert (states(found.model, other) - states(llama, other)).square().mean() < 1.2 * cut

    def test_it_brings_states_nearer_on_other_text(self, llama, make_blocks):
        other = make_blocks(32, 16, seed=1)
        for form in ("down_proj", "linear"):
            found = recovery.closed_form(llama, (0, 3), make_blocks(256, 16), form=form)
            before = (states(compaction.compact(llama, (0, 3)), other) - states(llama, other)).square().mean()
            assert (states(found.model, other) - states(llama, other)).square().mean() < 0.8 * before

    def test_each_family_is_refitted(self, full, family, make_blocks):
        blocks, other = make_blocks(64, 16), make_blocks(32, 16, seed=1)
        found = recovery.closed_form(full, (0, 3), blocks, reach="gaps")
        assert found.added == 0
        assert found.refits[0]["error_after"] < found.refits[0]["error_before"]
        before = (states(compaction.compact(full, (0, 3)), other) - states(full, other)).square().mean()
        assert (states(found.model, other) - states(full, other)).square().mean() < before

    @pytest.mark.parametrize("form", ["down_proj", "mlp_map"])
    def test_a_map_through_a_norm_behind_the_mlp_is_found(self, make_blocks, form):
        full = build_model("gemma3_text")
        with torch.no_grad():
            for layer in full.model.layers:
                layer.mlp.down_proj.weight *= 30  # so that the MLPs say something
            full.model.layers[0].post_feedforward_layernorm.weight += torch.randn(32)
        blocks, changed = make_blocks(256, 16), compaction.compact(full, range(4))
        writer = changed.model.layers[0].mlp.down_proj
        if form == "down_proj":
            models.add_to_weight_(writer, 5 * writer.weight.std() * torch.randn(48, 32))
        else:
            writer.weight = nn.Parameter((torch.eye(32) + 0.3 * torch.randn(32, 32)) @ writer.weight.detach())
        # a full model whose second layer undoes what stands behind the first: only the norm's factor is in the way
        target = states(changed, blocks)
        full.model.layers[1] = _Replaces(full.model.layers[1], changed.model.layers[0], full.model.layers[0])
        found = recovery.closed_form(full, (0, 2, 3), blocks, form=form)
        assert found.refits[0]["error_after"] < 0.02 * found.refits[0]["error_before"]
        assert target.isfinite().all()

    def test_something_else_behind_the_mlp_is_refused(self, make_blocks, monkeypatch, refused):
        full = build_model("gemma3_text")
        kind = type(full.model.layers[0].post_feedforward_layernorm)
        monkeypatch.setattr(kind, "forward", lambda self, x: x.sigmoid())
        with refused("no linear map of layer 0 has its output added to the layer's state"):
            recovery.closed_form(full, (0, 3), make_blocks(16, 8))

    def test_a_factor_before_the_sum_is_found_and_taken_into_account(self, make_blocks):
        full = build_model("granite", residual_multiplier=0.25)
        blocks, changed = make_blocks(256, 16), compaction.compact(full, range(4))
        writer = changed.model.layers[0].mlp.down_proj
        models.add_to_weight_(writer, 5 * writer.weight.std() * torch.randn(48, 32))
        full.model.layers[1] = _Replaces(full.model.layers[1], changed.model.layers[0], full.model.layers[0])
        found = recovery.closed_form(full, (0, 2, 3), blocks)
        assert found.refits[0]["error_after"] < 1e-4 * found.refits[0]["error_before"]
        torch.testing.assert_close(
            found.model.model.layers[0].mlp.down_proj.weight, writer.weight, atol=1e-2, rtol=1e-2
        )

    def test_the_mlps_matrix_is_refitted_where_another_part_comes_last(self, llama, make_blocks):
        for layer in llama.model.layers:
            layer.add_module("self_attn", layer._modules.pop("self_attn"))  # as in hybrids: behind the MLP
        found = recovery.closed_form(llama, (0, 3), make_blocks(32, 16)).model
        old, new = (dict(model.named_parameters()) for model in (llama, found))
        changed = [name for name in new if name.startswith("model.layers.0") and not torch.equal(old[name], new[name])]
        assert changed == ["model.layers.0.mlp.down_proj.weight"]

    @pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
    def test_experts_are_refused_by_layer(self, family, make_blocks, refused):
        with refused(r"no linear map of layer 0 has its output added .*experts\?"):
            recovery.closed_form(build_model(family), (0, 3), make_blocks(16, 8))

    def test_the_result_is_a_standard_checkpoint(self, llama, make_blocks, tmp_path):
        found = recovery.closed_form(llama, (0, 3), make_blocks(64, 16)).model
        found.save_pretrained(tmp_path)
        again = type(llama).from_pretrained(tmp_path)
        blocks = make_blocks(2, 8)
        torch.testing.assert_close(states(again, blocks), states(found, blocks))

    def test_refits_are_those_before_gaps_or_all_behind_the_first(self, llama, make_blocks):
        rows = {
            reach: [
                row["layer"] for row in recovery.closed_form(llama, (0, 1, 3), make_blocks(16, 8), reach=reach).refits
            ]
            for reach in ("gaps", "all")
        }
        assert rows == {"gaps": [1], "all": [1, 3]}

    @pytest.mark.parametrize("family", ["llama", "gemma3_text"])
    @torch.no_grad()
    def test_the_error_before_is_that_of_the_cut_on_the_second_of_four_batches(self, family, make_blocks):
        full, blocks = build_model(family), make_blocks(32, 8)
        found = recovery.closed_form(full, (0, 2, 3), blocks)
        hidden = full(blocks, output_hidden_states=True).hidden_states
        own, target = (hidden[place][8:16].double() for place in (1, 2))  # (8, 8, d)
        expected = ((target - own).square().sum(-1) / target.square().sum(-1)).mean()
        assert found.refits[0]["error_before"] == pytest.approx(float(expected), rel=1e-4)

    @torch.no_grad()
    def test_three_of_four_batches_are_fitted_and_one_is_held_out(self, llama, make_blocks, tmp_path):
        small = compaction.compact(llama, (0, 2, 3))
        walk = side_by_side.SideBySide((llama, small), make_blocks(32, 8), 8, tmp_path)
        walk.advance_full(2)
        writer = walk.writer(0, models.decoder_layers(small)[0])
        sums = walk.sums(0, writer.module, recovery.FORMS["down_proj"].features, writer)
        assert [each.tokens for each in sums] == [3 * 64, 64]

    def test_where_no_round_brings_states_nearer_the_cut_model_stays_as_it_is(self, make_blocks, monkeypatch):
        full = build_model("gemma3_text")
        monkeypatch.setattr(side_by_side.SideBySide, "error", lambda self, position: 1.0)
        found = recovery.closed_form(full, (0, 2, 3), make_blocks(32, 8))
        for name, value in compaction.compact(full, (0, 2, 3)).named_parameters():
            assert torch.equal(value, found.model.get_parameter(name)), name
        assert found.refits[0]["error_after"] == 1.0 and found.refits[0]["ridge"] == math.inf

    def test_a_diagonal_adds_a_number_for_each_unit_of_the_state(self, llama, make_blocks):
        assert recovery.closed_form(llama, (0, 2, 3), make_blocks(16, 8), form="diagonal").added == 32

    def test_it_costs_less_than_two_passes_of_the_full_model(self, llama, make_blocks, monkeypatch):
        calls = []

        def counted(model, kept):
            small = compaction.compact(model, kept)
            for layer in models.decoder_layers(small):
                layer._forward_hooks.clear()  # those of the full model's layers came along
                layer.register_forward_hook(lambda *_: calls.append("compact"))
            return small

        monkeypatch.setattr(recovery, "compact", counted)
        for layer in models.decoder_layers(llama):
            layer.register_forward_hook(lambda *_: calls.append("full"))
        recovery.closed_form(llama, (0, 3), make_blocks(64, 8), batch_size=4)
        # each layer once on two tokens, to see what it returns, then on 16 batches; before that, a few tokens to see
        # that the cut model is the full one with two layers bypassed: 6 calls of the full one's, 6 of its copies
        assert calls.count("full") == 4 + 16 * 4 + 6 + 6
        # the refitted layer once more, and twice on one batch to find its writer
        assert calls.count("compact") == 2 + 16 * 3 + 2

    def test_bad_input(self, llama, make_blocks, refused):
        with refused("form 'lstsq'"):
            recovery.closed_form(llama, (0, 3), make_blocks(16, 8), form="lstsq")
        with refused("give 2 batches"):
            recovery.closed_form(llama, (0, 3), make_blocks(15, 8))
        with refused("increasing order"):
            recovery.closed_form(llama, (3, 0), make_blocks(16, 8))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merged_and_unmerged_forms_agree(kind):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 4) if kind == "linear" else models.Conv1D(4, 6)
    x, change = torch.randn(10, 6, generator=generator), torch.randn(6, 4, generator=generator)
    before = linear(x)
    old = linear.weight
    given = models.add_to_weight_(linear, change)
    torch.testing.assert_close(linear(x), before + x @ change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given, change, atol=1e-6, rtol=1e-5)
    assert linear.weight is not old


def test_features_of_the_map_behind_the_mlp_are_its_outputs_without_the_bias():
    linear, x = nn.Linear(3, 2), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(recovery.FORMS["mlp_map"].features(linear, x, linear(x)), x @ linear.weight.T)


def test_a_small_factor_of_a_norm_keeps_its_sign_where_it_is_raised():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-0.001, 1.0, -2.0]))

        def forward(self, z):
            return self.weight * z

    assert side_by_side._gain(Scaled(), torch.device("cpu")).tolist() == pytest.approx([-0.1, 1, -2])
