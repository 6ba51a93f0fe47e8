"""Section 9: the figure of the front page."""

from dataclasses import dataclass

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE

SPEED, QUALITY = "prefill_hidden_speedup", "ppl_ratio"


@dataclass(frozen=True)
class Series:
    """Rows of t7_baselines that make one line: a method by its name and whether it is the trained row."""

    label: str
    colour: str
    marker: str
    name: str
    recovered: bool = False
    stage: str = ""  # of t5_recovery, which then gives the quality


SERIES = (
    Series("layers cut", GREY, "o", "cut", stage="none"),
    Series("layers cut, closed form", BLUE, "o", "cut", stage="closed_form"),
    Series("layers cut, distilled", GREEN, "o", "cut_repaired", stage="distilled"),
    Series("layers cut, short training", SKY, "o", "cut", recovered=True),
    Series("narrower layers", ORANGE, "^", "width"),
    Series("narrower, short training", ORANGE, "^", "width", recovered=True),
    Series("low rank", PURPLE, "v", "svd_aware"),
    Series("low rank, short training", PURPLE, "v", "svd_aware", recovered=True),
    Series("int8 weights", RED, "s", "int8_weight"),
)


def f9_overview(recovery: pd.DataFrame, baselines: pd.DataFrame) -> Figure:
    """Quality against measured speed for removed layers, as cut, after the closed form and after distillation, beside
    narrower layers, low rank and int8 weights. n: `n_tokens` of t5_recovery; bars: 95% bootstrap over
    windows for the perplexity, over timed rounds for the prefill's speedup, of which three give no more than their
    range. Hollow: not trained; filled: trained, with the budget of section 5 ("distilled") or, equal for all methods,
    with the small one of section 7 ("short training").
    """
    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure, axis = plt.subplots(figsize=(7.6, 4.6))
        axis.plot(1, 1, "*", ms=13, color="black", label="full model", ls="")
        for series in SERIES:
            if len(points := _points(series, recovery, baselines)):
                _line(axis, series, points)
        axis.set_xscale("log")
        axis.set_yscale("log")
        ticks = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8)
        low, high = axis.get_xlim()
        axis.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))  # silent over more than a decade
        axis.set_xlabel("measured prefill speedup over the full model")
        axis.set_ylabel("perplexity / full model's")
        axis.set_title("What speed costs: better is right and down")
        figure.legend(loc="outside right center")
    plt.close(figure)
    return figure


def _points(series: Series, recovery: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
    """The series' rows from the largest k down; quality from t5_recovery where it names a stage."""
    rows = baselines[(baselines["name"] == series.name) & (baselines["recovered"] == series.recovered)]
    rows = rows[rows[QUALITY].notna()].set_index("k").sort_index(ascending=False)
    if series.stage:
        stage = recovery[(recovery["selection"] == "selected") & (recovery["recovery"] == series.stage)].set_index("k")
        rows = rows.loc[rows.index.intersection(stage.index, sort=False)].copy()
        wanted = [QUALITY, f"{QUALITY}_lo", f"{QUALITY}_hi"]
        rows[wanted] = stage.loc[rows.index, wanted]
    return rows


def _line(axis: Axes, series: Series, points: pd.DataFrame) -> None:
    """The points with both intervals, joined; the distilled ones with their k."""
    filled = points["trained"].all() and series.stage != "none"
    bars = [[points[name] - points[f"{name}_lo"], points[f"{name}_hi"] - points[name]] for name in (QUALITY, SPEED)]
    axis.errorbar(
        points[SPEED], points[QUALITY], *bars, color=series.colour, marker=series.marker, ms=6, lw=1, elinewidth=1,
        ls="-" if len(points) > 1 else "", mfc=series.colour if filled else "white", label=series.label,
    )  # fmt: skip
    if series.stage == "distilled":
        for k, row in points.iterrows():
            below = (row[SPEED], row[f"{QUALITY}_lo"])
            axis.annotate(f"k = {k}", below, (0, -12), textcoords="offset points", ha="center", size=9)
