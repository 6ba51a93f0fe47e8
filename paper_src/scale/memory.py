"""What a model takes: memory, measured in a process of its own, and bytes on disk."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from paper_src import InputError
from paper_src.support.machine import peak_resident_bytes
from paper_src.timing import Workload, random_prompt, run_seconds


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
    before = psutil.Process().memory_info().rss
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    run_seconds(model, workload, random_prompt(model, workload, 0))
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes() - before


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
