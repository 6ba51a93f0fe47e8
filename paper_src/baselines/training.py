"""The trainings of section 7: one distillation, of all the weights that a method leaves or of some of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src.baselines import depth, sparsity
from paper_src.baselines.setting import Setting
from paper_src.distillation import Distillation, Distilled, distil

STAGES = 4  # cuts of a stepwise training


def plain(on: Setting, model: PreTrainedModel, k: int, folder: Path, how: Distillation) -> Distilled:
    """``model`` distilled on the text that all methods get."""
    return distil(on.full, model, on.blocks, on.validation, folder, how, answers=on.folder / "answers")


def whole(on: Setting, model: PreTrainedModel, k: int, folder: Path, how: Distillation) -> Distilled:
    """The same with embedding and head."""
    return plain(on, model, k, folder, replace(how, embeddings=True))


def masked(on: Setting, model: PreTrainedModel, k: int, folder: Path, how: Distillation) -> Distilled:
    """The same, where zeros stay zeros."""
    found = plain(on, sparsity.masked(model), k, folder, how)
    return replace(found, model=sparsity.unmasked(found.model))


def tail(on: Setting, model: PreTrainedModel, k: int, folder: Path, how: Distillation) -> Distilled:
    """The same, of the last layers alone: see :func:`depth.only_tail`."""
    found = plain(on, depth.only_tail(model), k, folder, how)
    return replace(found, model=depth.whole(found.model, model))


def stepwise(on: Setting, model: PreTrainedModel, k: int, folder: Path, how: Distillation) -> Distilled:
    """The layers of ``on.kept[k]``, reached in ``STAGES`` cuts on a share of the text each: :func:`depth.stepwise`."""
    looks: list[dict[str, float]] = []  # of the latest stage, with what the earlier ones cost

    def train(small: PreTrainedModel, blocks: Tensor, stage: int) -> PreTrainedModel:
        found = distil(on.full, small, blocks, on.validation, folder / str(stage), how, answers=on.folder / "answers")
        spent = {name: looks[-1][name] if looks else 0 for name in ("step", "tokens", "seconds")}
        looks[:] = [look | {name: look[name] + before for name, before in spent.items()} for look in found.history]
        return found.model

    batches = len(on.blocks) // how.batch_size
    shares = torch.arange(batches * how.batch_size).view(batches, -1).tensor_split(max(1, min(STAGES, on.depth - k)))
    parts = [on.blocks[share.flatten()] for share in shares if len(share)]
    return Distilled(depth.stepwise(on.full, on.kept[k], parts, train), looks)


TRAININGS: dict[str, Callable[[Setting, PreTrainedModel, int, Path, Distillation], Distilled]] = {
    "plain": plain, "whole": whole, "masked": masked, "tail": tail, "stepwise": stepwise,
}  # fmt: skip
