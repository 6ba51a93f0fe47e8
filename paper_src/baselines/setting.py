"""What all methods of section 7 share: text, layers, section 5's checkpoints, and what several of them need."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from paper_src import distillation, fidelity
from paper_src.baselines import low_rank, moments
from paper_src.compaction import compact
from paper_src.models import count_parameters, decoder_layers


@dataclass(frozen=True)
class Recovered:
    """A checkpoint of section 5: its folder, the tokens it has cost, and what its training started from."""

    folder: Path
    tokens: int
    start: str = "closed_form"


@dataclass
class Setting:
    """What all methods share.

    Attributes:
        full: the full model; no method changes it.
        blocks: (N, T) calibration text of every method, and of the training that all get.
        kept: k -> the layers that section 5 repaired.
        block_cut: k -> the layers that are left when the block of least angular distance goes (ReplaceMe's choice).
        repaired: k -> section 5's checkpoint of ``kept``.
        validation: decides on the training's best state.
        folder: of the training's checkpoints and of finished rows.
        training: how every method is trained; its learning rate and seed are those below.
        rates: learning rates among which validation text decides, for every method.
        random_cut: k -> the random selection of layers that was best on validation text.
    """

    full: PreTrainedModel
    blocks: Tensor
    kept: Mapping[int, Sequence[int]]
    block_cut: Mapping[int, Sequence[int]]
    repaired: Mapping[int, Recovered]
    validation: fidelity.Reference
    folder: Path
    training: distillation.Distillation
    rates: Sequence[float] = (5e-4,)
    random_cut: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spent: dict[str, float] = {}  # seconds of what several methods share
        self.seed = 0  # of the row that is being made: of random weights
        self._latest: tuple[object, PreTrainedModel, float] = (None, self.full, 0.0)

    @property
    def bits(self) -> int:
        """Of a weight of the full model."""
        return 8 * self.full.dtype.itemsize

    @property
    def depth(self) -> int:
        """Layers of the full model."""
        return len(decoder_layers(self.full))

    def size(self, k: int) -> int:
        """Parameters of the compact model of k layers: no method of this size gets more."""
        return count_parameters(compact(self.full, self.kept[k]))

    @property
    def few_blocks(self) -> Tensor:
        """A few sentences of the calibration text, as LaCo takes them."""
        return self.blocks[:4]

    @cached_property
    def moments(self) -> moments.InputMoments:
        """Of the inputs of all linear maps, on ``blocks``."""
        return self._timed("moments", lambda: moments.input_moments(self.full, self.blocks))

    @cached_property
    def plain_factors(self) -> low_rank.Factors:
        """Of the weights."""
        return self._timed("plain_factors", lambda: low_rank.factors(self.full))

    @cached_property
    def aware_factors(self) -> low_rank.Factors:
        """Of the weights, for the inputs of ``blocks``."""
        found = self.moments
        return self._timed("aware_factors", lambda: low_rank.factors(self.full, found))

    def make(
        self, key: object, needs: Sequence[str], function: Callable[["Setting"], PreTrainedModel]
    ) -> tuple[PreTrainedModel, float]:
        """``function`` (self), and its seconds with those of what it shares, the attributes ``needs``.

        The latest is remembered by its ``key``: a method's rows before and after training start from the same model.
        """
        if self._latest[0] != key:
            for need in needs:
                getattr(self, need)
            shared, start = sum(self.spent.get(need, 0.0) for need in needs), time.perf_counter()
            model = function(self)
            self._latest = key, model, shared + time.perf_counter() - start
        return self._latest[1:]

    def tokens(self, needs: Sequence[str], k: int) -> int:
        """Tokens of calibration and training that a model of these ``needs`` has seen."""
        whole = self.blocks.numel()
        seen = {"blocks": whole, "moments": whole, "few_blocks": self.few_blocks.numel()}
        if k in self.repaired:
            seen["repaired"] = self.repaired[k].tokens
        return max((seen.get(need, 0) for need in needs), default=0)

    def _timed(self, name: str, make: Callable):
        start = time.perf_counter()
        made = make()
        self.spent[name] = time.perf_counter() - start
        return made
