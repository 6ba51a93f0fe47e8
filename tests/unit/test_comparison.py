"""The comparison's rows: sizes on disk, what cannot run, lost layers, resumption, frontier and budgets."""

import pandas as pd
import pytest
import torch
from conftest import build_model
from matplotlib import pyplot as plt

from paper_src import NotSupported, distillation, timing
from paper_src.baselines import methods, moments, quantization, size
from paper_src.baselines.methods import METHODS, Method
from paper_src.baselines.setting import Repaired, Setting
from paper_src.compaction import compact
from paper_src.models import count_parameters, decoder_layers
from paper_src.sections import baselines as rows
from paper_src.sections.judge import Judge

SHAPE = {"vocab_size": 300, "max_position_embeddings": 128, "num_key_value_heads": 4}


@pytest.fixture
def setting(tmp_path, make_blocks, judges):
    model = build_model("llama", **SHAPE)
    training = distillation.Distillation(batch_size=4, evaluate_every=2, learning_rate=1e-3)
    repaired = {2: Repaired(tmp_path / "repaired", tokens=1000)}
    blocks = make_blocks(16, 16, vocab=300)
    kept = {2: (0, 3)}
    return Setting(model, blocks, kept, kept, repaired, judges[1].first, tmp_path / "work", training)


@pytest.fixture
def judges(tmp_path, tokenizer):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the mat and the dog ran " * 60)
    model = build_model("llama", **SHAPE)
    return [Judge(model, tokenizer, [str(tmp_path)], split, (3, 16), torch.zeros(32), 0) for split in ("test", "valid")]


@pytest.fixture
def measurement(judges, tokenizer):
    return rows.Measurement(judges[0], tokenizer, [], [], [timing.Workload("prefill_hidden", 1, 8)], 2)


def compared(setting, measurement, jobs):
    """The notebook's loop."""
    finished = rows.Rows(setting, measurement)
    for name, k, recover in finished.missing(jobs):
        with finished.row(name, k, recover) as row:
            small, row["calibration_s"] = METHODS[name].make(setting, k)
            if recover:
                small, cost = rows.trained(setting, name, k, small)
                row.update(cost)
            row.update(rows.measured(setting, measurement, small, k))
    return rows.t7_baselines(finished.rows, setting.full, measurement.judge)


def test_bytes_are_those_of_the_weights(setting):
    full = setting.full
    count = sum(parameter.numel() for parameter in full.parameters())
    sizes = size.bytes_of(full)
    assert size.count_of(full) == count
    assert sizes["memory_bytes"] == 4 * count
    assert 4 * count <= sizes["disk_bytes"] < 4.2 * count + 20_000
    half = size.bytes_of(quantization.cast(full, torch.bfloat16))
    assert half["memory_bytes"] == 2 * count
    cut = compact(full, (0, 3))
    assert size.bytes_of(cut)["memory_bytes"] == 4 * sum(parameter.numel() for parameter in cut.parameters())


@pytest.mark.parametrize("name", ["int8_weight", "int8_torch_ao"])
def test_int8_weights_take_a_byte_each(setting, name):
    full = setting.full
    small, _ = METHODS[name].make(setting, 0)
    inside = sum(linear.weight.numel() for _, linear in moments.linears(full))
    outputs = sum(len(linear.weight) for _, linear in moments.linears(full))
    saved = size.bytes_of(full)["memory_bytes"] - size.bytes_of(small)["memory_bytes"]
    assert 3 * inside - 20 * outputs <= saved <= 3 * inside
    assert size.count_of(small) == pytest.approx(size.count_of(full), rel=0.02)


def test_tied_weights_count_once():
    model = build_model("llama", **SHAPE, tie_word_embeddings=True)
    assert size.count_of(model) == sum(parameter.numel() for parameter in model.parameters())
    assert size.bytes_of(model)["memory_bytes"] == 4 * size.count_of(model)


