"""Published methods against their formulas: hand-computed merges, brute force on tiny matrices, what they refuse."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model
from test_baselines import DENSE
from torch import nn
from torch.nn.functional import cosine_similarity

from paper_src import NotSupported, fidelity
from paper_src.baselines import depth, quantization, replace_me, sparsity, surgeon, training, width
from paper_src.baselines.methods import METHODS
from paper_src.baselines.moments import InputMoments, input_moments, linears
from paper_src.baselines.setting import Setting
from paper_src.baselines.training import TRAININGS
from paper_src.compaction import compact
from paper_src.distillation import Distillation, Distilled
from paper_src.models import count_parameters, decoder_layers, last_hidden, locate_layers
from paper_src.sections import peers


@pytest.fixture
def model():
    return build_model("llama", **DENSE)


@pytest.fixture
def blocks(make_blocks):
    return make_blocks(16, 16)


@pytest.fixture
def moments(model, blocks):
    return input_moments(model, blocks)


def inputs_of(model, name, blocks):
    """(n, in) what the map ``name`` reads."""
    seen = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        last_hidden(model, blocks)
    return seen[0].detach().flatten(0, -2)


def output_error(old, new, moment):
    """E |W x - W' x|^2."""
    gap = (old - new).detach().double()
    return float((gap @ moment.double() * gap).sum())


# LaCo


def test_the_released_merge_is_plain_removal_of_all_but_the_last(model):
    layers, merged = decoder_layers(model), decoder_layers(depth._merged(model, 1, 3, released=True))
    for name, part in merged[1].named_modules():
        if isinstance(part, nn.Linear):
            assert torch.equal(part.weight, layers[3].get_submodule(name).weight)
    assert torch.equal(merged[1].input_layernorm.weight, layers[1].input_layernorm.weight)
    assert torch.equal(merged[0].mlp.up_proj.weight, layers[0].mlp.up_proj.weight)
    assert len(merged) == 2


def test_the_released_merges_give_the_depth_asked_for(model, make_blocks):
    small = depth.laco(model, 2, make_blocks(2, 8), released=True)
    assert len(decoder_layers(small)) == small.config.num_hidden_layers == 2


# magnitude compensation


def test_magnitudes_are_those_of_the_released_rule(make_blocks):
    """There embedding and output matrices before each gap are multiplied; states are the same but for the scale."""
    full, blocks = build_model("llama", tie_word_embeddings=False), make_blocks(3, 12)
    small = depth.magnitude_compensated(full, (0, 2), blocks)
    expected = copy.deepcopy(compact(full, (0, 2)))
    for stop in (1, 2):  # the gaps behind layer 0 and behind layer 2: one layer each, in the full model 1 and 3
        half = compact(full, (0, 1)) if stop == 1 else compact(full, (0, 2, 3))
        for place in range(stop):
            for name in depth.WRITERS:
                weight = decoder_layers(expected)[place].get_submodule(name).weight
                decoder_layers(half)[place].get_submodule(name).weight = nn.Parameter(weight.clone())
        half.set_input_embeddings(copy.deepcopy(expected.get_input_embeddings()))
        states = half(blocks, output_hidden_states=True).hidden_states
        seen = []
        with decoder_layers(half)[stop].register_forward_hook(lambda m, i, o, seen=seen: seen.extend([i[0], o])):
            half(blocks)
        alpha = (seen[1].abs().mean(1) / states[stop].abs().mean(1)).mean().detach()  # of samples and channels
        expected.get_input_embeddings().weight.data *= alpha
        for layer in decoder_layers(expected)[:stop]:
            for name in depth.WRITERS:
                layer.get_submodule(name).weight.data *= alpha
    assert torch.allclose(last_hidden(small, blocks), last_hidden(expected, blocks), atol=1e-3)
    assert not torch.allclose(last_hidden(small, blocks), last_hidden(compact(full, (0, 2)), blocks), atol=1e-2)


