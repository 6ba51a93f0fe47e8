"""Honest speed: warm, interleaved, synchronized, beside what the arithmetic allows."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.models import last_hidden
from paper_src.stats import median_interval
from paper_src.support.caches import cache_name
from paper_src.support.machine import Others

TASKS = ("prefill_hidden", "prefill_logits", "decode")
SPREAD, OTHERS = 0.25, 0.25  # of ratios (decoding a few tokens has 0.15 on an idle machine), and others' cores: at most
LOOKS = 3  # so many times the rounds are taken at most


def _attention_flops(query: list[int], key: list[int], value: list[int], *args, **kwargs) -> int:
    """2 B H T S (d_qk + d_v) of a query (B, H, T, d_qk) and S keys and values, of as many heads or fewer."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _experts_flops(tokens: list[int], weights: list[int], *args, **kwargs) -> int:
    """2 n m p of tokens (n, m), each through the matrix of its own expert among weights (E, m, p)."""
    return 2 * math.prod(tokens) * weights[-1]


# torch's counter does not know the CPU's kernel of attention, and some releases of it refuse queries in groups
_KERNELS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention{end}"): _attention_flops
    for kernel, end in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
} | dict.fromkeys([torch.ops.aten._grouped_mm, torch.ops.transformers.grouped_mm_fallback], _experts_flops)


@dataclass(frozen=True)
class Workload:
    """What is timed: ``task`` is ``prefill_hidden`` (states of all tokens), ``prefill_logits`` (and all logits) or
    ``decode`` (``new_tokens`` greedy steps with the KV cache, after a prefill that is not timed).
    """

    task: str
    batch: int  # sequences
    length: int  # tokens of each prompt
    new_tokens: int = 0


def compare_speed(
    full: PreTrainedModel, compact: dict[object, PreTrainedModel], workload: Workload, rounds: int = 9, seed: int = 0
) -> list[dict[str, object]]:
    """One row for each compact model: ``speedup`` = median over rounds of seconds(full) / seconds(compact).

    One run before counts FLOPs and warms up. A row has the workload, ``k`` (the key of ``compact``, whose models are
    on the same device in the same dtype), the columns of :func:`speed_row`, ``ideal`` (FLOPs ratio),
    ``share_of_ideal``, ``above_ideal`` (more than the arithmetic allows: only decoding can be, which waits for
    weights), ``full_ms``, ``compact_ms`` (medians), and ``seconds``: (full, compact) of every round.
    """
    models = {None: full, **compact}
    prompt = random_prompt(full, workload, seed)
    flops = {key: count_flops(model, workload, prompt) for key, model in models.items()}
    seconds, others = quiet_rounds(models, workload, prompt, rounds)
    rows = []
    for k in compact:
        speed, ideal = speed_row(seconds[None], seconds[k], others), flops[None] / flops[k]
        medians = {name: 1e3 * float(np.median(seconds[key])) for name, key in (("full_ms", None), ("compact_ms", k))}
        rows.append({**vars(workload), "k": k, **speed, "ideal": ideal, "share_of_ideal": speed["speedup"] / ideal,
                     "above_ideal": speed["speedup"] > ideal, **medians,
                     "seconds": list(zip(seconds[None], seconds[k], strict=True))})  # fmt: skip
    return rows


