"""Next-item recommendation ranked over the whole catalogue, and recommenders that are not trained.

Users and items are indices; a recommender is a function from histories to scores of all items. *Frozen* items are a
(compact) language model's states of their texts, users the weighted mean of their items. Item-kNN is implicit's.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.data import beginning
from paper_src.models import last_hidden
from paper_src.recommendation.interactions import Sequences, Split

WEIGHTINGS = {"cosine": "CosineRecommender", "tf_idf": "TFIDFRecommender", "bm25": "BM25Recommender"}
Scorer = Callable[[Sequences], Tensor]  # histories of U users -> scores (U, I)


def target_ranks(scorer: Scorer, histories: Sequences, targets: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """(U,) rank of each user's target among all items they have not had, 1 is best; of equal scores the worst.

    Args:
        scorer: gives the scores of all items from histories, what is known of each user in time order.
        targets: (U,) the item that came next.

    Raises:
        InputError: an empty history, a target that the user has had, or a score that is NaN.
    """
    lengths = np.array([len(items) for items in histories])
    if (lengths == 0).any():
        raise InputError(f"user {lengths.argmin()} has an empty history: nothing can be recommended")
    found = np.empty(len(histories), dtype=np.int64)
    for users in alike_in_length(lengths, batch_size):
        part = [histories[user] for user in users]
        scores = scorer(part).float().cpu()
        if (broken := scores.isnan().any(1)).any():
            raise InputError(f"scores of user {users[int(broken.nonzero()[0])]} are NaN: retrain or refit")
        rows = torch.arange(len(part)).repeat_interleave(torch.as_tensor(lengths[users]))
        scores[rows, torch.as_tensor(np.concatenate(part))] = -torch.inf
        own = scores.gather(1, torch.as_tensor(targets[users])[:, None])
        if (had := own.isneginf()).any():
            raise InputError(f"user {users[int(had.nonzero()[0, 0])]} has had the target before: drop repeats")
        found[users] = (scores >= own).sum(1)
    return found


def alike_in_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of indices, shortest first: rows of like length need little padding."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[low : low + batch_size] for low in range(0, len(order), batch_size)]


def metrics_of(found: np.ndarray) -> dict[str, np.ndarray]:
    """Each user's metrics by the rank r of the one relevant item.

    HR@k = [r <= k], NDCG@k = [r <= k] / log2(1 + r), MRR = 1 / r.

    Example:
        >>> {name: values.tolist() for name, values in metrics_of(np.array([3])).items()}
        {'hr5': [1.0], 'hr10': [1.0], 'ndcg5': [0.5], 'ndcg10': [0.5], 'mrr': [0.3333333333333333]}
    """
    gain = 1 / np.log2(1 + found)
    hits = {f"hr{k}": (found <= k).astype(float) for k in (5, 10)}
    return hits | {f"ndcg{k}": np.where(found <= k, gain, 0.0) for k in (5, 10)} | {"mrr": 1 / found}


def most_popular(train: Sequences, items: int) -> Scorer:
    """Scores by the number of interactions in ``train``, the same for every user."""
    counts = torch.as_tensor(np.bincount(np.concatenate(train), minlength=items)).float()
    return lambda histories: counts.repeat(len(histories), 1)


def item_knn(train: Sequences, items: int, weighting: str = "cosine", neighbours: int = 100) -> Scorer:
    """Scores by cosine between items' sets of users, summed over the history, by implicit's recommenders.

    ``weighting``: of ``WEIGHTINGS``, how much a user counts.
    """
    from implicit import nearest_neighbours  # compiled: slow to import

    model = getattr(nearest_neighbours, WEIGHTINGS[weighting])(K=neighbours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a conversion of its own
        model.fit(_matrix(train, items), show_progress=False)
    similarity = model.similarity.tocsr()
    return lambda histories: torch.as_tensor((_matrix(histories, items) @ similarity).toarray())


def _matrix(sequences: Sequences, items: int) -> sparse.csr_matrix:
    """(U, I) with a 1 for each interaction."""
    users = np.repeat(np.arange(len(sequences)), [len(row) for row in sequences])
    ones = np.ones(len(users), dtype=np.float32)
    return sparse.csr_matrix((ones, (users, np.concatenate(sequences))), shape=(len(sequences), items))


@torch.no_grad()
def text_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int = 20,
    batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """(I, d) float32: mean over tokens of the last hidden states of each text.

    Padding stands behind the texts, where a causal model's states do not see it. A BOS token stands before each where
    the tokenizer puts one, and does not count.

    Args:
        texts: I texts, none empty.
        length: tokens of a text that count.
    """
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:length]) for text in texts]
    first = torch.tensor(beginning(tokenizer), dtype=torch.long)
    if empty := [index for index, row in enumerate(ids) if len(row) == 0]:
        raise InputError(f"item {empty[0]} has an empty text: give it one")
    means, order = [], []
    for part in alike_in_length([len(row) for row in ids], batch_size):
        lengths = torch.tensor([len(ids[index]) for index in part])
        rows = [torch.cat([first, ids[index]]) for index in part]
        states = last_hidden(model, pad_sequence(rows, batch_first=True))[:, len(first) :].float().cpu()
        states[torch.arange(states.shape[1]) >= lengths[:, None]] = 0  # padding
        means.append(states.sum(1) / lengths[:, None])
        order += part
    return torch.cat(means)[torch.tensor(order).argsort()]


def frozen(states: Tensor, decay: float = 0.8) -> Scorer:
    """Scores by cosine of :func:`text_states` (I, d) between an item and the user.

    A user is the mean of their items, weighted by ``decay`` ** age.
    """
    vectors = functional.normalize(states - states.mean(0), dim=-1)  # hidden states share a large mean

    def score(histories: Sequences) -> Tensor:
        users = [vectors[items].T @ decay ** torch.arange(len(items) - 1.0, -1, -1) for items in histories]
        return functional.normalize(torch.stack(users), dim=-1) @ vectors.T

    return score


def sampled_users(split: Split, users: int, seed: int) -> np.ndarray:
    """Sorted indices of ``users`` random users of ``split``; all if there are no more."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.choice(len(split.train), min(users, len(split.train)), replace=False))
