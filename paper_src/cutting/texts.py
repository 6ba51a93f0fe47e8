"""The texts of a run as blocks of tokens: the training part calibrates, validation decides, test judges."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paper_src import InputError, data

LENGTH = 128  # tokens of a block
KINDS = ("wikitext-2", "c4", "code", "technical", "multilingual")  # of text on which every result is tested


class Texts:
    """The texts that a model is cut for; each has three parts that share nothing.

    Args:
        tokenizer: of the model.
        names: what the reader gave; none: WikiText-2.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]):
        self.names, self._tokenizer = list(names) or ["wikitext-2"], tokenizer

    @property
    def kinds(self) -> list[str]:
        """Of text on which the result is tested, those of the run first."""
        return list(dict.fromkeys([*self.names, *KINDS]))

    def read(self) -> tuple[dict[str, int], dict[str, str]]:
        """Text -> characters to calibrate on, and part -> digest; InputError if one is missing or too short."""
        found, digests = {}, {}
        for name in self.names:
            for split in ("train", "valid", "test"):
                text, digests[f"{name} {split}"] = data.load_text(name, split)
                blocks = self._as_many(name, text, 2, LENGTH, 0)
                if split == "train":
                    found[name] = len(text)
                    if len(blocks) < 2:  # to fit and to hold out
                        raise InputError(f"{name} is too short: its training part holds no 2 blocks of {LENGTH} tokens")
        return found, digests

    def blocks(self, split: str, count: int, seed: int) -> Tensor:
        """(n, LENGTH) token ids, n at most ``count``, of all texts alike, shuffled; fewer where they are short."""
        each = max(2, -(-count // len(self.names)))
        parts = [self._as_many(name, data.load_text(name, split)[0], each, LENGTH, seed) for name in self.names]
        return shuffled(torch.cat(parts), seed)[:count]

    def windows(self, kind: str, count: int, length: int, seed: int) -> Tensor:
        """(n, length) token ids of test text, n at most ``count``; InputError if there is none."""
        return self._as_many(kind, data.load_text(kind, "test")[0], count, length, seed)

    def _as_many(self, name: str, text: str, count: int, length: int, seed: int) -> Tensor:
        try:
            return data.as_many(self._tokenizer, text, count, length, seed)
        except InputError as error:
            raise InputError(f"{name} is too short: its training, validation or test part holds no {length} tokens"
                             ) from error  # fmt: skip


def shuffled(blocks: Tensor, seed: int) -> Tensor:
    """The same blocks in another order."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))]