def test_nothing_to_compensate_changes_nothing(model, blocks):
    small = depth.magnitude_compensated(model, range(4), blocks)
    assert torch.equal(last_hidden(small, blocks), last_hidden(model, blocks))


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "olmo2"])
def test_magnitudes_of_other_layers_are_not_compensated(family, make_blocks):
    with pytest.raises(NotSupported, match=r"other parts than Llama's|does not add"):
        depth.magnitude_compensated(build_model(family), (0, 2), make_blocks(2, 8))


# recipes of training


def test_only_the_tail_has_parameters_to_train(model, blocks):
    part = depth.only_tail(model, 1)
    assert torch.equal(last_hidden(part, blocks), last_hidden(model, blocks))
    inside = {name for name, _ in part.named_parameters() if ".layers." in name}
    assert inside and all(".layers.3." in name for name in inside)
    optimizer = torch.optim.SGD(part.requires_grad_(True).parameters(), lr=1.0)
    part(input_ids=blocks, labels=blocks).loss.backward()
    optimizer.step()
    plain = depth.whole(part, model)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}
    for index, (old, new) in enumerate(zip(decoder_layers(model), decoder_layers(plain), strict=True)):
        same = torch.equal(old.mlp.up_proj.weight, new.mlp.up_proj.weight)
        assert same == (index < 3)


def test_the_tail_of_the_recipe_is_the_last_three_layers():
    tail = depth.only_tail(build_model("llama", num_hidden_layers=5))
    assert {name.split(".")[2] for name, _ in tail.named_parameters() if ".layers." in name} == {"2", "3", "4"}


def test_the_layers_of_a_step_are_spread_over_the_depth():
    model, seen = build_model("llama", num_hidden_layers=6), []
    places = {layer.mlp.up_proj.weight: place for place, layer in enumerate(decoder_layers(model))}

    def train(small, part, stage):
        seen.append([places[layer.mlp.up_proj.weight] for layer in decoder_layers(small)])
        return small

    depth.stepwise(model, (0, 5), [torch.zeros(1, 4)] * 2, train)
    assert seen == [[0, 2, 4, 5], [0, 5]]  # 1 and 3 go first, then 2 and 4


def test_stepwise_cuts_a_share_of_the_layers_and_trains_on_a_share_of_the_text(model, blocks):
    seen = []

    def train(small, part, stage):
        seen.append((len(decoder_layers(small)), len(part), stage))
        return small

    small = depth.stepwise(model, (2,), blocks.split(6), train)
    assert seen == [(3, 6, 0), (2, 6, 1), (1, 4, 2)]
    assert torch.equal(last_hidden(small, blocks), last_hidden(compact(model, (2,)), blocks))


# ReplaceMe


def test_replace_me_is_least_squares(model, blocks):
    m, y = replace_me._outputs(model, blocks, 0, 3)
    small = replace_me.replace_me(model, (0, 3), blocks)
    old, new = (decoder_layers(each)[0].mlp.down_proj.weight.detach() for each in (model, small))
    matrix = np.linalg.lstsq(m.double().numpy(), y.double().numpy(), rcond=None)[0]
    assert np.allclose(new.numpy(), matrix.T @ old.double().numpy(), atol=2e-3)
    assert not torch.equal(old, new)
    h = model(blocks, output_hidden_states=True).hidden_states
    assert torch.allclose(y.view_as(h[3]) - m.view_as(h[3]) + h[1], h[3], atol=1e-4)


def test_the_cosine_objective_is_lower_than_before(model, blocks):
    m, y = replace_me._outputs(model, blocks, 1, 3)
    found = replace_me._nearest_by_cosine(m, y, epochs=200, seed=0)
    before, after = (cosine_similarity(m @ matrix, y).mean() for matrix in (torch.eye(96), found))
    assert after > before
    small = replace_me.replace_me(model, (0, 1, 3), blocks, cosine=True, epochs=200)
    weight = decoder_layers(small)[1].mlp.down_proj.weight
    assert torch.allclose(weight, found.T @ decoder_layers(model)[1].mlp.down_proj.weight, atol=1e-5)


