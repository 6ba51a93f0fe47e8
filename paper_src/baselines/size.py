"""Weights and bytes of any model, quantized ones included, and whether all its layers work."""

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.layers import LayerRunner
from paper_src.models import decoder_layers
from paper_src.support.weights import PINNED, pinned


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


def bytes_of(model: PreTrainedModel, bits: int = 8) -> dict[str, int]:
    """``memory_bytes`` of all weights with their scales as this process holds them, ``packed_bytes``, ``disk_bytes``.

    ``packed_bytes`` are those of :func:`packed_bytes`, ``disk_bytes`` of what ``torch.save`` writes of the state. Tied
    weights stand there once, and every method can be saved so.
    """
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {"memory_bytes": sum(size for _, size in _parts(model)), "packed_bytes": packed_bytes(model, bits),
            "disk_bytes": file.getbuffer().nbytes}  # fmt: skip


def packed_bytes(model: PreTrainedModel, bits: int = 8) -> int:
    """Bytes of the best packed file of the weights, tied ones once.

    A quantized weight takes ``bits`` / 8, each of its scales 2, each zero point ``bits`` / 8 unless all are zero.
    Others take what their dtype takes; where many are zero, a bit each that says which, and the rest as they are.
    """
    total = 0.0
    for value in _stored(model):
        if hasattr(value, "__tensor_flatten__"):
            scales, zeros = _grid(value)
            total += value.numel() * bits / 8 + 2 * scales + zeros * bits / 8
        elif value.is_quantized:
            total += value.numel() * bits / 8 + 2 * len(value)
        else:
            dense = value.numel() * value.element_size()
            total += min(dense, value.numel() / 8 + int(value.count_nonzero()) * value.element_size())
    return round(total)


def _grid(value: Tensor) -> tuple[int, int]:
    """Numbers of scales and of zero points of a tensor of torchao."""
    scales = zeros = 0
    for name in value.__tensor_flatten__()[0]:
        part = getattr(value, name)
        if hasattr(part, "__tensor_flatten__"):
            return _grid(part)
        scales += part.numel() if "scale" in name else 0
        zeros += part.numel() if "zero" in name and bool(part.any()) else 0
    return scales, zeros


def original_file(name: str) -> Path | None:
    """The packed file (.gguf) that the model called ``name`` comes from, if it does."""
    path = pinned(name) if name in PINNED else Path(name).expanduser()
    if path.is_dir() and not any(path.glob("*.safetensors")):
        path = next(path.glob("*.gguf"), path)
    return path if path.is_file() and path.suffix == ".gguf" else None


def _stored(model: PreTrainedModel) -> Iterator[Tensor]:
    """The tensors of the state; plain ones that share a storage, as tied weights do, once."""
    seen: set[int] = set()
    for value in _leaves(model.state_dict().values()):
        if hasattr(value, "__tensor_flatten__") or value.is_quantized:
            yield value
        elif value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            yield value


def _leaves(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors that hold numbers, also those of torch.ao's packed weight and bias."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _leaves(value)
        elif isinstance(value, Tensor) and value.numel():
            yield value


def _parts(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(weights, bytes) of each tensor of the state, each storage once."""
    found = []
    for value in _stored(model):
        if hasattr(value, "__tensor_flatten__"):  # torchao's: codes and scales
            names, _ = value.__tensor_flatten__()
            inner = [getattr(value, name) for name in names]
            found.append((value.numel(), sum(part.numel() * part.element_size() for part in inner)))
        elif value.is_quantized:  # a float64 scale and an int64 zero point for each output
            found.append((value.numel(), value.numel() * value.element_size() + 16 * len(value)))
        else:
            found.append((value.numel(), value.numel() * value.element_size()))
    return found
