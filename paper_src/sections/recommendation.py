"""Rows of section 6: which designs can judge compaction, and does the compact model still recommend in those?"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import timing
from paper_src.baselines.control import random_layers, without_layers
from paper_src.baselines.depth import repaired
from paper_src.compaction import compact
from paper_src.recommendation import ranking
from paper_src.recommendation.gate import PASSES, gate, two_level_ratio_interval
from paper_src.recommendation.likelihood import TitleModel, candidates_alike, ranks_within
from paper_src.recommendation.recommenders import RECOMMENDERS, ItemTexts, Trial

KEY = ["method", "body", "train_on"]  # names a row of one data set
BARE = "embeddings"  # the body of a model without any layer
FULL = ("trained", "full", "sample")  # speedups are over this row
DESIGNS = {  # design -> row of the full model, and of the same recipe without its layers
    "trained": (FULL, ("no_layers", "full", "sample")),
    "frozen": (("frozen", "full", "none"), ("frozen", BARE, "none")),
    "contrastive": (("contrastive", "full", "sample"), ("contrastive", BARE, "sample")),
}
TITLES = "titles"  # the design that ranks candidates
RATIOS = ("share_of_full", "over_no_layers")
KNN, POPULAR = "item_knn", "most_popular"  # rankings of candidates without a language model
BAG = "mean_embedding"  # and by the mean of the titles' embeddings: text, but no layer


def variants(full: PreTrainedModel, kept: Sequence[int], recovered: Path, seed: int) -> dict[str, PreTrainedModel]:
    """name -> model: full, without any layer, cut to ``kept``, the same repaired (a checkpoint), with random layers,
    and the first layers, as SLMRec takes.
    """
    return {"full": full, BARE: without_layers(full), "compact": compact(full, kept),
            "recovered": repaired(full, recovered), "random_layers": random_layers(full, kept, seed),
            "first_layers": compact(full, range(len(kept)))}  # fmt: skip


def read_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> ItemTexts:
    """What ``model`` makes of all items' texts, once for all recommenders that start from that."""
    start = time.perf_counter()
    states = ranking.text_states(model, tokenizer, texts)
    return ItemTexts(model, tokenizer, states, time.perf_counter() - start)


