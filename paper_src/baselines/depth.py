"""Less depth, otherwise: layers merged (LaCo), and the repaired model of section 5."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from paper_src import InputError
from paper_src.compaction import compact
from paper_src.models import decoder_layers, last_hidden, locate_layers


def repaired(full: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The repaired model of a checkpoint, in the dtype and on the device of ``full``.

    Raises:
        InputError: the checkpoint is not there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: run ./reproduce.sh --only 05_recovery --force")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=full.dtype).to(full.device).eval()


@torch.no_grad()
def laco(
    model: PreTrainedModel,
    k: int,
    blocks: Tensor,
    most: int = 4,
    interval: int = 2,
    thresholds: Sequence[float] = (0.95, 0.75, 0.5, 0.25, -1.0),
) -> PreTrainedModel:
    """Layers merged into those below them, W_l + sum_j (W_{l+j} - W_l), from the top down (LaCo, arXiv:2402.11187).

    A merge of at most ``most`` layers is kept if the mean cosine of the last hidden states to the full model's on
    ``blocks`` (N, T), in the paper a few sentences, stays above a threshold; the next is ``interval`` layers below. The
    paper tunes the threshold to a size; here it is lowered step by step until k layers are left.
    """
    reference = last_hidden(model, blocks).float()
    small = model
    for threshold in thresholds:
        low = len(decoder_layers(small)) - most
        while low >= 0 and (count := len(decoder_layers(small))) > k:
            merged = _merged(small, low, min(most, count - low, 1 + count - k))
            near = nn.functional.cosine_similarity(last_hidden(merged, blocks).float(), reference, dim=-1).mean()
            small, step = (merged, interval) if near > threshold else (small, 1)
            low = min(low - step, len(decoder_layers(small)) - most)
    return copy.deepcopy(small)


def _merged(model: PreTrainedModel, low: int, count: int) -> PreTrainedModel:
    """``model`` with its layers [low, low + count) merged into the first of them."""
    layers = decoder_layers(model)
    kept = [index for index in range(len(layers)) if not low < index < low + count]
    small = compact(model, kept)
    first = copy.deepcopy(layers[low])
    for name, parameter in first.named_parameters():
        own = layers[low].get_parameter(name).float()
        gaps = [layers[low + j].get_parameter(name).float() - own for j in range(1, count)]
        parameter.data = (own + sum(gaps)).to(parameter.dtype)
    path, _ = locate_layers(small)
    small.set_submodule(f"{path}.{low}", first)
    return small
