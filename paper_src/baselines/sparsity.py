"""Zeros in the weights of the layers' linear maps, in equal shares."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.baselines.moments import InputMoments, linears
from paper_src.baselines.surgeon import Fix, compensated


def magnitude_pruned(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """The model whose smallest weights of each linear map are zero, by ``torch.nn.utils.prune``."""
    small = copy.deepcopy(model)
    for _, linear in linears(small):
        prune.l1_unstructured(linear, "weight", sparsity)
        prune.remove(linear, "weight")
    return small


def wanda(model: PreTrainedModel, moments: InputMoments, sparsity: float = 0.5, group: int = 0) -> PreTrainedModel:
    """The model whose weights of least |W_ij| * sqrt(E x_j^2) are zero (Wanda, arXiv:2306.11695).

    The share of zeros holds in each output row, or in each ``group`` of consecutive inputs: 4 with 0.5 is 2:4.
    """
    small = copy.deepcopy(model)
    for name, linear in linears(small):
        score = linear.weight.detach().float().abs() * moments[name].diagonal().sqrt()
        parts = score.view(len(score), -1, group or score.shape[1])  # (out, groups, inputs)
        order = parts.argsort(dim=-1, stable=True)
        drop = torch.zeros_like(parts, dtype=torch.bool)
        drop.scatter_(-1, order[..., : round(sparsity * parts.shape[-1])], True)
        linear.weight.data[drop.view_as(score)] = 0
    return small


@torch.no_grad()
def sparse_gpt(
    model: PreTrainedModel, moments: InputMoments, sparsity: float = 0.5, width: int = 128
) -> PreTrainedModel:
    """The model with this share of zeros, the other weights changed so that outputs change least (arXiv:2301.00774).

    In each stretch of ``width`` inputs the weights of least w^2 / U_jj^2 are zero, the share over all outputs together
    (:func:`surgeon.compensated`). The released code takes the inputs that the model so far pruned gives, layer after
    layer; here they are those of the full model, as for every other method.
    """

    def rule(part: Tensor, scale: Tensor) -> Fix:
        score = (part / scale).square().flatten()
        keep = torch.ones_like(score, dtype=torch.bool)
        keep[score.argsort(stable=True)[: round(sparsity * len(score))]] = False
        keep = keep.view_as(part)
        return lambda column, place: column * keep[:, place]

    small = copy.deepcopy(model)
    for name, linear in linears(small):
        linear.weight.data = compensated(linear.weight.data, moments[name], rule, width)
    return small


class _Mask(nn.Module):
    """Keeps weights at zero that were zero."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("mask", weight != 0)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked(model: PreTrainedModel) -> PreTrainedModel:
    """The model for training: weights of linear maps that are zero stay zero; :func:`unmasked` makes it plain."""
    small = copy.deepcopy(model)
    for _, linear in list(linears(small)):
        parametrize.register_parametrization(linear, "weight", _Mask(linear.weight))
    return small


def unmasked(model: PreTrainedModel) -> PreTrainedModel:
    """Takes off what :func:`masked` put on, in place."""
    for _, linear in list(linears(model)):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    return model


def zeros(model: PreTrainedModel) -> float:
    """Share of exact zeros in the weights of the layers' linear maps; NaN where they are quantized."""
    try:
        weights = [linear.weight for _, linear in linears(model)]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    except (NotSupported, NotImplementedError, RuntimeError):  # no plain weights
        return float("nan")
