"""Rows and figure of section 6: does it still recommend, and do the layers matter at all?"""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, timing
from paper_src.baselines.depth import repaired
from paper_src.compaction import compact
from paper_src.recommendation import ranking
from paper_src.recommendation.recommenders import RECOMMENDERS, ItemTexts, Trial
from paper_src.reporting.findings import Findings, Read, ends
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE
from paper_src.stats import interval, paired_ratio_interval

KEY = ["method", "body", "train_on"]  # names a row of one data set
FULL = ("trained", "full", "sample")  # speedups are over this row
PAIRED = "paired bootstrap over users"
SHARES = {"share_of_full": ("share_lo", "share_hi"), "over_no_layers": ("over_no_layers_lo", "over_no_layers_hi")}


def variants(full: PreTrainedModel, kept: Sequence[int], recovered: Path) -> dict[str, PreTrainedModel]:
    """name -> model: full, cut to ``kept``, the same repaired (a checkpoint), and the first layers, as SLMRec takes."""
    return {"full": full, "compact": compact(full, kept), "recovered": repaired(full, recovered),
            "first_layers": compact(full, range(len(kept)))}  # fmt: skip


def read_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> ItemTexts:
    """What ``model`` makes of all items' texts, once for all recommenders that start from that."""
    start = time.perf_counter()
    states = ranking.text_states(model, tokenizer, texts)
    return ItemTexts(model, states, time.perf_counter() - start)


class Contest:
    """Collects rows of one table, each user's NDCG@10 beside them, and trained networks to time.

    Args:
        trial: users, items and budgets.
        folder: of checkpoints; a killed run goes on from them.
    """

    def __init__(self, trial: Trial, folder: Path):
        self.trial, self.folder = trial, folder
        self.rows: list[dict[str, object]] = []
        self.ndcg10: dict[tuple[str, ...], np.ndarray] = {}
        self.scorers: dict[tuple[str, ...], ranking.Scorer] = {}

    def enter(self, method: str, train_on: str, body: str = "none", texts: ItemTexts | None = None) -> None:
        """Fit a recommender, judge it on test users and add its row.

        Args:
            method: of ``RECOMMENDERS``.
            train_on: the users it learns from: none, sample or all.
            body: name of the model that reads, where the recommender does not bring its own.
            texts: what that model makes of the items' texts.
        """
        entry, users = RECOMMENDERS[method], self.trial.users[train_on]
        body = method if entry.layers and not entry.texts else body
        start = time.perf_counter()
        scorer, columns = entry.fit(self.trial, users, texts, self.folder / f"{method}-{body}-{train_on}")
        spent = time.perf_counter() - start
        if entry.trained:
            self.scorers[method, body, train_on] = scorer
        values = ranking.metrics_of(ranking.target_ranks(scorer, *self.trial.test))
        self.ndcg10[method, body, train_on] = values["ndcg10"]
        row = {"method": method, "model": _label(method, body, train_on), "body": body, "train_on": train_on,
               "layers": entry.layers, "train_users": len(users), "seconds": spent}  # fmt: skip
        for name, column in values.items():
            low, high = interval(column, seed=self.trial.training.seed)
            row |= {name: column.mean(), f"{name}_lo": low, f"{name}_hi": high}
        self.rows.append(row | columns)

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
        """Columns with NDCG@10 over that of another row, NaN where there is none; intervals pair the same users.

        ``share_of_full`` is over the full model by the same method, ``over_no_layers`` over the control of the same
        item vectors, users and training.
        """
        entry, (control,) = RECOMMENDERS[method], [n for n, entry in RECOMMENDERS.items() if entry.kind == "control"]
        cut = entry.kind == "language model" and body != "full"
        bases = {"share_of_full": (method, "full", train_on) if cut else None,
                 "over_no_layers": (control, body, train_on) if entry.texts and entry.layers else None}  # fmt: skip
        columns, own = {}, self.ndcg10[method, body, train_on]
        for name, base in bases.items():
            values = (np.nan, np.nan, np.nan)
            if base in self.ndcg10:
                other = self.ndcg10[base]
                low, high = paired_ratio_interval(own, other, self.trial.training.seed)
                values = own.mean() / other.mean(), low, high
            columns |= dict(zip((name, *SHARES[name]), values, strict=True))
        return columns


def t6_recommenders(contest: Contest, speeds: pd.DataFrame) -> pd.DataFrame:
    """t6_movielens, t6_amazon: the rows of one data set, with paired ratios and speed."""
    frame = pd.DataFrame(contest.rows)
    ratios = pd.DataFrame([contest.ratios(*key) for key in frame[KEY].itertuples(index=False)])
    frame = pd.concat([frame, ratios], axis=1).assign(
        n_users=len(contest.trial.test[0]), n_items=contest.trial.items, dataset=contest.trial.data.name
    )
    return frame.merge(speeds, on=KEY, how="left")


def _label(method: str, body: str, train_on: str) -> str:
    """How a row is shown in the column ``model``; what it means stands in columns of their own."""
    if body == method:
        return {"all": "all users", "sample": "same users"}[train_on]
    return f"{body}, all users" if train_on == "all" and body != "none" else body


PALETTE = (GREY, SKY, GREEN, ORANGE, BLUE, RED, PURPLE)  # of recommenders, in their order
RATIOS = {"over_no_layers": ("o", 0.16, "no layers"), "share_of_full": ("s", -0.16, "the full model")}


