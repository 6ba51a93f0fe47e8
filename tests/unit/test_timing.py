"""Counted work against hand arithmetic, ratios against planted seconds. No test asserts a measured time."""

import mmap
import resource
import signal
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from paper_src import timing
from paper_src.compaction import compact, save
from paper_src.models import last_hidden
from paper_src.scale import memory
from paper_src.scale.memory import checkpoint_bytes
from paper_src.support import machine
from paper_src.support.machine import Others
from paper_src.timing import Workload, compare_speed, count_flops, run_seconds

# of a tiny Llama's layer, 2 operations each: q and o, k and v of half as many heads, and three maps of the MLP
LINEAR = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # a token
ATTENTION = 2 * 2 * 32  # a pair of query and key: the product of both, and the weighted value
HEAD = 2 * 32 * 96  # a token

FULL_SECONDS = [8.0, 4.0, 6.0]  # a machine that drifts
COLUMNS = ["task", "batch", "length", "new_tokens", "k", "speedup", "speedup_lo", "speedup_hi"]
COLUMNS += ["rounds", "spread", "others_cores", "quiet"]
COLUMNS += ["ideal", "share_of_ideal", "above_ideal", "full_ms", "compact_ms", "seconds"]


def flops(model, *workload):
    work = Workload(*workload)
    return count_flops(model, work, timing.random_prompt(model, work, 0))


