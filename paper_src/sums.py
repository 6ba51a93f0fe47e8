"""Sums that hooks take while a pass runs: each layer's gradient and activation statistics, sequence by sequence.

In :class:`GradientSums` nothing is accumulated in ``.grad``: the weights stay frozen, so autograd carries only
activation gradients, and hooks reduce each weight's gradient to a few numbers a sequence the moment its parts are
known. For a linear layer with input X and output gradient G (T tokens each) the per-sequence gradient is G'X, and its
squared norm is taken from the smaller of G'X itself and the two T x T Gram matrices: ||G'X||^2 = sum(XX' * GG')
(Goodfellow 2015, arXiv:1510.01799, extended
from vectors to sequences).
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from paper_src import InputError, NotSupported

SINK_RATIO = 10.0  # an attention-sink token's norm is above this many times the sequence's median norm


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; afterwards each is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextmanager
def watched(parameter: Tensor, reduce: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, ``reduce`` sees the parameter's gradient as soon as it is known, and then the gradient is let go."""
    before, flag, parameter.grad = parameter.grad, parameter.requires_grad, None
    parameter.requires_grad_(True)

    def hook(parameter: Tensor) -> None:
        reduce(parameter)
        parameter.grad = None

    with parameter.register_post_accumulate_grad_hook(hook):
        try:
            yield
        finally:
            parameter.grad = before
            parameter.requires_grad_(flag)