class Contest:
    """Collects rows of one table, each user's NDCG@10 beside them, and trained networks to time.

    Args:
        trial: users, items and budgets.
        folder: of checkpoints; a killed run goes on from them.
        seeds: of the trainings of language models and their control; references are trained once.
    """

    def __init__(self, trial: Trial, folder: Path, seeds: Sequence[int] = (0,)):
        self.trial, self.folder, self.seeds = trial, folder, seeds
        self.rows: list[dict[str, object]] = []
        self.ndcg10: dict[tuple[str, ...], np.ndarray] = {}  # (S, U) of S trainings and U users
        self.scorers: dict[tuple[str, ...], ranking.Scorer] = {}

    def enter(self, method: str, train_on: str, body: str = "none", texts: ItemTexts | None = None) -> None:
        """Fit a recommender once for each seed, judge it on test users and add its row, a mean over seeds.

        Args:
            method: of ``RECOMMENDERS``.
            train_on: the users it learns from: none, sample or all.
            body: name of the model that reads, where the recommender does not bring its own.
            texts: what that model makes of the items' texts.
        """
        entry, users = RECOMMENDERS[method], self.trial.users[train_on]
        body = method if entry.layers and not entry.texts else body
        several = entry.trained and entry.texts
        found, columns = [], []
        for seed in self.seeds if several else self.seeds[:1]:
            start = time.perf_counter()
            folder = self.folder / f"{method}-{body}-{train_on}-{seed}"
            scorer, own = entry.fit(self.trial.seeded(seed) if several else self.trial, users, texts, folder)
            columns.append({"seconds": time.perf_counter() - start} | own)
            found.append(ranking.metrics_of(ranking.target_ranks(scorer, *self.trial.test)))
            if entry.trained:
                self.scorers.setdefault((method, body, train_on), scorer)
        values = {name: np.stack([each[name] for each in found]) for name in found[0]}
        self.ndcg10[method, body, train_on] = values["ndcg10"]
        row = {"method": method, "body": body, "train_on": train_on, "layers": entry.layers,
               "train_users": len(users), "trainings": len(found)}  # fmt: skip
        unseen = values["ndcg10"][:, self.trial.unseen]
        row |= _told(values | {"ndcg10_unseen": unseen}) | {"n_unseen": unseen.shape[1]}
        self.rows.append(row | _means(columns))

    def speeds(self, rounds: int, users: int = 128) -> pd.DataFrame:
        """``users_per_s`` of trained networks at inference, and the speedup over the full model, interleaved."""
        histories = self.trial.test[0][:users]

        def timed(key: tuple[str, ...]) -> float:
            start = time.perf_counter()
            self.scorers[key](histories).sum().item()  # waits for the device
            return time.perf_counter() - start

        for key in self.scorers:
            timed(key)  # warms up
        seconds, rows = timing.interleaved(list(self.scorers), timed, rounds), []
        for key, own in seconds.items():
            compared = FULL in seconds and key != FULL
            found = timing.speed_row(seconds[FULL], own) if compared else {}
            ratio = {name: value for name, value in found.items() if name.startswith("speedup")}
            rows.append(dict(zip(KEY, key, strict=True)) | {"users_per_s": len(histories) / np.median(own), **ratio})
        return pd.DataFrame(rows)

    def ratios(self, method: str, body: str, train_on: str) -> dict[str, float]:
        """Columns with NDCG@10 over that of another row, NaN where there is none; intervals pair users and trainings.

        ``share_of_full`` is over the full model by the same method, ``over_no_layers`` over the same recipe without
        layers.
        """
        cut = RECOMMENDERS[method].kind == "language model" and body not in ("full", BARE)
        bases: dict[str, tuple | None] = {"share_of_full": (method, "full", train_on) if cut else None}
        recipe, reader, _ = DESIGNS[method][1] if method in DESIGNS and body != BARE else (None, None, None)
        bases["over_no_layers"] = (recipe, BARE if reader == BARE else body, train_on)
        columns, own = {}, self.ndcg10[method, body, train_on]
        for name, base in bases.items():
            columns |= ratio(name, own, self.ndcg10.get(base), self.trial.training.seed)
        return columns


def ratio(name: str, own: np.ndarray, other: np.ndarray | None, seed: int) -> dict[str, float]:
    """Columns ``name``, ``name_lo`` and ``name_hi`` of mean(own) / mean(other), both (S, U); NaN without ``other``."""
    low, high = (np.nan, np.nan) if other is None else two_level_ratio_interval(own, other, seed)
    return {name: np.nan if other is None else own.mean() / other.mean(), f"{name}_lo": low, f"{name}_hi": high}