def test_each_pass_of_the_cosine_objective_moves_the_map_on_and_follows_its_seed():
    m, y = torch.randn(2, 3000, 8, generator=torch.Generator().manual_seed(0))
    one, other = (replace_me._nearest_by_cosine(m, y, 1, seed) for seed in (1, 2))
    assert not torch.equal(one, other)
    few = replace_me._nearest_by_cosine(m[:50], y[:50], 1, 0), replace_me._nearest_by_cosine(m[:50], y[:50], 10, 0)
    near, far = ((matrix - torch.eye(8)).abs().max() for matrix in few)
    assert far > 5 * near


@torch.no_grad()
def test_replace_me_maps_outputs_without_their_bias(make_blocks):
    model, blocks = build_model("phi"), make_blocks(2, 8)
    m, _ = replace_me._outputs(model, blocks, 0, 2)
    expected = inputs_of(model, "model.layers.0.mlp.fc2", blocks) @ model.model.layers[0].mlp.fc2.weight.T
    torch.testing.assert_close(m, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [(1, 2), (0, 2), (0, 1, 2, 3)])
def test_replace_me_replaces_one_block(model, blocks, refused, kept):
    with refused("remove one block of layers, behind the first"):
        replace_me.replace_me(model, kept, blocks)


# SparseGPT and GPTQ


def brute_force(weight, moment, fix):
    """Each input in turn is fixed, those behind it are then the best: solved anew for each, without Cholesky."""
    eye = torch.eye(len(moment), dtype=torch.float64)
    h = moment.double() + surgeon.DAMPING * moment.double().diagonal().mean() * eye
    start, left = weight.double(), weight.double().clone()
    for j in range(len(h)):
        left[:, j] = fix(left[:, j], j)
        if j + 1 < len(h):
            change = (left[:, : j + 1] - start[:, : j + 1]) @ h[: j + 1, j + 1 :]
            left[:, j + 1 :] = start[:, j + 1 :] - torch.linalg.solve(h[j + 1 :, j + 1 :], change.T).T
    return left


def tiny(outputs=5, inputs=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x.T @ x / len(x)


@pytest.mark.parametrize("stretch", [3, 4, 12, 100])
def test_every_error_is_made_up_for_as_well_as_can_be(stretch):
    weight, moment = tiny()
    found = surgeon.compensated(weight, moment, lambda part, scale: lambda column, place: column.round(), stretch)
    expected = brute_force(weight, moment, lambda column, j: column.round())
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_a_row_without_its_first_inputs_is_the_optimal_one():
    """w' = w - H^-1_:P (H^-1_PP)^-1 w_P, the joint solution of optimal brain surgery."""
    weight, moment = tiny()
    h = moment.double() + surgeon.DAMPING * moment.double().diagonal().mean() * torch.eye(12)
    inverse, gone = torch.linalg.inv(h), slice(0, 5)
    expected = weight.double() - weight[:, gone].double() @ torch.linalg.inv(inverse[gone, gone]) @ inverse[gone]
    rule = lambda part, scale: lambda column, place: column * (place >= 5)  # noqa: E731
    found = surgeon.compensated(weight, moment, rule)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_an_input_that_is_always_zero_is_no_error():
    weight, moment = tiny()
    moment[3] = moment[:, 3] = 0
    found = surgeon.compensated(weight, moment, lambda part, scale: lambda column, place: column.round(), 4)
    assert torch.isfinite(found).all()


def test_sparse_gpt_keeps_outputs_better_than_wanda_at_the_same_share(model, moments):
    errors = {}
    for make in (sparsity.wanda, sparsity.sparse_gpt):
        small = dict(linears(make(model, moments, 0.5)))
        errors[make] = [output_error(linear.weight, small[name].weight, moments[name])
                        for name, linear in linears(model)]  # fmt: skip
    assert sum(errors[sparsity.sparse_gpt]) < 0.9 * sum(errors[sparsity.wanda])
    assert sparsity.zeros(sparsity.sparse_gpt(model, moments, 0.75)) == pytest.approx(0.75, abs=1e-9)


def test_sparse_gpt_removes_the_weight_of_least_square_over_that_of_its_cholesky_factor(model):
    """Of independent inputs w^2 / U_jj^2 is w^2 E x_j^2: equal weights stay where the input is larger."""
    name, linear = next(linears(model))
    linear.weight.data = torch.ones_like(linear.weight)
    found = {name: torch.eye(part.in_features) for name, part in linears(model)}
    found[name] = torch.diag(torch.tensor([1.0, 4.0]).repeat(linear.in_features // 2))
    kept = dict(linears(sparsity.sparse_gpt(model, found, 0.5)))[name].weight != 0
    assert kept[:, 1::2].all() and not kept[:, ::2].any()


def test_a_grid_of_int4_holds_zero_where_all_weights_are_of_one_sign():
    groups = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, -3.0, -2.0, -1.0]])
    scale, zero = quantization._grid(groups, torch.float32)
    assert scale.tolist() == pytest.approx([4 / 15, 4 / 15])
    assert zero.tolist() == [-8, 7]


