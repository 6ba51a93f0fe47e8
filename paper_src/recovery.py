"""Closed-form repair of a compact model: least squares instead of gradient steps.

A kept layer that stands before a gap is refitted so that the state it hands on follows the full model's state
at the next kept layer. Layer after layer, on the compact model's own states, so that errors do not pile up.

With h the state after a kept layer, t the full model's state before the next kept layer and x features of the
layer, x D is added to h, where D minimizes E |t - h - x D|^2 / |t|^2 + ridge |D|^2. Tokens are weighted by 1 / |t|^2
because the next layer normalizes its input, and because the few attention sinks, whose norms are in the thousands,
would decide everything otherwise. The ridge pulls towards the weights as they were.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.compaction import compact
from paper_src.layers import LayerRunner, StandIn
from paper_src.models import add_to_weight_, decoder_layers, in_by_out, locate_layers, mlp_writer
from paper_src.support.processes import ALONE, Processes

RIDGES = (1e-4, 1e-2, 1e-1, 1.0)
HELD_OUT = 8  # of so many batches one is held out, to choose the ridge by


@dataclass(frozen=True)
class Form:
    """What is refitted, and how: x D is added to the state of a layer with features x."""

    title: str
    source: str  # paper, and how this differs
    module: Callable[[nn.Module], nn.Module]  # layer -> the module at whose call the features are seen
    features: Callable[[nn.Module, Tensor, Tensor], Tensor]  # that module, its input, its output -> x (B, T, F)
    build_: Callable[[nn.Module, Tensor], tuple[nn.Module, Tensor]]  # layer, D (F, d) -> layer with D in it, D rounded
    diagonal: bool = False  # so is D
    standard: bool = True  # no parameter is added: the model is a standard checkpoint


class Mapped(StandIn):
    """A layer with a matrix behind it: h + h D."""

    def __init__(self, layer: nn.Module, matrix: Tensor):
        super().__init__(layer)
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor | tuple:
        output = self.layer(hidden, *args, **kwargs)
        state, *rest = output if isinstance(output, tuple) else (output,)
        state = state + state @ self.matrix
        return (state, *rest) if isinstance(output, tuple) else state


def _through_writer_(layer: nn.Module, solution: Tensor) -> tuple[nn.Module, Tensor]:
    writer = mlp_writer(layer)
    add_to_weight_(writer, in_by_out(writer).double() @ solution)
    return layer, solution.float()


def _behind_(layer: nn.Module, solution: Tensor) -> tuple[nn.Module, Tensor]:
    mapped = Mapped(layer, solution.to(next(layer.parameters()).dtype))
    return mapped, mapped.matrix.float()


_BEHIND = {"module": lambda layer: layer, "features": lambda layer, into, out: out, "build_": _behind_}
FORMS = {
    "down_proj": Form("last MLP matrix, W + D'", "this paper", mlp_writer, lambda _, into, out: into,
                      lambda layer, solution: (layer, add_to_weight_(mlp_writer(layer), solution))),
    "mlp_map": Form(
        "map of the MLP's output, (I + D)' W", "ReplaceMe, arXiv:2505.02819, with weights and the compact states here",
        mlp_writer, lambda writer, into, out: out if writer.bias is None else out - writer.bias, _through_writer_,
    ),
    "linear": Form("matrix behind the layer, d^2 parameters", "as ghosted layers", standard=False, **_BEHIND),
    "diagonal": Form("factor per channel, d parameters", "LinearPatch, arXiv:2505.24680, without its Hadamard basis",
                     diagonal=True, standard=False, **_BEHIND),
}  # fmt: skip


@dataclass
class NormalEquations:
    """Weighted second moments, in float64, of features x (F,) and what they must add, y (d,)."""

    xx: Tensor  # (F, F)
    xy: Tensor  # (F, d)
    yy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, width: int, device: torch.device) -> "NormalEquations":
        """No tokens yet."""
        return cls(*(torch.zeros(features, n, dtype=torch.float64, device=device) for n in (features, width)))

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: x (n, F), y (n, d), weights (n,)."""
        x, y = x.float() * weights[:, None].sqrt(), y.float() * weights[:, None].sqrt()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.double().square().sum())
        self.tokens += len(x)

    def over(self, processes: Processes) -> "NormalEquations":
        """The sums of all processes."""
        scalars = torch.tensor([self.yy, self.tokens], dtype=torch.float64, device=self.xx.device)
        yy, tokens = processes.summed(scalars).tolist()
        return NormalEquations(processes.summed(self.xx), processes.summed(self.xy), yy, round(tokens))

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(*(getattr(self, name) + getattr(other, name) for name in ("xx", "xy", "yy", "tokens")))

    def solve(self, ridge: float, diagonal: bool = False) -> Tensor:
        """(F, d) argmin over D of E |y - x D|^2 + ridge * sum over features f of E x_f^2 |D_f|^2; or D diagonal.

        Each feature's penalty is in its own unit, for MLP activations differ by orders of magnitude.
        """
        own = self.xx.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
        if diagonal:
            return (self.xy.diagonal() / ((1 + ridge) * own)).diag()
        return torch.cholesky_solve(self.xy, torch.linalg.cholesky(self.xx + (ridge * own).diag()))

    def error(self, solution: Tensor) -> float:
        """E |y - x D|^2 per token."""
        fitted = (solution * (self.xx @ solution - 2 * self.xy)).sum()
        return float(fitted + self.yy) / self.tokens


