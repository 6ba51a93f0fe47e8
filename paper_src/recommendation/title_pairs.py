"""Histories and items as texts, without item identities: one model reads both and is trained to bring them together.

In the manner of Recformer (arXiv:2305.13731): a history is the text of its titles, an item that of its own, and an
item that nobody took in training is ranked like any other. The loss is contrastive, over the items of a batch.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from paper_src.data import beginning
from paper_src.recommendation.encoders import Training, trained
from paper_src.recommendation.interactions import Sequences
from paper_src.recommendation.likelihood import BULLET, tokens_of_titles
from paper_src.recommendation.ranking import Scorer, alike_in_length

PAIRS = 3  # last items of a training sequence that are each to be brought near the history before them
LENGTH = 10  # last titles of a history that are read
SHARPNESS = 20.0  # of the softmax over cosines, at the start


class TitlePairs(nn.Module):
    """Vectors of texts: mean of the body's states over the titles' tokens, through a head, of length 1.

    The head starts as what takes away the mean of all items, which hidden states share; so training starts from the
    recommender that is not trained. An item is read as a history of that item alone.

    Args:
        body: takes ``input_ids`` (N, T), gives ``last_hidden_state`` (N, T, d); trained together with the head.
        titles: text of each item.
        centre: (d,) mean state of the items' texts.
        decay: weight of an item over that of the one after it.
        longest: tokens of a title that count.
        products: dtype of matrix products outside training, where the Trainer decides.
    """

    def __init__(
        self, body: nn.Module, tokenizer: PreTrainedTokenizerBase, titles: list[str], centre: Tensor,
        decay: float = 0.8, longest: int = 24, products: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__()
        self.body, self.decay, self.products = body, decay, products
        self.opening, self.bullet = beginning(tokenizer), tokenizer(BULLET, add_special_tokens=False)["input_ids"]
        self.titles = tokens_of_titles(tokenizer, titles, longest)
        self.head = nn.Linear(len(centre), len(centre))
        with torch.no_grad():
            nn.init.eye_(self.head.weight)
            self.head.bias.copy_(-centre)
        self.scale = nn.Parameter(torch.tensor(SHARPNESS).log())

    def text(self, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """(T,) token ids of a history's titles, and the weights of its tokens, which sum to 1."""
        ids, weights = [*self.opening], [0.0] * len(self.opening)
        for item, age in zip(items, range(len(items) - 1, -1, -1), strict=True):
            title = self.titles[item]
            ids += [*self.bullet, *title]
            weights += [0.0] * len(self.bullet) + [self.decay**age / len(title)] * len(title)
        return torch.tensor(ids), torch.tensor(weights) / sum(weights)

    def vectors(self, input_ids: Tensor, weights: Tensor) -> Tensor:
        """(N, d) of texts (N, T), padding behind, which weighs nothing."""
        states = self.body(input_ids=input_ids, use_cache=False).last_hidden_state  # (N, T, d)
        mean = (weights[..., None] * states).sum(1)
        return functional.normalize(self.head(mean), dim=-1)

    def forward(
        self, input_ids: Tensor, weights: Tensor, title_ids: Tensor, title_weights: Tensor, items: Tensor
    ) -> dict[str, Tensor]:  # fmt: skip
        """``loss``: cross-entropy of each history's next item among those of all rows.

        Args:
            items: (N,) what came next; where two rows have the same, neither is the other's wrong answer.
        """
        cosines = self.vectors(input_ids, weights) @ self.vectors(title_ids, title_weights).T  # (N, N)
        own = torch.arange(len(items), device=items.device)
        alike = (items[:, None] == items) & (own[:, None] != own)
        scores = (self.scale.exp() * cosines).float().masked_fill(alike, -torch.inf)
        return {"loss": functional.cross_entropy(scores, own)}

    @torch.no_grad()
    def read(self, histories: Sequences, batch_size: int = 32) -> Tensor:
        """(U, d) float32 vectors of histories; those of like length are read together."""
        self.eval()
        device, texts = self.scale.device, [self.text(items) for items in histories]
        found = torch.empty(len(texts), self.head.out_features, device=device)
        for rows in alike_in_length([len(ids) for ids, _ in texts], batch_size):
            batch = [pad_sequence(part, batch_first=True) for part in zip(*(texts[row] for row in rows), strict=True)]
            with torch.autocast(device.type, torch.bfloat16, enabled=self.products == torch.bfloat16):
                found[rows] = self.vectors(*(part.to(device) for part in batch)).float()
        return found


def as_scorer(model: TitlePairs) -> Scorer:
    """Cosines of all items with a history; items are read once, here."""
    items = model.read([np.array([item]) for item in range(len(model.titles))])
    return lambda histories: model.read([history[-LENGTH:] for history in histories]) @ items.T


def train(
    model: TitlePairs, sequences: Sequences, validation: tuple[Sequences, np.ndarray], folder: Path, training: Training
) -> list[dict[str, float]]:
    """Train ``model`` in place on the last ``PAIRS`` items of each sequence, as :func:`encoders.trained` does.

    Raises:
        InputError: no sequence has two items.
    """
    examples = []
    for items in sequences:
        for place in range(max(1, len(items) - PAIRS), len(items)):
            ids, weights = model.text(items[max(0, place - LENGTH) : place])
            title, own = model.text(items[place : place + 1])
            examples.append({"input_ids": ids, "weights": weights, "title_ids": title, "title_weights": own,
                             "items": torch.tensor(items[place])})  # fmt: skip
    return trained(model, examples, _collate, as_scorer, validation, folder, training)


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    texts = [name for name in rows[0] if name != "items"]
    padded = {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in texts}
    return padded | {"items": torch.stack([row["items"] for row in rows])}
