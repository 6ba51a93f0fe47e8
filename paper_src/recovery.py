"""Closed-form repair of a compact model: least squares instead of gradient steps.

A kept layer that stands before a gap is refitted so that the state it hands on follows the full model's state
at the next kept layer. Layer after layer, on the compact model's own states, so that errors do not pile up.
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
from paper_src.processes import ALONE, Processes

FORMS = ("down_proj", "mlp_map", "linear", "diagonal")
RIDGES = (1e-4, 1e-2, 1e-1, 1.0)
HELD_OUT = 8  # of so many batches one is held out, to choose the ridge by


@dataclass
class NormalEquations:
    """Weighted second moments of features x (F,) and what they must add, y (d,): all that least squares needs.

    Sums are in float64 and take the same memory for any number of tokens.
    """

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
        """E |y - x D|^2, a token."""
        fitted = (solution * (self.xx @ solution - 2 * self.xy)).sum()
        return float(fitted + self.yy) / self.tokens


@dataclass
class Refit:
    """One refitted layer: held-out error E |y - x D|^2 / |t|^2 before (D = 0) and after, and the ridge."""

    layer: int
    ridge: float
    error_before: float
    error_after: float


@dataclass
class Recovered:
    """A repaired compact model; ``added`` counts parameters that a standard checkpoint does not have."""

    model: PreTrainedModel
    tokens: int
    refits: list[Refit] = field(default_factory=list)
    added: int = 0


@torch.no_grad()
def closed_form(
    full: PreTrainedModel,
    kept: Sequence[int],
    blocks: Tensor,
    form: str = "down_proj",
    reach: str = "gaps",
    batch_size: int = 8,
    progress: Callable = iter,
    processes: Processes = ALONE,
) -> Recovered:
    """The compact model of ``kept``, refitted so that its states follow the full model's.

    With h the state after a kept layer, t the full model's state before the next kept layer and x features of
    the layer, x D is added to h, where D minimizes E |t - h - x D|^2 / |t|^2 + ridge |D|^2. Tokens are weighted
    by 1 / |t|^2 because the next layer normalizes its input, and because the few attention sinks, whose norms are
    in the thousands, would decide everything otherwise. The ridge pulls towards the weights as they were; of
    ``RIDGES`` the one with the least error on held-out batches is taken.

    Forms, by their features x:

    - ``down_proj``: the activations that enter the MLP's last matrix, W <- W + D'. Adds no parameter.
    - ``mlp_map``: the MLP's output, W <- (I + D)' W (ReplaceMe, arXiv:2505.02819; there with uniform weights and
      on the full model's states). Adds no parameter.
    - ``linear``: h itself, a full matrix behind the layer (as in ghosted layers). Adds d^2 parameters a layer and
      is no standard checkpoint.
    - ``diagonal``: h itself, one factor a channel (LinearPatch, arXiv:2505.24680, without its Hadamard basis).

    Cost: one pass of the full model's layers over ``blocks``, one of the compact model's, and the solves. States
    are kept in scratch files, so that memory does not grow with the number of tokens.

    Args:
        full: the full model; it is not changed, and shares with the result all that is not refitted.
        kept: increasing layer indices.
        blocks: (N, T) token ids, calibration text.
        form: one of ``FORMS``.
        reach: ``gaps`` refits the layers before a gap, ``all`` also the kept layers behind the first gap, whose
            input is no longer the full model's. That brings states nearer and, as measured, perplexity up: least
            squares takes away what it cannot predict.
        batch_size: blocks a step.
        progress: wraps the iterable of kept layers.
        processes: who shares the batches of ``blocks``; all get the same model.

    Raises:
        InputError: unknown form or reach, or too few blocks.
        NotSupported: a layer does not add its MLP's output to its input as it is (Gemma 2, OLMo 2).
    """
    if form not in FORMS or reach not in ("all", "gaps"):
        raise InputError(f"form {form!r}, reach {reach!r}: use one of {FORMS}, and 'all' or 'gaps'")
    if len(blocks) < 2 * batch_size:
        raise InputError(f"{len(blocks)} blocks in batches of {batch_size}: give 2 batches, to fit and to hold out")
    small = compact(full, kept)
    path, layers = locate_layers(small)
    result = Recovered(small, blocks.numel())
    bounds = [*kept, len(decoder_layers(full))]
    with tempfile.TemporaryDirectory() as folder:
        walk = _Walk(full, small, blocks.to(full.device), batch_size, Path(folder), processes)
        for position in progress(range(len(kept))):
            stop = bounds[position + 1]
            cut = stop > bounds[position] + 1 if reach == "gaps" else stop > position + 1
            tap = Tap(layers[position], form) if cut else None
            moments = walk.advance(position, stop, tap)
            if tap:
                solution, row = _solved(*moments, form == "diagonal")
                walk.correct(tap, solution)
                result.refits.append(Refit(kept[position], *row))
                if tap.mapped:
                    small.set_submodule(f"{path}.{position}", tap.mapped)
                    result.added += tap.mapped.added
    return result


def _solved(
    fitted: NormalEquations, held_out: NormalEquations, diagonal: bool
) -> tuple[Tensor, tuple[float, float, float]]:
    """The solution on all tokens at the best ridge; that ridge, and the held-out error before and after."""
    errors = {ridge: held_out.error(fitted.solve(ridge, diagonal)) for ridge in RIDGES}
    ridge = min(errors, key=errors.get)
    before = held_out.error(torch.zeros_like(held_out.xy))
    if errors[ridge] >= before:  # nothing that holds on other text
        return torch.zeros_like(held_out.xy), (float("inf"), before, before)
    return (fitted + held_out).solve(ridge, diagonal), (ridge, before, errors[ridge])


class Mapped(StandIn):
    """A layer with a matrix behind it: h + h D."""

    def __init__(self, layer: nn.Module, matrix: Tensor, added: int):
        super().__init__(layer)
        self.added = added
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor | tuple:
        output = self.layer(hidden, *args, **kwargs)
        state = output[0] if isinstance(output, tuple) else output
        state = state + state @ self.matrix
        return (state, *output[1:]) if isinstance(output, tuple) else state


class Tap:
    """Where a layer's features are read, and where its correction goes."""

    def __init__(self, layer: nn.Module, form: str):
        self.layer, self.form = layer, form
        self.of_layer = form in ("linear", "diagonal")
        self.mapped: Mapped | None = None
        self.features: Tensor | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, ``features`` (N, T, F) are those of the layer's last call."""

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
            features = inputs[0] if self.form == "down_proj" else output
            features = features[0] if isinstance(features, tuple) else features
            bias = getattr(module, "bias", None) if self.form == "mlp_map" else None
            self.features = features if bias is None else features - bias

        hook = (self.layer if self.of_layer else mlp_writer(self.layer)).register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def correct(self, solution: Tensor) -> Tensor:
        """Build the correction into the layer; returns it (F, d) as it is after rounding to the layer's dtype."""
        if self.of_layer:
            dtype = next(self.layer.parameters()).dtype
            count = len(solution) if self.form == "diagonal" else solution.numel()
            self.mapped = Mapped(self.layer, solution.to(dtype), count)
            return self.mapped.matrix.float()
        writer = mlp_writer(self.layer)
        if self.form == "down_proj":
            return add_to_weight_(writer, solution)
        add_to_weight_(writer, in_by_out(writer).double() @ solution)
        return solution.float()


class _Walk:
    """Both models side by side, layer after layer over all blocks; states (N, T, width) lie in files."""

    def __init__(
        self,
        full: PreTrainedModel,
        small: PreTrainedModel,
        blocks: Tensor,
        batch_size: int,
        folder: Path,
        processes: Processes,
    ):
        self.teacher, self.student = LayerRunner(full), LayerRunner(small)
        batches = blocks.split(batch_size)
        self.numbers = processes.mine(range(len(batches)))  # of this process's batches among all
        self.blocks, self.folder, self.processes = torch.cat(processes.mine(batches)), folder, processes
        blocks = self.blocks
        self.parts = [slice(low, low + batch_size) for low in range(0, len(blocks), batch_size)]
        self.reached = 0
        self.states: dict[str, Tensor] = {}
        for part in self.parts:
            for name in ("full", "small"):
                self._put(name, part, self.teacher.embedded(blocks[part]))

    def advance(self, position: int, stop: int, tap: Tap | None) -> tuple[NormalEquations, NormalEquations]:
        """Move the compact model over its layer ``position`` and the full one to before layer ``stop``."""
        moments: list[NormalEquations] = []
        for number, part in zip(self.numbers, self.parts, strict=True):
            ids = self.blocks[part]
            target = self.teacher.run(ids, self._get("full", part), self.reached, stop)
            before = self._get("small", part).clone()
            with tap.reading() if tap else nullcontext():
                own = self.student.run(ids, before, position, position + 1)
            self._put("full", part, target)
            self._put("small", part, own)
            if tap:
                if part is self.parts[0]:
                    self.check = (ids, position, before)
                features = tap.features.reshape(*ids.shape, -1)  # some families flatten them
                self._put("features", part, features)
                x, y, t = (states.flatten(0, 1).float() for states in (features, target.float() - own, target))
                if not moments:
                    moments = [NormalEquations.empty(x.shape[1], y.shape[1], x.device) for _ in range(2)]
                moments[number % HELD_OUT == 1].add(x, y, 1 / t.square().sum(-1))
        self.reached = stop
        return [each.over(self.processes) for each in moments]

    def correct(self, tap: Tap, solution: Tensor) -> None:
        """Build the correction into the layer and into the states behind it."""
        matrix = tap.correct(solution)
        for part in self.parts:
            own, x = self._get("small", part), self._get("features", part)
            self._put("small", part, own + (x.float() @ matrix).to(own.dtype))
        self.states.pop("features")
        if not tap.of_layer:
            self._require_additive()

    def _require_additive(self) -> None:
        """Raise unless the corrected layer really gives what the algebra says."""
        ids, position, before = self.check
        given = self.student.run(ids, before, position, position + 1).float()
        expected = self._get("small", self.parts[0]).float()
        if not (given - expected).norm() <= 0.05 * expected.norm():
            raise NotSupported(
                f"layer {position} does not add its MLP's output to its state as it is (a norm behind it, experts): "
                "distil without the closed form, or use form='linear'"
            )

    def _get(self, name: str, part: slice) -> Tensor:
        return self.states[name][part].to(self.blocks.device)

    def _put(self, name: str, part: slice, states: Tensor) -> None:
        if name not in self.states:
            shape = (len(self.blocks), *states.shape[1:])
            file = str(self.folder / name)
            size = shape[0] * shape[1] * shape[2]
            self.states[name] = torch.from_file(file, shared=True, size=size, dtype=states.dtype).view(shape)
        self.states[name][part] = states.cpu()
