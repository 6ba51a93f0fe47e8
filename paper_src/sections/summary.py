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
    """Rows of t7_baselines that make one line: a method by its name and whether it is the row trained there."""

    label: str
    colour: str
    marker: str
    name: str
    recovered: bool = False
    named: bool = False  # whether each point has its k


SERIES = (
    Series("layers cut", GREY, "o", "cut"),
    Series("layers cut, closed form", BLUE, "o", "cut_refit"),
    Series("layers cut, distilled", GREEN, "o", "cut_repaired", named=True),
    Series("layers cut, short training", SKY, "o", "cut", recovered=True),
    Series("narrower layers", ORANGE, "^", "width"),
    Series("narrower, short training", ORANGE, "^", "width", recovered=True),
    Series("low rank", PURPLE, "v", "svd_aware"),
    Series("low rank, short training", PURPLE, "v", "svd_aware", recovered=True),
    Series("int8 weights", RED, "s", "int8_weight"),
    Series("int4 in groups", RED, "D", "int4_groups"),
)


def f9_overview(baselines: pd.DataFrame) -> Figure:
    """Quality against measured speed for removed layers, as cut, after the closed form and after distillation, beside
    narrower layers, low rank and quantized weights, all on the same windows. n: `n_windows` and the rounds of
    t7_baselines; bars: 95% BCa bootstrap over windows for the perplexity, order statistics of the rounds for the
    prefill's speedup. Hollow: not trained; filled: trained, with the budget of section 5 ("distilled") or, equal for
    all methods, with the small one of section 7 ("short training").
    """
    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure, axis = plt.subplots(figsize=(7.6, 4.6))
        axis.plot(1, 1, "*", ms=13, color="black", label="full model", ls="")
        for series in SERIES:
            if len(points := _points(series, baselines)):
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


def _points(series: Series, baselines: pd.DataFrame) -> pd.DataFrame:
    """The series' rows from the largest k down, of the first seed."""
    rows = baselines[(baselines["name"] == series.name) & (baselines["recovered"] == series.recovered)]
    rows = rows[rows[QUALITY].notna()].sort_values("seed", kind="stable").drop_duplicates("k")
    return rows.set_index("k").sort_index(ascending=False)


def _line(axis: Axes, series: Series, points: pd.DataFrame) -> None:
    """The points with both intervals, joined; where it is asked for with their k."""
    bars = [[points[name] - points[f"{name}_lo"], points[f"{name}_hi"] - points[name]] for name in (QUALITY, SPEED)]
    axis.errorbar(
        points[SPEED], points[QUALITY], *bars, color=series.colour, marker=series.marker, ms=6, lw=1, elinewidth=1,
        ls="-" if len(points) > 1 else "", mfc=series.colour if points["trained"].all() else "white",
        label=series.label,
    )  # fmt: skip
    if series.named:
        for k, row in points.iterrows():
            below = (row[SPEED], row[f"{QUALITY}_lo"])
            axis.annotate(f"k = {k}", below, (0, -12), textcoords="offset points", ha="center", size=9)