def test_int4_weights_are_on_a_grid_of_sixteen(model, moments):
    for small in (quantization.int4_groups(model), quantization.gptq(model, moments)):
        for _, linear in linears(small):
            groups = linear.weight.dequantize().view(-1, quantization.group_of(linear.in_features))
            assert max(len(group.unique()) for group in groups) <= 16


def test_gptq_keeps_outputs_better_than_rounding_to_the_nearest(model, moments):
    nearest, found = (
        dict(linears(small)) for small in (quantization.int4_groups(model), quantization.gptq(model, moments))
    )
    for name, linear in linears(model):
        errors = [output_error(linear.weight, each[name].weight.dequantize(), moments[name])
                  for each in (found, nearest)]  # fmt: skip
        assert 0 < errors[0] < errors[1], name


def test_gptq_of_independent_inputs_is_rounding_to_the_nearest(model):
    moments = {name: torch.eye(linear.in_features) for name, linear in linears(model)}
    nearest, found = (
        dict(linears(small)) for small in (quantization.int4_groups(model), quantization.gptq(model, moments))
    )
    for name in nearest:
        assert torch.allclose(found[name].weight.dequantize(), nearest[name].weight.dequantize(), atol=1e-5)


def test_hqq_stays_near_the_model(model, blocks):
    small = quantization.int4_groups(model, hqq=True)
    error = (last_hidden(small, blocks) - last_hidden(model, blocks)).norm() / last_hidden(model, blocks).norm()
    assert 0 < error < 0.5


def test_groups_fit_the_width():
    assert [quantization.group_of(inputs) for inputs in (1536, 576, 96, 48)] == [128, 64, 32, 16]
    with pytest.raises(NotSupported, match="divides 40 inputs"):
        quantization.group_of(40)


# width


def size_of(model, kept):
    return count_parameters(compact(model, kept))


def test_refitted_maps_are_least_squares_on_the_inputs_that_stay(model, blocks, moments, monkeypatch):
    monkeypatch.setattr(width, "RIDGE", 1e-12)
    name = "model.layers.0.mlp.down_proj"
    linear, kept = copy.deepcopy(model.get_submodule(name)), torch.tensor([1, 4, 7, 30, 31, 90])
    x = inputs_of(model, name, blocks).double().numpy()
    expected = np.linalg.lstsq(x[:, kept], x @ linear.weight.detach().double().numpy().T, rcond=None)[0].T
    width._cut_inputs_(linear, name, moments, kept, "refit")
    assert np.allclose(linear.weight.detach().numpy(), expected, atol=1e-3)


