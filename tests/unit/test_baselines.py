"""Quantization, sparsity, width, low rank and merging: sizes counted, identities, hand-computed choices."""

import copy
import math

import pytest
import torch
from conftest import build_model
from torch import nn

from paper_src import NotSupported
from paper_src.baselines import depth
from paper_src.baselines.depth import _merged, laco
from paper_src.baselines.low_rank import factors, low_rank
from paper_src.baselines.moments import input_moments, linears
from paper_src.baselines.quantization import cast, dynamic_quantized, torchao_quantized
from paper_src.baselines.sparsity import magnitude_pruned, masked, unmasked, wanda, zeros
from paper_src.baselines.width import _widths, width_pruned
from paper_src.compaction import compact
from paper_src.models import count_parameters, decoder_layers, last_hidden

DENSE = {
    "hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "vocab_size": 96
}  # fmt: skip


@pytest.fixture
def model():
    return build_model("llama", **DENSE)


@pytest.fixture
def moments(model, make_blocks):
    return input_moments(model, make_blocks(6, 16))


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_moments_are_the_mean_outer_product_of_inputs(model, make_blocks):
    blocks = make_blocks(3, 8)
    found = input_moments(model, blocks, batch_size=2)
    seen = []
    layer = decoder_layers(model)[1]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    last_hidden(model, blocks)
    hook.remove()
    expected = seen[0].T @ seen[0] / blocks.numel()
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], expected, atol=1e-5)
    assert torch.allclose(found.means["model.layers.1.mlp.down_proj"], seen[0].mean(0), atol=1e-6)
    assert found["model.layers.1.mlp.up_proj"] is found["model.layers.1.mlp.gate_proj"]
    assert found.means["model.layers.1.mlp.up_proj"] is found.means["model.layers.1.mlp.gate_proj"]
    assert len(found) == 4 * 7


