"""The linear maps of the layers, and second moments of their inputs on calibration text."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.models import last_hidden, locate_layers


class InputMoments(dict[str, Tensor]):
    """Name of each map -> (in, in) E x x^T of its input x, and in ``means`` (in,) E x."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}


def linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Dotted name and module of every linear map inside the decoder layers."""
    path, layers = locate_layers(model)
    found = [(name, part) for name, part in layers.named_modules(prefix=path) if isinstance(part, nn.Linear)]
    if not found:
        raise NotSupported(f"{type(model).__name__} has no nn.Linear in its layers, and nothing else is changed")
    yield from found


@torch.no_grad()
def input_moments(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> InputMoments:
    """float32 means of x x^T and x over the tokens of ``blocks`` (N, T), for every map of :func:`linears`.

    Maps that read the same states (query, key and value; gate and up) share their tensors. The inputs are those of
    the full model, also for maps behind others that a method changes.
    """
    moments = InputMoments()
    latest: list[tuple[Tensor, str]] = []  # the input seen last, and the map that it was seen at

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0]
        if not (latest and latest[0][0] is states):
            x = states.flatten(0, -2).float()
            moments.setdefault(name, x.new_zeros(x.shape[1], x.shape[1])).add_(x.T @ x)
            moments.means.setdefault(name, x.new_zeros(x.shape[1])).add_(x.sum(0))
            latest[:] = [(states, name)]
        moments[name], moments.means[name] = moments[latest[0][1]], moments.means[latest[0][1]]

    with ExitStack() as hooks:
        for name, linear in linears(model):
            hook = linear.register_forward_pre_hook(lambda module, inputs, name=name: add(name, inputs))
            hooks.callback(hook.remove)
        for batch in blocks.split(batch_size):
            last_hidden(model, batch)
    for unique in {id(total): total for total in (*moments.values(), *moments.means.values())}.values():
        unique.div_(blocks.numel())
    return moments
