"""Ask the language model itself: how much likelier it finds a title behind the titles that a user took, in their order.

Nothing is trained and no item has an identity: the model reads and writes titles. What a title gains by the history is
pointwise mutual information (arXiv:2104.08315), here per token, where the paper sums over them, so that long titles are
at no advantage; its likelihood alone says most of all how common its words are.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.data import beginning
from paper_src.recommendation.interactions import Sequences
from paper_src.support.devices import rows_at_once

OPENING, BULLET = "One person's choices, in order:", "\n-"  # a title is a line, so that it ends with the next bullet
SAME = 0.05  # nats per token: in one row and in rows of their own, likelihoods differ by rounding alone


def candidates_alike(
    counts: np.ndarray, histories: Sequences, targets: np.ndarray, count: int = 20, seed: int = 0
) -> np.ndarray:
    """(U, count) items a user has not had: the target first, the others drawn by how often each was taken.

    So being popular is no advantage, and a ranking has to know the user; beside uniformly drawn ones the popular win.

    Args:
        counts: (I,) how often each item was taken in training.

    Raises:
        InputError: a user has had so many items that too few are left.
    """
    rng, rows = np.random.default_rng(seed), []
    for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
        weights = counts.astype(float)
        weights[[*history, target]] = 0
        if (weights > 0).sum() < count - 1:
            raise InputError(f"{count} candidates, but {(weights > 0).sum() + 1} items are left to user {user}")
        rows.append([target, *rng.choice(len(counts), count - 1, replace=False, p=weights / weights.sum())])
    return np.array(rows)


def tokens_of_titles(tokenizer: PreTrainedTokenizerBase, items: Sequence[str], longest: int) -> list[list[int]]:
    """At most ``longest`` token ids of each title behind a space; white space in it counts as a space, so that none
    holds a line's end.

    Raises:
        InputError: a title is empty.
    """
    titles = [" ".join(title.split()) for title in items]
    if empty := [index for index, title in enumerate(titles) if not title]:
        raise InputError(f"item {empty[0]} has an empty text: give it one")
    ids = tokenizer([f" {title}" for title in titles], add_special_tokens=False)["input_ids"]
    return [title[:longest] for title in ids]


class TitleModel:
    """Log-likelihoods of titles by a causal language model.

    Args:
        items: title of each item.
        length: last titles of a history that are read.
        longest: tokens of a title that count.

    Raises:
        InputError: a title is empty.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[str], length: int = 20,
        longest: int = 24,
    ):  # fmt: skip
        self.model, self.length = model, length
        opening, self.bullet = tokenizer([OPENING, BULLET], add_special_tokens=False)["input_ids"]
        self.opening = [*beginning(tokenizer), *opening]
        self.titles = tokens_of_titles(tokenizer, items, longest)
        self.packs, self.longest = True, 0  # whether a user is one row, and the longest prompt of which that is known
        self.alone: dict[int, float] = {}  # item -> score behind no title at all

    def gains(self, history: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """(C,) by how much a history makes each candidate's title likelier, nats per token.

        To four decimals: finer differences are of rounding, and without layers all gains are to be equal.
        """
        self.read_alone(candidates)
        alone = torch.tensor([self.alone[int(item)] for item in candidates])
        return (self.scores(history, candidates) - alone).round(decimals=4)

    def lengths(self, candidates: Sequence[int]) -> Tensor:
        """(C,) tokens over which a candidate's score is a mean."""
        return torch.tensor([len(self.titles[int(item)]) + len(self.bullet) for item in candidates])

    def read_alone(self, items: Iterable[int], batch_size: int = 32) -> None:
        """Score the titles of ``items`` behind the opening, those that are not known yet."""
        new = sorted({int(item) for item in items} - self.alone.keys())
        for low in range(0, len(new), batch_size):
            batch = new[low : low + batch_size]
            self.alone |= zip(batch, self.scores([], batch).tolist(), strict=True)

    @torch.no_grad()
    def scores(self, history: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """(C,) mean log-likelihood, nats per token, of each candidate's title and the line's end behind it."""
        prompt = [*self.opening]
        for item in history[-self.length :]:
            prompt += [*self.bullet, *self.titles[item]]
        prompt += self.bullet
        ends = [torch.tensor([*self.titles[item], *self.bullet]) for item in candidates]
        if self.packs and len(prompt) > self.longest:  # a longer one can be wider than a model's window
            self.packs, self.longest = self._agrees(prompt, ends[:2]), len(prompt)
        return self._packed(prompt, ends) if self.packs else self._plain(prompt, ends)

    def _agrees(self, prompt: list[int], ends: Sequence[Tensor]) -> bool:
        try:
            return bool((self._packed(prompt, ends) - self._plain(prompt, ends)).abs().max() < SAME)
        except Exception:  # of the model's class, each its own type: some take no such mask, or no places
            return False

    def _packed(self, prompt: list[int], ends: Sequence[Tensor]) -> Tensor:
        """One row for all: candidates behind one another, of which each sees the prompt and itself alone."""
        device, length = self.model.device, len(prompt)
        counts = torch.tensor([0, *(len(end) - 1 for end in ends)])  # the last token is foretold, not read
        ids = torch.cat([torch.tensor(prompt), *(end[:-1] for end in ends)])  # (S,)
        owner = torch.cat([torch.zeros(length, dtype=torch.long), torch.arange(len(counts)).repeat_interleave(counts)])
        places = torch.cat([torch.arange(length), *(length + torch.arange(len(end) - 1) for end in ends)])
        sees = (owner[:, None] == owner) | (owner == 0)
        mask = torch.zeros(len(ids), len(ids), dtype=self.model.dtype)
        mask.masked_fill_(~sees.tril(), torch.finfo(self.model.dtype).min)
        logits = self.model(
            input_ids=ids[None].to(device), attention_mask=mask[None, None].to(device),
            position_ids=places[None].to(device), use_cache=False, logits_to_keep=len(ids) - length + 1,
        ).logits[0]  # fmt: skip
        firsts = (1 + counts.cumsum(0)[:-1]).tolist()
        # before a title's first token stands the prompt's end, 0
        rows = [torch.tensor([0, *range(n, n + len(end) - 1)]) for n, end in zip(firsts, ends, strict=True)]
        return self._means(logits[torch.cat(rows).to(device)], ends)

    def _plain(self, prompt: list[int], ends: Sequence[Tensor]) -> Tensor:
        """Each candidate in a row of its own, behind the whole prompt."""
        rows = pad_sequence([torch.cat([torch.tensor(prompt), end]) for end in ends], batch_first=True)
        logits = self.model(input_ids=rows.to(self.model.device), use_cache=False).logits
        before = [row[len(prompt) - 1 :][: len(end)] for row, end in zip(logits, ends, strict=True)]
        return self._means(torch.cat(before), ends)

    @staticmethod
    def _means(logits: Tensor, ends: Sequence[Tensor]) -> Tensor:
        """(C,) means of the log-likelihoods of C titles by the logits (n, V) before each of their n tokens in all."""
        tokens, step = torch.cat(list(ends)).to(logits.device)[:, None], rows_at_once(logits.device)
        parts = zip(logits.split(step), tokens.split(step), strict=True)
        found = torch.cat([part.float().log_softmax(-1).gather(-1, own)[:, 0] for part, own in parts]).cpu()
        return torch.stack([title.mean() for title in found.split([len(end) for end in ends])])


def ranks_within(scores: Sequence[Tensor], seed: int = 0) -> np.ndarray:
    """(U,) rank of each user's first candidate by their scores, 1 is best; equal ones (equal titles) stand in random
    order.

    Raises:
        InputError: a score that is NaN.
    """
    rng, found = np.random.default_rng(seed), np.empty(len(scores), dtype=np.int64)
    for user, values in enumerate(scores):
        if values.isnan().any():
            raise InputError(f"scores of user {user} are NaN: load the model in another dtype")
        found[user] = int((values > values[0]).sum()) + rng.integers(1, int((values == values[0]).sum()) + 1)
    return found
