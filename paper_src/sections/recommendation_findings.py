"""Section 6's findings, and its figure."""

from collections.abc import Mapping, Sequence

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
from paper_src.sections.recommendation import BARE, ORDER, TITLES, passing

DATA = ("movielens", "amazon")
TWO_LEVELS = "paired bootstrap over users and trainings"
UNIT = "NDCG@10 ratio, same users"
LINES = {"most_popular": GREY, "item_knn": "black"}
FEWEST = 30  # users that say something
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
        asked = titles.query("dataset == @dataset").set_index(["model", "users"])
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
    order = titles.loc[(ORDER, "all")]
    found.add("t6_titles", f"named_{data}", *ends(order, "named"), n=order["n_users"], unit="share of test items")
    for name, key in {"full": "full", "no_layers": BARE, "order": ORDER, "compact": COMPACT}.items():
        for users, role in {"all": "", "unseen item": "_unseen"}.items():
            if (key, users) in titles.index and titles.loc[(key, users), "n_users"] >= FEWEST:
                row = titles.loc[(key, users)]
                found.add("t6_titles", f"ndcg10_titles_{name}{role}_{data}", *ends(row, "ndcg10"),
                          unit="NDCG@10 among candidates", n=row["n_users"])  # fmt: skip
    shares = []
    for design in designs:
        rows = titles.xs("all", level="users") if design == TITLES else table.loc[[design]].set_index("body")
        if COMPACT in rows.index:
            value, low, high = ends(rows.loc[COMPACT], "share_of_full")
            n = int(rows.loc[COMPACT, "n_users"])
            found.add("t6_titles" if design == TITLES else f"t6_{data}", f"share_of_full_{design}_{data}", value, low,
                      high, n=n, unit=UNIT, test=TWO_LEVELS)  # fmt: skip
            shares.append({"value": value, "lo": low, "hi": high, "n": n})
    return shares


def f6_recommendation(tables: Mapping[str, pd.DataFrame], titles: pd.DataFrame, gates: pd.DataFrame) -> Figure:
    """Left: NDCG@10 over the whole catalogue against users a second; dashed: rankings that need no network. Right: the
    full model over the same recipe without layers; where the interval is above 1 a design can judge compaction, and
    only those are in full colour. Bars: 95% bootstrap over users and trainings; n users in the titles.

    Args:
        tables: data set -> t6_movielens, t6_amazon, as many as there are.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(len(tables), 2, figsize=(8.4, 3.1 * len(tables)), squeeze=False,
                                    width_ratios=(3, 2))  # fmt: skip
        for (left, right), (dataset, table) in zip(axes, tables.items(), strict=True):
            own = gates[gates["dataset"] == dataset]
            asked = titles[(titles["dataset"] == dataset) & (titles["users"] == "all")]
            _quality_by_speed(left, table, asked, passing(gates, dataset))
            left.set(title=f"{dataset}: {table['n_users'].iloc[0]:,} users, titles {asked['n_users'].iloc[0]:,}",
                     xlabel="users per second", ylabel="NDCG@10, whole catalogue", xscale="log")  # fmt: skip
            left.margins(x=0.1)
            for place, row in enumerate(own.itertuples()):
                colour = BLUE if row.verdict == PASSES else GREY
                right.errorbar(row.ratio, place, xerr=[[row.ratio - row.lo], [row.hi - row.ratio]], fmt="o", ms=5,
                               color=colour)  # fmt: skip
            right.axvline(1, color="black", lw=0.8, ls="--")
            right.set(title="do the layers help?", xlabel="full model / no layers", ylim=(-0.6, len(own) - 0.4))
            right.set_yticks(range(len(own)), own["design"])
        there = {*titles["model"], *(body for table in tables.values() for body in table["body"])}
        dots = [Line2D([], [], ls="", marker="o", color=colour, label=label)
                for body, (colour, label) in BODIES.items() if body in there]  # fmt: skip
        lines = [Line2D([], [], ls="--", color=colour, label=name.replace("_", " ")) for name, colour in LINES.items()]
        shapes = [Line2D([], [], ls="", marker=marker, color="black", label=label)
                  for label, marker in {"trained": "o", "titles": "D", "SASRec": "s"}.items()]  # fmt: skip
        figure.legend(handles=[*dots, *shapes, *lines], loc="outside lower center", ncols=4)
    plt.close(figure)
    return figure


def _quality_by_speed(panel: Axes, table: pd.DataFrame, asked: pd.DataFrame, designs: Sequence[str]) -> None:
    """Networks as points, what needs none as lines; faint where the design cannot judge."""
    for row in table[table["users_per_s"].notna()].itertuples():
        colour, _ = BODIES.get(BARE if row.method == "no_layers" else row.body, (GREY, ""))
        faint = 1.0 if row.method in ("sasrec", *designs) else 0.25
        marker = "s" if row.method == "sasrec" else "o"
        _point(panel, row.users_per_s, (row.ndcg10, row.ndcg10_lo, row.ndcg10_hi), colour, marker, faint)
    for row in asked[asked["users_per_s"].notna()].itertuples():
        values = row.ndcg10_catalogue, row.ndcg10_catalogue_lo, row.ndcg10_catalogue_hi
        colour, faint = BODIES[row.model][0], 1.0 if TITLES in designs else 0.25
        _point(panel, row.users_per_s, values, colour, "D", faint)
    for method, colour in LINES.items():
        panel.axhline(table.loc[table["method"] == method, "ndcg10"].item(), color=colour, lw=1, ls="--")


def _point(panel: Axes, x: float, values: tuple[float, float, float], colour: str, marker: str, alpha: float) -> None:
    value, low, high = values
    panel.errorbar(x, value, [[value - low], [high - value]], fmt=marker, ms=5, color=colour, alpha=alpha)