def test_no_baseline_changes_the_model_it_is_given(model, moments, make_blocks):
    before = states(model)
    size = count_parameters(compact(model, (0, 3)))
    magnitude_pruned(model, 0.5)
    wanda(model, moments, 0.75)
    width_pruned(model, moments, size)
    low_rank(model, factors(model, moments), size)
    laco(model, 2, make_blocks(2, 8))
    masked(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_sparsity_is_exact(model, moments, sparsity):
    for small in (magnitude_pruned(model, sparsity), wanda(model, moments, sparsity)):
        assert zeros(small) == pytest.approx(sparsity, abs=1e-9)
    assert zeros(model) == 0


def test_zeros_of_quantized_weights_are_not_told():
    assert math.isnan(zeros(dynamic_quantized(build_model("llama", **DENSE))))


def test_two_of_four_leaves_two_of_every_four(model, moments):
    small = wanda(model, moments, 0.5, group=4)
    for _, linear in linears(small):
        left = (linear.weight.view(len(linear.weight), -1, 4) != 0).sum(-1)
        assert (left == 2).all()


def test_wanda_weighs_by_the_norm_of_the_input(model):
    name, linear = next(linears(model))
    linear.weight.data = torch.ones_like(linear.weight)
    size = linear.weight.shape[1]
    moments = {name: torch.eye(part.weight.shape[1]) for name, part in linears(model)}
    moments[name] = torch.diag(torch.arange(size, 0, -1.0))  # the last inputs are the smallest
    found = dict(linears(wanda(model, moments, 0.5)))[name].weight
    assert (found[:, : size // 2] != 0).all()
    assert (found[:, size // 2 :] == 0).all()
    linear.weight.data[:, ::2] = 3.0
    moments[name] = torch.diag(torch.tensor([1.0, 4.0]).repeat(size // 2))  # 3 * 1 is above 1 * 2, and below 1 * 4
    found = dict(linears(wanda(model, moments, 0.5)))[name].weight
    assert (found[:, ::2] != 0).all() and (found[:, 1::2] == 0).all()


def test_masked_weights_stay_zero_through_a_step(model):
    sparse = magnitude_pruned(model, 0.5)
    ids = torch.arange(3, 11)[None]
    plain = unmasked(masked(sparse))
    assert torch.equal(last_hidden(plain, ids), last_hidden(sparse, ids))
    training = masked(sparse)
    before = states(training)
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    training(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in training.state_dict().items())
    assert zeros(unmasked(training)) == pytest.approx(0.5, abs=1e-9)


def test_a_narrow_model_has_at_most_the_size_asked_for_and_loads_as_a_standard_one(model, moments, tmp_path):
    for kept in ((0, 1, 2), (0, 3), (0,)):
        size = count_parameters(compact(model, kept))
        small = width_pruned(model, moments, size)
        assert 0.97 * size < count_parameters(small) <= size
        small.save_pretrained(tmp_path)
        ids = torch.arange(3, 11)[None]
        loaded = type(small).from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.allclose(loaded(ids).logits, small(ids).logits, atol=1e-5)


def test_narrowing_takes_away_what_does_nothing(model, make_blocks):
    """Neurons and groups that write nothing are the first to go, and then nothing changes."""
    for layer in decoder_layers(model):
        layer.mlp.down_proj.weight.data[:, ::3] = 0
        for group in (1, 4):  # of six
            layer.self_attn.o_proj.weight.data[:, 16 * group : 16 * group + 16] = 0
    moments = input_moments(model, make_blocks(4, 16))
    group = 2 * 16 * 96 + 2 * 8 * 96  # query and output of two heads, key and value of one
    small = width_pruned(model, moments, count_parameters(model) - 4 * (32 * 3 * 96 + 2 * group))
    assert (small.config.num_key_value_heads, small.config.intermediate_size) == (4, 64)
    ids = make_blocks(1, 12)
    assert torch.allclose(small(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.85, 0.9])
def test_attention_and_mlp_get_narrower_by_shares_as_alike_as_can_be(model, share):
    """Of all pairs of the size asked for: g of 6 groups of two heads, where 2 g divides the width, and n of 96."""
    group, neuron, full = 2 * 16 * 96 + 2 * 8 * 96, 3 * 96, count_parameters(model)
    size = int(share * full)
    room = (size - (full - 4 * (6 * group + 96 * neuron))) // 4  # of one layer's maps
    pairs = [(groups, min(96, (room - groups * group) // neuron)) for groups in (1, 2, 3, 4, 6)]
    expected = min((pair for pair in pairs if pair[1] > 0), key=lambda pair: abs(pair[0] / 6 - pair[1] / 96))
    assert _widths(model, decoder_layers(model), size) == expected


def test_too_small_a_size_is_refused(model, moments, refused):
    with refused("leave no neuron"):
        width_pruned(model, moments, 1000)
    with refused("leave no rank"):
        low_rank(model, factors(model), 1000)


def test_other_families_are_not_supported_by_width(make_blocks, refused):
    model = build_model("gpt_neox")
    with pytest.raises(NotSupported, match="other parts than Llama's"):
        width_pruned(model, input_moments(model, make_blocks(2, 8)), 10**6)
    with refused("no nn.Linear"):
        list(linears(build_model("gpt2")))


def test_low_rank_of_full_size_is_the_model_itself(model, moments):
    ids = torch.arange(3, 19)[None]
    size = count_parameters(model) + sum(part.weight.numel() * 3 for _, part in linears(model))
    for given in (None, moments):
        small = low_rank(model, factors(model, given), size)
        assert torch.allclose(small(ids).logits, model(ids).logits, atol=1e-3)


def test_low_rank_has_at_most_the_size_asked_for(model, moments):
    size = count_parameters(compact(model, (0, 3)))
    small = low_rank(model, factors(model, moments), size)
    assert 0.9 * size < count_parameters(small) <= size


def test_activation_aware_low_rank_is_the_best_map_of_its_rank(model, make_blocks):
    """|W x - U V x|^2 on the calibration text is lower than the plain SVD's, and equal to the discarded spectrum."""
    blocks = make_blocks(40, 32)
    moments = input_moments(model, blocks)
    size = count_parameters(compact(model, (0, 3)))
    plain, aware = (dict(low_rank(model, factors(model, given), size).named_modules())
                    for given in (None, moments))  # fmt: skip
    for name, linear in linears(model):
        moment = moments[name].double()

        def error(parts, linear=linear, moment=moment, name=name):
            gap = linear.weight.double() - parts[name][1].weight.double() @ parts[name][0].weight.double()
            return float((gap @ moment * gap).sum())

        assert error(aware) <= error(plain) * (1 + 1e-6)
        rank = len(aware[name][0].weight)
        root = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment)))
        left_out = torch.linalg.svdvals(linear.weight.double() @ root)[rank:].square().sum()
        assert error(aware) == pytest.approx(float(left_out), rel=1e-2)


def test_laco_merges_to_the_depth_asked_for(model, make_blocks):
    for k in (3, 2, 1):
        small = laco(model, k, make_blocks(2, 8))
        assert len(decoder_layers(small)) == small.config.num_hidden_layers == k
        small.generate(make_blocks(1, 4), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize(("depth", "k"), [(6, 2), (9, 2), (9, 1)])
def test_laco_ends_at_the_depth_asked_for_where_few_layers_are_left(make_blocks, depth, k):
    small = laco(build_model("llama", num_hidden_layers=depth), k, make_blocks(2, 8), thresholds=(-1.0,))
    assert len(decoder_layers(small)) == k


def test_laco_merges_nothing_that_stays_no_nearer_than_its_threshold(model, make_blocks):
    small = laco(model, 3, make_blocks(2, 8), thresholds=(2.0,))  # which no cosine is above
    assert len(decoder_layers(small)) == 4


def test_laco_goes_down_by_its_interval_from_one_merge_to_the_next(make_blocks, monkeypatch):
    lows, merged = [], depth._merged
    monkeypatch.setattr(depth, "_merged", lambda model, low, *rest: lows.append(low) or merged(model, low, *rest))
    laco(build_model("llama", num_hidden_layers=8), 6, make_blocks(2, 8), most=2, interval=3, thresholds=(-1.0,))
    assert lows == [5, 2]  # 5 and 6 become one: the first merge leaves out the last layer


def test_a_merged_layer_is_the_sum_of_the_differences(model):
    small = _merged(model, 1, 3)
    layers = decoder_layers(model)
    a, b, c = (layers[index].mlp.up_proj.weight for index in (1, 2, 3))
    assert torch.allclose(decoder_layers(small)[1].mlp.up_proj.weight, a + (b - a) + (c - a), atol=1e-6)
    assert len(decoder_layers(small)) == 2


@pytest.mark.parametrize(("kind", "bound"), [("int8_weight", 0.03), ("int8_dynamic", 0.05), ("int4_unpacked", 0.5)])
def test_torchao_stays_near_the_model(model, kind, bound):
    ids = torch.arange(3, 35)[None]
    small = torchao_quantized(model, kind)
    error = (last_hidden(small, ids) - last_hidden(model, ids)).norm() / last_hidden(model, ids).norm()
    assert 0 < error < bound


def test_torchao_leaves_the_head_as_it_is(model):
    assert type(torchao_quantized(model, "int8_weight").lm_head.weight.data) is torch.Tensor


def test_torch_ao_dynamic_stays_near_the_model(model):
    ids = torch.arange(3, 35)[None]
    small = dynamic_quantized(model)
    error = (last_hidden(small, ids) - last_hidden(model, ids)).norm() / last_hidden(model, ids).norm()
    assert 0 < error < 0.1
    assert not any(isinstance(part, nn.Linear) for part in decoder_layers(small).modules())


def test_what_this_build_cannot_do_is_said(model, monkeypatch):
    from torchao import quantization

    def refuse(*arguments, **settings):
        raise NotImplementedError("no kernel for cpu\nmore lines")

    monkeypatch.setattr(quantization, "quantize_", refuse)
    with pytest.raises(NotSupported, match=r"^no kernel for cpu$"):
        torchao_quantized(model, "int8_weight")


def test_a_cast_model_has_half_the_bytes(model):
    half = cast(model, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    assert copy.deepcopy(half).dtype == torch.bfloat16
