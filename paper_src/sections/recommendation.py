"""The paper's figures, each drawn from tables alone."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import timing
from paper_src.compaction import compact
from paper_src.models import count_parameters
from paper_src.recommendation import encoders, ranking
from paper_src.recommendation.interactions import Interactions, leave_last_out
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from paper_src.sections.recovery import saved
from paper_src.stats import interval, paired_ratio_interval

METHODS = {
    "most_popular": (GREY, "most popular"),
    "item_knn": (GREY, "item-kNN"),
    "sasrec": (GREEN, "SASRec"),
    "frozen": (ORANGE, "frozen"),
    "trained": (BLUE, "trained"),
    "no_layers": (RED, "no layers"),
}
PLACES = (9, 0, -9)  # points above the marks of the compact models, from the best down: names that would overlap


def f6_recommendation(tables: dict[str, pd.DataFrame]) -> Figure:
    """NDCG@10 with 95% intervals of every recommender, and of the trained ones against their measured speed.

    Args:
        tables: name -> t6_movielens, t6_amazon, as many as there are.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(len(tables), 2, figsize=(10, 3.6 * len(tables)), squeeze=False)
        for (left, right), table in zip(axes, tables.values(), strict=True):
            small = table[(table["method"] == "trained") & (table["model"] != "full")].nlargest(len(PLACES), "ndcg10")
            above = dict(zip(small.index, PLACES, strict=False))
            for place, row in enumerate(table.itertuples()):
                colour, label = METHODS[row.method]
                spread = [[row.ndcg10 - row.ndcg10_lo], [row.ndcg10_hi - row.ndcg10]]
                left.errorbar(row.ndcg10, place, xerr=spread, fmt="o", ms=4, color=colour)
                if row.users_per_s == row.users_per_s:
                    right.errorbar(row.users_per_s, row.ndcg10, spread, fmt="o", ms=5, color=colour, capsize=2)
                    name = row.model if row.method == "trained" else f"{label}, {row.model}"
                    if row.method == "no_layers" and "users" not in row.model:  # points that lie on each other
                        name = label if row.model == "full" else ""
                    right.annotate(name.replace("_", " "), (row.users_per_s, row.ndcg10), size=7,
                                   textcoords="offset points", xytext=(5, above.get(row.Index, 4)))  # fmt: skip
            names = [METHODS[row.method][1] + (f", {row.model}" if row.model != "none" else "")
                     for row in table.itertuples()]  # fmt: skip
            left.set_yticks(range(len(table)), [name.replace("_", " ") for name in names])
            left.invert_yaxis()
            left.set_xlim(left=0)
            left.set_xlabel("NDCG@10, whole catalogue")
            left.set_title(f"{table['dataset'].iloc[0]}: {table['n_users'].iloc[0]:,} test users")
            right.set_xscale("log")
            right.margins(x=0.3)
            right.set_ylim(bottom=0)
            right.set_xlabel("users a second at inference")
            right.set_ylabel("NDCG@10")
            right.set_title("trained models: quality and speed")
    plt.close(figure)
    return figure


SASREC_WIDTH = 64
SASREC_BATCH = 64  # sequences a step
WATCHED = 1000  # users; of a quarter as many, the best epoch was often not the best


def variants(full: PreTrainedModel, kept: Sequence[int], recovered: Path) -> dict[str, PreTrainedModel]:
    """name -> model: full, cut to ``kept``, the same repaired (a checkpoint), and the first layers, as SLMRec takes."""
    return {"full": full, "compact": compact(full, kept), "recovered": saved(full, recovered),
            "first_layers": compact(full, range(len(kept)))}  # fmt: skip


@dataclass
class Bench:
    """Users and items that all recommenders of one data set share.

    Args:
        data: sequences.
        learners: number of random users whose sequences language models are trained on; items are never sampled.
        judged: number of random users that test; validation looks at as many others, at most ``WATCHED``.
        seed: of both samples and the bootstrap.
    """

    data: Interactions
    learners: int
    judged: int
    seed: int

    def __post_init__(self) -> None:
        self.split = leave_last_out(self.data.sequences)
        self.users = ranking.sample(self.split, self.judged, self.seed)
        self.sample = [self.split.train[user] for user in ranking.sample(self.split, self.learners, self.seed + 1)]
        watched = ranking.sample(self.split, min(self.judged, WATCHED), self.seed + 2)
        self.validation = [self.split.train[user] for user in watched], self.split.valid[watched]
        histories = self.split.history("test")
        self.test = [histories[user] for user in self.users], self.split.test[self.users]

    def judge(self, scorer: ranking.Scorer) -> dict[str, np.ndarray]:
        """Each test user's metrics."""
        return ranking.metrics_of(ranking.ranks(scorer, *self.test))