@dataclass
class Recovered:
    """A repaired compact model."""

    model: PreTrainedModel
    tokens: int  # it was fitted on
    # rows layer, ridge, error_before (D = 0) and error_after: held-out E |y - x D|^2 / |t|^2
    refits: list[dict[str, float]] = field(default_factory=list)
    added: int = 0  # parameters that a standard checkpoint does not have


@torch.no_grad()
def closed_form(
    full: PreTrainedModel, kept: Sequence[int], blocks: Tensor, form: str = "down_proj", reach: str = "gaps",
    batch_size: int = 8, progress: Callable = iter, processes: Processes = ALONE,
) -> Recovered:  # fmt: skip
    """The compact model of ``kept``, refitted on ``blocks`` (N, T); it shares the other weights with ``full``.

    Cost: one pass of each model over ``blocks``, and the solves. States lie in files: memory does not grow with N T.

    Args:
        form: one of ``FORMS``.
        reach: ``gaps`` refits the layers before a gap, ``all`` also the kept layers behind the first gap. That brings
            states nearer and, as measured, perplexity up: least squares takes away what it cannot predict.
        processes: who shares the batches of ``blocks``; all get the same model.

    Raises:
        InputError: unknown form or reach, or less than two batches of blocks.
        NotSupported: a layer does not add its MLP's output to its input as it is (Gemma 2, OLMo 2).
    """
    if form not in FORMS or reach not in ("all", "gaps"):
        raise InputError(f"form {form!r}, reach {reach!r}: use one of {tuple(FORMS)}, and 'all' or 'gaps'")
    if len(blocks) < 2 * batch_size:
        raise InputError(f"{len(blocks)} blocks in batches of {batch_size}: give 2 batches, to fit and to hold out")
    how, small = FORMS[form], compact(full, kept)
    path, layers = locate_layers(small)
    result, bounds = Recovered(small, blocks.numel()), [*kept, len(decoder_layers(full))]
    with tempfile.TemporaryDirectory() as folder:
        walk = _Walk((full, small), blocks.to(full.device), batch_size, Path(folder), processes)
        for position in progress(range(len(kept))):
            stop = bounds[position + 1]
            cut = stop > bounds[position] + 1 if reach == "gaps" else stop > position + 1
            sums = walk.advance(position, stop, layers[position], how if cut else None)
            if cut:
                solution, row = _solved(*sums, how.diagonal)
                small.set_submodule(f"{path}.{position}", walk.correct(layers[position], how, solution))
                result.refits.append({"layer": kept[position], **row})
                if not how.standard:
                    result.added += len(solution) if how.diagonal else solution.numel()
    return result


def _solved(fitted: NormalEquations, held_out: NormalEquations, diagonal: bool) -> tuple[Tensor, dict[str, float]]:
    """The solution on all tokens at the best of ``RIDGES``, and its row of ``Recovered.refits``."""
    none = torch.zeros_like(held_out.xy)  # what an endless ridge gives: nothing else may hold on other text
    errors = {float("inf"): held_out.error(none)}
    errors |= {ridge: held_out.error(fitted.solve(ridge, diagonal)) for ridge in RIDGES}
    ridge = min(errors, key=errors.get)
    row = {"ridge": ridge, "error_before": errors[float("inf")], "error_after": errors[ridge]}
    return none if ridge == float("inf") else (fitted + held_out).solve(ridge, diagonal), row


