"""Weights and bytes of any model, quantized ones included, and whether all its layers work."""

import io
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.layers import LayerRunner
from paper_src.models import decoder_layers


@torch.no_grad()
def require_alive(model: PreTrainedModel, blocks: Tensor) -> None:
    """Raise InputError where a layer of ``model`` is missing or hands on exactly what it was given."""
    depth = model.config.get_text_config().num_hidden_layers
    if (found := len(decoder_layers(model))) != depth:
        raise InputError(f"the model has {found} layers, its configuration {depth}: a layer was lost")

    def check(index: int, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        state = layer(hidden)
        if torch.equal(state, hidden):
            raise InputError(f"layer {index} hands on what it is given: its weights are zero")
        return state

    LayerRunner(model).drive(blocks.to(model.device), check)


def count_of(model: PreTrainedModel) -> int:
    """Number of weights, quantized ones included; tied ones are counted once."""
    return sum(count for count, _ in _parts(model))


def bytes_of(model: PreTrainedModel) -> dict[str, int]:
    """``memory_bytes`` of all weights with their scales, and ``disk_bytes`` of what ``torch.save`` writes of the state.

    Tied weights stand there once, and every method can be saved so.
    """
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {"memory_bytes": sum(size for _, size in _parts(model)), "disk_bytes": file.getbuffer().nbytes}


def _parts(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(weights, bytes) of each tensor of the state, each storage once."""
    seen: set[int] = set()
    found = []

    def visit(value: object) -> None:
        if isinstance(value, tuple | list):  # torch.ao's packed weight and bias
            for part in value:
                visit(part)
        if not isinstance(value, Tensor) or not value.numel():
            return
        if hasattr(value, "__tensor_flatten__"):  # torchao's: codes and scales
            names, _ = value.__tensor_flatten__()
            inner = [getattr(value, name) for name in names]
            found.append((value.numel(), sum(part.numel() * part.element_size() for part in inner)))
        elif value.is_quantized:  # a float64 scale and an int64 zero point for each output
            found.append((value.numel(), value.numel() * value.element_size() + 16 * len(value)))
        elif value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found.append((value.numel(), value.numel() * value.element_size()))

    for value in model.state_dict().values():
        visit(value)
    return found
