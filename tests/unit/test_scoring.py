"""Scores against a plain loop of backward(), hidden states in numpy, and numbers made by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from paper_src import coalitions, scoring
from paper_src.coalitions import Evaluator
from paper_src.models import decoder_layers, load_model, offloaded
from paper_src.scoring import Calibration, LayerScores, combined_score, score_layers, weight_taylor
from paper_src.sums import SINK_RATIO, _squared_norms, frozen


def gradients_by_backward(model, blocks):
    """Per-sequence ||g||^2, ||g|| and |theta . g|, each (N, L), from p.grad after one backward() a sequence."""
    model = copy.deepcopy(model)
    squared, inner = torch.zeros(2, len(blocks), 4, dtype=torch.float64)
    for row, block in enumerate(blocks):
        model.zero_grad()
        functional.cross_entropy(model(block[None]).logits[0, :-1], block[1:]).backward()
        for index, layer in enumerate(decoder_layers(model)):
            for parameter in layer.parameters():
                weight, gradient = parameter.detach().double(), parameter.grad.double()
                squared[row, index] += gradient.square().sum()
                inner[row, index] += (weight * gradient).sum()
    return {"fisher": squared, "grad_norm": squared.sqrt(), "taylor": inner.abs()}


def states_of(model, blocks):
    """Input of each layer and output of the last one before the final norm, (L+1, N, T, d)."""
    model = copy.deepcopy(model)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        states = model(blocks, output_hidden_states=True).hidden_states
    return torch.stack(states).double().numpy()


def assert_gradient_scores(scores, expected):
    for name in ("fisher", "grad_norm"):
        torch.testing.assert_close(scores.per_sequence[name], expected[name], rtol=1e-5, atol=0)
    # theta . g is a sum of both signs: its rounding is relative to what is summed, not to what is left
    scale = 1e-5 * expected["taylor"].max()
    torch.testing.assert_close(scores.per_sequence["taylor"], expected["taylor"], rtol=1e-5, atol=float(scale))


# Gradients


def test_gradient_scores_equal_a_loop_of_backward(family, full, make_blocks):
    blocks = make_blocks(3, 12)
    assert_gradient_scores(score_layers(full, blocks), gradients_by_backward(full, blocks))


@pytest.mark.parametrize("length", [2, 12, 50])  # from Gram matrices only to none
def test_gradient_scores_are_right_at_every_length(llama, make_blocks, length):
    blocks = make_blocks(2, length)
    assert_gradient_scores(score_layers(llama, blocks), gradients_by_backward(llama, blocks))


def test_gradient_scores_of_parallel_falcon_layers_with_two_norms(make_model, make_blocks):
    model, blocks = make_model("falcon", new_decoder_architecture=True, bias=True), make_blocks(2, 12)
    assert_gradient_scores(score_layers(model, blocks), gradients_by_backward(model, blocks))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("labels", ["text", "model"])
def test_batch_size_does_not_matter(llama, make_blocks, batch_size, labels):
    blocks = make_blocks(5, 8)
    expected = score_layers(llama, blocks, batch_size=3, labels=labels)
    scores = score_layers(llama, blocks, batch_size=batch_size, labels=labels)
    for name, values in expected.per_sequence.items():
        torch.testing.assert_close(scores.per_sequence[name], values, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores.angular, expected.angular, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "wide"), [(3, 64), (40, 8)])  # 384 < 64^2: Gram; 640 > 8^2: direct
def test_squared_norms_equal_the_product_on_both_sides_of_the_switch(tokens, wide):
    torch.manual_seed(0)
    x, gradient = torch.randn(2, tokens, wide), torch.randn(2, tokens, wide)
    expected = torch.einsum("bti,btj->bij", gradient.double(), x.double()).square().sum(dim=(1, 2))
    torch.testing.assert_close(_squared_norms(x, gradient), expected, rtol=1e-5, atol=0)


def test_squared_norms_do_not_change_when_empty_tokens_cause_the_switch():
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 3, 64), torch.randn(2, 3, 48)
    padded = [functional.pad(tensor, (0, 0, 0, 60)) for tensor in (x, gradient)]
    torch.testing.assert_close(_squared_norms(x, gradient), _squared_norms(*padded), rtol=1e-5, atol=0)


def test_score_of_a_layer_is_the_mean_over_sequences(llama, make_blocks):
    scores = score_layers(llama, make_blocks(5, 8))
    values = scores.per_sequence["fisher"].numpy()
    assert values.dtype == np.float64
    np.testing.assert_allclose(scores.mean("fisher"), values.mean(axis=0))
    np.testing.assert_allclose(scores.standard_error("fisher"), values.std(axis=0, ddof=1) / np.sqrt(5))


def test_fisher_per_parameter_divides_by_each_layers_count(make_model, make_blocks):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 48)  # 48 biases more than the other layers
    scores = score_layers(model, make_blocks(2, 8))
    expected = [2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32] * 4
    expected[1] += 48
    assert scores.parameters.tolist() == expected
    ratio = scores.per_sequence["fisher"] / scores.per_sequence["fisher_per_parameter"]
    torch.testing.assert_close(ratio, scores.parameters.double().expand(2, 4))


# The true Fisher


def test_drawn_labels_follow_their_seed(llama, make_blocks):
    def fisher(seed):
        return score_layers(llama, make_blocks(3, 8), labels="model", seed=seed).per_sequence["fisher"]

    assert torch.equal(fisher(1), fisher(1))
    assert not torch.equal(fisher(1), fisher(2))


def test_drawn_labels_do_not_touch_the_global_generator(llama, make_blocks):
    before = torch.get_rng_state()
    score_layers(llama, make_blocks(3, 8), labels="model")
    assert torch.equal(torch.get_rng_state(), before)


def test_true_fisher_nears_its_exact_expectation(make_model, make_blocks):
    """Drawn labels are independent and E g_t = 0: E||g||^2 = sum_t sum_y p_t(y) ||g_t(y)||^2 / (T-1)^2."""
    model, block = make_model("llama", vocab_size=8), make_blocks(1, 3, vocab=8)
    log_p = model(block).logits[0, :-1].log_softmax(-1)  # (2, 8)
    expected = torch.zeros(4, dtype=torch.float64)
    for nll in -log_p.flatten():
        model.zero_grad()
        nll.backward(retain_graph=True)
        for index, layer in enumerate(model.model.layers):
            squared = sum(float(p.grad.square().sum()) for p in layer.parameters())
            expected[index] += float((-nll).detach().exp()) * squared / 4
    scores = score_layers(model, block.expand(600, 3), batch_size=100, labels="model")
    error = scores.standard_error("fisher")
    assert (error < 0.1 * expected).all()
    assert ((scores.mean("fisher") - expected).abs() < 4 * error).all()


# Activations


def moments(states, keep):
    """Variance, mean |h| and kurtosis of states (L, N, T, d) where ``keep`` (L, N, T): each (N, L)."""

    def each(function):
        depth, count = keep.shape[:2]
        return [[function(states[i, n][keep[i, n]]) for i in range(depth)] for n in range(count)]

    return {
        "activation_variance": each(np.var),
        "activation_mean_abs": each(lambda h: np.abs(h).mean()),
        "activation_kurtosis": each(lambda h: ((h - h.mean()) ** 4).mean() / h.var() ** 2),
    }


def test_block_influence_is_one_minus_the_cosine_of_input_and_output(llama, make_blocks):
    blocks = make_blocks(3, 8)
    before, after = (states := states_of(llama, blocks))[:-1], states[1:]
    norms = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    expected = 1 - ((before * after).sum(axis=-1) / norms).mean(axis=-1).T  # (N, L)
    np.testing.assert_allclose(score_layers(llama, blocks).per_sequence["block_influence"], expected, rtol=1e-4)


def test_activation_statistics_equal_numpys(llama, make_blocks):
    blocks = make_blocks(3, 8)
    states = states_of(llama, blocks)[1:]
    scores = score_layers(llama, blocks).per_sequence
    for name, expected in moments(states, np.ones(states.shape[:3], bool)).items():
        np.testing.assert_allclose(scores[name], expected, rtol=1e-4)
        np.testing.assert_allclose(scores[f"{name}_no_sink"], expected, rtol=1e-4)  # no token stands out


def test_sink_token_is_left_out_of_the_no_sink_statistics(llama, make_blocks):
    blocks = make_blocks(3, 9)
    blocks[blocks == 50] = 51
    blocks[:, 2] = 50
    with torch.no_grad():
        llama.model.embed_tokens.weight[50] *= 1000
    states = states_of(llama, blocks)[1:]
    norms = np.linalg.norm(states, axis=-1)  # (L, N, T)
    keep = norms <= SINK_RATIO * np.median(norms, axis=-1, keepdims=True)
    assert not keep[:, :, 2].any()
    assert keep.sum() == keep.size - 12
    scores = score_layers(llama, blocks).per_sequence
    for name, expected in moments(states, keep).items():
        np.testing.assert_allclose(scores[f"{name}_no_sink"], expected, rtol=1e-4)
    plain = moments(states, np.ones_like(keep))["activation_variance"]
    np.testing.assert_allclose(scores["activation_variance"], plain, rtol=1e-4)
    assert (scores["activation_variance"] > 100 * scores["activation_variance_no_sink"]).all()


def test_angular_distance_is_the_angle_between_last_tokens_over_pi(llama, make_blocks):
    blocks = make_blocks(3, 8)
    last = states_of(llama, blocks)[:, :, -1]  # (L+1, N, d)
    unit = last / np.linalg.norm(last, axis=-1, keepdims=True)
    expected = np.arccos(np.clip(np.einsum("lnd,mnd->nlm", unit, unit), -1, 1)).mean(axis=0) / np.pi
    np.testing.assert_allclose(score_layers(llama, blocks).angular, expected, atol=1e-4)


def test_layer_that_negates_its_input_is_at_distance_one(llama, make_blocks):
    layer = llama.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: -args[0])
    scores = score_layers(llama, make_blocks(2, 6))
    assert float(scores.angular[1, 2]) == pytest.approx(1, abs=1e-3)
    assert scores.mean("block_influence")[1] == pytest.approx(2)


# The caller's model


def test_model_is_as_before_after_scoring(llama, make_blocks):
    llama.model.layers[1].requires_grad_(False)
    kept = llama.lm_head.weight.grad = torch.ones_like(llama.lm_head.weight)
    flags = {name: p.requires_grad for name, p in llama.named_parameters()}
    weights = copy.deepcopy(llama.state_dict())
    score_layers(llama, make_blocks(2, 6))
    assert {name: p.requires_grad for name, p in llama.named_parameters()} == flags
    assert llama.lm_head.weight.grad is kept and (kept == 1).all()
    assert all(p.grad is None for p in llama.model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in llama.state_dict().items())
    assert not any(module._forward_hooks for module in llama.modules())


def test_model_is_as_before_after_a_refusal(llama, make_blocks, refused):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with refused("is not finite"):
        score_layers(llama, make_blocks(2, 6))
    assert all(p.requires_grad for p in llama.parameters())
    assert all(p.grad is None for p in llama.parameters())
    assert not any(module._forward_hooks for module in llama.modules())


def test_scoring_works_where_gradients_are_switched_off(llama, make_blocks):
    with torch.no_grad():
        scores = score_layers(llama, make_blocks(2, 6))
    assert (scores.mean("fisher") > 0).all()


def test_progress_sees_every_batch(llama, make_blocks):
    sizes = []

    def watch(batches):
        for batch in batches:
            sizes.append(len(batch))
            yield batch

    score_layers(llama, make_blocks(5, 6), batch_size=2, progress=watch)
    assert sizes == [2, 2, 1]


# What is refused


@pytest.mark.parametrize("shape", [(12,), (2, 1), (0, 8), (2, 2, 2)])
def test_blocks_of_another_shape_are_refused(llama, shape, refused):
    with refused(r"blocks have shape \(.*\): give \(N, T\) token ids with T >= 2"):
        score_layers(llama, torch.ones(shape, dtype=torch.long))


def test_unknown_labels_are_refused(llama, make_blocks, refused):
    with refused("labels 'teacher': use 'text' or 'model'"):
        score_layers(llama, make_blocks(2, 6), labels="teacher")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_mix_sequences_are_scored_one_by_one(make_model, make_blocks, family, batch_size):
    model, blocks = make_model(family), make_blocks(3, 6)
    assert_gradient_scores(score_layers(model, blocks, batch_size), gradients_by_backward(model, blocks))


def test_weights_that_two_layers_share_count_for_both(llama, make_blocks):
    llama.model.layers[2].mlp = llama.model.layers[1].mlp
    blocks = make_blocks(3, 6)
    assert_gradient_scores(score_layers(llama, blocks), gradients_by_backward(llama, blocks))


def test_a_module_whose_hook_is_not_called_is_noticed(llama, make_blocks, monkeypatch):
    mlp = llama.model.layers[1].mlp
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: self.down_proj(
        self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)))  # fmt: skip
    blocks = make_blocks(3, 6)
    found = score_layers(llama, blocks)
    monkeypatch.undo()
    assert_gradient_scores(found, gradients_by_backward(llama, blocks))


def test_a_batch_whose_inner_products_alone_are_wrong_is_noticed(llama, make_blocks, monkeypatch):
    batch, blocks = scoring._score_batch, make_blocks(3, 6)

    def wrong(*arguments):
        row, ends = batch(*arguments)
        return row | {"taylor": row["taylor"] + 100 * row["fisher"].sqrt()}, ends

    monkeypatch.setattr(scoring, "_score_batch", wrong)
    assert_gradient_scores(score_layers(llama, blocks), gradients_by_backward(llama, blocks))


def test_scores_that_are_not_finite_are_refused(llama, make_blocks, refused):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with refused("of layer .* is not finite, sequence 0: check the weights"):
        score_layers(llama, make_blocks(2, 6))


# Summaries by hand


def scores_of(rows):
    values = torch.tensor(rows, dtype=torch.float64)
    return LayerScores({"x": values}, torch.zeros(1), torch.ones(values.shape[1]))


@pytest.mark.parametrize(
    ("odd", "tau"),
    [([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1), ([2, 1, 3, 4], 2 / 3)],  # one pair of six turned: 5/6 - 1/6
)
def test_half_split_tau_compares_even_with_odd_sequences(odd, tau):
    even = [10, 20, 30, 40]
    rows = [even, odd, even, odd, [0, 0, 0, 0]]
    assert scores_of(rows).half_split_tau("x") == pytest.approx(tau)


def test_standard_error_of_one_sequence_is_unknown():
    assert scores_of([[1, 2]]).standard_error("x").isnan().all()


def test_combined_score_hand_values():
    scores = {"a": torch.tensor([1.0, 10.0, 100.0]), "b": torch.tensor([8.0, 2.0, 4.0])}
    assert combined_score({"a": scores["a"]}).tolist() == pytest.approx([0, 0.5, 1])
    assert combined_score(scores).tolist() == pytest.approx([0.5, 0.25, 0.75])


def test_combined_score_of_equal_values_is_one_half():
    assert combined_score({"a": torch.full((3,), 7.0)}).tolist() == [0.5] * 3


def test_combined_score_ignores_the_unit_and_stays_in_range():
    a, b = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) + 1e-6
    combined = combined_score({"a": a, "b": b})
    assert combined.min() >= 0 and combined.max() <= 1
    torch.testing.assert_close(combined_score({"a": 1e3 * a, "b": 1e-3 * b}), combined)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_combined_score_refuses_what_has_no_logarithm(value, refused):
    with refused("score 'a' has values <= 0"):
        combined_score({"a": torch.tensor([1.0, value])})


# The Taylor score by weight


def test_weight_taylor_equals_a_plain_backward_pass(full, make_blocks):
    blocks = make_blocks(3, 10)
    full.zero_grad()
    found = weight_taylor(full, blocks)
    logits = full(input_ids=blocks, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).backward()
    expected = [sum((p * p.grad).abs().sum().item() for p in layer.parameters()) for layer in decoder_layers(full)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_weight_taylor_leaves_gradients_and_flags_as_they_were(llama, make_blocks):
    weight = llama.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    llama.model.layers[1].requires_grad_(False)
    weight_taylor(llama, make_blocks(2, 8))
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert llama.model.layers[2].mlp.up_proj.weight.grad is None
    assert not llama.model.layers[1].mlp.up_proj.weight.requires_grad
    assert llama.model.layers[2].mlp.up_proj.weight.requires_grad


def test_in_a_batch_and_layer_by_layer_scores_are_the_same_and_right(full, make_blocks):
    """The ways of models that allow a batch and of those that do not fit, which nothing corrects here."""
    blocks, layers = make_blocks(3, 12), decoder_layers(full)
    by_backward = gradients_by_backward(full, blocks)
    with frozen(full), torch.enable_grad():
        (expected, ends), (found, also) = (
            score(full, layers, blocks, None) for score in (scoring._score_batch, scoring._score_layerwise)
        )
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-12)
    assert torch.equal(ends, also)
    torch.testing.assert_close(expected["fisher"], by_backward["fisher"], rtol=1e-5, atol=0)
    scale = 1e-5 * by_backward["taylor"].max()
    torch.testing.assert_close(expected["taylor"], by_backward["taylor"], rtol=1e-5, atol=float(scale))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_weights_on_the_disk_give_the_same_scores(make_model, family, tokenizer, make_blocks, tmp_path):
    make_model(family, vocab_size=300).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    here, there = (load_model(str(tmp_path), "float32", device).model for device in ("cpu", "disk"))
    assert offloaded(there)
    assert not offloaded(here)
    blocks = make_blocks(4, 10)
    expected, found = (score_layers(model, blocks, batch_size=2) for model in (here, there))
    for name, values in expected.per_sequence.items():
        torch.testing.assert_close(found.per_sequence[name], values, rtol=1e-6, atol=1e-12)
    assert torch.equal(found.parameters, expected.parameters)
    assert offloaded(there)  # nothing stayed in memory
    assert not list(tmp_path.glob("*offload*"))


def test_float16_is_refused(llama, make_blocks, refused):
    with refused("float16 holds neither the squares of large activations nor small gradients"):
        score_layers(copy.deepcopy(llama).half(), make_blocks(2, 8))


# What each score takes of the calibration text


def test_the_true_fisher_is_of_the_first_sequences_and_of_drawn_labels(llama, make_blocks):
    blocks = make_blocks(4, 8)
    found, cost = scoring.fisher_true(Calibration(llama, blocks, blocks, true_sequences=3, seed=5))
    expected = score_layers(llama, blocks[:3], labels="model", seed=5).per_sequence["fisher"]
    torch.testing.assert_close(found["fisher_true"], expected)
    assert (cost.evaluations, cost.forward_tokens) == (1, 3 * 3 * 8)  # a pass forward, and backward twice its work


def test_the_taylor_score_by_weight_is_of_four_batches_of_equal_size(llama, make_blocks):
    blocks = make_blocks(11, 6)
    found, cost = scoring.taylor_by_weight(Calibration(llama, blocks, blocks, taylor_sequences=2))
    expected = torch.stack([weight_taylor(llama, part) for part in blocks[:8].split(2)])
    torch.testing.assert_close(found["weight_taylor"], expected)
    assert cost.evaluations == 4


def test_leaving_one_out_takes_the_first_windows_two_by_two(llama, make_blocks):
    windows = make_blocks(6, 8)
    found, _ = scoring.leave_one_out(Calibration(llama, windows, windows, loo_windows=4))
    expected = coalitions.leave_one_out([Evaluator(llama, windows[:2]), Evaluator(llama, windows[2:4])])
    np.testing.assert_allclose(found["leave_one_out"], expected, rtol=1e-6)


def test_shapley_values_are_of_the_capped_loss_of_the_scored_tokens_and_follow_the_seed(llama, make_blocks):
    windows = make_blocks(4, 12)
    with torch.no_grad():
        llama.lm_head.weight.mul_(5)  # so that the cap acts
    found, _ = scoring.shapley(Calibration(llama, windows, windows, scored=5, seed=3, target=0.0))
    parts = [Evaluator(llama, part, ["nll_capped_nats"], scored=5) for part in windows.split(1)]
    expected = coalitions.shapley(parts, 0.0, seed=3).groups[:, :, 0]
    np.testing.assert_allclose(found["shapley"], expected, rtol=1e-5, atol=1e-7)
