"""The paper's figures, each drawn from tables alone."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from paper_src import reported
from paper_src.report import kept_tuple

STYLE = {
    "svg.hashsalt": "paper",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}
# Okabe and Ito's palette, safe for colour-blind readers
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7f7f7f",
)  # fmt: skip
TITLES = {
    "fisher": "Fisher (empirical)",
    "fisher_true": "Fisher (true)",
    "grad_norm": "gradient norm",
    "taylor": "Taylor",
    "block_influence": "block influence",
    "activation_variance": "activation variance",
    "activation_variance_no_sink": "variance, no sinks",
    "activation_mean_abs": "mean |activation|",
    "activation_mean_abs_no_sink": "mean |act.|, no sinks",
    "activation_kurtosis": "kurtosis",
    "activation_kurtosis_no_sink": "kurtosis, no sinks",
    "combined": "combined",
}
TASKS = {
    "prefill_hidden": "prefill, hidden states",
    "prefill_logits": "prefill with logits",
    "decode": "decode",
}


def importance(table: pd.DataFrame, scores: list[str]) -> Figure:
    """Each score over the depth, with its standard error; Fisher's first and last layers stand out or not."""
    columns = 4
    rows = -(-len(scores) // columns)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(10, 1.9 * rows), sharex=True, squeeze=False)
        for axis, score in zip(axes.flat, scores, strict=False):
            error = table.get(f"{score}_se", pd.Series(np.zeros(len(table))))
            axis.bar(table["layer"], table[score], yerr=error, color=BLUE, width=0.8, error_kw={"elinewidth": 0.7})
            axis.set_title(TITLES.get(score, score))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            values = table[score]
            if values.min() > 0 and values.max() / values.median() > 20:
                axis.set_yscale("log")
        for axis in axes.flat[len(scores) :]:
            axis.set_visible(False)
        for column in range(columns):
            bottom = max(row for row in range(rows) if axes[row, column].get_visible())
            axes[bottom, column].set_xlabel("layer")
            axes[bottom, column].tick_params(labelbottom=True)
        figure.suptitle("Importance of each layer, by score (bars: standard error over sequences)")
    plt.close(figure)
    return figure


def agreement(table: pd.DataFrame) -> Figure:
    """Kendall's tau between scores; the diagonal holds tau between the two halves of the calibration text."""
    names = list(dict.fromkeys(table["score_a"]))
    matrix = table.pivot(index="score_a", columns="score_b", values="kendall_tau").loc[names, names]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(7.4, 6.2))
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        labels = [TITLES.get(name, name.replace("_", " ")) for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=40, ha="right")
        axis.set_yticks(range(len(names)), labels)
        for (row, column), value in np.ndenumerate(matrix.to_numpy()):
            colour = "white" if abs(value) > 0.6 else "black"
            weight = "bold" if row == column else "normal"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", size=6.5, color=colour, weight=weight)
        figure.colorbar(image, label="Kendall's tau", shrink=0.8)
        axis.set_title("Do scores rank layers alike? Diagonal: two halves of the text")
    plt.close(figure)
    return figure


def selection(table: pd.DataFrame, k: int, depth: int) -> Figure:
    """Which layers each strategy keeps at one k, the first random draw for comparison."""
    rows = table[(table["k"] == k) & ((table["strategy"] != "random") | (table["draw"] == 0))]
    labels = [selection_label(row) for _, row in rows.iterrows()]
    grid = np.zeros((len(rows), depth))
    for index, kept in enumerate(rows["kept"]):
        grid[index, list(kept_tuple(kept))] = 1
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(8, 0.6 + 0.2 * len(rows)))
        axis.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1.3, edgecolors="white", linewidth=1)
        axis.set_yticks(np.arange(len(rows)) + 0.5, labels)
        axis.set_xticks(np.arange(0, depth, 2 if depth > 12 else 1) + 0.5, range(0, depth, 2 if depth > 12 else 1))
        axis.invert_yaxis()
        axis.set_xlabel("layer")
        axis.set_title(f"Layers kept at k = {k} of {depth}")
    plt.close(figure)
    return figure


