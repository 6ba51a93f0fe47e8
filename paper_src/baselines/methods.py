"""All methods of section 7, and what they share."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import distillation, fidelity, recovery, timing
from paper_src.baselines import depth, low_rank, moments, quantization, sparsity, width, zero_shot
from paper_src.compaction import compact
from paper_src.models import count_parameters
from paper_src.sections.recovery import Judge, saved

Model = PreTrainedModel


@dataclass(frozen=True)
class Entry:
    """One method: how its model is made, and how it is trained in the second block of rows.

    Attributes:
        method: its name.
        family: quantization, sparsity, width, low_rank, depth or combination.
        k: the number of layers whose parameter count it was given; 0 where size is not free.
        make: gives the model.
        training: ``none`` where its weights cannot be trained, ``plain``, ``masked`` where zeros stay zeros, or
            ``refit``: cut layers, first repaired in closed form.
        kept: layers of a ``refit``.
        uses: parts of the bench that are made once for several methods; their seconds count for each.
        source: folder of the checkpoint that it starts from, if any.
    """

    method: str
    family: str
    k: int
    make: Callable[[], Model]
    training: str = "none"
    kept: Sequence[int] = ()
    uses: Sequence[str] = ()
    source: Path | None = None


@dataclass
class Bench:
    """What all methods share.

    Args:
        full: the full model.
        tokenizer: its tokenizer.
        blocks: (N, T) calibration text of every method, and of the recovery in the second block of rows.
        judge: on test text.
        validation: for the recovery's early stop.
        items: of zero-shot tasks.
        workloads: what is timed; the first is the prefill.
        rounds: timed rounds.
        folder: of recovery's checkpoints and of finished rows, from which a killed run goes on.
        settings: of the recovery.
        zero_shot_k: sizes whose zero-shot accuracy is taken; 0 are methods without a size.
    """

    full: Model
    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    judge: Judge
    validation: fidelity.Reference
    items: Sequence[zero_shot.Items]
    workloads: Sequence[timing.Workload]
    rounds: int
    folder: Path
    settings: distillation.Distillation
    zero_shot_k: Sequence[int] = ()
    spent: dict[str, float] = field(default_factory=dict)

    @cached_property
    def moments(self) -> moments.Moments:
        """Of the inputs of all linear maps, on ``blocks``."""
        return self._timed("moments", lambda: moments.input_moments(self.full, self.blocks))

    @cached_property
    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the weights."""
        return self._timed("plain_factors", lambda: low_rank.factors(self.full))

    @cached_property
    def aware_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the weights, for the inputs of ``blocks``."""
        moments = self.moments
        return self._timed("aware_factors", lambda: low_rank.factors(self.full, moments))

    def prepare(self, uses: Sequence[str]) -> float:
        """Seconds that it took to make the parts ``uses``; makes them if they are not there."""
        for name in uses:
            getattr(self, name)
        return sum(self.spent[name] for name in uses)

    def _timed(self, name: str, make: Callable):
        start = time.perf_counter()
        made = make()
        self.spent[name] = time.perf_counter() - start
        return made


def entries(
    bench: Bench, kept: dict[int, Sequence[int]], blocks_cut: dict[int, Sequence[int]], recovered: Path
) -> list[Entry]:
    """All methods at the sizes of ``kept``.

    Args:
        bench: shared.
        kept: k -> the layers that notebook 5 repaired.
        blocks_cut: k -> the layers that are left when the block of least angular distance goes (ReplaceMe's choice).
        recovered: folder of the checkpoints of notebook 5, ``recovered_<k>``.
    """
    full = bench.full
    other = torch.float32 if full.dtype == torch.bfloat16 else torch.bfloat16
    sizes = {k: count_parameters(compact(full, layers)) for k, layers in kept.items()}
    found = [
        Entry(str(other).removeprefix("torch."), "quantization", 0, lambda: quantization.cast(full, other)),
        Entry("int8, torch.ao dynamic", "quantization", 0, lambda: quantization.dynamic_quantized(full)),
    ]
    for kind, name in TORCHAO.items():
        found.append(Entry(name, "quantization", 0, partial(quantization.torchao_quantized, full, kind)))
    for share in (0.5, 0.75):
        make = partial(sparsity.magnitude_pruned, full, share)
        found.append(Entry(f"magnitude {share:.0%}", "sparsity", 0, make, "masked"))
    for name, shape in {"Wanda 50%": (0.5, 0), "Wanda 75%": (0.75, 0), "Wanda 2:4": (0.5, 4)}.items():
        found.append(Entry(name, "sparsity", 0, lambda shape=shape: sparsity.wanda(full, bench.moments, *shape),
                           "masked", uses=["moments"]))  # fmt: skip
    for k, size in sizes.items():
        found += _at_one_size(bench, k, size, kept[k], blocks_cut[k], recovered / f"recovered_{k}")
    return found


TORCHAO = {
    "int8_dynamic": "int8, torchao dynamic",
    "int8_weight": "int8 weights, torchao",
    "int4_weight": "int4 weights, torchao",
    "int4_unpacked": "int4 weights, kept in 8 bits",
}


def _at_one_size(
    bench: Bench, k: int, size: int, kept: Sequence[int], block_cut: Sequence[int], recovered: Path
) -> list[Entry]:
    full, blocks = bench.full, bench.blocks
    return [
        Entry("width", "width", k, lambda: width.width_pruned(full, bench.moments, size), "plain",
              uses=["moments"]),
        Entry("SVD", "low rank", k, lambda: low_rank.low_rank(full, bench.plain_factors, size), "plain",
              uses=["plain_factors"]),
        Entry("SVD, activation-aware", "low rank", k,
              lambda: low_rank.low_rank(full, bench.aware_factors, size), "plain", uses=["moments", "aware_factors"]),
        Entry("early exit", "depth", k, lambda: compact(full, range(k)), "plain"),
        Entry("LaCo", "depth", k, lambda: depth.laco(full, k, blocks[:4]), "plain"),
        Entry("ReplaceMe", "depth", k, lambda: recovery.closed_form(full, block_cut, blocks, "mlp_map").model, "plain"),
        Entry("layers cut", "depth", k, lambda: compact(full, kept), "refit", kept),
        Entry("layers cut, section 5", "depth", k, lambda: saved(full, recovered), source=recovered),
        Entry("cut + int8", "combination", k,
              lambda: quantization.torchao_quantized(compact(full, kept), "int8_weight")),
        Entry("cut, section 5, + int8", "combination", k,
              lambda: quantization.torchao_quantized(saved(full, recovered), "int8_weight"), source=recovered),
    ]  # fmt: skip