def test_a_zeroed_layer_is_found(setting, refused):
    size.require_alive(setting.full, setting.blocks[:1])
    broken = compact(setting.full, (0, 1, 2, 3))
    for parameter in decoder_layers(broken)[2].parameters():
        parameter.data = torch.zeros_like(parameter)
    with refused("layer 2 hands on what it is given"):
        size.require_alive(broken, setting.blocks[:1])


def test_a_lost_layer_is_found(setting, refused):
    broken = compact(setting.full, (0, 1, 2))
    broken.config.num_hidden_layers = 4
    with refused("no list of 4 layers|3 layers, its configuration 4"):
        size.require_alive(broken, setting.blocks[:1])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.sized])
def test_no_method_of_a_size_gets_more_than_the_cut_model(setting, name):
    setting.repaired[2].folder.mkdir(exist_ok=True)
    compact(setting.full, (0, 3)).save_pretrained(setting.repaired[2].folder)
    small, _ = METHODS[name].make(setting, 2)
    assert size.count_of(small) <= count_parameters(compact(setting.full, (0, 3)))


def test_every_entry_says_where_it_is_from_and_what_it_is():
    for name, method in METHODS.items():
        assert method.source or name == "full"
        assert method.family in rows.FAMILIES
        assert method.training in ("none", "plain", "masked", "refit")
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_a_new_method_is_a_function_and_an_entry(setting, measurement, monkeypatch):
    toy = Method("toy", "depth", "here", lambda on, k: compact(on.full, (1, 2)), sized=True, training="plain")
    monkeypatch.setitem(methods.METHODS, "toy", toy)
    found = compared(setting, measurement, [("full", 0, False), ("toy", 2, False), ("toy", 2, True)])
    assert found["name"].tolist() == ["full", "toy", "toy"]
    assert found["k"].tolist() == [4, 2, 2]
    assert found["ppl_ratio"].notna().all()


def test_a_killed_comparison_goes_on_from_its_rows(setting, measurement, monkeypatch):
    calls = []

    def method(name, stop=False):
        def make(on, k):
            calls.append(name)
            if stop:
                raise KeyboardInterrupt
            return compact(on.full, (0, 3))

        monkeypatch.setitem(methods.METHODS, name, Method(name, "depth", "here", make, sized=True))

    jobs = [("full", 0, False), ("a", 2, False), ("b", 2, False)]
    method("a"), method("b", stop=True)
    with pytest.raises(KeyboardInterrupt):
        compared(setting, measurement, jobs)
    method("b")
    found = compared(setting, measurement, jobs)
    assert calls == ["a", "b", "b"]
    assert found["method"].tolist() == ["full model", "a", "b"]
    assert found.loc[1, "ppl_ratio"] == found.loc[2, "ppl_ratio"]
    assert compared(setting, measurement, jobs).equals(found)  # until its folder goes
    assert calls == ["a", "b", "b"]
    measurement.rounds += 1  # another measurement: all anew
    assert rows.Rows(setting, measurement).missing(jobs) == jobs


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_rows_are_not_taken_from_another_checkpoint(setting, measurement, name):
    files = []
    folder = setting.repaired[2].folder
    folder.mkdir()
    for weights in (b"one", b"one", b"two"):
        (folder / name).write_bytes(weights)
        files.append(rows.Rows(setting, measurement).file)
    assert files[0] == files[1] != files[2]


