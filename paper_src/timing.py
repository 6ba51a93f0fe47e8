"""Honest speed and memory: warm, interleaved, synchronized, beside what the arithmetic allows."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForCausalLM, PreTrainedModel

from paper_src import InputError
from paper_src.models import last_hidden
from paper_src.stats import interval

TASKS = ("prefill_hidden", "prefill_logits", "decode")


def _attention_flops(query: list[int], key: list[int], value: list[int], *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# the counter of torch 2.13 does not know the CPU's attention kernel
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        task: ``prefill_hidden`` (states of all tokens), ``prefill_logits`` (states and all logits) or
            ``decode`` (``new_tokens`` greedy steps with the KV cache, after a prefill that is not timed).
        batch: sequences.
        length: tokens of each prompt.
        new_tokens: decode steps; ignored for prefill.
    """

    task: str
    batch: int
    length: int
    new_tokens: int = 0


def compare_speed(
    full: PreTrainedModel,
    compact: dict[int, PreTrainedModel],
    workload: Workload,
    rounds: int = 9,
    seed: int = 0,
) -> list[dict[str, float]]:
    """One row for each compact model: ``speedup`` = median over rounds of seconds(full) / seconds(compact).

    In every round all models run once, in an order that rotates; a ratio is taken within its round, so
    that a machine whose speed drifts distorts both sides alike. One run before counts FLOPs and warms up.

    Args:
        full: the full model.
        compact: k -> compact model, on the same device and in the same dtype.
        workload: what to time.
        rounds: timed rounds.
        seed: of the random token ids and of the bootstrap.

    Returns:
        Rows with ``task``, ``batch``, ``length``, ``new_tokens``, ``k``, ``speedup`` and its 95% bootstrap
        interval ``speedup_lo``, ``speedup_hi``, ``ideal`` (FLOPs ratio), ``share_of_ideal``,
        ``full_ms``, ``compact_ms`` (medians, a workload) and ``rounds``.
    """
    models = {0: full, **compact}
    prompt = _prompt(full, workload, seed)
    flops = {key: count_flops(model, workload, prompt) for key, model in models.items()}
    seconds = interleaved(list(models), lambda key: run_seconds(models[key], workload, prompt), rounds)
    return [
        {
            **vars(workload),
            "k": k,
            **ratio_interval(np.divide(seconds[0], seconds[k]), seed),
            "ideal": flops[0] / flops[k],
            "share_of_ideal": float(np.median(np.divide(seconds[0], seconds[k]))) / (flops[0] / flops[k]),
            "full_ms": 1e3 * float(np.median(seconds[0])),
            "compact_ms": 1e3 * float(np.median(seconds[k])),
            "rounds": rounds,
        }
        for k in compact
    ]


def pair_seconds(
    first: PreTrainedModel, second: PreTrainedModel, workload: Workload, rounds: int, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Seconds of ``rounds`` runs of two models, interleaved, after one run each that warms up."""
    models, prompt = (first, second), _prompt(first, workload, seed)
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
    work = _work(model, workload, prompt)
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def _prompt(model: PreTrainedModel, workload: Workload, seed: int) -> Tensor:
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


def peak_memory(folder: str | Path, workload: Workload, dtype: str, device: str) -> int:
    """Peak bytes that loading a checkpoint and one run of ``workload`` take, in a fresh process.

    On CUDA the allocator's peak; on the CPU the growth of the resident set over the process with its
    libraries loaded.
    """
    return in_new_process(_peak_memory, str(folder), workload, dtype, device)


def in_new_process(function: Callable, *arguments: object) -> object:
    """``function(*arguments)``, both importable and picklable, in a fresh process.

    Raises:
        InputError: the process was killed, as the system does when memory runs out.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"the process of {function.__name__.lstrip('_')} was killed, out of memory as it seems: use a smaller "
                "model or dtype, or a machine with more memory"
            ) from error


def _peak_memory(folder: str, workload: Workload, dtype: str, device: str) -> int:
    before = resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    run_seconds(model, workload, _prompt(model, workload, 0))
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes() - before


def resident_bytes() -> int:
    """Resident set of this process in bytes (Linux); elsewhere the peak so far."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far, bytes.

    ``ru_maxrss`` alone would not do on Linux: a new process inherits its parent's peak.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes, where the system has it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
