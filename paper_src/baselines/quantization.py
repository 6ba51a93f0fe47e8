"""Fewer bits per weight of the layers' linear maps, by torchao and torch.ao; embedding and head stay as they are."""

import copy
import warnings

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.baselines.moments import InputMoments, linears
from paper_src.baselines.surgeon import Fix, compensated
from paper_src.models import cast_
from paper_src.support.weights import first_line


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its floating-point weights in ``dtype``."""
    small = copy.deepcopy(model)
    return cast_(small, [dtype if own.is_floating_point() else own.dtype for own in small.parameters()])


def torchao_quantized(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model quantized by torchao, by a ``kind`` of those below.

    Raises:
        NotSupported: torchao has no kernel for it here.
    """
    from torchao import quantization as ao  # slow to import, and few sections ask for it

    group = {"weight_dtype": torch.int4, "granularity": ao.PerGroup(32)}
    configurations = {
        # a scale for each output channel, products in the model's dtype; or inputs as well, a scale for each token
        "int8_weight": ao.Int8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        # packed for torchao's own kernels; or the same values kept in 8 bits, where no kernel takes packed ones
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


GROUPS = (128, 64, 32, 16)  # weights that share a scale and a zero: the most that divide the map's inputs


def group_of(inputs: int) -> int:
    """Weights of one group in a map of so many inputs.

    Raises:
        NotSupported: none of ``GROUPS`` divides them.
    """
    try:
        return next(group for group in GROUPS if inputs % group == 0)
    except StopIteration:
        raise NotSupported(f"no group of {GROUPS} weights divides {inputs} inputs") from None


def int4_groups(model: PreTrainedModel, hqq: bool = False) -> PreTrainedModel:
    """The model with int4 weights in groups of :func:`group_of`, by torchao: 16 steps from the least to the largest.

    Each weight is the nearest of them. With ``hqq`` torchao's HQQ chooses the scales instead, without a zero.
    """
    from torchao import quantization as ao

    how = {"weight_dtype": torch.int4, "mapping_type": ao.MappingType.ASYMMETRIC}
    if hqq:
        how |= {"mapping_type": ao.MappingType.SYMMETRIC, "intx_choose_qparams_algorithm": "hqq_scale_only"}
    small = copy.deepcopy(model)
    for _, linear in list(linears(small)):
        granularity = ao.PerGroup(group_of(linear.in_features))
        ao.quantize_(linear, ao.IntxWeightOnlyConfig(granularity=granularity, **how))
    return small


@torch.no_grad()
def gptq(model: PreTrainedModel, moments: InputMoments) -> PreTrainedModel:
    """The model with int4 weights in the groups of :func:`int4_groups`, rounded by GPTQ (arXiv:2210.17323).

    Scale and zero of a group are chosen when its first input is reached; each error is made up for by the inputs behind
    (:func:`surgeon.compensated`). torchao's GPTQ needs a GPU, so the rounding is ours and the storage torchao's.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor

    small = copy.deepcopy(model)
    for name, linear in list(linears(small)):
        group, dtype = group_of(linear.in_features), linear.weight.dtype
        grids: list[tuple[Tensor, Tensor]] = []  # of each group, scale and zero

        def rule(part: Tensor, scales: Tensor, grids: list = grids, dtype: torch.dtype = dtype) -> Fix:
            scale, zero = _grid(part, dtype)
            grids.append((scale, zero))
            return lambda column, place: scale * (((column / scale).round() + zero).clamp(-8, 7) - zero)

        weight = compensated(linear.weight.data, moments[name], rule, group)
        scale, zero = (torch.stack(parts, dim=1) for parts in zip(*grids, strict=True))  # (out, groups)
        packed = IntxUnpackedToInt8Tensor.from_hp(
            weight, (1, group), torch.int4, custom_scale=scale.to(dtype), custom_zero_point=zero.to(torch.int8),
            intx_choose_qparams_algorithm=None,
        )  # fmt: skip
        linear.weight = nn.Parameter(packed, requires_grad=False)
    return small


def _grid(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out,) scale, as it is rounded to ``dtype``, and zero: q in -8..7 stands for scale (q - zero)."""
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    scale = ((high - low) / 15).to(dtype).clamp(min=torch.finfo(dtype).smallest_normal).to(part.dtype)
    return scale, (-8 - (low / scale).round()).clamp(-8, 7)


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