class Contest:
    """Collects rows of one table, each user's NDCG@10 beside them, and trained models to time."""

    def __init__(self, bench: Bench, report: Callable = print):
        self.bench, self.report = bench, report
        self.rows: list[dict[str, object]] = []
        self.users: dict[tuple[str, str], np.ndarray] = {}
        self.scorers: dict[tuple[str, str], ranking.Scorer] = {}

    def enter(self, method: str, model: str, scorer: ranking.Scorer, **context) -> None:
        """Judge ``scorer`` on test users and add its row."""
        values = self.bench.judge(scorer)
        self.users[method, model] = values["ndcg10"]
        row = {"method": method, "model": model, **context}
        for name, column in values.items():
            low, high = interval(column, seed=self.bench.seed)
            row |= {name: column.mean(), f"{name}_lo": low, f"{name}_hi": high}
        self.rows.append(row)
        self.report(f"{self.bench.data.name}, {method} {model}: NDCG@10 {row['ndcg10']:.4f}, HR@10 {row['hr10']:.4f}")

    def table(self, rounds: int) -> pd.DataFrame:
        """t6_*: the rows, with NDCG@10 over the full model's and over that without layers, and the speed.

        Both ratios pair the same users: ``share_of_full`` is of the same method, ``over_no_layers`` of the same
        item vectors, users and training.
        """
        frame = pd.DataFrame(self.rows)
        base = {
            "n_users": len(self.bench.users),
            "n_items": len(self.bench.data.texts),
            "dataset": self.bench.data.name,
        }
        shares = [self._ratios(row["method"], row["model"]) for row in self.rows]
        frame = pd.concat([frame, pd.DataFrame(shares)], axis=1).assign(**base)
        return frame.merge(self._speeds(rounds), on=["method", "model"], how="left")

    def _ratios(self, method: str, model: str) -> dict[str, float]:
        """The columns of :meth:`table` with ratios, NaN where there is nothing to compare with."""
        full = (method, "full") if model != "full" and method in ("frozen", "trained") else None
        bare = ("no_layers", model) if method == "trained" else None
        columns = {("share_of_full", "share_lo", "share_hi"): full,
                   ("over_no_layers", "over_no_layers_lo", "over_no_layers_hi"): bare}  # fmt: skip
        return {name: value for names, base in columns.items()
                for name, value in zip(names, self._ratio((method, model), base), strict=True)}  # fmt: skip

    def _ratio(self, key: tuple[str, str], base: tuple[str, str] | None) -> tuple[float, float, float]:
        """NDCG@10 of ``key`` over that of ``base``, with the interval of a bootstrap over the same users for both."""
        if base not in self.users:
            return np.nan, np.nan, np.nan
        own, other = self.users[key], self.users[base]
        with np.errstate(divide="ignore", invalid="ignore"):
            return own.mean() / other.mean(), *paired_ratio_interval(own, other, self.bench.seed)

    def _speeds(self, rounds: int, users: int = 128) -> pd.DataFrame:
        """``users_per_s`` at inference, and the speedup over the trained full model, interleaved."""
        histories = self.bench.test[0][:users]

        def timed(key: tuple[str, str]) -> float:
            start = time.perf_counter()
            self.scorers[key](histories).sum().item()  # waits for the device
            return time.perf_counter() - start

        for key in self.scorers:
            timed(key)  # warms up
        seconds = timing.interleaved(list(self.scorers), timed, rounds)
        rows, base = [], ("trained", "full")
        for (method, model), own in seconds.items():
            compared = base in seconds and (method, model) != base
            ratio = timing.ratio_interval(np.divide(seconds[base], own), self.bench.seed) if compared else {}
            rows.append({"method": method, "model": model, "users_per_s": len(histories) / np.median(own), **ratio})
        return pd.DataFrame(rows)


