"""Fidelity metrics against brute force in float64, and intervals against hand values."""

import copy
import math

import numpy as np
import pytest
import torch

from paper_src.compaction import compact
from paper_src.fidelity import (
    METRICS,
    Reference,
    compare,
    compare_constant,
    load_mean,
    mean_state,
    ppl_ratio,
    reference,
    save_mean,
    summarize,
)
from paper_src.models import logits_of
from paper_src.stats import interval


@pytest.fixture
def blocks(make_blocks):
    return make_blocks(5, 70)  # longer than the 64 rows that are compared at a time


@pytest.fixture
def full(llama, blocks):
    return reference(llama, blocks, mean_state(llama, blocks))


@pytest.fixture
def small(llama):
    return compact(llama, [0, 3])


@torch.no_grad()
def states_and_logits(model, blocks):
    """Last hidden states (N, T, d) and logits (N, T, V) in float64."""
    output = model(blocks, output_hidden_states=True)
    return output.hidden_states[-1].double(), output.logits.double()


def cosines(a, b):
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


def test_full_model_is_faithful_to_itself(llama, full):
    result = compare(llama, full)
    assert set(result) == set(METRICS)
    assert all(column.shape == (5,) and column.dtype == np.float64 for column in result.values())
    np.testing.assert_allclose(result["cosine"], 1, atol=1e-6)
    np.testing.assert_allclose(result["cosine_centred"], 1, atol=1e-6)
    np.testing.assert_allclose(result["mse"], 0, atol=1e-10)
    np.testing.assert_allclose(result["kl_nats"], 0, atol=1e-6)
    assert (result["top1_agreement"] == 1).all()


def test_compact_model_of_all_layers_is_faithful(llama, full):
    result = compare(compact(llama, range(4)), full)
    assert (result["mse"] == 0).all() and (result["top1_agreement"] == 1).all()


def test_state_metrics_equal_brute_force(llama, small, blocks, full):
    h, other = states_and_logits(llama, blocks)[0], states_and_logits(small, blocks)[0]
    mean = h.mean(dim=(0, 1))
    result = compare(small, full)
    np.testing.assert_allclose(result["cosine"], cosines(h, other).mean(1), rtol=1e-5)
    np.testing.assert_allclose(result["cosine_centred"], cosines(h - mean, other - mean).mean(1), rtol=1e-4)
    np.testing.assert_allclose(result["mse"], (h - other).square().mean(dim=(1, 2)), rtol=1e-5)


def test_prediction_metrics_equal_brute_force(llama, small, blocks, full):
    logits, other = states_and_logits(llama, blocks)[1], states_and_logits(small, blocks)[1]
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    nll = -log_q[:, :-1].gather(2, blocks[:, 1:, None])[..., 0]
    result = compare(small, full)
    np.testing.assert_allclose(result["kl_nats"], (log_p.exp() * (log_p - log_q)).sum(-1).mean(1), rtol=1e-4)
    np.testing.assert_allclose(result["nll_nats"], nll.mean(1), rtol=1e-5)
    agreement = (logits.argmax(-1) == other.argmax(-1)).double().mean(1)
    assert 0 < agreement.mean() < 1
    np.testing.assert_allclose(result["top1_agreement"], agreement)


@pytest.mark.parametrize("length", [2, 64, 65])  # rows 64 and on are a part of their own
def test_nll_is_the_models_own_loss_at_every_length(llama, make_blocks, length):
    blocks = make_blocks(3, length)
    result = compare(llama, reference(llama, blocks, torch.zeros(32)))
    with torch.no_grad():
        losses = [float(llama(block[None], labels=block[None]).loss) for block in blocks]
    np.testing.assert_allclose(result["nll_nats"], losses, rtol=1e-5)


def test_perplexity_is_the_exponential_of_the_models_loss(llama, blocks, full):
    with torch.no_grad():
        loss = float(llama(blocks, labels=blocks).loss)
    assert summarize(compare(llama, full))["ppl"] == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_size_does_not_matter(llama, small, blocks, full, batch_size):
    mean = mean_state(llama, blocks, batch_size)
    torch.testing.assert_close(mean, full.mean_state)
    other = compare(small, reference(llama, blocks, mean, batch_size), batch_size)
    for name, column in compare(small, full).items():
        np.testing.assert_allclose(other[name], column, rtol=1e-4)


def test_mean_state_is_the_mean_over_all_tokens(llama, blocks):
    h, _ = states_and_logits(llama, blocks)
    mean = mean_state(llama, blocks, batch_size=2)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), h.mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)


