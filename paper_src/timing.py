"""Honest speed: warm, interleaved, synchronized, beside what the arithmetic allows."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.models import last_hidden
from paper_src.stats import interval

TASKS = ("prefill_hidden", "prefill_logits", "decode")


def _attention_flops(query: list[int], key: list[int], value: list[int], *args, **kwargs) -> int:
    """2 B H T S (d_qk + d_v) of a query (B, H, T, d_qk) and S keys and values, of as many heads or fewer."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


# torch's counter does not know the CPU's kernel, and some releases of it refuse queries in groups
_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention{end}"): _attention_flops
    for kernel, end in (("flash", "_for_cpu"), ("flash", ""), ("efficient", ""), ("cudnn", ""))
}


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
) -> list[dict[str, float]]:
    """One row for each compact model: ``speedup`` = median over rounds of seconds(full) / seconds(compact).

    A ratio is taken within its round, so that a machine whose speed drifts distorts both sides alike. One run before
    counts FLOPs and warms up. A row has the workload, ``k`` (the key of ``compact``, whose models are on the same
    device in the same dtype), ``speedup`` and its 95% bootstrap interval ``speedup_lo``, ``speedup_hi``, ``ideal``
    (FLOPs ratio), ``share_of_ideal``, ``full_ms``, ``compact_ms`` (medians) and ``rounds``.
    """
    models = {None: full, **compact}
    prompt = random_prompt(full, workload, seed)
    flops = {key: count_flops(model, workload, prompt) for key, model in models.items()}
    seconds = interleaved(list(models), lambda key: run_seconds(models[key], workload, prompt), rounds)
    rows = []
    for k in compact:
        speed, ideal = ratio_interval(np.divide(seconds[None], seconds[k]), seed), flops[None] / flops[k]
        medians = {name: 1e3 * float(np.median(seconds[key])) for name, key in (("full_ms", None), ("compact_ms", k))}
        rows.append({**vars(workload), "k": k, **speed, "ideal": ideal, "share_of_ideal": speed["speedup"] / ideal,
                     **medians, "rounds": rounds})  # fmt: skip
    return rows


def pair_seconds(
    first: PreTrainedModel, second: PreTrainedModel, workload: Workload, rounds: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Seconds of ``rounds`` runs of two models, interleaved, after one run each that warms up."""
    models, prompt = (first, second), random_prompt(first, workload, seed)
    for model in models:
        run_seconds(model, workload, prompt)
    seconds = interleaved((0, 1), lambda place: run_seconds(models[place], workload, prompt), rounds)
    return seconds[0], seconds[1]


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
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
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

    def decode() -> Tensor:
        cache, logits = state.past_key_values, state.logits
        for _ in range(workload.new_tokens):
            token = logits[:, -1:].argmax(dim=-1)  # (B, 1)
            step = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, logits = step.past_key_values, step.logits
        return logits

    return decode


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def ratio_interval(ratios: np.ndarray, seed: int = 0) -> dict[str, float]:
    """``speedup``, the median of ``ratios``, with its 95% bootstrap interval ``speedup_lo``, ``speedup_hi``."""
    low, high = interval(ratios, np.median, seed)
    return {"speedup": float(np.median(ratios)), "speedup_lo": low, "speedup_hi": high}


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