class GradientSums(ExitStack):
    """Per-sequence ||g||^2 and theta . g of each layer, summed by hooks in one backward pass, until it is closed."""

    def __init__(self, layers: nn.ModuleList, batch_size: int, tokens: int, device: torch.device | None = None):
        super().__init__()
        device = device or next(layers.parameters()).device
        self.tokens = tokens
        self.squared = torch.zeros(batch_size, len(layers), dtype=torch.float64, device=device)
        self.inner = torch.zeros_like(self.squared)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.callback(self.inputs.clear)
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                own = list(module.parameters(recurse=False))
                if isinstance(module, nn.Linear | Conv1D) or all(parameter.ndim == 1 for parameter in own):
                    if own:
                        self.enter_context(module.register_forward_hook(self._forward_hook(index, name)))
                else:  # experts and routers: their gradients are known for the whole batch only
                    self.close()
                    raise InputError(f"layer {index}, {name}: it mixes sequences; load the whole model into memory")

    def _forward_hook(self, index: int, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x, batch_size = args[0] if args else None, len(self.squared)
            tensors = isinstance(x, Tensor) and isinstance(output, Tensor)
            if not tensors or len(x) not in (batch_size, batch_size * self.tokens):
                problem = f"its input does not start with the batch of {batch_size}"
                raise InputError(f"layer {index}, {name}: {problem}; load the whole model into memory")
            if module in self.inputs:
                raise InputError(f"layer {index}, {name} is used twice in one pass: its weights are shared")
            self.inputs[module] = x.detach()
            value, version = output.detach(), output._version

            @torch.no_grad()
            def reduce(gradient: Tensor) -> None:
                # an in-place sum (Falcon's MLP and attention) has overwritten the output: make it again
                known = value if value._version == version else module.forward(self.inputs[module])
                self._reduce(index, module, known, gradient)

            output.register_hook(reduce)

        return hook

    @torch.no_grad()
    def _reduce(self, index: int, module: nn.Module, output: Tensor, gradient: Tensor) -> None:
        x, size = self.inputs.pop(module), len(self.squared)
        if len(x) != size:  # OPT flattens (B, T, .) to (B T, .)
            x, gradient, output = (tensor.unflatten(0, (size, -1)) for tensor in (x, gradient, output))
        if isinstance(module, nn.Linear | Conv1D):
            x, gradient, output = (tensor.flatten(1, -2) for tensor in (x, gradient, output))  # (B, T, .)
            squared = _squared_norms(x, gradient)
            if module.bias is not None:
                squared += _sum_squares(gradient.sum(dim=1))
            # theta . g over weight and bias together: sum_t G_t . (W X_t + b), and W X_t + b is the output
            inner = _sum_products(gradient, output)
        else:
            squared, inner = _small_module(module, x, gradient)
        self.squared[:, index] += squared
        self.inner[:, index] += inner


class ParameterSums(ExitStack):
    """The same for a batch of one sequence, from whole gradients: right whatever the layers do with their input.

    A parameter's gradient lives only until it is summed. One that several layers share counts for each of them.
    """

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        device = next(layers.parameters()).device
        self.squared, self.inner = torch.zeros(2, 1, len(layers), dtype=torch.float64, device=device)
        owners: dict[nn.Parameter, list[int]] = {}
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                owners.setdefault(parameter, []).append(index)
        for parameter, own in owners.items():
            self.enter_context(watched(parameter, functools.partial(self._add, own)))

    def _add(self, layers: list[int], parameter: Tensor) -> None:
        self.squared[0, layers] += _sum_squares(parameter.grad[None])
        self.inner[0, layers] += _sum_products(parameter.grad[None], parameter.detach()[None])


def _squared_norms(x: Tensor, gradient: Tensor) -> Tensor:
    """(B,) float64 ||G'X||^2 of x (B, T, n) and gradient (B, T, m), by the cheaper of two exact ways."""
    tokens, width_in, width_out = x.shape[1], x.shape[2], gradient.shape[2]
    if tokens * (width_in + width_out) < width_in * width_out:
        return _sum_products(x @ x.mT, gradient @ gradient.mT)  # Gram matrices, (B, T, T)
    return torch.stack([_sum_squares((g.mT @ row)[None])[0] for g, row in zip(gradient, x, strict=True)])


def _small_module(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) ||g||^2 and theta . g of a module that is no linear map (a norm), by vmapped backward."""
    parameters = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    bare = copy.copy(module)  # the same weights without our hooks
    bare._forward_hooks = {}

    def weight_gradient(row: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        def run(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(bare, values, (row[None],))[0]

        return torch.func.vjp(run, parameters)[1](upstream)[0]

    with torch.enable_grad():
        gradients = torch.func.vmap(weight_gradient)(x, gradient)  # each (B, *shape of the parameter)
    inner = sum(_sum_products(value, parameters[name][None]) for name, value in gradients.items())
    return sum(map(_sum_squares, gradients.values())), inner


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """(B,) float64 sums over all but the first axis of a * b."""
    return (a.float() * b.float()).flatten(1).sum(dim=1, dtype=torch.float64)


def _sum_squares(a: Tensor) -> Tensor:
    return _sum_products(a, a)


class ActivationSums(ExitStack):
    """Per-sequence statistics of each layer's input and output, taken by hooks, until it is closed."""

    def __init__(self, layers: nn.ModuleList):
        super().__init__()
        self.columns: dict[str, list[Tensor]] = {}
        self.ends: list[Tensor] = []
        for layer in layers:
            self.enter_context(layer.register_forward_hook(self._hook, with_kwargs=True))

    @torch.no_grad()
    def _hook(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach().float()  # (B, T, d)
        after = (output[0] if isinstance(output, tuple | list) else output).detach().float()
        if before.ndim != 3:
            raise NotSupported(f"{type(layer).__name__} has states of shape {tuple(before.shape)}, not (B, T, d)")
        norms = after.norm(dim=-1)  # (B, T)
        keep = norms <= SINK_RATIO * norms.median(dim=1, keepdim=True).values
        cosine = functional.cosine_similarity(before, after, dim=-1)  # (B, T)
        values = {"block_influence": 1 - cosine.double().mean(dim=1)}
        values |= _moments(after, torch.ones_like(keep), "")
        values |= _moments(after, keep, "_no_sink")
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)
        if not self.ends:
            self.ends.append(before[:, -1].cpu())
        self.ends.append(after[:, -1].cpu())


def _moments(states: Tensor, keep: Tensor, suffix: str) -> dict[str, Tensor]:
    """(B,) variance, mean |h| and kurtosis of states (B, T, d) where ``keep`` (B, T)."""
    weight = keep.unsqueeze(-1)
    count = keep.sum(dim=1, dtype=torch.float64) * states.shape[-1]

    def average(values: Tensor) -> Tensor:
        return (values * weight).sum(dim=(1, 2), dtype=torch.float64) / count

    centred = states - average(states).float()[:, None, None]
    square = centred.square()
    variance = average(square)
    return {
        f"activation_variance{suffix}": variance,
        f"activation_mean_abs{suffix}": average(states.abs()),
        f"activation_kurtosis{suffix}": average(square.square()) / variance.square(),
    }
