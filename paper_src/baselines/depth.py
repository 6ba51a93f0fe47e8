"""Less depth, otherwise: layers merged, magnitudes compensated, other recipes of training, section 5's model."""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.compaction import compact
from paper_src.layers import LayerRunner
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
    model: PreTrainedModel, k: int, blocks: Tensor, released: bool = False, most: int = 4, interval: int = 2,
    thresholds: Sequence[float] = (0.95, 0.75, 0.5, 0.25, -1.0),
) -> PreTrainedModel:  # fmt: skip
    """k layers, the others merged into those below them from the top down (LaCo, arXiv:2402.11187).

    The paper's formula is W_l + sum_j (W_{l+j} - W_l), of all that a layer holds. The released code takes each
    difference to the W_l that it has already changed: the sum telescopes to W_{l+m}, of the linear maps only. So it
    removes all layers of a merge but the last, and puts the first one's norms before it (``released``).

    A merge of at most ``most`` layers is kept if the cosine of the last hidden states of a block to the full model's,
    mean over ``blocks`` (N, T), in the paper a few sentences, stays above a threshold; the next is ``interval`` layers
    below. As released, the first leaves out the last layer. The paper tunes the threshold to a size; here it is lowered
    step by step until k layers are left.
    """
    reference = last_hidden(model, blocks).float().flatten(1)
    small = model
    for threshold in thresholds:
        low = max(0, len(decoder_layers(small)) - 1 - most)
        while low >= 0 and (count := len(decoder_layers(small))) > k:
            merged = _merged(small, low, min(most, count - low, 1 + count - k), released)
            states = last_hidden(merged, blocks).float().flatten(1)
            near = nn.functional.cosine_similarity(states, reference).mean()
            small, below = (merged, max(0, low - interval)) if near > threshold else (small, low - 1)
            low = min(below, max(0, len(decoder_layers(small)) - 1 - most))
    return copy.deepcopy(small)


def _merged(model: PreTrainedModel, low: int, count: int, released: bool = False) -> PreTrainedModel:
    """``model`` with its layers [low, low + count) merged into the first of them."""
    layers = decoder_layers(model)
    kept = [index for index in range(len(layers)) if not low < index < low + count]
    small = compact(model, kept)
    first = copy.deepcopy(layers[low])
    inside = {f"{name}.weight" for name, part in first.named_modules() if isinstance(part, nn.Linear)}
    for name, parameter in first.named_parameters():
        own, *others = (layers[low + j].get_parameter(name).float() for j in range(count))
        merged = own + sum(other - own for other in others)
        if released:
            merged = others[-1] if name in inside else own
        parameter.data = merged.to(parameter.dtype)
    path, _ = locate_layers(small)
    small.set_submodule(f"{path}.{low}", first)
    return small


WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # of a layer's output, in Llama's family


@torch.no_grad()
def magnitude_compensated(full: PreTrainedModel, kept: Sequence[int], blocks: Tensor) -> PreTrainedModel:
    """The compact model of ``kept`` whose states are as large behind each gap as the next kept layer is used to.

    alpha = E_n E_c (E_t |h'| / E_t |h|), mean over ``blocks`` (N, T) and channels c of the ratio of mean absolute
    entries of the states behind the removed layers and before them, from the bottom up on the compact model's own
    states (Prune&Comp, arXiv:2507.18212; its code takes removed layers one by one).
    The released code multiplies embedding and output matrices before the gap by alpha; as each part reads a normalized
    state, the same comes of dividing those behind the gap, and an embedding that is also the head stays as it is.

    Raises:
        NotSupported: a layer has other parts than Llama's, or norms its output.
    """
    runner, small = LayerRunner(full), copy.deepcopy(compact(full, kept))
    layers, blocks = decoder_layers(small), blocks.to(full.device)
    states, scale = runner.embedded(blocks), 1.0
    # the gap before the first kept layer first, and so on to that behind the last
    for place, (before, layer) in enumerate(pairwise([-1, *kept, runner.depth])):
        if layer > before + 1:
            wide = runner.run(blocks, states, before + 1, layer)
            alpha = float((wide.float().abs().mean(1) / states.float().abs().mean(1)).mean())
            states, scale = states * alpha, scale * alpha
        if place < len(kept):
            states = runner.run(blocks, states, layer, layer + 1)
            for name in WRITERS:
                _divide_(layers[place], name, scale)
    found = LayerRunner(small).run(blocks[:1], runner.embedded(blocks[:1]), 0, len(kept)).float() * scale
    if not (found - states[:1]).norm() <= 0.05 * found.norm():
        raise NotSupported(f"{type(layers[0]).__name__} does not add what it writes to its state as it is")
    return small


def _divide_(layer: nn.Module, name: str, scale: float) -> None:
    try:
        writer = layer.get_submodule(name)
    except AttributeError as error:
        raise NotSupported(f"{type(layer).__name__} has other parts than Llama's layers ({error})") from error
    for parameter in writer.parameters():
        parameter.data /= scale


def only_tail(model: PreTrainedModel, layers: int = 3) -> PreTrainedModel:
    """The model for a training of its last ``layers`` only; :func:`whole` makes it plain again.

    The recipe of Lu et al. (arXiv:2411.15558) trains the head as well. The training here leaves embedding and head
    alone, for every method, and where one tensor is both, the head cannot be trained without the embedding.
    """
    small = copy.deepcopy(model)
    for layer in decoder_layers(small)[:-layers]:
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, parameter.data)  # which no optimizer sees, and every checkpoint keeps
    return small


def whole(model: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """Takes off what :func:`only_tail` did, in place: what is a parameter of ``like`` is one again."""
    for name, _ in like.named_parameters():
        path, _, last = name.rpartition(".")
        part = model.get_submodule(path)
        if last in part._buffers:
            tensor = part._buffers.pop(last)
            part.register_parameter(last, nn.Parameter(tensor))
    return model


def stepwise(
    full: PreTrainedModel, kept: Sequence[int], parts: Sequence[Tensor],
    train: Callable[[PreTrainedModel, Tensor, int], PreTrainedModel],
) -> PreTrainedModel:  # fmt: skip
    """The compact model of ``kept``, cut in as many steps as ``parts``, with a training on each (arXiv:2511.05085).

    Each step removes an equal share of the layers, spread over the depth; all steps together see what one training
    sees. The paper removes the layer that costs least at each step; here the layers that stay are given, so that only
    the recipe differs from cutting all at once.

    Args:
        parts: blocks (n, T) of each step.
        train: (model, blocks, number of the step) -> the trained model.
    """
    left = list(range(len(decoder_layers(full))))
    removed, small = [layer for layer in left if layer not in set(kept)], full
    for stage, blocks in enumerate(parts):
        gone = set(removed[stage :: len(parts)])
        small = compact(small, [place for place, layer in enumerate(left) if layer not in gone])
        left = [layer for layer in left if layer not in gone]
        small = train(small, blocks, stage)
    return small