def test_a_refitted_narrow_model_is_nearer_to_the_full_one(model, blocks, moments):
    size, target = size_of(model, (0, 1, 2)), last_hidden(model, blocks)
    plain, refitted = (width.width_pruned(model, moments, size, repair=repair) for repair in ("none", "refit"))
    assert count_parameters(plain) == count_parameters(refitted)
    gaps = [(last_hidden(small, blocks) - target).norm() for small in (refitted, plain)]
    assert gaps[0] < gaps[1]


def test_flap_scores_fluctuation_and_not_size():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.ones(2, 4)
    moments = InputMoments()
    moments["it"], moments.means["it"] = torch.diag(torch.tensor([9.0, 2.0, 1.5, 5.0])), torch.tensor([3.0, 0, 0.5, 2])
    # variances 0, 2, 1.25 and 1
    assert width._best(linear, "it", moments, 1, 2, "fluctuation").tolist() == [1, 2]
    assert width._best(linear, "it", moments, 1, 2, "norm").tolist() == [0, 3]
    assert width._best(linear, "it", moments, 2, 1, "fluctuation").tolist() == [0]  # by squares: 0 + 4 beats 1.56 + 1


def test_flaps_bias_gives_what_the_removed_inputs_gave_on_average(model, moments):
    name = "model.layers.1.mlp.down_proj"
    linear, kept = nn.Linear(96, 96), torch.arange(0, 96, 3)
    mean = moments.means[name]
    expected = linear(mean)
    width._cut_inputs_(linear, name, moments, kept, "bias")
    assert linear.weight.shape == (96, 32)
    assert torch.allclose(linear(mean[kept]), expected, atol=1e-5)


def test_a_model_with_flaps_biases_has_the_size_asked_for_and_loads_as_a_standard_one(model, moments, tmp_path):
    size = size_of(model, (0, 1, 2))
    small = width.width_pruned(model, moments, size, "fluctuation", "bias")
    assert 0.97 * size < count_parameters(small) <= size
    small.save_pretrained(tmp_path)
    ids = torch.arange(3, 11)[None]
    loaded = type(small).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.allclose(loaded(ids).logits, small(ids).logits, atol=1e-5)
    assert decoder_layers(loaded)[0].mlp.down_proj.bias.abs().sum() > 0
    assert model.config.mlp_bias is False


def test_families_without_biases_get_none(blocks):
    full = build_model("mistral", **DENSE)
    with pytest.raises(NotSupported, match="no attention_bias and mlp_bias"):
        width.width_pruned(full, input_moments(full, blocks), size_of(full, (0, 1)), "fluctuation", "bias")


def test_no_peer_changes_the_model_it_is_given(model, moments, blocks):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    depth.laco(model, 2, blocks[:2], True)
    depth.magnitude_compensated(model, (0, 2), blocks)
    depth.only_tail(model)
    replace_me.replace_me(model, (0, 3), blocks, cosine=True, epochs=1)
    sparsity.sparse_gpt(model, moments)
    quantization.gptq(model, moments)
    width.width_pruned(model, moments, size_of(model, (0, 1)), "fluctuation", "bias")
    width.width_pruned(model, moments, size_of(model, (0, 1)), repair="refit")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert locate_layers(model)[0] == "model.layers"


# the trainings


@pytest.fixture
def setting(model, blocks, make_blocks, tmp_path):
    mean = fidelity.mean_state(model, blocks)
    valid = fidelity.reference(model, make_blocks(2, 12, seed=5), mean)
    how = Distillation(batch_size=4, learning_rate=1e-3, evaluate_every=2)
    return Setting(model, blocks, {1: (2,), 2: (0, 3)}, {}, {}, valid, tmp_path, how)