def selection_label(row: pd.Series) -> str:
    """Readable name of a row of t2_selection or t4_fidelity."""
    strategy = str(row["strategy"]).replace("_", " ")
    score = row["score"]
    if pd.isna(score):
        return strategy
    title = TITLES.get(score, score.replace("_", " "))
    return f"{strategy}: {title}"


def speed(table: pd.DataFrame, depth: int) -> Figure:
    """Measured speedup over layer compression, a panel for each task, beside the ideal of the arithmetic.

    Args:
        table: t3_speed.
        depth: number of layers of the full model.
    """
    colours = [BLUE, GREEN, PURPLE, SKY]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.4), sharey=True)
        for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
            part = table[table["task"] == task]
            for colour, ((batch, length), rows) in zip(colours, part.groupby(["batch", "length"]), strict=False):
                x = depth / rows["k"]
                spread = [rows["speedup"] - rows["speedup_lo"], rows["speedup_hi"] - rows["speedup"]]
                label = f"batch {batch}, {length} tokens"
                axis.errorbar(x, rows["speedup"], spread, color=colour, marker="o", ms=4, lw=1.2, label=label)
                axis.plot(x, rows["ideal"], color=colour, ls=":", lw=1)
            axis.plot([], [], color="black", ls=":", lw=1, label="ideal (FLOPs)")
            axis.plot(
                reported.LAYER_COMPRESSION,
                reported.SPEEDUP,
                marker="*",
                ms=10,
                color=RED,
                ls="",
                label="earlier report",
            )
            axis.set_title(title)
            axis.set_xlabel("layer compression L / k")
            axis.legend(loc="upper left")
        axes[0].set_ylabel("speedup, full / compact")
    plt.close(figure)
    return figure


STRATEGIES = {
    "random": ("#b5b5b5", "."), "top_k": (BLUE, "o"), "distributed": (ORANGE, "s"), "drop_block": (GREEN, "^"),
    "first_and_last": (PURPLE, "v"), "evenly_spaced": (SKY, "D"), "reported_list": (RED, "X"),
}  # fmt: skip


def tradeoff(fidelity: pd.DataFrame, draws: pd.DataFrame, speed_by_k: pd.Series) -> Figure:
    """Cosine and perplexity ratio against measured speedup, with random selections and the trivial predictor.

    The strategies of one k share its speedup; their points stand side by side so that they can be seen.

    Args:
        fidelity: t4_fidelity.
        draws: t4_random, one row a random draw.
        speed_by_k: k -> measured prefill speedup.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
        for axis, metric in zip(axes, ("cosine", "ppl_ratio"), strict=True):
            for place, (strategy, (colour, marker)) in enumerate(STRATEGIES.items()):
                rows = draws if strategy == "random" else fidelity[fidelity["strategy"] == strategy]
                x = rows["k"].map(speed_by_k) * (1 + 0.011 * (place - len(STRATEGIES) // 2))
                axis.plot(x, rows[metric], ls="", marker=marker, ms=5, color=colour, mec="white", mew=0.4,
                          label="random draws" if strategy == "random" else strategy.replace("_", " "))  # fmt: skip
            trivial = fidelity.loc[fidelity["strategy"] == "trivial", metric].item()
            axis.axhline(trivial, color="black", lw=1, ls="--", label="trivial predictor (a constant)")
            axis.set_xscale("log")
            axis.set_xticks(speed_by_k, [f"{x:.2f}\nk = {k}" for k, x in speed_by_k.items()], minor=False)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel("measured speedup (prefill of hidden states)")
        box = dict(color=RED, alpha=0.25, lw=0, label="earlier report")
        axes[0].fill_between(reported.SPEEDUP_RANGE, *reported.COSINE_RANGE, **box)
        axes[0].axhline(reported.COSINE_TARGET, color=RED, lw=1, ls=":", label="its target")
        axes[0].set_ylabel("cosine to the full model's last hidden state")
        axes[1].set_yscale("log")
        axes[1].set_ylabel("perplexity / full model's perplexity")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    plt.close(figure)
    return figure
