"""Importance scores of every layer from one forward and backward pass over calibration text.

Nothing is accumulated in ``.grad``. The weights stay frozen, so autograd carries only activation
gradients; hooks reduce each weight's gradient to a few numbers a sequence the moment its parts are
known. For a linear layer with input X and output gradient G (T tokens each) the per-sequence gradient
is G'X, and its squared norm is taken from the smaller of G'X itself and the two T x T Gram matrices:
||G'X||^2 = sum(XX' * GG')  (Goodfellow 2015, arXiv:1510.01799, extended from vectors to sequences).
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paper_src import InputError
from paper_src.layers import LayerRunner
from paper_src.models import decoder_layers, last_hidden, logits_of, offloaded

SINK_RATIO = 10.0  # an attention-sink token's norm is above this many times the sequence's median norm


@dataclass
class LayerScores:
    """Scores of L layers on N sequences.

    Attributes:
        per_sequence: name -> (N, L) float64; a layer's score is the mean over N.
        angular: (L+1, L+1) float64; [l, m] is the angular distance, in [0, 1], between the states before
            layers l and m at the last token (m = L: before the final norm).
        parameters: (L,) int64, parameters in each layer.
    """

    per_sequence: dict[str, Tensor]
    angular: Tensor
    parameters: Tensor

    def add(self, name: str, rows: Sequence[Sequence[float]]) -> None:
        """Add a score that was measured elsewhere, (N, L): one row a sequence, or a group of them."""
        self.per_sequence[name] = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])

    def mean(self, name: str) -> Tensor:
        """(L,) score: mean over sequences."""
        return self.per_sequence[name].mean(dim=0)

    def standard_error(self, name: str) -> Tensor:
        """(L,) standard error of :meth:`mean` over sequences; NaN for a single sequence."""
        values = self.per_sequence[name]
        return values.std(dim=0) / math.sqrt(len(values))

    def half_split_tau(self, name: str) -> float:
        """Kendall's tau between the rankings from even and odd sequences: 1 means converged."""
        values = self.per_sequence[name]
        return float(kendalltau(values[0::2].mean(dim=0), values[1::2].mean(dim=0)).statistic)


def score_layers(
    model: PreTrainedModel,
    blocks: Tensor,
    batch_size: int = 8,
    labels: str = "text",
    seed: int = 0,
    progress: Callable = iter,
) -> LayerScores:
    """Scores of every layer from one forward-backward pass over ``blocks``.

    With g the gradient of one sequence's loss (mean next-token NLL, nats/token) for a layer's parameters:

    - ``fisher`` = E ||g||^2, the trace of the empirical Fisher matrix; ``fisher_per_parameter`` divides
      by the layer's parameter count; ``grad_norm`` = E ||g||;
    - ``taylor`` = E |theta . g|, the first-order change of the loss when the layer's weights go to zero
      (Molchanov et al. 2019, arXiv:1906.10771, with the whole layer as one group);
    - ``activation_variance``, ``activation_mean_abs``, ``activation_kurtosis`` (E (h - mean)^4 / variance^2)
      of the layer's output over a sequence's tokens and units, and
      ``..._no_sink`` without the tokens whose norm is above ``SINK_RATIO`` times the sequence's median;
    - ``block_influence`` = 1 - E cos(input, output) over tokens (ShortGPT, arXiv:2403.03853, eq. 1), the
      last layer's output taken before the final norm.

    Args:
        model: a causal model; its parameters and their ``requires_grad`` are as before on return.
        blocks: (N, T) int64 token ids, T >= 2.
        batch_size: sequences a step. 1 serves layers that mix sequences (flattened experts).
        labels: ``text``: g is of the text's own next tokens, and ``fisher`` the empirical Fisher. ``model``:
            of next tokens drawn from the model's distribution, and ``fisher`` the true Fisher (Kunstner et
            al. 2019, arXiv:1905.12558).
        seed: of the drawn labels.
        progress: wraps the iterable of batches, for example ``tqdm``.

    Raises:
        InputError: blocks too short, weights in float16, a layer that is used twice or flattens the batch, or
            non-finite scores.
    """
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: give at least 1")
    if blocks.ndim != 2 or blocks.shape[1] < 2 or not len(blocks):
        raise InputError(f"blocks have shape {tuple(blocks.shape)}: give (N, T) token ids with T >= 2")
    if model.dtype == torch.float16:
        raise InputError("float16 holds neither the squares of large activations nor small gradients: "
                         "load the model in bfloat16 or float32")  # fmt: skip
    if labels not in ("text", "model"):
        raise InputError(f"labels {labels!r}: use 'text' or 'model'")
    layers = decoder_layers(model)
    generator = torch.Generator(device=model.device).manual_seed(seed) if labels == "model" else None
    rows, states = [], []
    with _frozen(model), torch.enable_grad():
        score = _score_layerwise if offloaded(model) else _score_batch
        for batch in progress(blocks.split(batch_size)):
            row, ends = score(model, layers, batch, generator)
            rows.append(row)
            states.append(ends)
    per_sequence = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    parameters = torch.tensor([sum(p.numel() for p in layer.parameters()) for layer in layers])
    per_sequence["fisher_per_parameter"] = per_sequence["fisher"] / parameters
    _require_finite(per_sequence)
    return LayerScores(per_sequence, _angular(torch.cat(states)), parameters)