@pytest.mark.parametrize("name", TRAININGS)
def test_each_training_gives_a_plain_model_for_the_same_tokens(setting, name):
    start = compact(setting.full, (0, 3))
    if name == "masked":
        start = sparsity.magnitude_pruned(start, 0.5)
    found = TRAININGS[name](setting, start, 2, setting.folder, setting.training)
    names = {key for key, _ in start.named_parameters()}
    assert {key for key, _ in found.model.named_parameters()} == names
    assert found.history[-1]["tokens"] == setting.blocks.numel()
    assert len(decoder_layers(found.model)) == 2
    if name == "masked":
        assert sparsity.zeros(found.model) == pytest.approx(0.5)
    moved = [key for key in names if not torch.equal(found.model.get_parameter(key), start.get_parameter(key))]
    assert moved
    assert ("model.embed_tokens.weight" in moved) == (name == "whole")


def test_a_stepwise_training_is_judged_by_its_last_stage(setting):
    found = TRAININGS["stepwise"](setting, compact(setting.full, (2,)), 1, setting.folder, setting.training)
    steps = [look["step"] for look in found.history]
    assert steps[-1] == len(setting.blocks) // 4
    assert steps[0] > 0  # the looks of the stages before are not its own
    assert len(decoder_layers(found.model)) == 1


def test_a_stepwise_training_takes_no_more_steps_than_there_are_layers_to_remove(setting, monkeypatch):
    setting.kept[3], stages = (0, 1, 3), []

    def distil(full, small, blocks, *rest, **settings):
        stages.append(len(blocks))
        return Distilled(small, [{"step": 1, "tokens": 9, "seconds": 1.0}])

    monkeypatch.setattr(training, "distil", distil)
    TRAININGS["stepwise"](setting, None, 3, setting.folder, setting.training)
    assert stages == [len(setting.blocks)]  # one layer: one step, on all of the text


def test_every_method_names_a_training_that_is_there():
    assert {method.training for method in METHODS.values()} - {"none"} <= set(TRAININGS)


# released figures


def fidelity_table(rows):
    rows = [{"strategy": "full", "k": 30, "ppl": 30.0, "ppl_ratio": 1.0}, *rows]
    return pd.DataFrame(rows).assign(ppl_ratio_lo=0.9, ppl_ratio_hi=1.1)


def test_released_selections_stand_beside_ours_of_the_same_name_and_size():
    table = fidelity_table([
        {"strategy": "sleb", "k": 15, "ppl": 300.0, "ppl_ratio": 10.0},
        {"strategy": "evopress", "k": 22, "ppl": 90.0, "ppl_ratio": 3.0},
        {"strategy": "evopress_paper", "k": 22, "ppl": 60.0, "ppl_ratio": 2.0},
    ])  # fmt: skip
    found = peers.t4_peers(table, "smollm2-135m-instruct").set_index(["name", "k"])
    sleb = found.loc[("sleb", 15)]
    assert sleb["released_ratio"] == pytest.approx(375 / 29.17)
    assert sleb["ratio"] == pytest.approx(10 / (375 / 29.17))
    assert found.loc[("evopress_paper", 22), "ppl_ratio"] == 2.0  # with at least the generations of the released run
    assert found["ppl_ratio"].notna().sum() == 2
    assert len(found) == 16


def test_another_model_is_not_compared_with_released_figures():
    table = fidelity_table([{"strategy": "sleb", "k": 15, "ppl": 300.0, "ppl_ratio": 10.0}])
    found = peers.t4_peers(table, "tiny")
    assert found["ppl_ratio"].isna().all()
    assert found["released_ppl"].notna().all()


def test_released_models_stand_beside_ours_before_any_training():
    rows = [{"name": "replace_me_cosine", "k": 22, "recovered": trained, "ppl": 300.0, "ppl_ratio": ratio}
            for trained, ratio in ((False, 9.0), (True, 3.0))]  # fmt: skip
    table = pd.DataFrame(rows).assign(ppl_ratio_lo=8.0, ppl_ratio_hi=10.0)
    found = peers.t7_peers(table, "smollm2-135m-instruct").set_index(["name", "k"]).loc[("replace_me_cosine", 22)]
    assert found["ppl_ratio"] == 9.0
    assert found["ratio"] == pytest.approx(9 / (399.0 / 29.94))
    assert set(peers.MODELS.ppl) <= set(METHODS)
