"""Narrower layers: fewer MLP neurons and attention groups."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.baselines.moments import InputMoments
from paper_src.models import count_parameters, locate_layers


@torch.no_grad()
def width_pruned(model: PreTrainedModel, moments: InputMoments, parameters: int) -> PreTrainedModel:
    """The model with fewer MLP neurons and attention groups in every layer, of at most so many ``parameters``.

    Neurons of least sqrt(E a_j^2) * |W_down,j| are removed, as are whole groups of query heads with their key and
    value head, of least E |W_o,group x|^2: a standard checkpoint. The share of groups that stays is the one nearest to
    the share of neurons that the size then allows, of those that divide the hidden size, as transformers asks.

    Raises:
        NotSupported: a layer has other parts than Llama's.
        InputError: ``parameters`` leaves no neuron.
    """
    small = copy.deepcopy(model)
    path, layers = locate_layers(small)
    config = small.config.get_text_config()
    groups, neurons = _widths(small, layers, parameters)
    heads = config.num_attention_heads // config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"{path}.{index}"
        down, out = mlp.down_proj.weight.float(), attention.o_proj.weight.float()
        energy = moments[f"{name}.mlp.down_proj"].diagonal().sqrt() * down.norm(dim=0)
        kept = energy.topk(neurons).indices.sort().values
        _narrow_(mlp.gate_proj, rows=kept), _narrow_(mlp.up_proj, rows=kept), _narrow_(mlp.down_proj, columns=kept)
        wide = heads * size
        part = (out.T @ out) * moments[f"{name}.self_attn.o_proj"]  # E |W x|^2 is the sum of its entries
        worth = part.unflatten(0, (-1, wide)).unflatten(2, (-1, wide)).sum((1, 3)).diagonal()
        best = worth.topk(groups).indices.sort().values
        query, key = (torch.cat([torch.arange(n * g, n * g + n) for g in best.tolist()]) for n in (wide, size))
        _narrow_(attention.q_proj, rows=query), _narrow_(attention.o_proj, columns=query)
        _narrow_(attention.k_proj, rows=key), _narrow_(attention.v_proj, rows=key)
    config.head_dim, config.intermediate_size = size, neurons
    config.num_key_value_heads, config.num_attention_heads = groups, groups * heads
    return small


def _widths(model: PreTrainedModel, layers: nn.ModuleList, parameters: int) -> tuple[int, int]:
    """Attention groups and MLP neurons of every layer that come nearest to ``parameters`` from below."""
    config = model.config.get_text_config()
    try:
        attention, mlp = layers[0].self_attn, layers[0].mlp
        group = sum(count_parameters(getattr(attention, f"{name}_proj")) for name in "qkvo")
        group //= config.num_key_value_heads
        neuron = sum(count_parameters(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
        neuron //= config.intermediate_size
    except AttributeError as error:
        raise NotSupported(f"{type(layers[0]).__name__} has other parts than Llama's layers ({error})") from error
    fixed = count_parameters(model) - count_parameters(layers)
    fixed += sum(count_parameters(layer) - group * config.num_key_value_heads - neuron * config.intermediate_size
                 for layer in layers)  # fmt: skip
    room = (parameters - fixed) // len(layers)
    most = config.num_key_value_heads, config.intermediate_size
    options = [(groups, min((room - groups * group) // neuron, most[1])) for groups in range(1, most[0] + 1)]
    per_group = config.num_attention_heads // most[0]
    options = [(groups, neurons) for groups, neurons in options
               if neurons > 0 and config.hidden_size % (groups * per_group) == 0]  # fmt: skip
    if not options:
        least = fixed + len(layers) * (group + neuron)
        raise InputError(f"{parameters:,} parameters leave no neuron in a layer: give at least {least:,}")
    return min(options, key=lambda pair: abs(pair[0] / most[0] - pair[1] / most[1]))


def _narrow_(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only these outputs or inputs of ``linear``."""
    weight, bias = linear.weight.data, linear.bias
    if rows is not None:
        weight = weight[rows]
        linear.bias = None if bias is None else nn.Parameter(bias.data[rows])
    if columns is not None:
        weight = weight[:, columns]
    linear.weight = nn.Parameter(weight.contiguous())
    linear.out_features, linear.in_features = weight.shape
