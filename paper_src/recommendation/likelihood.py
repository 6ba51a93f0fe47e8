"""Ask the language model itself: how likely it finds a title behind the titles that a user took, in their order.

Nothing is trained and no item has an identity: the model reads and writes titles. It reorders candidates that another
recommender names, as it would a catalogue if that were short.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.data import beginning
from paper_src.models import last_hidden, logits_of
from paper_src.recommendation.interactions import Sequences
from paper_src.recommendation.ranking import Scorer

OPENING, BULLET = "One person's choices, in order:", "\n-"  # a title is a line, so that it ends with the next bullet
SAME = 0.02  # nats per token: packed and plain likelihoods differ by rounding alone


def candidates_of(scorer: Scorer, histories: Sequences, targets: np.ndarray, count: int = 100) -> np.ndarray:
    """(U, count) items that ``scorer`` puts first of those a user has not had, best first.

    Where the target is not among them it takes the last place: a ranking of candidates needs the true item.
    """
    rows = []
    for history, target in zip(histories, targets, strict=True):
        scores = scorer([history])[0].float()
        scores[torch.as_tensor(history)] = -torch.inf
        best = scores.argsort(descending=True, stable=True)[:count].numpy()
        rows.append(best if target in best else np.append(best[:-1], target))
    return np.stack(rows)


class TitleModel:
    """Log-likelihoods of titles by a causal language model.

    Args:
        items: title of each item; white space in it counts as a space, so that none holds a line's end.
        length: last titles of a history that are read.
        longest: tokens of a title that count.

    Raises:
        InputError: a title is empty.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[str], length: int = 20,
        longest: int = 24,
    ):  # fmt: skip
        titles = [" ".join(title.split()) for title in items]
        if empty := [index for index, title in enumerate(titles) if not title]:
            raise InputError(f"item {empty[0]} has an empty text: give it one")
        self.model, self.length = model, length

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.bullet = ids(BULLET)
        self.opening = [*beginning(tokenizer), *ids(OPENING)]
        self.titles = [ids(f" {title}")[:longest] for title in titles]
        self.packs: bool | None = None  # whether candidates may stand in one row; not known before the first user

    @torch.no_grad()
    def scores(self, history: Sequence[int], candidates: Sequence[int]) -> Tensor:
        """(C,) mean log-likelihood, nats per token, of each candidate's title and the line's end behind it."""
        prompt = [*self.opening]
        for item in history[-self.length :]:
            prompt += [*self.bullet, *self.titles[item]]
        prompt += self.bullet
        ends = [torch.tensor([*self.titles[item], *self.bullet]) for item in candidates]
        if self.packs is None:
            few = ends[:2]
            self.packs = bool((self._packed(prompt, few) - self._plain(prompt, few)).abs().max() < SAME)
        return self._packed(prompt, ends) if self.packs else self._plain(prompt, ends)

    def _packed(self, prompt: list[int], ends: Sequence[Tensor]) -> Tensor:
        """All in one row, the prompt once: each candidate sees the prompt and itself, at the same positions."""
        start, device = len(prompt), self.model.device
        own = torch.cat([torch.full((start,), -1), *(torch.full((len(end),), n) for n, end in enumerate(ends))])
        places = torch.cat([torch.arange(start), *(start + torch.arange(len(end)) for end in ends)])
        ids = torch.cat([torch.tensor(prompt), *ends])
        seen = (own[None, :] == -1) | (own[None, :] == own[:, None])
        seen &= torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill(~seen, torch.finfo(self.model.dtype).min)
        more = {"attention_mask": mask[None, None].to(device), "position_ids": places[None].to(device)}
        hidden = last_hidden(self.model, ids[None], **more)[0]
        before = torch.arange(len(ids)) - 1  # the place that predicts each token
        before[torch.cumsum(torch.tensor([start, *map(len, ends[:-1])]), 0)] = start - 1
        return self._means(hidden[before[start:].to(device)], ids[start:], ends)

    def _plain(self, prompt: list[int], ends: Sequence[Tensor]) -> Tensor:
        """Each candidate in a row of its own, behind the whole prompt."""
        rows = pad_sequence([torch.cat([torch.tensor(prompt), end]) for end in ends], batch_first=True)
        hidden, start = last_hidden(self.model, rows), len(prompt)
        states = torch.cat([row[start - 1 : start - 1 + len(end)] for row, end in zip(hidden, ends, strict=True)])
        return self._means(states, torch.cat(list(ends)), ends)

    def _means(self, states: Tensor, ids: Tensor, ends: Sequence[Tensor]) -> Tensor:
        """(C,) means of the log-likelihoods of tokens ``ids`` by the ``states`` before them."""
        log_p = logits_of(self.model, states[None])[0].float().log_softmax(-1)
        found = log_p.gather(1, ids[:, None].to(log_p.device))[:, 0].cpu()
        return torch.stack([part.mean() for part in found.split([len(end) for end in ends])])


def ranks_within(
    scores: Callable[[Sequence[int], Sequence[int]], Tensor], histories: Sequences, candidates: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """(U,) rank of each user's target among the candidates, 1 is best; of equal scores (equal titles) the worst.

    Raises:
        InputError: a score that is NaN.
    """
    found = np.empty(len(targets), dtype=np.int64)
    for user, (history, row, target) in enumerate(zip(histories, candidates, targets, strict=True)):
        values = scores(history, row)
        if values.isnan().any():
            raise InputError(f"scores of user {user} are NaN: load the model in another dtype")
        found[user] = int((values >= values[torch.as_tensor(row == target)]).sum())
    return found
