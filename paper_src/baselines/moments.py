"""The linear maps of the layers, and second moments of their inputs on calibration text."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.models import last_hidden, locate_layers

InputMoments = dict[str, Tensor]  # of each map's input x, E x x^T


def linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Dotted name and module of every linear map inside the decoder layers."""
    path, layers = locate_layers(model)
    found = [(name, part) for name, part in layers.named_modules(prefix=path) if isinstance(part, nn.Linear)]
    if not found:
        raise NotSupported(f"{type(model).__name__} has no nn.Linear in its layers, and nothing else is changed")
    yield from found


@torch.no_grad()
def input_moments(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> InputMoments:
    """name -> (in, in) float32 mean of x x^T over the tokens of ``blocks`` (N, T), for every map of :func:`linears`.

    Maps that read the same states (query, key and value; gate and up) share one tensor.
    """
    moments: InputMoments = {}
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