def test_reference_holds_the_distribution_of_the_full_model(llama, blocks, full):
    h, logits = states_and_logits(llama, blocks)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(full.hidden.double(), h)
    torch.testing.assert_close(full.probabilities.double(), log_p.exp(), rtol=1e-5, atol=1e-7)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(-full.negative_entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    assert torch.equal(full.top1, logits.argmax(-1))


def test_one_token_predicts_nothing_and_is_refused(llama, make_blocks, refused):
    with refused("blocks of 1 tokens, None scored: give at least 2"):
        reference(llama, make_blocks(2, 1), torch.zeros(32))


# The trivial predictor


def test_constant_predictor_equals_brute_force(llama, blocks, full):
    h, logits = states_and_logits(llama, blocks)
    mean = full.mean_state.double()
    with torch.no_grad():
        log_q = logits_of(llama, full.mean_state[None, None])[0, 0].double().log_softmax(-1)  # (V,)
    log_p = logits.log_softmax(-1)
    result = compare_constant(llama, full)
    np.testing.assert_allclose(result["cosine"], cosines(h, mean).mean(1), rtol=1e-5)
    np.testing.assert_allclose(result["mse"], (h - mean).square().mean(dim=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(result["kl_nats"], (log_p.exp() * (log_p - log_q)).sum(-1).mean(1), rtol=1e-4)
    np.testing.assert_allclose(result["top1_agreement"], (logits.argmax(-1) == log_q.argmax()).double().mean(1))
    np.testing.assert_allclose(result["nll_nats"], -log_q[blocks[:, 1:]].mean(1), rtol=1e-5)


def test_cosines_by_hand(llama):
    """Two tokens with states (3, 4, 0, ...) and (1, 0, 0, ...), all of them predicted as (1, 0, 0, ...)."""
    hidden = torch.zeros(1, 2, 32)
    hidden[0, 0, :2], hidden[0, 1, 0] = torch.tensor([3.0, 4.0]), 1.0
    zeros = torch.zeros(1, 2)
    uniform = torch.full((1, 2, 96), 1 / 96)
    full = Reference(zeros.long(), hidden, hidden[0, 1], zeros[:, :0].long(), uniform, zeros, zeros.long())
    result = compare_constant(llama, full)
    assert result["cosine"] == pytest.approx([(3 / 5 + 1) / 2])
    assert result["mse"] == pytest.approx([(4 + 16) / 64])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_predictor_has_no_centred_cosine(llama, blocks, dtype):
    model = copy.deepcopy(llama).to(getattr(torch, dtype))
    full = reference(model, blocks, mean_state(model, blocks))
    assert (compare_constant(model, full)["cosine_centred"] == 0).all()


# Summaries


def test_summary_holds_mean_and_interval_of_every_metric():
    values = {"cosine": np.array([0.2, 0.4]), "nll_nats": np.array([1.0, 3.0])}
    row = summarize(values)
    assert list(row) == [f"{name}{end}" for name in ("cosine", "nll_nats", "ppl") for end in ("", "_lo", "_hi")]
    assert row["cosine"] == pytest.approx(0.3)
    assert (row["ppl_lo"], row["ppl"], row["ppl_hi"]) == pytest.approx((math.e, math.e**2, math.e**3))


def test_intervals_of_losses_and_ratios_follow_the_seed():
    values = np.random.default_rng(0).exponential(size=12)
    one, two = (summarize({"nll_nats": values}, seed)["nll_nats_lo"] for seed in (1, 2))
    assert one == interval(values, seed=1)[0] != two
    assert ppl_ratio(values, 0.0, 1)["ppl_ratio_lo"] == pytest.approx(math.exp(one))


def test_scored_tokens_are_read_in_their_context(llama, make_blocks):
    full = reference(llama, make_blocks(3, 12), torch.zeros(32), scored=4)
    values = compare(llama, full)
    np.testing.assert_allclose(values["cosine"], 1, atol=1e-6)
    np.testing.assert_allclose(values["kl_nats"], 0, atol=1e-6)


# The mean state as a file


def test_mean_state_is_read_back_as_it_was_written(tmp_path):
    mean = torch.tensor([1.5, -2.0, 1e-8])
    save_mean(tmp_path / "mean.safetensors", mean, "ab" * 32)
    assert torch.equal(load_mean(tmp_path / "mean.safetensors", "ab" * 32), mean)
    assert [file.name for file in tmp_path.iterdir()] == ["mean.safetensors"]


def test_mean_state_of_another_model_is_refused(tmp_path, refused):
    save_mean(tmp_path / "mean.safetensors", torch.zeros(3), "ab" * 32)
    with refused(r"of another model \(abababababab, not cdcdcdcdcdcd\): run ./reproduce.sh --only 01_importance"):
        load_mean(tmp_path / "mean.safetensors", "cd" * 32)


def test_missing_mean_state_names_the_command_that_makes_it(tmp_path, refused):
    with refused("no mean state .*: run ./reproduce.sh --only 01_importance"):
        load_mean(tmp_path / "mean.safetensors", "ab" * 32)