def classical(contest: Contest, settings: encoders.Settings, epochs: int, folder: Path) -> None:
    """Most popular, item-kNN and SASRec on all users; SASRec also on the users that language models learn from.

    SASRec is small and starts from nothing: it has ``epochs`` passes, and stops when five bring no progress. On the
    few users it has as many steps, of fewer sequences each, and stops after as many. Its learning rate is no worse
    than three times it on validation users of both data sets.
    """
    bench = contest.bench
    train, items = bench.split.train, len(bench.data.texts)
    for name, scorer in (("most_popular", ranking.most_popular), ("item_knn", ranking.item_knn)):
        start = time.perf_counter()
        contest.enter(name, "none", scorer(train, items), train_users=len(train), seconds=time.perf_counter() - start)
    batch = min(settings.batch_size, SASREC_BATCH)
    passes = max(1.0, len(train) / len(bench.sample) * batch / SASREC_BATCH)
    for name, sequences, batch_size, times in (("all users", train, SASREC_BATCH, 1.0),
                                               ("same users", bench.sample, batch, passes)):  # fmt: skip
        torch.manual_seed(bench.seed)
        body = encoders.sasrec_body(length=settings.length)
        vectors = encoders.random_vectors(items, SASREC_WIDTH, bench.seed)
        small = replace(settings, epochs=round(epochs * times), patience=round(5 * times), batch_size=batch_size,
                        learning_rate=1e-3, body_rate=1e-3, residual=0.0)  # fmt: skip
        _train(contest, "sasrec", name, body, vectors, sequences, small, folder)


def language_model(
    contest: Contest,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: encoders.Settings,
    width: int,
    folder: Path,
    progress: Callable = iter,
) -> None:
    """One model, frozen, trained, and trained without its layers: item vectors start from its own states of texts.

    Without layers there is little to train: for the cut model that row is also of all users, as SASRec's is.
    """
    start = time.perf_counter()
    states = ranking.text_states(model, tokenizer, contest.bench.data.texts, progress=progress)
    spent = time.perf_counter() - start
    contest.enter("frozen", name, ranking.frozen(states), train_users=0, seconds=spent,
                  parameters=count_parameters(model))  # fmt: skip
    vectors, sample = encoders.item_vectors(states, width), contest.bench.sample
    body = copy.deepcopy(model.base_model).float()
    _train(contest, "trained", name, body, vectors, sample, settings, folder)
    _train(contest, "no_layers", name, encoders.NoLayers(model.config), vectors, sample, settings, folder)
    if name == "compact":
        bare, everyone = encoders.NoLayers(model.config), contest.bench.split.train
        _train(contest, "no_layers", f"{name}, all users", bare, vectors, everyone, settings, folder)


def _train(
    contest: Contest,
    method: str,
    name: str,
    body: torch.nn.Module,
    vectors: Tensor,
    sequences: Sequence[np.ndarray],
    settings: encoders.Settings,
    folder: Path,
) -> None:
    bench = contest.bench
    own = folder / f"{bench.data.name}-{method}-{name.replace(', ', '-').replace(' ', '_')}"
    trained, history = encoders.train(body, vectors, sequences, bench.validation, own, settings)
    scorer = encoders.trained(trained, settings.length)
    best = max(history, key=lambda row: row["ndcg10"])
    contest.scorers[method, name] = scorer
    contest.enter(method, name, scorer, train_users=len(sequences), seconds=history[-1]["seconds"],
                  epochs=best["epoch"], valid_ndcg10=best["ndcg10"], parameters=count_parameters(trained))  # fmt: skip


def contest(
    bench: Bench,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    settings: encoders.Settings,
    width: int,
    folder: Path,
    sasrec_epochs: int = 20,
    rounds: int = 5,
) -> pd.DataFrame:
    """t6_*: all recommenders of one data set. A killed run goes on from what was trained in ``folder``."""
    held = Contest(bench)
    classical(held, settings, sasrec_epochs, folder)
    for name, model in models.items():
        language_model(held, name, model, tokenizer, settings, width, folder)
    return held.table(rounds)