def compare_pair(
    full: PreTrainedModel, small: PreTrainedModel, workload: Workload, rounds: int, seed: int = 0
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """The columns of :func:`speed_row`, and (full, small) seconds of every round, after one run each that warms up."""
    models, prompt = {"full": full, "small": small}, random_prompt(full, workload, seed)
    for model in models.values():
        run_seconds(model, workload, prompt)
    seconds, others = quiet_rounds(models, workload, prompt, rounds)
    return speed_row(*seconds.values(), others), list(zip(*seconds.values(), strict=True))


def quiet_rounds(
    models: dict[object, PreTrainedModel], workload: Workload, prompt: Tensor, rounds: int
) -> tuple[dict[object, list[float]], float]:
    """Seconds of every round by key of ``models``, the full one first; and cores that other processes kept busy.

    On a busy machine as many rounds again, up to three times as many. All of them count: to keep the quiet ones is to
    choose among results, and an interval over chosen rounds covers nothing.
    """
    seconds = {key: [] for key in models}
    with Others() as others:
        for _ in range(LOOKS):
            more = interleaved(list(models), lambda key: run_seconds(models[key], workload, prompt), rounds)
            for key, own in more.items():
                seconds[key] += own
            first, *rest = seconds.values()
            if all(speed_row(first, own, others.cores)["quiet"] for own in rest):
                break
    return seconds, others.cores


def speed_row(full: Sequence[float], small: Sequence[float], others: float = 0.0) -> dict[str, float]:
    """``speedup``, the median over rounds of full / small seconds, and what says how far to trust it.

    A ratio is taken within its round, so that a machine whose speed drifts distorts both sides alike.
    ``speedup_lo`` and ``speedup_hi`` are :func:`paper_src.stats.median_interval`: 95% by order statistics, of fewer
    than 6 rounds their range. ``spread`` is the interquartile range of the ratios over their median,
    ``others_cores`` the load of other processes; ``quiet`` says that both are small.
    """
    ratios = np.divide(full, small)
    lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    low, high = median_interval(ratios)
    spread = (upper - lower) / median
    return {"speedup": median, "speedup_lo": low, "speedup_hi": high, "rounds": len(ratios), "spread": spread,
            "others_cores": others, "quiet": spread <= SPREAD and others <= OTHERS}  # fmt: skip


def interleaved(keys: Sequence, timed: Callable[..., float], rounds: int) -> dict[object, list[float]]:
    """key -> ``rounds`` times what ``timed(key)`` gives, all keys in every round, in an order that rotates."""
    seconds, order = {key: [] for key in keys}, list(keys)
    for _ in range(rounds):
        for key in order:
            seconds[key].append(timed(key))
        order = order[1:] + order[:1]
    return seconds


@torch.no_grad()
def run_seconds(model: PreTrainedModel, workload: Workload, prompt: Tensor) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    work = _work(model, workload, prompt)
    _synchronize(model)
    start = time.perf_counter()
    work()
    _synchronize(model)
    return time.perf_counter() - start


@torch.no_grad()
def count_flops(model: PreTrainedModel, workload: Workload, prompt: Tensor) -> int:
    """Floating-point operations of one run, counted while it runs (2 for each multiply-add).

    Attention is counted in full, although a causal kernel may skip half of it.
    """
    work = _work(model, workload, prompt)  # outside: the prefill before decoding is not counted
    with FlopCounterMode(display=False, custom_mapping=_KERNELS) as counter:
        work()
    return counter.get_total_flops()


def random_prompt(model: PreTrainedModel, workload: Workload, seed: int) -> Tensor:
    """(batch, length) random token ids on the model's device; InputError if the workload is none."""
    if workload.task not in TASKS:
        raise InputError(f"task {workload.task!r}: use one of {TASKS}")
    if min(workload.batch, workload.length) < 1 or (workload.task == "decode" and workload.new_tokens < 1):
        raise InputError(f"{workload}: batch, length and (for decode) new_tokens must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    size = (workload.batch, workload.length)
    return torch.randint(model.config.get_text_config().vocab_size, size, generator=generator).to(model.device)


def _work(model: PreTrainedModel, workload: Workload, prompt: Tensor) -> Callable[[], object]:
    """A function that does the timed part once; for decode the prefill happens here."""
    if workload.task == "prefill_hidden":
        return lambda: last_hidden(model, prompt)
    if workload.task == "prefill_logits":
        return lambda: model(input_ids=prompt, use_cache=False).logits
    state = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    kind = cache_name(state)

    def decode() -> Tensor:
        cache, logits = state[kind], state.logits
        for _ in range(workload.new_tokens):
            token = logits[:, -1:].argmax(dim=-1)  # (B, 1)
            step = model(input_ids=token, use_cache=True, **{kind: cache})
            cache, logits = step[kind], step.logits
        return logits

    return decode


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
