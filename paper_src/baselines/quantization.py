"""Fewer bits per weight of the layers' linear maps, by torchao and torch.ao; embedding and head stay as they are."""

import copy
import warnings

import torch
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.baselines.moments import linears
from paper_src.models import first_line


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its floating-point weights in ``dtype``."""
    return copy.deepcopy(model).to(dtype)


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
