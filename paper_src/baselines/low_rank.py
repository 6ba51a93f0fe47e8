"""Linear maps as products of two thin ones."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.baselines.moments import InputMoments, linears
from paper_src.models import count_parameters

Factors = dict[str, tuple[Tensor, Tensor]]  # of each map, (out, m) and (m, in)


@torch.no_grad()
def factors(model: PreTrainedModel, moments: InputMoments | None = None) -> Factors:
    """name -> (out, m), (m, in) float32 with W = U V, whose first r columns and rows are the best map of rank r.

    Best for |W - U V|^2, or with ``moments`` of :func:`input_moments` for E |W x - U V x|^2, which is the SVD of W S
    where S S^T = E x x^T (SVD-LLM, arXiv:2403.07378). m is the smaller side. In float64, by the eigenvectors of the
    smaller of the two products of W S with itself.
    """
    found = {}
    for name, linear in linears(model):
        weight = linear.weight.double()
        eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        moment = eye if moments is None else moments[name].double()
        moment = moment + 1e-6 * moment.diagonal().mean() * eye
        if len(weight) <= weight.shape[1]:
            squares, u = _descending(weight @ moment @ weight.T)
            left, right = u, u.T @ weight  # U and s V^T S^-1
            scale = squares**0.25
        else:
            root = torch.linalg.cholesky(moment)
            squares, v = _descending(root.T @ weight.T @ weight @ root)
            left, right = weight @ root @ v, torch.linalg.solve_triangular(root, v.T, upper=False, left=False)
            scale = squares**-0.25
        found[name] = ((left * scale).float(), (right / scale[:, None]).float())
    return found


def _descending(square: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) from the largest down, none below 1e-12 of it, and eigenvectors (n, n)."""
    values, vectors = torch.linalg.eigh(square)
    return values.flip(0).clamp(min=1e-12 * float(values[-1])), vectors.flip(1)


@torch.no_grad()
def low_rank(model: PreTrainedModel, parts: Factors, parameters: int) -> PreTrainedModel:
    """The model whose linear maps are products of two thin ones, of at most so many ``parameters``. Not standard.

    All maps keep the same share of their size.

    Raises:
        InputError: ``parameters`` leaves no rank.
    """
    small = copy.deepcopy(model)
    maps = list(linears(small))
    inside = sum(part.weight.numel() for _, part in maps)
    share = (parameters - count_parameters(small) + inside) / inside
    for name, linear in maps:
        rank = int(share * linear.weight.numel() / sum(linear.weight.shape))
        if rank < 1:
            raise InputError(f"{parameters:,} parameters leave no rank in {name}: give more")
        left, right = parts[name]
        small.set_submodule(name, _product(linear, left[:, :rank], right[:rank]))
    return small


def _product(linear: nn.Linear, left: Tensor, right: Tensor) -> nn.Sequential:
    """x -> left (right x), with the bias of ``linear``."""
    first = nn.Linear(right.shape[1], len(right), bias=False)
    second = nn.Linear(left.shape[1], len(left), bias=linear.bias is not None)
    first.weight, second.weight = (nn.Parameter(part.to(linear.weight.dtype).contiguous()) for part in (right, left))
    if linear.bias is not None:
        second.bias = nn.Parameter(linear.bias.detach().clone())
    return nn.Sequential(first, second)