def _told(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of (S, U) values with their intervals over trainings and users; NaN without users."""
    columns = {}
    for name, column in values.items():
        columns |= ratio(name, column, np.ones_like(column) if column.size else None, seed=0)
    return columns


def _means(columns: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Numbers averaged over trainings; words are those of the first."""
    first = columns[0]
    return {name: value if isinstance(value, str) else float(np.mean([each[name] for each in columns]))
            for name, value in first.items()}  # fmt: skip


class Asked:
    """Test users whose candidates language models rank by how much likelier a history makes their titles.

    Args:
        trial: users and items; candidates are drawn by how often its users took an item.
        users: so many of its test users, drawn at random; all if there are no more.
        count: candidates of each user, the test item among them.
        length: last titles of a history that are read.
    """

    def __init__(self, trial: Trial, users: int, count: int, length: int):
        self.trial, self.length, self.seed = trial, length, trial.training.seed
        everyone = len(trial.test[1])
        drawn = np.sort(np.random.default_rng(self.seed).choice(everyone, min(users, everyone), replace=False))
        self.histories = [trial.test[0][user] for user in drawn]
        counts = np.bincount(np.concatenate(trial.users["all"]), minlength=trial.items)
        self.candidates = candidates_alike(counts, self.histories, trial.test[1][drawn], count, self.seed)
        self.ranks: dict[str, np.ndarray] = {}
        self.summed: dict[str, np.ndarray] = {}  # ranks by gains summed over a title's tokens
        self.speed: dict[str, float] = {}
        self.place(POPULAR, ranking.most_popular(trial.users["all"], trial.items))
        self.place(KNN, trial.knn[0])

    def place(self, name: str, scorer: ranking.Scorer) -> None:
        """Let a recommender of the whole catalogue rank everybody's candidates."""
        scores = [scorer([history])[0, torch.as_tensor(row)] for history, row in self._asked()]
        self.ranks[name], self.speed[name] = ranks_within(scores, self.seed), np.nan

    def _asked(self) -> Iterable[tuple[Sequence[int], np.ndarray]]:
        return zip(self.histories, self.candidates, strict=True)

    def enter(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let ``model`` rank everybody's candidates; titles alone are read before, as once for a catalogue."""
        titles = TitleModel(model, tokenizer, self.trial.data.texts, self.length)
        titles.read_alone(self.candidates.flat)
        start = time.perf_counter()
        gains = [titles.gains(history, row) for history, row in self._asked()]
        self.speed[name] = len(self.candidates) / (time.perf_counter() - start)
        self.ranks[name] = ranks_within(gains, self.seed)
        summed = [own * titles.lengths(row) for own, row in zip(gains, self.candidates, strict=True)]
        self.summed[name] = ranks_within(summed, self.seed)

    def ndcg10(self, name: str) -> np.ndarray:
        """(1, U) of each user within the candidates."""
        return ranking.metrics_of(self.ranks[name])["ndcg10"][None]

    def table(self) -> pd.DataFrame:
        """Rows of t6_titles: each ranking, within the candidates."""
        rows = []
        for name, ranks in self.ranks.items():
            values = {metric: found[None] for metric, found in ranking.metrics_of(ranks).items()}
            row = {"dataset": self.trial.data.name, "model": name, "n_users": len(ranks),
                   "candidates": self.candidates.shape[1], "users_per_s": self.speed[name]} | _told(values)  # fmt: skip
            own = ranking.metrics_of(self.summed[name])["ndcg10"] if name in self.summed else np.array([])
            row |= _told({"ndcg10_summed": own[None]})
            for column, base in zip((*RATIOS, "over_knn"), ("full", BARE, KNN), strict=True):
                other = self.ndcg10(base) if base in self.ranks and base != name else None
                row |= ratio(column, values["ndcg10"], other, self.seed)
            rows.append(row)
        return pd.DataFrame(rows)


def t6_gate(contests: Iterable[Contest], asked: Iterable[Asked]) -> pd.DataFrame:
    """t6_gate: each design on each data set, the full model over the same recipe without layers, and the verdict."""
    rows = []
    for contest, titles in zip(contests, asked, strict=True):
        found = {name: [contest.ndcg10[key] for key in keys] for name, keys in DESIGNS.items()
                 if keys[0] in contest.ndcg10}  # fmt: skip
        found[TITLES] = [titles.ndcg10(name) for name in ("full", BARE)]
        for name, (full, without) in found.items():
            trained = name in RECOMMENDERS and RECOMMENDERS[name].trained
            judged = gate(full, without, trained, seed=contest.trial.training.seed)
            row = {"dataset": contest.trial.data.name, "design": name, "ndcg10_full": full.mean()}
            rows.append(row | {"ndcg10_no_layers": without.mean(), **judged._asdict()})
    return pd.DataFrame(rows)


def passing(gates: pd.DataFrame, dataset: str) -> list[str]:
    """The designs that can judge compaction on a data set."""
    return gates.loc[(gates["dataset"] == dataset) & (gates["verdict"] == PASSES), "design"].tolist()


def t6_recommenders(contest: Contest, speeds: pd.DataFrame) -> pd.DataFrame:
    """t6_movielens, t6_amazon: the rows of one data set, with paired ratios and speed."""
    frame = pd.DataFrame(contest.rows)
    ratios = pd.DataFrame([contest.ratios(*key) for key in frame[KEY].itertuples(index=False)])
    frame = pd.concat([frame, ratios], axis=1).assign(
        n_users=len(contest.trial.test[0]), n_items=contest.trial.items, dataset=contest.trial.data.name
    )
    return frame.merge(speeds, on=KEY, how="left")
