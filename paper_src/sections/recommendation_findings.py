"""Section 6's findings, and its figure."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from paper_src import InputError
from paper_src.recommendation.gate import PASSES
from paper_src.recommendation.ranking import metrics_of
from paper_src.reporting.findings import Findings, Read, ends
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE
from paper_src.sections.recommendation import BAG, BARE, KNN, POPULAR, TITLES, passing

DATA = ("movielens", "amazon")
TWO_LEVELS = "paired bootstrap over users and trainings"
UNIT = "NDCG@10 ratio, same users"
LINES = {POPULAR: GREY, KNN: "black", BAG: SKY}
COMPACT = "recovered"  # the compact model that a verdict is about
BODIES = {
    "full": (BLUE, "full"),
    "recovered": (GREEN, "compact, repaired"),
    "compact": (ORANGE, "compact, cut"),
    "first_layers": (PURPLE, "first layers"),
    "random_layers": (RED, "random layers"),
    BARE: (SKY, "no layers"),
}


def t6_findings(read: Read) -> pd.DataFrame:
    """t6_findings: which designs can judge compaction, and what the compact model keeps in those that can."""
    found, gates = Findings(), read("t6_gate")
    passed = gates[gates["verdict"] == PASSES]
    names = ", ".join(f"{row.design} on {row.dataset}" for row in passed.itertuples()) or "none"
    found.add("t6_gate", "designs_that_judge", len(passed), n=len(gates), unit="designs on data sets", text=names)
    titles, shares = read("t6_titles"), []
    count = int(titles["candidates"].max())
    found.add("t6_titles", "ndcg10_titles_by_chance", metrics_of(np.arange(count) + 1)["ndcg10"].mean(), n=count,
              unit="NDCG@10 of a random order of candidates")  # fmt: skip
    for data in DATA:
        try:
            table = read(f"t6_{data}")
        except (InputError, FileNotFoundError):  # its data were not at hand
            continue
        dataset = table["dataset"].iloc[0]
        for row in gates[gates["dataset"] == dataset].itertuples():
            found.add("t6_gate", f"gate_{row.design}_{data}", row.ratio, row.lo, row.hi, n=row.users, unit=UNIT,
                      test=TWO_LEVELS)  # fmt: skip
        asked = titles.query("dataset == @dataset").set_index("model")
        shares += _quality(found, table.set_index("method"), asked, data, passing(gates, dataset))
    if shares:
        least = pd.DataFrame(shares)
        found.add("t6_titles", "share_of_full_least", *least[["value", "lo", "hi"]].min(), n=least["n"].min(),
                  unit="least over designs that judge", test=TWO_LEVELS)  # fmt: skip
    return found.frame()


def _quality(
    found: Findings, table: pd.DataFrame, titles: pd.DataFrame, data: str, designs: Sequence[str]
) -> list[dict[str, float]]:
    """Adds what rankings of one data set reach; the compact model's shares in the designs that can judge."""
    for name in ("most_popular", "item_knn", "sasrec"):
        found.add(f"t6_{data}", f"ndcg10_{name}_{data}", *ends(table.loc[name], "ndcg10"), unit="NDCG@10",
                  n=table.loc[name, "n_users"])  # fmt: skip
    for role, key in {"full": "full", "no_layers": BARE, "knn": KNN, "popular": POPULAR, "bag": BAG,
                      "compact": COMPACT}.items():  # fmt: skip
        if key in titles.index:
            found.add("t6_titles", f"ndcg10_titles_{role}_{data}", *ends(titles.loc[key], "ndcg10"),
                      unit="NDCG@10 among candidates", n=titles.loc[key, "n_users"])  # fmt: skip
    if table["n_unseen"].max() and "trained" in table.index:
        full = table.loc[["trained"]].set_index("body").loc["full"]
        found.add(f"t6_{data}", f"ndcg10_unseen_{data}", *ends(full, "ndcg10_unseen"), n=full["n_unseen"],
                  unit="NDCG@10, items that no learner took")  # fmt: skip
    shares = []
    for design in designs:
        rows = titles if design == TITLES else table.loc[[design]].set_index("body")
        if COMPACT in rows.index:
            value, low, high = ends(rows.loc[COMPACT], "share_of_full")
            n = int(rows.loc[COMPACT, "n_users"])
            found.add("t6_titles" if design == TITLES else f"t6_{data}", f"share_of_full_{design}_{data}", value, low,
                      high, n=n, unit=UNIT, test=TWO_LEVELS)  # fmt: skip
            shares.append({"value": value, "lo": low, "hi": high, "n": n})
    return shares


