"""The comparison's rows: bytes, equal trainings, windows, shared timings, resumption, frontier and what to take."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model
from matplotlib import pyplot as plt

from paper_src import NotSupported, distillation, timing
from paper_src.baselines import control, methods, moments, quantization, size
from paper_src.baselines.methods import METHODS, Method
from paper_src.baselines.setting import Recovered, Setting
from paper_src.baselines.training import TRAININGS
from paper_src.compaction import compact
from paper_src.models import count_parameters, decoder_layers
from paper_src.sections import baselines, comparison
from paper_src.sections.comparison import Job
from paper_src.sections.judge import Judge
from paper_src.sections.windows import losses, window_rows

SHAPE = {"vocab_size": 300, "max_position_embeddings": 128, "num_key_value_heads": 4}


@pytest.fixture
def setting(tmp_path, make_blocks, judges):
    model = build_model("llama", **SHAPE)
    training = distillation.Distillation(batch_size=4, evaluate_every=2)
    repaired = {2: Recovered(tmp_path / "repaired", tokens=1000)}
    blocks, kept, random = make_blocks(16, 16, vocab=300), {2: (0, 3)}, {2: (1, 3)}
    folder, valid = tmp_path / "work", judges[1].first
    return Setting(model, blocks, kept, kept, repaired, valid, folder, training, [1e-3], random)


@pytest.fixture
def judges(tmp_path, tokenizer):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("the cat sat on the mat and the dog ran " * 60)
    model = build_model("llama", **SHAPE)
    return [Judge(model, tokenizer, [str(tmp_path)], split, (3, 16), torch.zeros(32), 0, model_digest="abc")
            for split in ("test", "valid")]  # fmt: skip


@pytest.fixture
def measurement(judges, tokenizer):
    work = [timing.Workload("prefill_hidden", 1, 8)]
    return comparison.Measurement(*judges, tokenizer, [], [], work, 2)


def compared(setting, measurement, jobs):
    """The notebook's loop; its rows."""
    finished = comparison.Rows(setting, measurement)
    for job in finished.missing(jobs):
        with finished.row(job) as row:
            if job.recovered:
                small, cost = comparison.trained(setting, job, finished.rows)
                row.update(cost)
            else:
                small, row["calibration_s"] = METHODS[job.name].make(setting, job.k)
            row.update(comparison.measured(setting, measurement, small, row, finished.rows))
    return finished.rows


def table_of(setting, measurement, jobs):
    rows = compared(setting, measurement, jobs)
    return comparison.t7_baselines(rows, setting.full, measurement.judge, None)


def test_only_the_first_seed_searches_the_learning_rate(setting, measurement):
    setting.rates = [1e-5, 1e-3]
    first, second = compared(setting, measurement, [Job("cut", 2, True, seed) for seed in (0, 1)])
    assert first["learning_rate"] == second["learning_rate"] == 1e-3
    assert first["tokens"] == second["tokens"] == second["search_tokens"] < first["search_tokens"]
    assert first["ppl_ratio"] != second["ppl_ratio"]


def test_the_full_model_answers_each_block_once_for_all_trainings(setting, measurement, monkeypatch):
    asked, real = [], distillation.last_hidden
    monkeypatch.setattr(distillation, "last_hidden", lambda model, ids: asked.append((model, ids)) or real(model, ids))
    setting.rates = [1e-5, 1e-3]
    compared(setting, measurement, [Job("cut", 2, True), Job("early_exit", 2, True)])
    assert sum(len(ids) for model, ids in asked if model is setting.full) == len(setting.blocks)


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


def test_packed_bytes_by_hand():
    """4 layers of 4 maps of 32 x 32 and 3 of 32 x 48; norms and the tied embedding stay in float32."""
    model = build_model("llama", **SHAPE, tie_word_embeddings=True)
    inside = 4 * (4 * 32 * 32 + 3 * 32 * 48)
    outputs = 4 * (4 * 32 + 48 + 48 + 32)
    rest = size.count_of(model) - inside
    assert size.packed_bytes(model) == 4 * (inside + rest)
    int8 = quantization.torchao_quantized(model, "int8_weight")
    assert size.packed_bytes(int8, 8) == inside + 2 * outputs + 4 * rest  # a 16-bit scale a row, no zero
    dynamic = quantization.dynamic_quantized(model)  # in memory a float64 scale and an int64 zero point a row
    gap = size.bytes_of(dynamic)["memory_bytes"] - size.packed_bytes(dynamic, 8)
    assert 16 * outputs - 2 * outputs <= gap < 16 * outputs - 2 * outputs + 28 * 12  # and one of each a map
    assert size.bytes_of(int8, 8)["packed_bytes"] < size.bytes_of(int8, 8)["memory_bytes"]