@contextmanager
def _watched(layer: nn.Module, form: Form | None) -> Iterator[list[Tensor]]:
    """A list that gets the features of each call of ``layer``; none without a form."""
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        seen.append(form.features(module, inputs[0], output[0] if isinstance(output, tuple) else output))

    with form.module(layer).register_forward_hook(look) if form else nullcontext():  # a hook's handle is a context
        yield seen


class _Walk:
    """Both models side by side, layer after layer over all blocks; states (N, T, width) lie in files."""

    def __init__(
        self, models: tuple[PreTrainedModel, ...], blocks: Tensor, batch_size: int, folder: Path, processes: Processes
    ):
        self.teacher, self.student = map(LayerRunner, models)
        batches = blocks.split(batch_size)
        self.numbers = processes.mine(range(len(batches)))  # of this process's batches among all
        self.blocks, self.folder, self.processes = torch.cat(processes.mine(batches)), folder, processes
        self.parts = [slice(low, low + batch_size) for low in range(0, len(self.blocks), batch_size)]
        self.reached = 0
        self.states: dict[str, Tensor] = {}
        for part in self.parts:
            for name in ("full", "small"):
                self._put(name, part, self.teacher.embedded(self.blocks[part]))

    def advance(self, position: int, stop: int, layer: nn.Module, form: Form | None) -> list[NormalEquations]:
        """With a form, the normal equations of the batches to fit on and of those held out, else none.

        Moves the compact model over its layer ``position``, and the full one to before its layer ``stop``.
        """
        sums: list[NormalEquations] = []
        for number, part in zip(self.numbers, self.parts, strict=True):
            ids = self.blocks[part]
            target = self.teacher.run(ids, self._get("full", part), self.reached, stop)
            before = self._get("small", part).clone()
            with _watched(layer, form) as seen:
                own = self.student.run(ids, before, position, position + 1)
            self._put("full", part, target)
            self._put("small", part, own)
            if form:
                if part is self.parts[0]:
                    self.check = (ids, position, before)
                features = seen[-1].reshape(*ids.shape, -1)  # some families flatten them
                self._put("features", part, features)
                x, y, t = (states.flatten(0, 1).float() for states in (features, target.float() - own, target))
                if not sums:
                    sums = [NormalEquations.empty(x.shape[1], y.shape[1], x.device) for _ in range(2)]
                sums[number % HELD_OUT == 1].add(x, y, 1 / t.square().sum(-1))
        self.reached = stop
        return [each.over(self.processes) for each in sums]

    def correct(self, layer: nn.Module, form: Form, solution: Tensor) -> nn.Module:
        """``layer`` with the correction in it, which goes into the states behind it as well."""
        layer, matrix = form.build_(layer, solution)
        for part in self.parts:
            own, x = self._get("small", part), self._get("features", part)
            self._put("small", part, own + (x.float() @ matrix).to(own.dtype))
        self.states.pop("features")
        if form.standard:
            self._require_additive()
        return layer

    def _require_additive(self) -> None:
        """Raise unless the corrected layer really gives what the algebra says."""
        ids, position, before = self.check
        given = self.student.run(ids, before, position, position + 1).float()
        expected = self._get("small", self.parts[0]).float()
        if not (given - expected).norm() <= 0.05 * expected.norm():
            raise NotSupported(f"layer {position} does not add its MLP's output to its state as it is (a norm behind "
                               "it, experts): distil without the closed form, or use form='linear'")  # fmt: skip

    def _get(self, name: str, part: slice) -> Tensor:
        return self.states[name][part].to(self.blocks.device)

    def _put(self, name: str, part: slice, states: Tensor) -> None:
        if name not in self.states:
            shape = torch.Size((len(self.blocks), *states.shape[1:]))
            held = torch.from_file(str(self.folder / name), shared=True, size=shape.numel(), dtype=states.dtype)
            self.states[name] = held.view(shape)
        self.states[name][part] = states.cpu()
