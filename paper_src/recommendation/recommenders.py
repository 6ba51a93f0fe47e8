"""The recommenders that are compared, and what all of one data set share.

A new recommender is a function with an entry of ``RECOMMENDERS``.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src.models import count_parameters
from paper_src.recommendation import encoders, ranking, title_pairs
from paper_src.recommendation.encoders import Training
from paper_src.recommendation.interactions import Interactions, Sequences, leave_last_out

NEIGHBOURS = (10, 30, 100, 300)  # of item-kNN
WATCHED = 1000  # validation users; of a quarter as many, the best epoch was often not the best


Fitted = tuple[ranking.Scorer, dict[str, object]]  # scores, and columns of the row


@dataclass
class Trial:
    """Users, items and budgets that all recommenders of one data set share; items are never sampled."""

    data: Interactions
    learners: int  # number of random users whose sequences language models are trained on
    judged: int  # number of random users that test; validation looks at as many others, at most ``WATCHED``
    training: Training  # of language models; its seed is that of the samples as well
    scratch: Training  # of networks that start from nothing, on all users
    width: int  # numbers of an item vector that starts from texts

    def __post_init__(self) -> None:
        split, seed = leave_last_out(self.data.sequences), self.training.seed
        self.items = len(self.data.texts)
        tested = ranking.sampled_users(split, self.judged, seed)
        learners = ranking.sampled_users(split, self.learners, seed + 1)
        watched = ranking.sampled_users(split, min(self.judged, WATCHED), seed + 2)
        self.users = {"none": [], "sample": [split.train[user] for user in learners], "all": split.train}
        self.validation = [split.train[user] for user in watched], split.valid[watched]
        histories = split.history("test")
        self.test = [histories[user] for user in tested], split.test[tested]
        # (U,) whether no learner took the test item: what is trained on learners knows its text alone
        self.unseen = ~np.isin(self.test[1], np.concatenate(self.users["sample"]))

    def seeded(self, seed: int) -> "Trial":
        """The same users with another seed of all trainings."""
        other = copy.copy(self)
        other.training, other.scratch = (replace(each, seed=seed) for each in (self.training, self.scratch))
        return other

    @functools.cached_property
    def knn(self) -> Fitted:
        """Item-kNN of all users: the weighting and number of neighbours that are best on validation users."""
        users, start, found = self.users["all"], time.perf_counter(), {}
        for settings in itertools.product(ranking.WEIGHTINGS, NEIGHBOURS):
            scorer = ranking.item_knn(users, self.items, *settings)
            values = ranking.metrics_of(ranking.target_ranks(scorer, *self.validation))["ndcg10"]
            found[settings] = values.mean(), scorer
        weighting, neighbours = best = max(found, key=lambda settings: found[settings][0])
        quality, scorer = found[best]
        columns = {"weighting": weighting, "neighbours": neighbours, "valid_ndcg10": quality}
        return scorer, columns | {"seconds": time.perf_counter() - start}


class ItemTexts(NamedTuple):
    """A language model with its tokenizer, its states (I, d) of the items' texts, and the seconds that these took."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    states: Tensor
    seconds: float


def fit_most_popular(trial: Trial, users: Sequences, *ignored) -> Fitted:
    return ranking.most_popular(users, trial.items), {}


def fit_item_knn(trial: Trial, *ignored) -> Fitted:
    return trial.knn


def fit_frozen(trial: Trial, users: Sequences, texts: ItemTexts, folder: Path) -> Fitted:
    return ranking.frozen(texts.states), {"seconds": texts.seconds, "parameters": count_parameters(texts.model)}


def fit_sasrec(trial: Trial, users: Sequences, texts: None, folder: Path) -> Fitted:
    training = trial.scratch
    torch.manual_seed(training.seed)
    body = encoders.sasrec_body(length=training.length)
    vectors = encoders.random_vectors(trial.items, body.config.n_embd, training.seed)
    return _fit(body, vectors, users, trial, training, folder)


def fit_layers(trial: Trial, users: Sequences, texts: ItemTexts, folder: Path) -> Fitted:
    """The language model's layers as encoder; item vectors start from its own states of the texts."""
    body = copy.deepcopy(texts.model.base_model).float()
    return _fit(body, encoders.item_vectors(texts.states, trial.width), users, trial, trial.training, folder)


def fit_no_layers(trial: Trial, users: Sequences, texts: ItemTexts, folder: Path) -> Fitted:
    """The same item vectors and training without any layer."""
    body = encoders.NoLayers(texts.model.config)
    return _fit(body, encoders.item_vectors(texts.states, trial.width), users, trial, trial.training, folder)


def fit_sasrec_texts(trial: Trial, users: Sequences, texts: ItemTexts, folder: Path) -> Fitted:
    """The same item vectors under a small Transformer that is trained from nothing."""
    training = replace(trial.training, body_rate=trial.training.learning_rate)
    torch.manual_seed(training.seed)
    body = encoders.sasrec_body(length=training.length)
    return _fit(body, encoders.item_vectors(texts.states, trial.width), users, trial, training, folder)


def fit_contrastive(trial: Trial, users: Sequences, texts: ItemTexts, folder: Path) -> Fitted:
    """The language model reads histories and items as texts; no item has a vector of its own."""
    training = replace(trial.training, learning_rate=trial.training.body_rate)  # its head starts from what it knows
    body = copy.deepcopy(texts.model.base_model).float()
    model = title_pairs.TitlePairs(body, texts.tokenizer, trial.data.texts, texts.states.mean(0), training.residual,
                                   products=training.products)  # fmt: skip
    history = title_pairs.train(model, users, trial.validation, folder, training)
    return title_pairs.as_scorer(model), _columns(model, history)


def _fit(body: nn.Module, vectors: Tensor, users: Sequences, trial: Trial, training: Training, folder: Path) -> Fitted:
    model, history = encoders.train(body, vectors, users, trial.validation, folder, training)
    return encoders.as_scorer(model, training.length), _columns(model, history)


def _columns(model: nn.Module, history: list[dict[str, float]]) -> dict[str, object]:
    best = max(history, key=lambda row: row["ndcg10"])
    columns = {"seconds": history[-1]["seconds"], "epochs": best["epoch"], "valid_ndcg10": best["ndcg10"]}
    return columns | {"parameters": count_parameters(model)}


@dataclass(frozen=True)
class Recommender:
    """An entry of ``RECOMMENDERS``."""

    kind: str  # reference, language model, or control of trained language models
    fit: Callable[[Trial, Sequences, ItemTexts | None, Path], Fitted]
    texts: bool = False  # whether a language model reads the items' texts
    trained: bool = False  # whether a network is trained on sequences; it is timed
    layers: bool = False  # whether the layers of that network read the history


RECOMMENDERS = {
    "most_popular": Recommender("reference", fit_most_popular),
    "item_knn": Recommender("reference", fit_item_knn),  # implicit's
    "sasrec": Recommender("reference", fit_sasrec, trained=True, layers=True),  # arXiv:1808.09781
    "frozen": Recommender("language model", fit_frozen, texts=True),
    "trained": Recommender("language model", fit_layers, texts=True, trained=True, layers=True),  # arXiv:2405.17890
    "no_layers": Recommender("control", fit_no_layers, texts=True, trained=True),
    "sasrec_texts": Recommender("control", fit_sasrec_texts, texts=True, trained=True),
    "contrastive": Recommender("language model", fit_contrastive, texts=True, trained=True, layers=True),
}