def watch_inputs(model):
    """A list that grows by the token ids of each call of ``model``."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    return seen


@pytest.fixture
def planted(llama, monkeypatch):
    """Compact models by k, and a log of runs: k of 4 layers take k/4 of ``FULL_SECONDS``, nobody else is there."""
    models = {k: compact(llama, range(k)) for k in (1, 2)}
    layers = {id(llama): 4, **{id(model): k for k, model in models.items()}}
    log = []

    def planted_seconds(model, workload, prompt):
        log.append(layers[id(model)])
        return FULL_SECONDS[(len(log) - 1) // 3] * layers[id(model)] / 4

    monkeypatch.setattr(timing, "run_seconds", planted_seconds)
    monkeypatch.setattr(timing, "Others", partial(Fake, cores=0.0))
    return models, log


class Fake:
    """``machine.Others`` of a machine whose other processes keep so many cores busy."""

    def __init__(self, cores):
        self.cores = cores

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def run_with(monkeypatch, llama, ratios, cores, rounds=9):
    """compare_pair of a model that takes 1 s beside one that takes ``ratios`` s: one a round, over and over."""
    small, turns = compact(llama, range(1)), chain([1.0], cycle(ratios))  # the first run warms up
    monkeypatch.setattr(timing, "run_seconds", lambda model, *rest: next(turns) if model is llama else 1.0)
    monkeypatch.setattr(timing, "Others", partial(Fake, cores=cores))
    return timing.compare_pair(llama, small, Workload("prefill_hidden", 1, 4), rounds)


# Work


def test_flops_of_hidden_states_are_those_of_the_layers(llama):
    assert flops(llama, "prefill_hidden", 2, 7) == 4 * 2 * (7 * LINEAR + 7 * 7 * ATTENTION)


def test_flops_of_logits_add_the_head_for_every_token(llama):
    difference = flops(llama, "prefill_logits", 2, 7) - flops(llama, "prefill_hidden", 2, 7)
    assert difference == 2 * 7 * HEAD


def test_flops_of_decoding_grow_with_the_cache_and_leave_out_the_prefill(llama):
    pairs = 8 + 9 + 10  # the first new token sees the prompt of 7 and itself
    assert flops(llama, "decode", 2, 7, 3) == 2 * (3 * (4 * LINEAR + HEAD) + 4 * pairs * ATTENTION)


def test_flops_of_experts_are_those_that_a_token_goes_through(make_model):
    """4 layers, 7 tokens: attention, a router, 2 of 4 experts of width 16, the shared one of 16 and its gate."""
    expert, router, gate = 3 * 32 * 16, 32 * 4, 32
    attention = 2 * 32 * 32 + 2 * 32 * 16  # 4 heads of 8, 2 keys and values
    layer = 2 * 7 * (attention + router + 3 * expert + gate) + 2 * 7 * 7 * 4 * (8 + 8)
    assert flops(make_model("qwen2_moe", decoder_sparse_step=1), "prefill_hidden", 1, 7) == 4 * layer


@pytest.mark.parametrize("kernel", ["flash_attention_for_cpu", "flash_attention", "efficient_attention"])
def test_attention_of_grouped_queries_counts_every_query(kernel):
    """2 texts, 6 queries a key and value: 12 heads, 3 x 5 pairs, 2 operations for each of 8 units of key and value."""
    operation = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")
    query, key = torch.empty(2, 12, 3, 4, device="meta"), torch.empty(2, 2, 5, 4, device="meta")
    more = {"attn_bias": None, "compute_log_sumexp": False} if kernel.startswith("efficient") else {}
    with FlopCounterMode(display=False, custom_mapping=timing._KERNELS) as counter:
        operation(query, key, key, **more)
    assert counter.get_total_flops() == 2 * 2 * 12 * 3 * 5 * 8


def test_attention_flops_by_hand():
    """1 text, 2 heads, 3 x 5 pairs: 4 multiply-adds for the product of query and key and 6 for the weighted value."""
    assert timing._attention_flops([1, 2, 3, 4], [1, 1, 5, 4], [1, 1, 5, 6]) == 2 * 2 * 15 * (4 + 6)


@pytest.mark.parametrize("task", timing.TASKS)
def test_flops_of_a_compact_model_lack_those_of_the_removed_layers(llama, task):
    counts = [flops(compact(llama, range(k)), task, 2, 7, 3) for k in (1, 2, 3, 4)]
    assert len(set(np.diff(counts))) == 1 and counts[0] < counts[1]


@torch.no_grad()
def test_prefill_tasks_return_states_and_logits(llama):
    prompt = torch.arange(3, 10)[None]
    run = timing._work(llama, Workload("prefill_hidden", 1, 7), prompt)
    assert torch.equal(run(), last_hidden(llama, prompt))
    run = timing._work(llama, Workload("prefill_logits", 1, 7), prompt)
    assert torch.equal(run(), llama(prompt).logits)


@torch.no_grad()
def test_decoding_takes_the_tokens_of_greedy_generation(full, make_blocks):
    prompt = make_blocks(2, 7)
    full.generation_config.eos_token_id = None  # the number of steps is fixed
    expected = full.generate(prompt, max_new_tokens=6, do_sample=False)[:, 7:]
    run = timing._work(full, Workload("decode", 2, 7, 5), prompt)
    fed = watch_inputs(full)
    logits = run()
    assert torch.equal(torch.cat(fed, dim=1), expected[:, :5])
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, 5])


def test_run_prefills_before_it_decodes(llama):
    fed = watch_inputs(llama)
    workload = Workload("decode", 2, 7, 3)
    assert run_seconds(llama, workload, timing.random_prompt(llama, workload, 0)) > 0
    assert [tuple(ids.shape) for ids in fed] == [(2, 7), (2, 1), (2, 1), (2, 1)]


def test_prompt_follows_its_seed(llama):
    workload = Workload("decode", 2, 50, 3)
    prompt = timing.random_prompt(llama, workload, 1)
    assert prompt.shape == (2, 50) and prompt.max() < 96
    assert torch.equal(prompt, timing.random_prompt(llama, workload, 1))
    assert not torch.equal(prompt, timing.random_prompt(llama, workload, 2))


# Comparison


def test_models_are_compared_on_the_prompt_of_the_seed(llama, monkeypatch):
    seen, work = [], Workload("prefill_hidden", 1, 20)
    monkeypatch.setattr(timing, "run_seconds", lambda model, workload, prompt: seen.append(prompt) or 1.0)
    compare_speed(llama, {2: compact(llama, [0, 3])}, work, rounds=1, seed=5)
    assert all(torch.equal(prompt, timing.random_prompt(llama, work, 5)) for prompt in seen)


def test_rows_have_their_columns_for_every_compact_model(llama, planted):
    rows = compare_speed(llama, planted[0], Workload("prefill_hidden", 2, 7), rounds=3)
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [list(row.values())[:5] for row in rows] == [["prefill_hidden", 2, 7, 0, k] for k in (1, 2)]
    assert [row["rounds"] for row in rows] == [3, 3]


def test_ratios_are_taken_within_a_round(llama, planted):
    one, two = compare_speed(llama, planted[0], Workload("prefill_hidden", 2, 7), rounds=3)
    assert (one["speedup_lo"], one["speedup"], one["speedup_hi"]) == (4, 4, 4)
    assert (two["speedup_lo"], two["speedup"], two["speedup_hi"]) == (2, 2, 2)
    assert (one["full_ms"], one["compact_ms"], two["compact_ms"]) == (6000, 1500, 3000)


def test_ideal_is_the_ratio_of_operations(llama, planted):
    work = ("prefill_logits", 2, 7)
    one, _ = compare_speed(llama, planted[0], Workload(*work), rounds=3)
    assert one["ideal"] == flops(llama, *work) / flops(planted[0][1], *work)
    assert one["share_of_ideal"] == pytest.approx(4 / one["ideal"])
    assert one["ideal"] < 4  # the head stays


def test_order_of_models_rotates(llama, planted):
    compare_speed(llama, planted[0], Workload("prefill_hidden", 2, 7), rounds=3)
    assert planted[1] == [4, 1, 2, 1, 2, 4, 2, 4, 1]


def test_real_runs_give_positive_seconds(llama):
    (row,) = compare_speed(llama, {2: compact(llama, [0, 3])}, Workload("decode", 1, 4, 2), rounds=2)
    assert min(row["full_ms"], row["compact_ms"]) > 0
    assert row["speedup_lo"] <= row["speedup"] <= row["speedup_hi"]


def test_a_quiet_machine_takes_its_rounds_once_and_keeps_their_seconds(llama, monkeypatch):
    ratios = [2.0, 2.02, 1.98, 2.01, 1.99, 2.0, 2.03, 1.97, 2.0]
    row, seconds = run_with(monkeypatch, llama, ratios, cores=0.2)
    assert (row["rounds"], row["quiet"], row["others_cores"]) == (9, True, 0.2)
    assert seconds == [(ratio, 1.0) for ratio in ratios]
    # the second and the last but one of nine in their order
    assert (row["speedup_lo"], row["speedup"], row["speedup_hi"]) == (1.98, 2.0, 2.02)


def test_the_speedup_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians():
    assert timing.speed_row([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])["speedup"] == 2  # of 2, 3 and 1


def test_spread_is_the_interquartile_range_over_the_median():
    row = timing.speed_row([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert row["spread"] == pytest.approx((4 - 2) / 3)
    assert (row["speedup_lo"], row["speedup_hi"]) == (1, 5)  # five rounds have a range only
    assert not row["quiet"]


@pytest.mark.parametrize(
    ("ratios", "cores"),
    [([2.0] * 9, 0.3), ([1.0, 4.0, 1.0, 4.0, 1.0, 4.0, 1.0, 4.0, 2.0], 0.0)],
    ids=["others at work", "wide"],
)
def test_a_busy_machine_takes_three_times_the_rounds_keeps_all_and_says_so(llama, monkeypatch, ratios, cores):
    row, seconds = run_with(monkeypatch, llama, ratios, cores)
    assert (row["rounds"], row["quiet"]) == (27, False)
    assert [full for full, _ in seconds] == ratios * 3


def test_one_wild_model_of_several_takes_three_times_the_rounds(llama, monkeypatch):
    quiet, wild, turns = compact(llama, [0]), compact(llama, [1]), cycle([1.0, 4.0])
    monkeypatch.setattr(timing, "Others", partial(Fake, cores=0.0))
    monkeypatch.setattr(timing, "run_seconds", lambda model, *rest: next(turns) if model is wild else 1.0)
    rows = compare_speed(llama, {1: quiet, 2: wild}, Workload("prefill_hidden", 1, 4), rounds=9)
    assert [row["rounds"] for row in rows] == [27, 27]


def test_rounds_that_calm_down_are_quiet_by_the_last_look(llama, monkeypatch):
    """9 rounds of 1 or 3, then 18 of 2: half of all lie at the median."""
    ratios = [1.0, 3.0] * 4 + [2.0] + [2.0] * 18
    row, seconds = run_with(monkeypatch, llama, ratios, 0.0)
    assert (row["rounds"], row["quiet"], row["speedup"]) == (18, True, 2.0)
    assert [full for full, _ in seconds[:8]] == [1.0, 3.0] * 4, "the wild rounds stay"


def test_load_of_others_by_hand():
    """In 10 s everybody used 13 s and this process 8: half a core is others'; guests are in ``user`` already."""
    system = iter([
        SimpleNamespace(user=100.0, system=10.0, nice=1.0, idle=50.0, guest=7.0),
        SimpleNamespace(user=110.0, system=12.0, nice=2.0, idle=57.0, guest=9.0),
    ])  # fmt: skip
    own = iter([SimpleNamespace(user=5.0, system=1.0), SimpleNamespace(user=12.0, system=2.0)])
    clock = iter([3.0, 13.0])
    with Others(lambda: next(system), lambda: next(own), lambda: next(clock)) as others:
        pass
    assert others.cores == 0.5
    assert others.cores == 0.5, "asked again, it looks at no clock"


