"""What else makes a model small or fast: quantization, sparsity, narrower layers, low rank, other ways to lose depth.

Every function takes a model and returns another; the one given is not changed.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.compaction import compact
from paper_src.models import count_parameters, decoder_layers, first_line, last_hidden, locate_layers

Moments = dict[str, Tensor]


def linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Dotted name and module of every linear map inside the decoder layers."""
    path, layers = locate_layers(model)
    found = [(name, part) for name, part in layers.named_modules(prefix=path) if isinstance(part, nn.Linear)]
    if not found:
        raise NotSupported(f"{type(model).__name__} has no nn.Linear in its layers, and nothing else is changed")
    yield from found


@torch.no_grad()
def input_moments(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> Moments:
    """name -> (in, in) float32 mean of x x^T over the tokens of ``blocks`` (N, T), for every map of :func:`linears`.

    Maps that read the same states (query, key and value; gate and up) share one tensor.
    """
    moments: Moments = {}
    latest: list[tuple[Tensor, Tensor]] = []  # the input seen last, and its sum of x x^T

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0]
        if not (latest and latest[0][0] is states):
            x = states.flatten(0, -2).float()
            total = moments.setdefault(name, x.new_zeros(x.shape[1], x.shape[1]))
            total += x.T @ x
            latest[:] = [(states, total)]
        moments[name] = latest[0][1]

    with ExitStack() as hooks:
        for name, linear in linears(model):
            hook = linear.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs))
            hooks.callback(hook.remove)
        for batch in blocks.split(batch_size):
            last_hidden(model, batch)
    for unique in {id(total): total for total in moments.values()}.values():
        unique.div_(blocks.numel())
    return moments


# Quantization. Weights of the layers' linear maps; embedding and head stay as they are.


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its floating-point weights in ``dtype``."""
    return copy.deepcopy(model).to(dtype)


def torchao_quantized(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model quantized by torchao: ``int8_weight``, ``int8_dynamic``, ``int4_weight`` or ``int4_unpacked``.

    - ``int8_weight``: a scale for each output channel; products in the model's dtype.
    - ``int8_dynamic``: inputs as well, a scale for each token.
    - ``int4_weight``: groups of 32 inputs, packed for torchao's own kernels.
    - ``int4_unpacked``: the same values, each kept in 8 bits: the quality of int4 where no kernel takes packed ones.

    Raises:
        NotSupported: torchao has no kernel for it here.
    """
    from torchao import quantization as ao  # slow to import, and few sections ask for it

    group = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
    configurations = {
        "int8_weight": ao.Int8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "int4_weight": lambda: ao.Int4WeightOnlyConfig(group_size=32),
        "int4_unpacked": lambda: ao.IntxWeightOnlyConfig(**group),
    }
    small = copy.deepcopy(model)
    names = {name for name, _ in linears(small)}
    try:
        ao.quantize_(small, configurations[kind](), filter_fn=lambda module, name: name in names)
    except (ImportError, NotImplementedError, RuntimeError, AssertionError, ValueError) as error:
        raise NotSupported(first_line(error)) from error
    return small


def dynamic_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with int8 weights and dynamic int8 inputs by ``torch.ao``: its CPU kernels, float32 elsewhere.

    PyTorch has moved its quantization to torchao and keeps this one for its kernels.

    Raises:
        NotSupported: not on the CPU, or torch was built without these kernels.
    """
    if model.device.type != "cpu":
        raise NotSupported(f"torch.ao's dynamic quantization runs on the CPU, the model is on {model.device}")
    small = copy.deepcopy(model).float()
    wanted = dict.fromkeys((name for name, _ in linears(small)), torch.ao.quantization.default_dynamic_qconfig)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            return torch.ao.quantization.quantize_dynamic(small, wanted, dtype=torch.qint8, inplace=True)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise NotSupported(first_line(error)) from error


# Sparsity. Zeros in the weights of the layers' linear maps, in equal shares.


def magnitude_pruned(model: PreTrainedModel, sparsity: float) -> PreTrainedModel:
    """The model whose smallest weights of each linear map are zero, by ``torch.nn.utils.prune``."""
    small = copy.deepcopy(model)
    for _, linear in linears(small):
        prune.l1_unstructured(linear, "weight", sparsity)
        prune.remove(linear, "weight")
    return small


def wanda(model: PreTrainedModel, moments: Moments, sparsity: float = 0.5, group: int = 0) -> PreTrainedModel:
    """The model whose weights of least |W_ij| * sqrt(E x_j^2) are zero (Wanda, arXiv:2306.11695).

    Args:
        model: the full model.
        moments: of :func:`input_moments`.
        sparsity: share of zeros in each output row, or in each ``group``.
        group: consecutive inputs compared with one another: 4 with sparsity 0.5 is 2:4; 0 is the whole row.
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
    """Share of exact zeros in the weights of the layers' linear maps."""
    weights = [linear.weight for _, linear in linears(model)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


# Smaller matrices, all layers kept.


@torch.no_grad()
def width_pruned(model: PreTrainedModel, moments: Moments, parameters: int) -> PreTrainedModel:
    """The model with fewer MLP neurons and attention groups in every layer, a standard checkpoint.

    Neurons of least sqrt(E a_j^2) * |W_down,j| are removed, as are whole groups of query heads with their key and
    value head, of least E |W_o,group x|^2. The number of groups is that whose share
    comes nearest to the share of neurons that the size then allows, of those that divide the hidden size, as
    transformers asks of a Llama.

    Args:
        model: with ``mlp.{gate,up,down}_proj`` and ``self_attn.{q,k,v,o}_proj`` in each layer, as Llama has.
        moments: of :func:`input_moments`.
        parameters: most parameters of the result.

    Raises:
        NotSupported: the family's layers have other parts.
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


@torch.no_grad()
def factors(model: PreTrainedModel, moments: Moments | None = None) -> dict[str, tuple[Tensor, Tensor]]:
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
def low_rank(model: PreTrainedModel, parts: dict[str, tuple[Tensor, Tensor]], parameters: int) -> PreTrainedModel:
    """The model whose linear maps are products of two thin ones, all of one share of their size. Not standard.

    Args:
        model: the full model.
        parts: of :func:`factors`.
        parameters: most parameters of the result.

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


# Less depth, otherwise.


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

    A merge is kept if the mean cosine of the last hidden states to the full model's on ``blocks`` stays above a
    threshold. The paper tunes the threshold to a size; here it is lowered step by step until k layers are left.

    Args:
        model: the full model.
        k: layers to keep.
        blocks: (N, T) calibration text; the paper takes a few sentences.
        most: layers merged at once, at most.
        interval: layers between two merges.
        thresholds: falling; the last lets everything through.
    """
    reference = last_hidden(model, blocks).float()
    small = model
    for threshold in thresholds:
        low = len(decoder_layers(small)) - most
        while low >= 0 and len(decoder_layers(small)) > k:
            merged = _merged(
                small, low, min(most, len(decoder_layers(small)) - low, 1 + len(decoder_layers(small)) - k)
            )
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
