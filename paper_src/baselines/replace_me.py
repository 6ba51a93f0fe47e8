"""ReplaceMe (arXiv:2505.02819): one matrix, folded into the MLP before a removed block, stands for the block."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paper_src import InputError
from paper_src.compaction import compact
from paper_src.layers import LayerRunner
from paper_src.models import add_to_weight_, decoder_layers, in_by_out

BATCH, LEARNING_RATE = 1024, 1e-4  # tokens and Adam's rate, as released


def replace_me(
    full: PreTrainedModel, kept: Sequence[int], blocks: Tensor, cosine: bool = False, epochs: int = 10, seed: int = 0
) -> PreTrainedModel:
    """The compact model of ``kept``, all layers but one block, whose last MLP matrix before the block is W T.

    With m the MLP's output there, h the state behind it and y the state behind the block, both of the full model,
    T = (M'M)^-1 M'(Y - H + M) in float64, all tokens weighing the same. Or, ``cosine``, the paper's better objective
    and the released code's default: the least mean of 1 - cos(m T, y - h + m), by Adam from the identity. The released
    code sees 8 million tokens ten times; ``blocks`` (N, T) are fewer, and on them more ``epochs`` overfit.

    Raises:
        InputError: the removed layers are not one block behind some kept layer.
    """
    before, stop = _block(kept, len(decoder_layers(full)))
    m, y = _outputs(full, blocks.to(full.device), before, stop)
    eye = torch.eye(m.shape[1], dtype=torch.float64, device=m.device)
    if cosine:
        matrix = _nearest_by_cosine(m, y, epochs, seed)
    else:
        m, y = m.double(), y.double()
        square = m.T @ m
        matrix = torch.linalg.solve(square + 1e-9 * square.diagonal().mean() * eye, m.T @ y)
    small = compact(full, kept)
    writer = _mlp_writer(decoder_layers(small)[list(kept).index(before)])
    add_to_weight_(writer, in_by_out(writer).detach().double() @ (matrix.double() - eye))
    return small


def _mlp_writer(layer: nn.Module) -> nn.Module:
    """The last linear map of a layer's last part, its MLP, whose output is added to the state; InputError if none."""
    parts = [[m for m in part.modules() if isinstance(m, nn.Linear | Conv1D)] for part in layer.children()]
    if not any(parts):
        raise InputError(f"{type(layer).__name__} holds no plain linear map: it cannot be refitted")
    return [linear for linear in parts if linear][-1][-1]


def _block(kept: Sequence[int], depth: int) -> tuple[int, int]:
    """The kept layer before the removed block, and the first layer behind it."""
    gaps = [(low, high) for low, high in pairwise([-1, *kept, depth]) if high > low + 1]
    if len(gaps) != 1 or gaps[0][0] < 0:
        raise InputError(f"kept layers {tuple(kept)} of {depth}: remove one block of layers, behind the first")
    return gaps[0]


@torch.no_grad()
def _outputs(full: PreTrainedModel, blocks: Tensor, before: int, stop: int) -> tuple[Tensor, Tensor]:
    """(N T, d) outputs of the MLP of layer ``before``, and what they would have to be for the block to be skipped."""
    runner, writer, parts = LayerRunner(full), _mlp_writer(decoder_layers(full)[before]), []
    seen: list[Tensor] = []
    with writer.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        for batch in blocks.split(8):
            h = runner.run(batch, runner.embedded(batch), 0, before + 1)
            m = seen[-1].reshape(h.shape) - (0 if writer.bias is None else writer.bias)
            y = runner.run(batch, h, before + 1, stop).float() - h.float() + m.float()
            parts.append((m.float().flatten(0, 1), y.flatten(0, 1)))
    m, y = (torch.cat(part) for part in zip(*parts, strict=True))
    return m, y


def _nearest_by_cosine(m: Tensor, y: Tensor, epochs: int, seed: int) -> Tensor:
    """(d, d) matrix T of the least mean of 1 - cos(m T, y) over tokens (n, d)."""
    matrix = torch.eye(m.shape[1], device=m.device, requires_grad=True)
    optimizer = torch.optim.Adam([matrix], lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in torch.randperm(len(m), generator=order).split(BATCH):
            near = torch.nn.functional.cosine_similarity(m[part] @ matrix, y[part], dim=-1)
            optimizer.zero_grad()
            (1 - near).mean().backward()
            optimizer.step()
    return matrix.detach()
