"""The judge of sections 5 and 7: a model beside the full one on every kind of text of one split."""

import copy
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, data, fidelity
from paper_src.sections.windows import window_rows

OTHER_TEXT = ("nll_nats", "cosine")  # measured on every kind of text; all metrics on the first
FEW = " few"  # behind the kind of text of the losses of exploratory rows
ALL_METRICS = 8192  # tokens of it that get them


def with_all_metrics(length: int) -> int:
    """Windows of so many tokens of the first kind of text that get all metrics."""
    return max(1, ALL_METRICS // length)


def kind_of_text(name: str) -> str:
    """The name of a text as it stands in a column: the last part of a folder's path."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def few_text(table: pd.DataFrame) -> str:
    """The first kind of text of the exploratory rows of a ``tN_windows``."""
    return next(text for text in table["text"] if text.endswith(FEW))


def calibration(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int, seed: int) -> Tensor:
    """(count, length) token ids of the calibration split of ``texts``, each as often as it is named."""
    return mixed_blocks(tokenizer, [data.load_text(name, "train")[0] for name in texts], count, length, seed)


def mixed_blocks(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int, seed: int
) -> Tensor:
    """(count, length) token ids: :func:`data.token_blocks` of each of ``texts`` in turn, twice if it is named twice.

    A text too short for its share gives fewer, and the first one more, then the others.

    Raises:
        InputError: the texts do not hold so many.
    """
    owners = [texts[index % len(texts)] for index in range(count)]
    wanted = Counter(owners)
    first, *others = wanted
    parts = {text: data.as_many(tokenizer, text, wanted[text], length, seed) for text in others}
    parts[first] = data.as_many(tokenizer, first, count - sum(map(len, parts.values())), length, seed)
    for text in others:
        missing = count - sum(map(len, parts.values()))
        if missing and len(parts[text]) == wanted[text]:
            more = data.as_many(tokenizer, text, wanted[text] + missing, length, seed)
            parts[text] = max(parts[text], more, key=len)
    if missing := count - sum(map(len, parts.values())):
        raise InputError(f"the texts hold {count - missing} of {count} blocks of {length} tokens: ask for fewer or "
                         "shorter blocks, or give more text")  # fmt: skip
    left = {text: iter(parts[text]) for text in wanted}
    found = [next(left[text], None) for text in owners]
    rest = itertools.chain(*left.values())
    return torch.stack([next(rest) if block is None else block for block in found])


def far_apart(count: int) -> list[int]:
    """0 to ``count`` - 1 in an order whose beginnings are spread over all of them, by halving the distances.

    Example:
        >>> far_apart(6)
        [0, 4, 2, 1, 5, 3]
    """
    bits = max(1, (count - 1).bit_length())
    return [place for n in range(2**bits) if (place := int(f"{n:0{bits}b}"[::-1], 2)) < count]


class Judge:
    """Compares models with the full one on several kinds of text of one split.

    Args:
        full: the full model.
        tokenizer: its tokenizer.
        texts: names for :func:`data.load_text`; all metrics are taken on the first.
        split: ``valid`` or ``test``.
        shape: windows of the first kind, tokens of a window.
        mean: (d,) mean state of calibration text.
        seed: of the windows and the bootstrap.
        others: windows of each other kind, or as many as its text holds; None: as many as of the first.
        model_digest: of the full model's files, for :meth:`windows`.
    """

    def __init__(
        self, full: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], split: str,
        shape: tuple[int, int], mean: Tensor, seed: int, others: int | None = None, model_digest: str = "",
    ):  # fmt: skip
        self.blocks: dict[str, Tensor] = {}
        self.references: dict[str, fidelity.Reference] = {}
        self.rest: fidelity.Reference | None = None  # windows of the first kind that are judged by OTHER_TEXT alone
        self.digests: dict[str, str] = {}
        self.full, self.seed, self.model_digest, self.label = full, seed, model_digest, ""
        (count, length), whole = shape, with_all_metrics(shape[1])
        for name in texts:
            kind = kind_of_text(name)
            text, self.digests[f"{kind} {split}"] = data.load_text(name, split)
            cut = data.as_many if self.references else data.token_blocks  # other kinds of text may be short
            blocks = cut(tokenizer, text, count, length, seed)
            blocks = self.blocks[kind] = blocks[far_apart(len(blocks))]  # whose first few are of the whole text too
            metrics = OTHER_TEXT if self.references else fidelity.METRICS
            if not self.references and count > whole:
                self.rest = fidelity.reference(full, blocks[whole:], mean, metrics=OTHER_TEXT)
                blocks = blocks[:whole]
            self.references[kind] = fidelity.reference(full, blocks, mean, metrics=metrics)
            count = others or count
        self.full_nll = {kind: self._nll(own) for kind, own in self.references.items()}  # nats/token of each window
        if self.rest is not None:
            first = kind_of_text(texts[0])
            self.full_nll[first] = np.concatenate([self.full_nll[first], self._nll(self.rest)])

    def few(self, windows: int, others: int) -> "Judge":
        """The same by the first windows of each kind alone, for exploratory rows; their losses stand apart."""
        part = copy.copy(self)
        wanted = {kind: others if n else windows for n, kind in enumerate(self.blocks)}
        part.blocks = {kind: self.blocks[kind][:count] for kind, count in wanted.items()}
        part.references = {kind: own.head(wanted[kind]) for kind, own in self.references.items()}
        part.full_nll = {kind: self.full_nll[kind][:count] for kind, count in wanted.items()}
        part.label = FEW
        left = windows - len(self.first.blocks)
        part.rest = self.rest.head(left) if self.rest is not None and left > 0 else None
        return part

    @property
    def first(self) -> fidelity.Reference:
        """The reference on the first kind of text, on the windows that get all metrics."""
        return next(iter(self.references.values()))

    @property
    def first_blocks(self) -> Tensor:
        """(N, T) token ids of all windows of the first kind of text."""
        return next(iter(self.blocks.values()))

    @property
    def n_tokens(self) -> int:
        """Tokens of the first kind of text."""
        return self.first_blocks.numel()

    @property
    def nll(self) -> float:
        """The full model's mean loss on the first kind of text, nats/token."""
        return float(next(iter(self.full_nll.values())).mean())

    @torch.no_grad()
    def compare(self, model: PreTrainedModel, metrics: Sequence[str] = fidelity.METRICS) -> dict[str, dict]:
        """kind of text -> metric -> a value a window; the first kind has all ``metrics``, the others those of them
        that are in ``OTHER_TEXT``. Where the first has over 8,192 tokens only these few are taken on all of it: the
        distributions of the full model, which the others need, fill the memory.
        """
        few = [name for name in OTHER_TEXT if name in metrics]
        found: dict[str, dict[str, np.ndarray]] = {}
        for kind, full in self.references.items():
            found[kind] = self._compare(model, full, few if found else metrics)
            if self.rest is not None and len(found) == 1:
                more = self._compare(model, self.rest, few)
                found[kind] |= {name: np.concatenate([found[kind][name], more[name]]) for name in few}
        return found

    @torch.no_grad()
    def _compare(
        self, model: PreTrainedModel, own: fidelity.Reference, metrics: Sequence[str]
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """:func:`fidelity.compare`; of the full model itself, from the states that are known already."""
        if model is self.full:
            return fidelity.compare_states(model, own, own.hidden, metrics)
        return fidelity.compare(model, own, metrics=metrics)

    def _nll(self, own: fidelity.Reference) -> np.ndarray:
        """(N,) the full model's losses."""
        return self._compare(self.full, own, ("nll_nats",))["nll_nats"]

    def windows(self, row: str, found: Mapping[str, Mapping[str, np.ndarray]]) -> pd.DataFrame:
        """Part of a ``tN_windows`` with the losses of every window of what :meth:`compare` gave."""
        parts = [window_rows(row, f"{kind}{self.label}", self.blocks[kind], self.model_digest, found[kind])
                 for kind in found]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def row(self, model: PreTrainedModel) -> dict[str, float]:
        """:meth:`summary` of the model."""
        return self.summary(self.compare(model))

    def summary(self, found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
        """All metrics on the first kind of text with intervals; ``ppl_ratio_<kind>``, ``cosine_<kind>`` on all.

        The interval of ``ppl_ratio`` is of the differences to the full model on the same windows;
        ``ppl_ratio_mean`` is the geometric mean over the kinds of text.
        """
        row: dict[str, float] = {}
        for kind, full in self.full_nll.items():
            values = found[kind]
            if not row:
                row |= fidelity.summarize(values, self.seed) | fidelity.ppl_ratio(values["nll_nats"], full, self.seed)
            row[f"ppl_ratio_{kind}"] = np.exp((values["nll_nats"] - full).mean())
            row[f"cosine_{kind}"] = values["cosine"].mean()
        ratios = [row[f"ppl_ratio_{kind}"] for kind in self.full_nll]
        return row | {"ppl_ratio_mean": float(np.exp(np.mean(np.log(ratios))))}

    def ppl_ratio(self, model: PreTrainedModel) -> float:
        """Perplexity over the full model's, geometric mean over the kinds of text."""
        found = self.compare(model, ("nll_nats",))
        return float(np.exp(np.mean([(found[kind]["nll_nats"] - full).mean() for kind, full in self.full_nll.items()])))

    def constant_row(self, full: PreTrainedModel) -> dict[str, float]:
        """The trivial predictor on the first kind of text: it answers every token with the mean state."""
        values, own = fidelity.compare_constant(full, self.first), next(iter(self.full_nll.values()))
        blocks, row = self.first.blocks, fidelity.summarize(values, self.seed)
        ratio = np.exp(row["nll_nats"] - own[: len(blocks)].mean())
        return row | {"ppl_ratio": float(ratio), "n_windows": len(blocks), "n_tokens": blocks.numel()}