def test_load_of_others_is_seen_while_the_block_runs_and_never_negative():
    same = SimpleNamespace(user=1.0, system=1.0)
    own, clock = iter([0.0, 1.0, 1.0]), iter([0.0, 2.0, 4.0])
    with Others(lambda: same, lambda: SimpleNamespace(user=next(own), system=0.0), lambda: next(clock)) as others:
        assert others.cores == 0


@pytest.mark.parametrize(("task", "above"), [("prefill_hidden", False), ("prefill_logits", True)])
def test_a_measured_speedup_above_the_arithmetic_is_flagged(llama, planted, task, above):
    """Four times as fast: what one of four layers allows, and more than it allows with the head that stays."""
    row, _ = compare_speed(llama, planted[0], Workload(task, 2, 7), rounds=3)
    assert (row["speedup"], row["above_ideal"]) == (4, above)


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        (Workload("sing", 1, 4), "task 'sing': use one of"),
        (Workload("prefill_hidden", 0, 4), "must be at least 1"),
        (Workload("prefill_logits", 1, 0), "must be at least 1"),
        (Workload("decode", 1, 4), r"new_tokens=0\): .* must be at least 1"),
    ],
)
def test_bad_workloads_are_refused(llama, workload, message, refused):
    with refused(message):
        compare_speed(llama, {}, workload)