def f6_recommendation(tables: Mapping[str, pd.DataFrame], titles: pd.DataFrame, gates: pd.DataFrame) -> Figure:
    """Left: NDCG@10 over the whole catalogue. Middle: among the candidates of *titles*. Right: the full model over the
    same recipe without layers; where the interval is above 1 a design can judge compaction, and only those are in full
    colour. Dashed: rankings without a network; dotted: a random order. Bars: 95% bootstrap over users and trainings.

    Args:
        tables: data set -> t6_movielens, t6_amazon, as many as there are.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(len(tables), 3, figsize=(9.6, 3.1 * len(tables)), squeeze=False,
                                    width_ratios=(3, 3, 2))  # fmt: skip
        for (left, middle, right), (dataset, table) in zip(axes, tables.items(), strict=True):
            own, asked = (frame[frame["dataset"] == dataset] for frame in (gates, titles))
            judges, count = passing(gates, dataset), int(asked["candidates"].max())
            _catalogue(left, table, judges)
            left.set(title=f"{dataset}: {table['n_users'].iloc[0]:,} users", ylabel="NDCG@10, whole catalogue")
            _candidates(middle, asked, judges)
            middle.axhline(metrics_of(np.arange(count) + 1)["ndcg10"].mean(), color="black", lw=0.8, ls=":")
            middle.set(title=f"titles: {asked['n_users'].iloc[0]:,} users", ylabel=f"NDCG@10 of {count} candidates")
            for panel in (left, middle):
                panel.set(xlabel="users per second")
                panel.margins(x=0.1)
            left.set_xscale("log")
            _gates(right, own)
        there = {*titles["model"], *(body for table in tables.values() for body in table["body"])}
        dots = [Line2D([], [], ls="", marker="o", color=colour, label=label)
                for body, (colour, label) in BODIES.items() if body in there]  # fmt: skip
        lines = [Line2D([], [], ls="--", color=colour, label=name.replace("_", " ")) for name, colour in LINES.items()]
        lines.append(Line2D([], [], ls=":", color="black", label="random order"))
        lines.append(Line2D([], [], ls="", marker="s", color=GREY, label="SASRec"))
        lines.append(Line2D([], [], ls="", marker="o", color=GREY, alpha=0.3, label="design fails"))
        figure.legend(handles=[*dots, *lines], loc="outside lower center", ncols=5)
    plt.close(figure)
    return figure


def _catalogue(panel: Axes, table: pd.DataFrame, designs: Sequence[str]) -> None:
    for row in table[table["users_per_s"].notna()].itertuples():
        colour, _ = BODIES.get(BARE if row.method == "no_layers" else row.body, (GREY, ""))
        marker, faint = ("s", False) if row.method == "sasrec" else ("o", row.method not in designs)
        _point(panel, row, colour, marker, faint)
    _lines(panel, table.set_index("method")["ndcg10"])


def _candidates(panel: Axes, asked: pd.DataFrame, designs: Sequence[str]) -> None:
    for row in asked[asked["users_per_s"].notna()].itertuples():
        _point(panel, row, BODIES[row.model][0], "o", TITLES not in designs)
    _lines(panel, asked.set_index("model")["ndcg10"])


def _lines(panel: Axes, quality: pd.Series) -> None:
    for name, colour in LINES.items():
        if name in quality.index:
            panel.axhline(quality[name], color=colour, lw=1, ls="--")


def _gates(panel: Axes, gates: pd.DataFrame) -> None:
    for place, row in enumerate(gates.itertuples()):
        colour = BLUE if row.verdict == PASSES else GREY
        panel.errorbar(row.ratio, place, xerr=[[row.ratio - row.lo], [row.hi - row.ratio]], fmt="o", ms=5, color=colour)
    panel.axvline(1, color="black", lw=0.8, ls="--")
    panel.set(title="do the layers help?", xlabel="full model / no layers", ylim=(-0.6, len(gates) - 0.4))
    panel.set_yticks(range(len(gates)), gates["design"])


def _point(panel: Axes, row: NamedTuple, colour: str, marker: str, faint: bool) -> None:
    """NDCG@10 of a row with its interval over users a second."""
    panel.errorbar(row.users_per_s, row.ndcg10, [[row.ndcg10 - row.ndcg10_lo], [row.ndcg10_hi - row.ndcg10]],
                   fmt=marker, ms=5, color=colour, alpha=0.25 if faint else 1.0)  # fmt: skip
