"""The judge of sections 5 and 7: a model beside the full one on every kind of text of one split."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, data, fidelity

OTHER_TEXT = ("nll_nats", "cosine")  # measured on every kind of text; all metrics on the first


def kind_of_text(name: str) -> str:
    """The name of a text as it stands in a column: the last part of a folder's path."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def calibration(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int, seed: int) -> Tensor:
    """(count, length) token ids of the calibration split of ``texts``, each as often as it is named."""
    return mixed_blocks(tokenizer, [data.load_text(name, "train")[0] for name in texts], count, length, seed)


def mixed_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int, seed: int
) -> Tensor:
    """(count, length) token ids: :func:`data.token_blocks` of each of ``texts`` in turn, twice if it is named twice.

    A text too short for its share gives fewer, and the first one more.

    Raises:
        InputError: the first text is too short for what is left to it.
    """
    first, *others = dict.fromkeys(texts)
    owners = [texts[index % len(texts)] for index in range(count)]
    wanted = Counter(owners)
    parts = {text: as_many(tokenizer, text, wanted[text], length, seed) for text in others if wanted[text]}
    rest = count - sum(map(len, parts.values()))
    parts = {text: iter(blocks) for text, blocks in parts.items()}
    parts[first] = iter(data.token_blocks(tokenizer, first, rest, length, seed))
    found = [next(parts[text], None) for text in owners]
    return torch.stack([next(parts[first]) if block is None else block for block in found])


def as_many(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int) -> Tensor:
    """:func:`data.token_blocks`, or fewer where the text does not hold so many."""
    while True:
        try:
            return data.token_blocks(tokenizer, text, count, length, seed)
        except InputError:
            if count == 1:
                raise
            count = max(1, count * 9 // 10)


class Judge:
    """Compares models with the full one on several kinds of text of one split.

    Args:
        full: the full model.
        tokenizer: its tokenizer.
        texts: names for :func:`data.load_text`; all metrics are taken on the first.
        split: ``valid`` or ``test``.
        shape: blocks of each kind, tokens of a block.
        mean: (d,) mean state of calibration text.
        seed: of the windows and the bootstrap.
    """

    def __init__(
        self, full: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split: str,
        shape: tuple[int, int], mean: Tensor, seed: int,
    ):  # fmt: skip
        self.references: dict[str, fidelity.Reference] = {}
        self.digests: dict[str, str] = {}
        self.full_nll: dict[str, np.ndarray] = {}  # nats/token of each block
        self.seed = seed
        for name in texts:
            kind = kind_of_text(name)
            text, self.digests[f"{kind} {split}"] = data.load_text(name, split)
            metrics = OTHER_TEXT if self.references else fidelity.METRICS
            blocks = data.token_blocks(tokenizer, text, *shape, seed)
            self.references[kind] = fidelity.reference(full, blocks, mean, metrics=metrics)
            self.full_nll[kind] = self._values(full, kind, ("nll_nats",))["nll_nats"]

    @property
    def first(self) -> fidelity.Reference:
        """The reference on the first kind of text."""
        return next(iter(self.references.values()))

    @property
    def nll(self) -> float:
        """The full model's mean loss on the first kind of text, nats/token."""
        return float(next(iter(self.full_nll.values())).mean())

    def row(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics on the first kind of text with intervals; ``ppl_ratio_<kind>``, ``cosine_<kind>`` on all.

        The interval of ``ppl_ratio`` is of the differences to the full model on the same blocks;
        ``ppl_ratio_mean`` is the geometric mean over the kinds of text.
        """
        row: dict[str, float] = {}
        for kind, full in self.full_nll.items():
            values = self._values(model, kind, OTHER_TEXT if row else fidelity.METRICS)
            if not row:
                row |= fidelity.summarize(values, self.seed) | fidelity.ppl_ratio(values["nll_nats"], full, self.seed)
            row[f"ppl_ratio_{kind}"] = np.exp((values["nll_nats"] - full).mean())
            row[f"cosine_{kind}"] = values["cosine"].mean()
        ratios = [row[f"ppl_ratio_{kind}"] for kind in self.full_nll]
        return row | {"ppl_ratio_mean": float(np.exp(np.mean(np.log(ratios))))}

    def ppl_ratio(self, model: PreTrainedModel) -> float:
        """Perplexity over the full model's, geometric mean over the kinds of text."""
        gaps = [(self._values(model, kind, ("nll_nats",))["nll_nats"] - full).mean()
                for kind, full in self.full_nll.items()]  # fmt: skip
        return float(np.exp(np.mean(gaps)))

    def constant_row(self, full: PreTrainedModel) -> dict[str, float]:
        """The trivial predictor on the first kind of text: it answers every token with the mean state."""
        row = fidelity.summarize(fidelity.compare_constant(full, self.first), self.seed)
        return row | {"ppl_ratio": float(np.exp(row["nll_nats"] - self.nll))}

    @torch.no_grad()
    def _values(self, model: PreTrainedModel, kind: str, metrics: Sequence[str]) -> dict[str, np.ndarray]:
        return fidelity.compare(model, self.references[kind], metrics=metrics)
