"""Narrower layers: fewer MLP neurons and attention groups."""

import copy

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.baselines.moments import InputMoments
from paper_src.models import count_parameters, locate_layers


@torch.no_grad()
def width_pruned(
    model: PreTrainedModel, moments: InputMoments, parameters: int, score: str = "norm", repair: str = "none"
) -> PreTrainedModel:
    """The model with fewer MLP neurons and attention groups in every layer, of at most so many ``parameters``.

    Units of the least score go, neurons or groups of query heads with their key and value head: a standard checkpoint.
    The share of groups that stays is the one nearest to the share of neurons that the size then allows, of those that
    divide the hidden size, as transformers asks. x_u is what unit u gives to its part's output matrix W.

    Args:
        score: ``norm``, E |W_u x_u|^2; or ``fluctuation``, var(x_j) |W_j|^2 of a neuron j, of a group of heads the sum
            of its squares (FLAP's code, arXiv:2312.11983; in its variant of the same widths everywhere, UL-UM).
        repair: of W: ``none``; ``refit``, least squares on the inputs S that stay, W' = W M_:S (M_SS + ridge)^-1 with
            M = E x x^T; or ``bias``, as in FLAP, what the removed inputs give on average, W_j E x_j.

    Raises:
        NotSupported: a layer has other parts than Llama's, or its family no biases where they are asked for.
        InputError: ``parameters`` leaves no neuron.
    """
    small = copy.deepcopy(model)
    (path, layers), config = locate_layers(small), small.config.get_text_config()
    if repair == "bias":
        _add_biases_(config, layers)
    groups, neurons = _widths(small, layers, parameters)
    heads = config.num_attention_heads // config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for index, layer in enumerate(layers):
        name = f"{path}.{index}.mlp.down_proj"
        kept = _best(layer.mlp.down_proj, name, moments, 1, neurons, score)
        _narrow_(layer.mlp.gate_proj, rows=kept), _narrow_(layer.mlp.up_proj, rows=kept)
        _cut_inputs_(layer.mlp.down_proj, name, moments, kept, repair)
        attention, name = layer.self_attn, f"{path}.{index}.self_attn.o_proj"
        best = _best(attention.o_proj, name, moments, heads * size, groups, score)
        query, key = (torch.cat([torch.arange(n * g, n * g + n) for g in best.tolist()]) for n in (heads * size, size))
        _narrow_(attention.q_proj, rows=query)
        _narrow_(attention.k_proj, rows=key), _narrow_(attention.v_proj, rows=key)
        _cut_inputs_(attention.o_proj, name, moments, query, repair)
    config.head_dim, config.intermediate_size = size, neurons
    config.num_key_value_heads, config.num_attention_heads = groups, groups * heads
    return small


def _best(linear: nn.Linear, name: str, moments: InputMoments, wide: int, count: int, score: str) -> Tensor:
    """(count,) units of ``wide`` inputs of the highest score, in order."""
    weight, moment = linear.weight.float(), moments[name]
    if score == "fluctuation":
        worth = (moment.diagonal() - moments.means[name].square()) * weight.square().sum(0)
        worth = worth.unflatten(0, (-1, wide)).square().sum(1)  # of single neurons the order is the same
    else:
        part = (weight.T @ weight) * moment  # E |W x|^2 is the sum of its entries
        worth = part.unflatten(0, (-1, wide)).unflatten(2, (-1, wide)).sum((1, 3)).diagonal()
    return worth.topk(count).indices.sort().values


RIDGE = 1e-3  # of the mean diagonal of the moment


def _cut_inputs_(linear: nn.Linear, name: str, moments: InputMoments, kept: Tensor, repair: str) -> None:
    """Keep only the inputs ``kept`` of ``linear``, and let it make up for the others."""
    weight = linear.weight.data.double()
    if repair == "refit":
        moment = moments[name].double()
        own = moment[kept][:, kept] + RIDGE * moment.diagonal().mean() * torch.eye(len(kept), device=weight.device)
        weight[:, kept] = torch.linalg.solve(own, moment[kept] @ weight.T).T
    if repair == "bias":
        gone = moments.means[name].double()
        gone[kept] = 0
        linear.bias.data = (linear.bias.data.double() + weight @ gone).to(linear.bias.dtype)
    linear.weight.data = weight.to(linear.weight.dtype)
    _narrow_(linear, columns=kept)


def _add_biases_(config: PretrainedConfig, layers: nn.ModuleList) -> None:
    """Biases of zero where there are none, and the entries of ``config`` that say so."""
    if not (hasattr(config, "attention_bias") and hasattr(config, "mlp_bias")):
        raise NotSupported(f"{type(config).__name__} has no attention_bias and mlp_bias: its layers take no biases")
    config.attention_bias = config.mlp_bias = True
    for part in layers.modules():
        if isinstance(part, nn.Linear) and part.bias is None:
            part.bias = nn.Parameter(part.weight.new_zeros(part.out_features))


def _widths(model: PreTrainedModel, layers: nn.ModuleList, parameters: int) -> tuple[int, int]:
    """Attention groups and MLP neurons of every layer that come nearest to ``parameters`` from below."""
    config = model.config.get_text_config()
    try:
        attention, mlp = layers[0].self_attn, layers[0].mlp
        group = sum(count_parameters(getattr(attention, f"{name}_proj")) for name in "qkv")
        group = (group + attention.o_proj.weight.numel()) // config.num_key_value_heads  # its bias stays whole
        neuron = sum(count_parameters(getattr(mlp, f"{name}_proj")) for name in ("gate", "up"))
        neuron = (neuron + mlp.down_proj.weight.numel()) // config.intermediate_size
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
