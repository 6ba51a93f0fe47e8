"""The comparison's rows: sizes on disk, what cannot run, lost layers, frontier and budgets."""

import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src import NotSupported, distillation, timing
from paper_src.baselines import moments, quantization, size, sparsity
from paper_src.baselines.methods import Bench, Entry
from paper_src.compaction import compact
from paper_src.models import decoder_layers
from paper_src.sections import baselines as baselines_section
from paper_src.sections import recovery as recovery_section

SHAPE = {"vocab_size": 300, "max_position_embeddings": 128, "num_key_value_heads": 4}


@pytest.fixture
def bench(tmp_path, tokenizer, make_blocks):
    words = "the cat sat on the mat and the dog ran "
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(words * 60)
    model = build_model("llama", **SHAPE)
    judges = [recovery_section.Judge(model, tokenizer, [str(tmp_path)], split, (3, 16), torch.zeros(32), 0)
              for split in ("test", "valid")]  # fmt: skip
    return Bench(
        model, tokenizer, make_blocks(16, 16, vocab=300), judges[0], judges[1].first, [],
        [timing.Workload("prefill_hidden", 1, 8)], 2, tmp_path / "work",
        distillation.Distillation(batch_size=4, evaluate_every=2, learning_rate=1e-3),
    )  # fmt: skip


def test_bytes_are_those_of_the_weights(bench):
    full = bench.full
    count = sum(parameter.numel() for parameter in full.parameters())
    sizes = size.bytes_of(full)
    assert size.count_of(full) == count
    assert sizes["memory_bytes"] == 4 * count
    assert 4 * count <= sizes["disk_bytes"] < 4.2 * count + 20_000
    half = size.bytes_of(quantization.cast(full, torch.bfloat16))
    assert half["memory_bytes"] == 2 * count
    cut = compact(full, (0, 3))
    assert size.bytes_of(cut)["memory_bytes"] == 4 * sum(parameter.numel() for parameter in cut.parameters())


@pytest.mark.parametrize("quantized", [
    lambda model: quantization.torchao_quantized(model, "int8_weight"), quantization.dynamic_quantized
])  # fmt: skip
def test_int8_weights_take_a_byte_each(bench, quantized):
    full = bench.full
    small = quantized(full)
    inside = sum(linear.weight.numel() for _, linear in moments.linears(full))
    outputs = sum(len(linear.weight) for _, linear in moments.linears(full))
    saved = size.bytes_of(full)["memory_bytes"] - size.bytes_of(small)["memory_bytes"]
    assert 3 * inside - 20 * outputs <= saved <= 3 * inside
    assert size.count_of(small) == pytest.approx(size.count_of(full), rel=0.02)


def test_tied_weights_count_once():
    model = build_model("llama", **SHAPE, tie_word_embeddings=True)
    assert size.count_of(model) == sum(parameter.numel() for parameter in model.parameters())
    assert size.bytes_of(model)["memory_bytes"] == 4 * size.count_of(model)


def test_a_zeroed_layer_is_found(bench, refused):
    size.require_alive(bench.full, bench.blocks[:1])
    broken = compact(bench.full, (0, 1, 2, 3))
    for parameter in decoder_layers(broken)[2].parameters():
        parameter.data = torch.zeros_like(parameter)
    with refused("layer 2 hands on what it is given"):
        size.require_alive(broken, bench.blocks[:1])


def test_a_lost_layer_is_found(bench, refused):
    broken = compact(bench.full, (0, 1, 2))
    broken.config.num_hidden_layers = 4
    with refused("no list of 4 layers|3 layers, its configuration 4"):
        size.require_alive(broken, bench.blocks[:1])