# Memory


def test_checkpoint_bytes_count_weight_files_only(tmp_path):
    for name, size in {"model-1.safetensors": 10, "model-2.safetensors": 20, "tokenizer.json": 40}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert checkpoint_bytes(tmp_path) == 30


def test_checkpoint_of_a_compact_model_is_smaller_by_the_removed_layers(llama, tmp_path):
    for k in (3, 4):
        save(compact(llama, range(k)), None, tmp_path / str(k), "tiny", range(k), 4)
    difference = checkpoint_bytes(tmp_path / "4") - checkpoint_bytes(tmp_path / "3")
    layer = 4 * (LINEAR // 2 + 2 * 32)  # float32, with two norms
    assert layer <= difference < layer + 1000  # the header names 9 tensors less


def test_the_peak_remembers_an_allocation():
    size = 64 * 2**20
    before = psutil.Process().memory_info().rss
    with mmap.mmap(-1, size) as block:  # fresh pages, where malloc may hand out resident ones
        block.write(b"x" * size)
    assert machine.peak_resident_bytes() > before + 0.9 * size


def test_peak_comes_from_the_system_call_where_there_is_no_status_file(monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda place: Path("no such file"))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert machine.peak_resident_bytes() == pytest.approx(expected, rel=0.1)


def test_peak_memory_of_a_fresh_process_covers_the_weights(make_model, tmp_path):
    model = make_model("llama", vocab_size=200_000)  # 2 * 25.6 MB
    save(model, None, tmp_path / "wide", "tiny", range(4), 4)
    del model
    peak = memory.peak_memory(tmp_path / "wide", Workload("decode", 1, 4, 2), "float32", "cpu")
    assert checkpoint_bytes(tmp_path / "wide") < peak < 2**31


def test_a_process_that_is_killed_ends_in_one_line(refused):
    assert memory.in_new_process(abs, -3) == 3
    with refused("the process of raise_signal was killed, out of memory"):
        memory.in_new_process(signal.raise_signal, signal.SIGKILL)