def test_int4_in_groups_packs_a_scale_and_a_zero_a_group():
    model = build_model("llama", **SHAPE, hidden_size=64, intermediate_size=128)
    inside = sum(part.weight.numel() for _, part in moments.linears(model))
    groups = sum(part.weight.numel() // quantization.group_of(part.in_features) for _, part in moments.linears(model))
    small = quantization.int4_groups(model)
    rest = 4 * (size.count_of(model) - inside)
    assert size.packed_bytes(small, 4) == inside // 2 + 2 * groups + groups // 2 + rest


def test_zeros_are_packed_with_a_bit_each_where_that_is_less():
    model = build_model("llama", **SHAPE)
    _, linear = next(moments.linears(model))
    before = size.packed_bytes(model)
    linear.weight.data[:, : linear.in_features // 2] = 0
    numbers = linear.weight.numel()
    assert before - size.packed_bytes(model) == 4 * numbers - (numbers // 8 + 4 * numbers // 2)


def test_the_file_that_the_weights_come_from_is_a_row(tmp_path, setting, measurement):
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"x" * 1000)
    assert size.original_file(str(tmp_path)) == tmp_path / "model.Q4_1.gguf"
    row = comparison.original_row(size.original_file(str(tmp_path / "model.Q4_1.gguf")), setting.full)
    rows = compared(setting, measurement, [Job("full", 0), Job("int8_weight", 0)])
    found = comparison.t7_baselines(rows, setting.full, measurement.judge, row).set_index("row")
    assert found.loc["int8_weight", "note"] == comparison.LOSSLESS
    assert found.loc["original_file", "packed_share"] == 1000 / (4 * size.count_of(setting.full))
    assert found.loc["original_file", ["method", "ppl_ratio", "k"]].tolist() == ["original file, Q4_1", 1.0, 4]
    assert math.isnan(found.loc["original_file", "prefill_hidden_speedup"])
    (tmp_path / "a.safetensors").touch()
    assert size.original_file(str(tmp_path)) is None
    assert comparison.original_row(None, setting.full) is None


def test_every_entry_says_where_it_is_from_and_what_it_is():
    for name, method in METHODS.items():
        assert method.source or name == "full"
        assert method.family in baselines.FAMILIES
        assert method.training in ("none", *TRAININGS)
        assert method.start in ("as_it_is", "closed_form", "random")
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_a_new_method_is_a_function_and_an_entry(setting, measurement, monkeypatch):
    toy = Method("toy", "depth", "here", lambda on, k: compact(on.full, (1, 2)), sized=True, training="plain")
    monkeypatch.setitem(methods.METHODS, "toy", toy)
    found = table_of(setting, measurement, [Job("full", 0), Job("toy", 2), Job("toy", 2, True)])
    assert found["row"].tolist() == ["full", "toy k=2", "toy k=2 trained s0"]
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

    jobs = [Job("full", 0), Job("a", 2), Job("b", 2)]
    method("a"), method("b", stop=True)
    with pytest.raises(KeyboardInterrupt):
        compared(setting, measurement, jobs)
    method("b")
    found = table_of(setting, measurement, jobs)
    assert calls == ["a", "b", "b"]
    assert found["method"].tolist() == ["full model", "a", "b"]
    assert found.loc[1, "ppl_ratio"] == found.loc[2, "ppl_ratio"]
    assert found["timed_as"].tolist()[1:] == ["a k=2", "a k=2"]  # also over the kill
    assert table_of(setting, measurement, jobs).equals(found)  # until its folder goes
    assert calls == ["a", "b", "b"]
    with monkeypatch.context() as later:
        later.setattr(comparison, "version", lambda package: "of next year")
        assert comparison.Rows(setting, measurement).missing(jobs) == jobs  # other libraries: all anew
    measurement.rounds += 1  # another measurement, too
    assert comparison.Rows(setting, measurement).missing(jobs) == jobs


def test_each_seed_is_a_row_and_a_training_leaves_no_models_behind(setting, measurement):
    jobs = [Job("cut", 2, True, seed) for seed in (0, 1)]
    rows = compared(setting, measurement, jobs)
    assert [row["row"] for row in rows] == ["cut k=2 trained s0", "cut k=2 trained s1"]
    assert rows[0]["nll_nats"] != rows[1]["nll_nats"]
    assert list(setting.folder.rglob("*.safetensors")) == []
    assert comparison.Rows(setting, measurement).missing([*jobs, Job("cut", 2, True, 2)]) == [Job("cut", 2, True, 2)]


def test_the_search_takes_the_rate_of_lowest_validation_loss(setting, monkeypatch):
    seen = {}

    def train(on, model, k, folder, how):
        loss = {1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}[how.learning_rate]
        seen[how.learning_rate] = compact(model, (0,))
        looks = [
            {"kl_nats": 4.0, "tokens": 0, "seconds": 0},
            {"kl_nats": loss, "tokens": 50, "seconds": 10.0},
            {"kl_nats": 3.5, "tokens": 100, "seconds": 20.0},
        ]  # the best look is not the last
        return distillation.Distilled(seen[how.learning_rate], looks)

    monkeypatch.setitem(TRAININGS, "plain", train)
    model, row = comparison.trained(dataclasses.replace(setting, rates=[1e-4, 1e-3, 1e-2]), Job("cut", 2, True))
    assert model is seen[1e-3]
    assert (row["learning_rate"], row["valid_kl_nats"]) == (1e-3, 1.0)
    assert (row["tokens"], row["search_tokens"]) == (256 + 100, 256 + 300)  # the closed form's, once
    assert row["start"] == "closed_form"
    assert 60 < row["recovery_s"] < 80  # of all three trainings


def test_a_rate_that_is_decided_is_of_the_same_size(setting):
    done = [{"name": "cut", "k": k, "recovered": True, "learning_rate": rate} for k, rate in ((3, 1e-5), (2, 1e-3))]
    assert comparison.decided(Job("cut", 2, True, 1), done) == [1e-3]


def test_a_training_has_the_seed_of_its_job(setting, monkeypatch):
    seeds = []

    def train(on, model, k, folder, how):
        seeds.append(how.seed)
        return distillation.Distilled(model, [{"kl_nats": 1.0, "tokens": 9, "seconds": 2.0}])

    monkeypatch.setitem(TRAININGS, "plain", train)
    comparison.trained(setting, Job("cut", 2, True, 3))
    assert seeds == [3]


def test_a_row_has_the_ratio_on_validation_text_and_the_full_model_timed_before_the_other(
    setting, measurement, monkeypatch
):
    timed = []

    def pair(full, small, *rest):
        timed.append((full, small))
        return timing.speed_row([2.0], [1.0]), [(2.0, 1.0)]

    monkeypatch.setattr(timing, "compare_pair", pair)
    monkeypatch.setattr(measurement.valid, "ppl_ratio", lambda model: 77.0)
    small = compact(setting.full, (0, 3))
    begun = {"row": "a", "bits": 32, "name": "cut", "recovered": False}
    row = comparison.measured(setting, measurement, small, begun, [])
    assert row["valid_ppl_ratio"] == 77.0 != row["ppl_ratio"]
    assert timed[0][0] is setting.full and timed[0][1] is small


def test_rows_of_other_rates_are_another_comparison(setting, measurement):
    settings = (dataclasses.replace(setting, rates=rates) for rates in ([1e-3], [1e-4, 1e-3]))
    assert len({comparison.Rows(each, measurement).file for each in settings}) == 2


def test_only_what_section_5_selected_and_distilled_is_its_repaired_model(tmp_path):
    table = pd.DataFrame({"selection": ["selected", "distributed", "selected"], "k": 2, "tokens": [7, 9, 8],
                          "recovery": ["distilled", "distilled", "closed_form"],
                          "form": ["down_proj", "none", "none"]})  # fmt: skip
    assert comparison.repaired(table, tmp_path)[2].tokens == 7


def test_models_of_another_dtype_have_another_shape(setting):
    half = quantization.cast(setting.full, torch.bfloat16)
    assert comparison._shape(setting.full) != comparison._shape(half)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_rows_are_not_taken_from_another_checkpoint(setting, measurement, name):
    files = []
    folder = setting.repaired[2].folder
    folder.mkdir()
    for weights in (b"one", b"one", b"two"):
        (folder / name).write_bytes(weights)
        files.append(comparison.Rows(setting, measurement).file)
    assert files[0] == files[1] != files[2]


def test_rows_before_and_after_recovery_and_what_is_not_supported(setting, measurement, monkeypatch):
    def refuse(on, k):
        raise NotSupported("no kernel")

    monkeypatch.setitem(methods.METHODS, "int4_weight", Method("int4", "quantization", "here", refuse, bits=4))
    jobs = [Job("full", 0), Job("int4_weight", 0), Job("wanda_50", 0), Job("wanda_50", 0, True), Job("cut", 2),
            Job("cut", 2, True), Job("width", 2, True)]  # fmt: skip
    found = table_of(setting, measurement, jobs)
    table = found.set_index(["name", "recovered"])
    assert table.loc[("int4_weight", False), "status"] == "not supported: no kernel"
    assert table.loc[("int4_weight", False), ["ppl_ratio", "memory_bytes", "prefill_hidden_speedup"]].isna().all()
    assert table.loc[("full", False), "ppl_ratio"] == pytest.approx(1)
    assert table.loc[("wanda_50", True), "zeros"] == pytest.approx(0.5, abs=1e-6)
    for name in ("wanda_50", "cut"):
        assert table.loc[(name, True), "kl_nats"] < table.loc[(name, False), "kl_nats"]
        assert table.loc[(name, True), "parameters"] == table.loc[(name, False), "parameters"]
    assert (found["status"] == "").sum() == 6
    wanted = ["trained", "bits", "repair", "repaired_by", "start", "tokens"]
    said = {key: table.loc[key, wanted].tolist() for key in table.index}
    assert said[("full", False)] == [False, 32, "none", "none", "none", 0]
    assert said[("int4_weight", False)] == [False, 4, "none", "none", "none", 0]
    assert said[("wanda_50", False)] == [False, 32, "none", "none", "none", 256]
    assert said[("wanda_50", True)] == [True, 32, "distilled", "section 7", "as_it_is", 512]
    assert said[("cut", False)] == [False, 32, "none", "none", "none", 0]
    assert said[("cut", True)] == said[("width", True)] == [True, 32, "distilled", "section 7", "closed_form", 512]


def test_windows_of_every_row_are_kept(setting, measurement):
    rows = compared(setting, measurement, [Job("full", 0), Job("cut", 2)])
    found = comparison.t7_windows(rows)
    for row in rows:
        own = losses(found, row["row"])
        assert own.values.mean() == pytest.approx(row["nll_nats"])
        assert len(own.values) == 3
    assert losses(found, "cut k=2").of == losses(found, "full").of


def test_models_of_one_shape_share_one_timing(setting, measurement, monkeypatch):
    timed = []

    def pair(full, small, work, rounds, seed):
        timed.append(small)
        return timing.speed_row([2.0] * rounds, [1.0] * rounds), [(2.0, 1.0)] * rounds

    monkeypatch.setattr(timing, "compare_pair", pair)
    names = ["full", "int8_weight", "wanda_50"], ["cut", "early_exit", "random_weights", "width"]
    rows = compared(
        setting, measurement, [Job(name, k) for k, part in zip((0, 2), names, strict=True) for name in part]
    )
    assert len(timed) == 4
    table = comparison.t7_baselines(rows, setting.full, measurement.judge, None).set_index("name")
    assert table.loc[["cut", "early_exit", "random_weights"], "timed_as"].tolist() == ["cut k=2"] * 3
    assert table.loc[["int8_weight", "wanda_50", "width"], "timed_as"].tolist() == [
        "int8_weight",
        "wanda_50",
        "width k=2",
    ]
    assert table.loc["random_weights", "prefill_hidden_speedup"] == 2
    rounds = comparison.t7_rounds(rows)
    assert rounds["row"].tolist() == [
        name for name in ("int8_weight", "wanda_50", "cut k=2", "width k=2") for _ in "12"
    ]
    assert (rounds["full_s"] / rounds["small_s"] == 2).all()


def test_random_weights_have_the_shape_of_the_cut_model_and_nothing_else_of_it(setting):
    cut = compact(setting.full, (0, 3))
    before = {name: value.clone() for name, value in setting.full.state_dict().items()}
    one, other, again = (control.random_weights(setting.full, (0, 3), seed) for seed in (0, 1, 0))
    assert count_parameters(one) == count_parameters(cut)
    head = [torch.equal(model.lm_head.weight, again.lm_head.weight) for model in (one, other, cut)]
    assert head == [True, False, False]
    ids = setting.blocks[:2]
    assert one(ids).logits.sub(cut(ids).logits).abs().max() > 0.01
    layers = control.random_layers(setting.full, (0, 3), 0)
    assert torch.equal(layers.lm_head.weight, setting.full.lm_head.weight)
    assert not torch.equal(decoder_layers(layers)[0].mlp.down_proj.weight, decoder_layers(cut)[0].mlp.down_proj.weight)
    for name, value in setting.full.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_random_weights_are_trained_with_their_embedding(setting):
    start = control.random_weights(setting.full, (0, 3), 0)
    model, row = comparison.trained(setting, Job("random_weights", 2, True))
    assert row["start"] == "random"
    changed = [not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    assert all(changed)


def test_what_section_5_repaired_says_so(setting):
    row = comparison.described(setting, Job("cut_repaired_int8", 2))
    wanted = {"trained": True, "bits": 8, "repair": "distilled", "repaired_by": "section 5", "start": "closed_form",
              "tokens": 1000}  # fmt: skip
    assert {key: row[key] for key in wanted} == wanted
    assert comparison.described(setting, Job("replace_me", 2))["repaired_by"] == "section 7"


def test_the_best_cut_is_that_of_lowest_perplexity(setting, measurement):
    draws = [(0, 3), (1, 2), (2, 3)]
    ratios = [measurement.valid.ppl_ratio(compact(setting.full, kept)) for kept in draws]
    assert comparison.best_cut(setting.full, draws, measurement.valid) == draws[int(np.argmin(ratios))]


def test_more_windows_than_fit_are_judged_by_losses_alone(judges, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("paper_src.sections.judge.ALL_METRICS", 32)
    model = build_model("llama", **SHAPE)
    small = compact(model, (0, 3))
    few = Judge(model, tokenizer, [str(tmp_path)], "test", (3, 16), torch.zeros(32), 0)
    found, whole = few.compare(small), judges[0].compare(small)
    for name, values in next(iter(whole.values())).items():
        own = next(iter(found.values()))[name]
        assert own == pytest.approx(values if name in ("nll_nats", "cosine") else values[:2])
    assert few.summary(found)["ppl_ratio"] == pytest.approx(judges[0].row(small)["ppl_ratio"])


def test_the_staircase_goes_over_what_nothing_better_beats():
    rows_by_quality = pd.DataFrame({"decode_speedup": [1.0, 0.5, 3.0, 2.0], "memory_share": [0.5, 1.0, 0.4, 0.6]})
    for cost, expected in {"decode_speedup": [1, 1, 3, 3], "memory_share": [0.5, 0.5, 0.4, 0.4]}.items():
        _, axis = plt.subplots()
        baselines._staircase(axis, rows_by_quality, cost)
        assert axis.lines[0].get_xdata().tolist() == expected
        plt.close()


def table(*rows):
    """Rows (name, class, validation, test, speed, share) of t7_baselines."""
    frame = pd.DataFrame(rows, columns=["name", "of", "valid_ppl_ratio", "ppl_ratio", baselines.SPEED, baselines.SHARE])
    trained, recovered = frame["of"] != "untrained", frame["of"] == "trained here"
    return frame.assign(row=frame["name"], method=frame["name"], k=2, trained=trained, recovered=recovered, tokens=9)


def test_what_to_take_is_chosen_on_validation_text_and_judged_on_test():
    frame = table(("a", "untrained", 1.1, 1.9, 3.0, 0.4), ("b", "untrained", 1.2, 1.0, 3.0, 0.4),
                  ("c", "trained here", 1.5, 1.5, 3.5, 0.2), ("d", "trained in section 5", 1.01, 1.01, 3.5, 0.2),
                  ("e", "untrained", 1.3, 1.3, np.nan, 0.1))  # fmt: skip
    found = baselines.t7_take(frame, [2.0, 3.2], [0.5, 0.15]).set_index(["budget", "limit", "of"])
    speed, share = baselines.SPEED, baselines.SHARE
    assert found.loc[(speed, 2.0, "untrained"), ["row", "valid_ppl_ratio", "ppl_ratio"]].tolist() == ["a", 1.1, 1.9]
    assert found.loc[(share, 0.5, "trained here"), "row"] == "c"  # not d, which has seen more
    assert found.loc[(share, 0.5, "trained in section 5"), "row"] == "d"
    assert found.loc[(share, 0.15, "untrained"), "row"] == "e"
    assert (speed, 3.2, "untrained") not in found.index  # what has no speed meets none


def findings(gaps, tokens=None, **valid):
    """t7_findings of trained rows whose losses on 16 windows exceed the full model's by ``gaps`` (name -> nats)."""
    base = np.random.default_rng(0).normal(3, 0.5, 16)
    noise = {name: np.random.default_rng(index + 1).normal(0, 0.02, 16) for index, name in enumerate(gaps)}
    blocks = torch.zeros(16, 8, dtype=torch.long)
    parts = [window_rows("full", "text", blocks, "m", {"nll_nats": base})]
    rows = []
    for name, gap in gaps.items():
        nll = base + gap + noise[name]
        parts.append(window_rows(f"{name} k=2 trained s0", "text", blocks, "m", {"nll_nats": nll}))
        method = METHODS[name]
        start = "random" if method.start == "random" else "closed_form"
        rows.append({"row": f"{name} k=2 trained s0", "name": name, "method": method.title, "family": method.family,
                     "k": 2, "recovered": True, "trained": True, "control": method.control, "start": start,
                     "tokens": (tokens or {}).get(name, 512), "search_tokens": 1024, "recovery_s": 1.0,
                     "ppl_ratio": math.exp(gap), "valid_ppl_ratio": valid.get(name, math.exp(gap)),
                     **{f"prefill_hidden_{key}": 2.0 for key in ("speedup", "speedup_lo", "speedup_hi", "rounds")},
                     baselines.SHARE: 0.4})  # fmt: skip
    tables = {"t7_baselines": pd.DataFrame(rows), "t7_windows": pd.concat(parts, ignore_index=True)}
    return baselines.t7_findings(tables.__getitem__).set_index("name")


def test_findings_compare_with_the_best_on_validation_text_by_paired_tests():
    found = findings({"cut": 1.0, "width": 1.2, "svd_aware": 1.3, "random_weights": 4.0, "early_exit": 1.02},
                     svd_aware=1.0)  # fmt: skip
    best = found.loc["recovered_cut_over_best_other"]
    assert best["text"] == METHODS["svd_aware"].title  # width is better on test text alone
    assert best["value"] == pytest.approx(math.exp(-0.3), rel=0.02)
    assert best["lo"] < best["value"] < best["hi"] < 1
    assert best["n"] == 16
    assert best["test"].endswith("Holm over 2")
    assert found.loc["recovered_cut_over_random_weights", "test"].endswith("Holm over 2")
    assert found.loc["recovered_cut_over_first_layers", "value"] == pytest.approx(math.exp(-0.02), rel=0.03)
    assert found.loc["compared_alike", ["value", "n"]].tolist() == [2, 2]
    assert found.loc["ppl_recovered_cut", "value"] == pytest.approx(math.e, rel=0.02)
    assert found.loc["speed_recovered_cut", ["n", "test"]].tolist() == [2, "order statistics of rounds"]


def test_methods_of_another_budget_are_not_alike():
    found = findings({"cut": 1.0, "width": 1.2, "svd_aware": 1.3}, tokens={"width": 600})
    assert found.loc["compared_alike", ["value", "n"]].tolist() == [1, 2]