def f6_recommendation(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Every recommender, best first: NDCG@10, its ratio to that without layers or of the full model, and speed.
    All items are ranked; n is the number of test users in the title. Bars: 95% bootstrap over test users, paired for
    ratios. Trained networks learn from all users where the name says so, else from one sample of them. Speed: median
    of interleaved rounds, trained networks only.

    Args:
        tables: name -> t6_movielens, t6_amazon, as many as there are.
    """
    sizes = [len(table) for table in tables.values()]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(len(sizes), 3, figsize=(10, 0.2 * sum(sizes) + len(sizes)), squeeze=False,
                                    width_ratios=(5, 5, 3))  # fmt: skip
        best_last = [table.sort_values("ndcg10", ignore_index=True) for table in tables.values()]
        for panels, table in zip(axes, best_last, strict=True):
            _bars(panels[0], table, ("ndcg10", "ndcg10_lo", "ndcg10_hi"), "o")
            for name, (marker, shift, _) in RATIOS.items():
                _bars(panels[1], table, (name, *SHARES[name]), marker, shift)
            _bars(panels[2], table, ("users_per_s",), "o")
            titles = (f"{table['dataset'][0]}: {table['n_users'][0]:,} test users", "ratio to another row", "speed")
            labels = ("NDCG@10, whole catalogue", "ratio of NDCG@10, same users", "users per second")
            for panel, title, label in zip(panels, titles, labels, strict=True):
                panel.set(title=title, xlabel=label, ylim=(-0.7, len(table) - 0.3), yticks=table.index, yticklabels=[])
            names = zip(table["method"], table["model"], strict=True)
            panels[0].set_yticklabels([_name(RECOMMENDERS[method].title, model) for method, model in names])
            panels[0].set_xlim(left=0)
            panels[1].axvline(1, color="black", lw=0.8, ls="--")
            panels[2].set_xscale("log")
            panels[2].margins(x=0.15)
        handles = [Line2D([], [], ls="", marker=marker, ms=4, color="black", label=f"ratio to {base}")
                   for marker, _, base in RATIOS.values()]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    plt.close(figure)
    return figure


def _bars(panel: Axes, table: pd.DataFrame, columns: Sequence[str], marker: str, shift: float = 0.0) -> None:
    """A point per row that has a value, with its interval if ``columns`` name one."""
    colours = dict(zip(RECOMMENDERS, itertools.cycle(PALETTE), strict=False))
    for row in table[table[columns[0]].notna()].itertuples():
        value, *interval_ends = (getattr(row, column) for column in columns)
        spread = [[value - interval_ends[0]], [interval_ends[1] - value]] if interval_ends else None
        panel.errorbar(value, row.Index + shift, xerr=spread, fmt=marker, ms=4, color=colours[row.method])


def _name(title: str, model: str) -> str:
    return title if model == "none" else f"{title}, {model.replace('_', ' ')}"


def t6_findings(read: Read) -> pd.DataFrame:
    """t6_findings: NDCG@10 of the smallest trained model of each data set, beside what needs no layers."""
    found, rows = Findings(), {}
    for name in ("movielens", "amazon"):
        try:
            table = read(f"t6_{name}")
        except (InputError, FileNotFoundError):  # its data were not at hand
            continue
        by_name, source = table.set_index(["method", "body", "train_on"], drop=False).sort_index(), f"t6_{name}"
        small = pd.concat([by_name.loc[[("trained", body, "sample")]] for body in ("compact", "recovered")])
        best = small.nlargest(1, "valid_ndcg10").iloc[0]
        popular = by_name.loc[("most_popular", "none", "all"), "ndcg10"]
        rows[name] = best.to_dict() | {"lead": best["ndcg10"] - popular}
        found.add(source, f"data_set_{name}", best["n_items"], unit="items", n=best["n_users"], text=best["dataset"])
        others = {"most_popular": ("most_popular", "none", "all"), "sasrec_same": ("sasrec", "sasrec", "sample"),
                  "sasrec_all": ("sasrec", "sasrec", "all"), "full": ("trained", "full", "sample"),
                  "smallest": ("trained", best["body"], "sample"), "no_layers": ("no_layers", best["body"], "sample"),
                  "no_layers_all": ("no_layers", "compact", "all")}  # fmt: skip
        for role, key in others.items():
            found.add(source, f"ndcg10_{role}_{name}", *ends(by_name.loc[key], "ndcg10"), unit="NDCG@10",
                      n=best["n_users"])  # fmt: skip
        for column, ends_of in (("share_of_full", "share"), ("over_no_layers", "over_no_layers")):
            found.add(source, f"{column}_{name}", best[column], best[f"{ends_of}_lo"], best[f"{ends_of}_hi"],
                      unit="NDCG@10 ratio, same users", n=best["n_users"], test=PAIRED)  # fmt: skip
        found.add(source, f"speedup_{name}", *ends(best, "speedup"), unit="times")
    if rows:
        _least(found, pd.DataFrame(rows.values()), ", ".join(f"t6_{name}" for name in rows))
    return found.frame()


def _least(found: Findings, best: pd.DataFrame, source: str) -> None:
    """Adds the least value, and the least of each end of the interval, over the data sets."""
    columns = {"share_of_full": ("share_of_full", "share_lo", "share_hi"), "lead_over_popular": ("lead",),
               "over_no_layers": ("over_no_layers", "over_no_layers_lo", "over_no_layers_hi")}  # fmt: skip
    for name, parts in columns.items():
        found.add(source, f"{name}_least", *best[list(parts)].min(), n=best["n_users"].min(),
                  test=PAIRED if len(parts) > 1 else "", unit="least over data sets")  # fmt: skip
