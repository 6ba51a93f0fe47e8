"""Calibration text that a model writes itself."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.support.checkpoints import run_folder
from paper_src.support.files import replacing


@torch.no_grad()
def generated(
    model: PreTrainedModel, prompts: Tensor, count: int, length: int, seed: int, folder: Path, batch_size: int = 64,
    progress: Callable = iter,
) -> Tensor:  # fmt: skip
    """Token ids (count, length) that ``model`` writes itself, sampled at temperature 1 behind random ``prompts``.

    What a model says is the text that it knows best: for its owner it is calibration text without any data.

    Args:
        prompts: (P, t) token ids, t < length: the first words of texts of the kinds that are wanted, or (1, 1) the BOS.
        folder: of what has been written, batch after batch, so that a killed run goes on.
        batch_size: sequences that are written at once.

    Raises:
        InputError: prompts that leave nothing to write.
    """
    new = length - prompts.shape[1]
    if new < 1:
        raise InputError(f"prompts of {prompts.shape[1]} tokens for blocks of {length}: give shorter ones")
    folder = run_folder(folder, [prompts, *model.parameters()], {"length": length, "seed": seed, "batch": batch_size})
    parts = []
    for number in progress(range(-(-count // batch_size))):
        if not (path := folder / f"{number:06}.safetensors").is_file():
            torch.manual_seed(seed * 1_000_003 + number)  # generate() takes no generator
            ids = prompts[torch.randint(len(prompts), (batch_size,))].to(model.device)
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                repetition_penalty=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
            )  # fmt: skip
            with replacing(path) as part:
                save_file({"ids": written.cpu()}, part)
        parts.append(load_file(path)["ids"])
    return torch.cat(parts)[:count] if count else prompts.new_empty(0, length)