def test_rows_before_and_after_recovery_and_what_is_not_supported(setting, measurement, monkeypatch):
    def refuse(on, k):
        raise NotSupported("no kernel")

    monkeypatch.setitem(methods.METHODS, "int4_weight", Method("int4", "quantization", "here", refuse, bits=4))
    jobs = [("full", 0, False), ("int4_weight", 0, False), ("wanda_50", 0, False), ("wanda_50", 0, True),
            ("cut", 2, False), ("cut", 2, True)]  # fmt: skip
    found = compared(setting, measurement, jobs)
    assert found["method"].tolist() == ["full model", "int4", "Wanda 50%", "layers cut", "Wanda 50%", "layers cut"]
    table = found.set_index(["name", "recovered"])
    assert table.loc[("int4_weight", False), "status"] == "not supported: no kernel"
    assert table.loc[("int4_weight", False), ["ppl_ratio", "memory_bytes", "prefill_hidden_speedup"]].isna().all()
    assert table.loc[("full", False), "ppl_ratio"] == pytest.approx(1)
    assert table.loc[("wanda_50", True), "zeros"] == pytest.approx(0.5, abs=1e-6)
    for name in ("wanda_50", "cut"):
        assert table.loc[(name, True), "kl_nats"] < table.loc[(name, False), "kl_nats"]
        assert table.loc[(name, True), "parameters"] == table.loc[(name, False), "parameters"]
    assert (found["status"] == "").sum() == 5
    wanted = ["trained", "bits", "repair", "repaired_by", "start", "tokens"]
    said = {key: table.loc[key, wanted].tolist() for key in table.index}
    assert said[("full", False)] == [False, 32, "none", "none", "none", 0]
    assert said[("int4_weight", False)] == [False, 4, "none", "none", "none", 0]
    assert said[("wanda_50", False)] == [False, 32, "none", "none", "none", 256]
    assert said[("wanda_50", True)] == [True, 32, "distilled", "section 7", "as_it_is", 512]
    assert said[("cut", False)] == [False, 32, "none", "none", "none", 0]
    assert said[("cut", True)] == [True, 32, "distilled", "section 7", "closed_form", 512]


def test_what_section_5_repaired_says_so(setting):
    row = rows.described(setting, "cut_repaired_int8", 2, recovered=False)
    wanted = {"trained": True, "bits": 8, "repair": "distilled", "repaired_by": "section 5", "start": "closed_form",
              "tokens": 1000}  # fmt: skip
    assert {key: row[key] for key in wanted} == wanted
    assert rows.described(setting, "replace_me", 2, recovered=False)["repaired_by"] == "section 7"


def test_the_staircase_goes_over_what_nothing_better_beats():
    rows_by_quality = pd.DataFrame({"decode_speedup": [1.0, 0.5, 3.0, 2.0], "memory_share": [0.5, 1.0, 0.4, 0.6]})
    for cost, expected in {"decode_speedup": [1, 1, 3, 3], "memory_share": [0.5, 0.5, 0.4, 0.4]}.items():
        _, axis = plt.subplots()
        rows._staircase(axis, rows_by_quality, cost)
        assert axis.lines[0].get_xdata().tolist() == expected
        plt.close()


def test_budgets_name_the_best_that_meets_them():
    frame = pd.DataFrame({
        "method": ["full model", "a", "b", "b", "c"], "k": [4, 0, 2, 2, 2], "name": ["full", "a", "b", "b", "c"],
        "recovered": [False, False, False, True, False], "trained": [False, False, False, True, True],
        "ppl_ratio": [1.0, 1.2, 9.0, 2.0, 1.5],
        "prefill_hidden_speedup": [1.0, 1.0, 3.5, 3.5, 3.5], "memory_share": [1.0, 0.25, 0.2, 0.2, 0.2],
    })  # fmt: skip
    found = rows.t7_budgets(frame, [1.3, 2.0, 3.0], [0.5, 0.25, 0.15]).set_index(["budget", "limit", "of"])
    assert found.loc[("prefill_hidden_speedup", 3.0, "as it is"), "method"] == "b"
    assert not found.loc[("prefill_hidden_speedup", 3.0, "as it is"), "recovered"]
    assert found.loc[("prefill_hidden_speedup", 3.0, "recovered or not"), "method"] == "c"
    assert found.loc[("memory_share", 0.25, "as it is"), "method"] == "a"
    assert ("memory_share", 0.15, "as it is") not in found.index