def test_a_killed_comparison_goes_on_from_its_rows(bench):
    calls = []

    def entry(name, stop=False):
        def make():
            calls.append(name)
            if stop:
                raise KeyboardInterrupt
            return compact(bench.full, (0, 3))

        return Entry(name, "depth", 2, make)

    with pytest.raises(KeyboardInterrupt):
        baselines_section.t7_baselines(bench, [entry("a"), entry("b", stop=True)], recover_k=[])
    found = baselines_section.t7_baselines(bench, [entry("a"), entry("b")], recover_k=[])
    assert calls == ["a", "b", "b"]
    assert found["method"].tolist() == ["full model", "a", "b"]
    assert found.loc[1, "ppl_ratio"] == found.loc[2, "ppl_ratio"]
    assert baselines_section.t7_baselines(bench, [entry("a"), entry("b")], recover_k=[]).equals(
        found
    )  # until its folder goes
    assert calls == ["a", "b", "b"]
    bench.rounds += 1
    baselines_section.t7_baselines(bench, [entry("a")], recover_k=[])  # of other settings: made anew
    assert calls == ["a", "b", "b", "a"]


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_rows_are_not_taken_from_another_checkpoint(bench, tmp_path, name):
    calls = []

    def rows(weights):
        (tmp_path / name).write_bytes(weights)
        make = lambda: calls.append(weights) or compact(bench.full, (0, 3))  # noqa: E731
        baselines_section.t7_baselines(bench, [Entry("a", "depth", 2, make, source=tmp_path)], recover_k=[])

    for weights in (b"one", b"one", b"two"):
        rows(weights)
    assert calls == [b"one", b"two"]


def test_rows_before_and_after_recovery_and_what_is_not_supported(bench):
    def refuse():
        raise NotSupported("no kernel")

    full = bench.full
    methods = [
        Entry("int4", "quantization", 0, refuse),
        Entry("Wanda 50%", "sparsity", 0, lambda: sparsity.wanda(full, bench.moments, 0.5), "masked"),
        Entry("layers cut", "depth", 2, lambda: compact(full, (0, 3)), "refit", (0, 3)),
        Entry("early exit", "depth", 3, lambda: compact(full, range(3)), "plain"),
    ]
    found = baselines_section.t7_baselines(bench, methods, recover_k=[0, 2])
    assert found["method"].tolist() == ["full model", "int4", "Wanda 50%", "layers cut", "early exit", "Wanda 50%",
                                        "layers cut"]  # fmt: skip
    rows = found.set_index(["method", "recovered"])
    assert rows.loc[("int4", False), "status"] == "not supported: no kernel"
    assert rows.loc[("int4", False)].drop(["family", "k", "status"]).isna().all()
    assert rows.loc[("full model", False), "ppl_ratio"] == pytest.approx(1)
    assert rows.loc[("Wanda 50%", True), "zeros"] == pytest.approx(0.5, abs=1e-6)
    for name in ("Wanda 50%", "layers cut"):
        assert rows.loc[(name, True), "kl_nats"] < rows.loc[(name, False), "kl_nats"]
        assert rows.loc[(name, True), "parameters"] == rows.loc[(name, False), "parameters"]
    assert (found["status"] == "").sum() == 6


def test_the_frontier_has_what_nothing_beats():
    frame = pd.DataFrame({"cost": [1.0, 2.0, 3.0, 3.0, 2.0], "ppl_ratio": [5.0, 3.0, 4.0, 2.0, 3.0]})
    assert baselines_section.frontier(frame, "cost", larger_is_better=False).tolist() == [True, True, False, True, True]
    assert baselines_section.frontier(frame, "cost", larger_is_better=True).tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_budgets_name_the_best_that_meets_them():
    frame = pd.DataFrame({
        "method": ["full model", "a", "b", "b", "cut, section 5"], "k": [4, 0, 2, 2, 2],
        "recovered": [False, False, False, True, False], "ppl_ratio": [1.0, 1.2, 9.0, 2.0, 1.5],
        "prefill_hidden_speedup": [1.0, 1.0, 3.5, 3.5, 3.5], "memory_share": [1.0, 0.25, 0.2, 0.2, 0.2],
    })  # fmt: skip
    found = baselines_section.t7_budgets(frame, [1.3, 2.0, 3.0], [0.5, 0.25, 0.15]).set_index(["budget", "limit", "of"])
    assert found.loc[("prefill_hidden_speedup", 3.0, "as it is"), "method"] == "b"
    assert not found.loc[("prefill_hidden_speedup", 3.0, "as it is"), "recovered"]
    assert found.loc[("prefill_hidden_speedup", 3.0, "recovered or not"), "method"] == "cut, section 5"
    assert found.loc[("memory_share", 0.25, "as it is"), "method"] == "a"
    assert ("memory_share", 0.15, "as it is") not in found.index
