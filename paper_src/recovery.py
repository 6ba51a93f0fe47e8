"""Closed-form repair of a compact model: least squares instead of gradient steps.

A kept layer that stands before a gap is refitted so that the state it hands on follows the full model's state
at the next kept layer. Layer after layer, on the compact model's own states, so that errors do not pile up.

With h the state after a kept layer, t the full model's state before the next kept layer and x features of the
layer, x D is added to h, where D minimizes E |t - h - x D|^2 / |t|^2 + ridge |D|^2. Tokens are weighted by 1 / |t|^2
because the next layer normalizes its input, and because the few attention sinks, whose norms are in the thousands,
would decide everything otherwise. The ridge pulls towards the weights as they were.

Some families (Gemma 2 and 3, OLMo 2) put a norm behind the MLP: its output z is added as g * z / rms(z). The factor of
a token depends on the solution, so it is fitted in a few rounds, each with the factors of the round before
(iteratively reweighted least squares); a round that brings held-out states no nearer is taken back.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.compaction import compact
from paper_src.least_squares import solved
from paper_src.models import StandIn, add_to_weight_, decoder_layers, in_by_out, locate_layers
from paper_src.side_by_side import Features, SideBySide, Writer

ROUNDS, STEPS = 4, (1.0, 0.5, 0.25)  # at most, where a norm stands behind the MLP; shares of a round's change


@dataclass(frozen=True)
class Form:
    """What is refitted, and how: x D is added to the state of a layer with features x.

    A standard form changes the layer's writer (see :class:`side_by_side.Writer`), with its input or output as
    features; the others put a matrix behind the layer, whose output is the features.
    """

    title: str
    source: str  # paper, and how this differs
    features: Features
    build_: Callable[[nn.Module, Tensor], tuple[nn.Module, Tensor]]  # writer or layer, D (F, d) -> with D, D rounded
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


def _into_writer_(writer: nn.Module, solution: Tensor) -> tuple[nn.Module, Tensor]:
    return writer, add_to_weight_(writer, solution)


def _through_writer_(writer: nn.Module, solution: Tensor) -> tuple[nn.Module, Tensor]:
    add_to_weight_(writer, in_by_out(writer).double() @ solution)
    return writer, solution.float()


def _behind_(layer: nn.Module, solution: Tensor) -> tuple[nn.Module, Tensor]:
    mapped = Mapped(layer, solution.to(next(layer.parameters()).dtype))
    return mapped, mapped.matrix.float()


_BEHIND = {"features": lambda layer, into, out: out, "build_": _behind_}
FORMS = {
    "down_proj": Form("last MLP matrix, W + D'", "this paper", lambda writer, into, out: into, _into_writer_),
    "mlp_map": Form(
        "map of the MLP's output, (I + D)' W", "ReplaceMe, arXiv:2505.02819, with weights and the compact states here",
        lambda writer, into, out: out if writer.bias is None else out - writer.bias, _through_writer_,
    ),
    "linear": Form("matrix behind the layer, d^2 parameters", "as ghosted layers", standard=False, **_BEHIND),
    "diagonal": Form(
        "factor per channel, d parameters",
        "this paper, by least squares, which shrinks (LinearPatch, arXiv:2505.24680, takes ratios of mean "
        "sizes in a Hadamard basis, which enlarge)", diagonal=True, standard=False, **_BEHIND),
}  # fmt: skip


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
    batch_size: int = 8, progress: Callable = iter,
) -> Recovered:  # fmt: skip
    """The compact model of ``kept``, refitted on ``blocks`` (N, T); it shares the other weights with ``full``.

    Cost: one pass of each model over ``blocks``, a second one of the layers that are refitted (some more where a norm
    stands behind the MLP), and the solves. States lie in files: memory does not grow with N T.

    Args:
        form: one of ``FORMS``.
        reach: ``gaps`` refits the layers before a gap, ``all`` also the kept layers behind the first gap. That brings
            states nearer and, as measured, perplexity up: least squares takes away what it cannot predict.

    Raises:
        InputError: unknown form or reach, or less than two batches of blocks.
        NotSupported: a layer does not add its MLP's output to its input, as it is or through an RMS norm.
    """
    if form not in FORMS or reach not in ("all", "gaps"):
        raise InputError(f"form {form!r}, reach {reach!r}: use one of {tuple(FORMS)}, and 'all' or 'gaps'")
    if len(blocks) < 2 * batch_size:
        raise InputError(f"{len(blocks)} blocks in batches of {batch_size}: give 2 batches, to fit and to hold out")
    how, small = FORMS[form], compact(full, kept)
    path, layers = locate_layers(small)
    result, bounds = Recovered(small, blocks.numel()), [*kept, len(decoder_layers(full))]
    with tempfile.TemporaryDirectory() as folder:
        walk = SideBySide((full, small), blocks.to(full.device), batch_size, Path(folder))
        for position in progress(range(len(kept))):
            stop = bounds[position + 1]
            walk.advance_full(stop)
            matrix = None
            if stop > bounds[position] + 1 if reach == "gaps" else stop > position + 1:
                layer, row, matrix = _refitted(walk, position, layers[position], how)
                result.refits.append({"layer": kept[position], **row})
            if matrix is not None:  # behind the layer
                small.set_submodule(f"{path}.{position}", layer)
                result.added += len(matrix) if how.diagonal else matrix.numel()
            walk.advance_small(position, matrix)
    return result


def _refitted(
    walk: SideBySide, position: int, layer: nn.Module, how: Form
) -> tuple[nn.Module, dict[str, float], Tensor | None]:  # fmt: skip
    """The layer with its correction, its row of ``Recovered.refits``, and the matrix behind it, if any."""
    if not how.standard:
        solution, row = solved(*walk.sums(position, layer, how.features, Writer(layer)), how.diagonal)
        layer, matrix = how.build_(layer, solution)
        return layer, row, matrix
    writer = walk.writer(position, layer)
    if writer.norm is not None:
        return layer, _through_norm_(walk, position, writer, how), None
    solution, row = solved(*walk.sums(position, writer.module, how.features, writer), how.diagonal)
    how.build_(writer.module, solution)
    return layer, row, None


def _through_norm_(walk: SideBySide, position: int, writer: Writer, how: Form) -> dict[str, float]:
    """Refit a writer whose output goes through a norm, in rounds; its row of ``Recovered.refits``."""
    linear, error, ridge = writer.module, walk.error(position), float("inf")
    row = {"error_before": error}
    for _ in range(ROUNDS):
        old, best = linear.weight, error
        solution, found = solved(*walk.sums(position, linear, how.features, writer), how.diagonal)
        for step in STEPS:
            linear.weight = old
            how.build_(linear, step * solution)
            if (error := walk.error(position)) < best:
                ridge = found["ridge"]
                break
        else:
            linear.weight, error = old, best
            break
    return {"ridge": ridge, **row, "error_after": error}
