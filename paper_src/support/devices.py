"""Where a model computes, and in which numbers."""

import torch

from paper_src import InputError


def pick_device(device: str = "auto") -> str:
    """``device``, or CUDA where there is one and else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine shows no CUDA device; use cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r}: torch knows no such device; use cpu, cuda or auto") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}: sums are in float64, which it may lack; use cpu, cuda or auto")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: this machine shows {torch.cuda.device_count()} CUDA devices, from cuda:0")
    return str(found)


def pick_dtype(dtype: str = "auto", device: str = "cpu") -> torch.dtype:
    """``dtype``, or bfloat16 where the hardware multiplies in it (about 2.5 times as fast), else float32."""
    if dtype == "auto":
        if device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            abilities = torch.cpu.get_capabilities()
            native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r}: use float32, bfloat16, float16 or auto")
    return getattr(torch, dtype)


def rows_at_once(device: torch.device) -> int:
    """So many rows of logits to work on at a time: few enough to stay in a CPU's caches, elsewhere many."""
    return 8 * torch.get_num_threads() if device.type == "cpu" else 1024