def weight_taylor(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """(L,) float64 sum over a layer's weights of |W dL/dW|, the Taylor score of Shortened LLaMA.

    L is the mean NLL of all ``blocks`` (N, T) together, so that gradients of different texts may cancel
    before the absolute value (Kim et al. 2024, arXiv:2402.02834, eq. 1, there with 10 x 128 tokens; the
    ``taylor`` of :func:`score_layers` takes the whole layer as one group, and each sequence for itself).
    Each weight's gradient is let go as soon as it is summed.
    """
    layers = decoder_layers(model)
    total = torch.zeros(len(layers), dtype=torch.float64)
    handles, before = [], [(parameter, parameter.grad) for parameter in layers.parameters()]

    def reduce(index: int, parameter: Tensor) -> None:
        total[index] += (parameter.detach().float() * parameter.grad.float()).abs().sum(dtype=torch.float64).cpu()
        parameter.grad = None

    with _frozen(model), torch.enable_grad():
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                parameter.requires_grad_(True)  # _frozen puts it back
                parameter.grad = None
                hook = functools.partial(reduce, index)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        try:
            hidden = last_hidden(model, blocks)
            hidden.backward(_loss_gradient(model, hidden.detach(), blocks.to(model.device), None) / len(blocks))
        finally:
            for handle in handles:
                handle.remove()
            for parameter, gradient in before:
                parameter.grad = gradient
    _require_finite({"weight_taylor": total[None]})
    return total


def combined_score(scores: dict[str, Tensor]) -> Tensor:
    """(L,) combined score in [0, 1]: the mean of the given scores, each put on a log scale and min-max scaled.

    The earlier report combined Fisher information, gradient norm and activation statistics without
    stating how; this is our definition. The log keeps one huge layer from flattening all others.

    Args:
        scores: name -> (L,) positive scores.
    """
    scaled = []
    for name, values in scores.items():
        if not (values > 0).all():
            raise InputError(f"score {name!r} has values <= 0: its logarithm does not exist, leave it out")
        logs = values.double().log()
        span = logs.max() - logs.min()
        scaled.append((logs - logs.min()) / span if span > 0 else torch.full_like(logs, 0.5))
    return torch.stack(scaled).mean(dim=0)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; afterwards each is as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _score_batch(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Scores (B, L) of one batch, and the last token's states (B, L+1, d) before each layer and at the end."""
    batch = batch.to(model.device)
    gradients = _GradientSums(layers, *batch.shape)
    activations = _ActivationSums(layers)
    embedding = model.get_input_embeddings()
    root = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        hidden = last_hidden(model, batch)
        hidden.backward(_loss_gradient(model, hidden.detach(), batch, generator))
    finally:
        root.remove()
        gradients.remove()
        activations.remove()
    return _row(gradients.squared, gradients.inner, activations)


def _score_layerwise(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None
) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`_score_batch` with the weights of one layer in memory: states are kept, each layer runs once more.

    The memory it takes: the states before each layer, one layer's weights and activations, embedding and head.
    """
    batch = batch.to(model.device)
    runner = LayerRunner(model)
    activations, states = _ActivationSums(layers), []
    last = len(layers) - 1

    def keep(index: int, layer: Callable, hidden: Tensor) -> Tensor:
        output = layer(hidden)
        states.extend([hidden, output] if index == last else [hidden])
        return output

    try:
        hidden = runner.drive(batch, keep)
    finally:
        activations.remove()
    end = states.pop().requires_grad_()
    normed = runner.drive(batch, lambda index, layer, hidden: end if index == last else hidden, gradients=True)
    normed.backward(_loss_gradient(model, hidden, batch, generator))
    upstream = end.grad
    squared, inner = torch.zeros(2, len(batch), len(layers), dtype=torch.float64, device=batch.device)
    for index in reversed(range(len(layers))):
        sums = _GradientSums(nn.ModuleList([layers[index]]), *batch.shape, device=batch.device)
        try:
            upstream = _through(runner, batch, index, states.pop(), upstream)
        finally:
            sums.remove()
        squared[:, index], inner[:, index] = sums.squared[:, 0], sums.inner[:, 0]
    return _row(squared, inner, activations)


def _row(squared: Tensor, inner: Tensor, activations: "_ActivationSums") -> tuple[dict[str, Tensor], Tensor]:
    """Scores (B, L) by name of ||g||^2, theta . g and the activations' sums; and the last token's states."""
    row = {"fisher": squared, "grad_norm": squared.sqrt(), "taylor": inner.abs()}
    row |= {name: torch.stack(columns, dim=1) for name, columns in activations.columns.items()}
    return {name: values.cpu() for name, values in row.items()}, torch.stack(activations.ends, dim=1)


def _through(runner: LayerRunner, batch: Tensor, index: int, before: Tensor, upstream: Tensor) -> Tensor:
    """Gradient before layer ``index`` of states ``before`` (B, T, d), from that behind it."""
    leaf = before.requires_grad_()

    def job(other: int, layer: Callable, hidden: Tensor) -> Tensor:
        if other == index:
            with torch.enable_grad():
                layer(leaf).backward(upstream)
        return hidden

    runner.drive(batch, job)
    return leaf.grad


def _loss_gradient(model: PreTrainedModel, hidden: Tensor, batch: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, T, d) gradient of every sequence's mean NLL for its last hidden states.

    One sequence at a time, so that no more than one (T, V) matrix of logits is alive.
    """
    gradient = torch.empty_like(hidden)
    for index in range(len(batch)):
        leaf = hidden[index : index + 1].requires_grad_()  # (1, T, d)
        logits = logits_of(model, leaf)[0, :-1].float()  # (T-1, V)
        labels = batch[index, 1:]
        if generator is not None:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = functional.cross_entropy(logits, labels)
        gradient[index] = torch.autograd.grad(loss, leaf)[0][0]
    return gradient


class _GradientSums:
    """Per-sequence ||g||^2 and theta . g of each layer, summed by hooks during one backward pass."""

    def __init__(self, layers: nn.ModuleList, batch_size: int, tokens: int, device: torch.device | None = None):
        device = device or next(layers.parameters()).device
        self.tokens = tokens
        self.saved: list[tuple[nn.Parameter, Tensor | None]] = []
        self.squared = torch.zeros(batch_size, len(layers), dtype=torch.float64, device=device)
        self.inner = torch.zeros_like(self.squared)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.handles = []
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                own = list(module.parameters(recurse=False))
                if isinstance(module, nn.Linear | Conv1D) or all(parameter.ndim == 1 for parameter in own):
                    if own:
                        self.handles.append(module.register_forward_hook(self._forward_hook(index, name)))
                else:
                    self._watch(index, name, own)

    def remove(self) -> None:
        """Take the hooks off and let go of what they hold."""
        for handle in self.handles:
            handle.remove()
        self.inputs.clear()
        for parameter, gradient in self.saved:
            parameter.grad = gradient

    def _watch(self, index: int, name: str, parameters: list[nn.Parameter]) -> None:
        """Experts and routers mix a batch's sequences: take their parameters' own gradients, one sequence a step."""
        if len(self.squared) > 1:
            self.remove()
            raise InputError(f"layer {index}, {name}: it mixes sequences; score this model with batch_size=1")

        def reduce(parameter: Tensor) -> None:
            self.squared[0, index] += _sum_squares(parameter.grad[None])[0]
            self.inner[0, index] += _sum_products(parameter.grad[None], parameter.detach()[None])[0]
            parameter.grad = None

        for parameter in parameters:
            self.saved.append((parameter, parameter.grad))
            parameter.grad = None
            parameter.requires_grad_(True)  # _frozen puts it back
            self.handles.append(parameter.register_post_accumulate_grad_hook(reduce))

    def _forward_hook(self, index: int, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            x = args[0] if args else None
            batch_size = len(self.squared)
            tensors = isinstance(x, Tensor) and isinstance(output, Tensor)
            if not tensors or len(x) not in (batch_size, batch_size * self.tokens):
                raise InputError(
                    f"layer {index}, {name}: its input does not start with the batch of {batch_size}; "
                    "score this model with batch_size=1"
                )
            if module in self.inputs:
                raise InputError(f"layer {index}, {name} is used twice in one pass: its weights are shared")
            self.inputs[module] = x.detach()
            value, version = output.detach(), output._version

            @torch.no_grad()
            def reduce(gradient: Tensor) -> None:
                # an in-place sum (Falcon's MLP and attention) has overwritten the output: make it again
                kept = value if value._version == version else module.forward(self.inputs[module])
                self._reduce(index, module, kept, gradient)

            output.register_hook(reduce)

        return hook

    @torch.no_grad()
    def _reduce(self, index: int, module: nn.Module, output: Tensor, gradient: Tensor) -> None:
        x = self.inputs.pop(module)
        size = len(self.squared)
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
    squared = sum(_sum_squares(value) for value in gradients.values())
    inner = sum(_sum_products(value, parameters[name][None]) for name, value in gradients.items())
    return squared, inner


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """(B,) float64 sums over all but the first axis of a * b."""
    return (a.float() * b.float()).flatten(1).sum(dim=1, dtype=torch.float64)


def _sum_squares(a: Tensor) -> Tensor:
    return _sum_products(a, a)


class _ActivationSums:
    """Per-sequence statistics of each layer's input and output, taken by hooks during the forward pass."""

    def __init__(self, layers: nn.ModuleList):
        self.columns: dict[str, list[Tensor]] = {}
        self.ends: list[Tensor] = []
        self.handles = [layer.register_forward_hook(self._hook, with_kwargs=True) for layer in layers]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _hook(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach().float()  # (B, T, d)
        after = (output[0] if isinstance(output, tuple) else output).detach().float()
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


def _angular(ends: Tensor) -> Tensor:
    """(L+1, L+1) mean angular distance arccos(cos)/pi between last-token states (N, L+1, d)."""
    unit = functional.normalize(ends.double(), dim=-1)
    return (unit @ unit.mT).clamp(-1, 1).arccos().mean(dim=0) / math.pi


def _require_finite(per_sequence: dict[str, Tensor]) -> None:
    for name, values in per_sequence.items():
        if not torch.isfinite(values).all():
            row, layer = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise InputError(f"score {name!r} of layer {layer} is not finite, sequence {row}: check the weights")
