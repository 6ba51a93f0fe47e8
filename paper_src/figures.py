"""The paper's figures, each drawn from tables alone."""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from paper_src import reported
from paper_src.budgets import LATER, frontier
from paper_src.report import kept_tuple

STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "legend.edgecolor": "none",
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
    "fisher_per_parameter": "Fisher / parameter",
    "grad_norm": "gradient norm",
    "taylor": "Taylor",
    "weight_taylor": "Taylor, by weight",
    "block_influence": "block influence",
    "activation_variance": "activation variance",
    "activation_variance_no_sink": "variance, no sinks",
    "activation_mean_abs": "mean |activation|",
    "activation_mean_abs_no_sink": "mean |act.|, no sinks",
    "activation_kurtosis": "kurtosis",
    "activation_kurtosis_no_sink": "kurtosis, no sinks",
    "leave_one_out": "leave-one-out",
    "shapley": "Shapley",
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


def causal(table: pd.DataFrame, agreement: pd.DataFrame, scores: list[str]) -> Figure:
    """Scores of gradients and activations (columns) against what removing layers really costs (rows), a dot a layer.

    Args:
        table: t1_importance.
        agreement: t1_agreement, for Kendall's tau and its interval.
        scores: the columns.
    """
    titles = {"leave_one_out": "leave-one-out, nats/token", "shapley": "Shapley value, nats/token"}
    taus = agreement.set_index(["score_a", "score_b"])
    with matplotlib.rc_context(STYLE):
        size = (2.5 * len(scores), 5)
        figure, axes = plt.subplots(len(titles), len(scores), figsize=size, sharex="col", sharey="row", squeeze=False)
        for row, (causal, title) in zip(axes, titles.items(), strict=True):
            for axis, score in zip(row, scores, strict=True):
                error = {"xerr": table[f"{score}_se"], "yerr": table[f"{causal}_se"]}
                axis.errorbar(table[score], table[causal], **error, ls="", marker="o", ms=3, color=BLUE, elinewidth=0.6)
                for layer in table.nlargest(4, causal)["layer"]:
                    place = (table.loc[layer, score], table.loc[layer, causal])
                    axis.annotate(str(layer), place, textcoords="offset points", xytext=(4, 2), size=7)
                tau = taus.loc[(score, causal)]
                low, high = tau["kendall_tau_lo"], tau["kendall_tau_hi"]
                axis.set_title(f"tau {tau['kendall_tau']:.2f} [{low:.2f}, {high:.2f}]", weight="normal")
                axis.set_yscale("symlog", linthresh=0.1)
                if table[score].min() > 0 and table[score].max() / table[score].median() > 20:
                    axis.set_xscale("log")
            row[0].set_ylabel(title)
        for axis, score in zip(axes[-1], scores, strict=True):
            axis.set_xlabel(TITLES.get(score, score))
        figure.suptitle("Do cheap scores say what a layer is worth? (the four layers worth most are numbered)")
    plt.close(figure)
    return figure


def saturation(coalitions: pd.DataFrame, causal: pd.DataFrame, cap: float) -> Figure:
    """Why the loss is capped: what coalitions of each size lose, and the Shapley values with and without the cap.

    Args:
        coalitions: t1_saturation.
        causal: t1_causal.
        cap: log V, nats.
    """
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        rows = coalitions[coalitions["layers"] > 0]
        left.fill_between(rows["layers"], rows["nll_nats_p10"], rows["nll_nats_p90"], color=RED, alpha=0.2, lw=0,
                          label="10% to 90% of coalitions")  # fmt: skip
        left.plot(rows["layers"], rows["nll_nats_median"], color=RED, label="NLL, median")
        left.plot(rows["layers"], rows["nll_capped_nats_median"], color=BLUE, label="each token capped, median")
        left.axhline(cap, color="black", ls="--", lw=1, label="uniform guess, log V")
        left.set_xlabel("layers in the coalition")
        left.set_ylabel("nats/token")
        none = coalitions.loc[coalitions["layers"] == 0, "nll_nats_median"]
        left.set_title(f"Loss of random coalitions (without any layer: {none.iloc[0]:.0f} nats)")
        left.legend()
        for name, colour, shift, label in (
            ("shapley", BLUE, -0.2, "capped"),
            ("shapley_uncapped", RED, 0.2, "uncapped"),
        ):
            scale = causal[name].abs().max()
            right.bar(causal["layer"] + shift, causal[name] / scale, yerr=causal[f"{name}_se"] / scale, width=0.4,
                      color=colour, error_kw={"elinewidth": 0.7}, label=label)  # fmt: skip
        right.set_xlabel("layer")
        right.set_ylabel("Shapley value / largest")
        right.set_title("Shapley values (bars: standard error)")
        right.legend()
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
    "chosen": ("black", "*"),
}  # fmt: skip
NAMES = {
    "drop_block": "angular block", "shortgpt": "ShortGPT", "shortened_llama_ppl": "PPL",
    "shortened_llama_taylor_plus": "Taylor+", "sleb": "SLEB",
    "evopress": "EvoPress", "staged": "staged removal", "swap": "swaps",
}  # fmt: skip


def strategies(table: pd.DataFrame) -> Figure:
    """Perplexity on validation text of every strategy, a panel for each k; beside each dot what finding it cost.

    Args:
        table: t2_strategies.
    """
    keep = sorted(set(table["k"]), reverse=True)
    label = table.apply(lambda row: NAMES.get(row["strategy"], selection_label(row)), axis=1)
    table = table.assign(label=label.replace("random", "random, mean"))
    order = table.groupby("label")["nll_nats"].mean().sort_values().index
    with matplotlib.rc_context(STYLE):
        size = (3.2 * len(keep) + 1.5, 0.8 + 0.24 * len(order))
        figure, axes = plt.subplots(1, len(keep), figsize=size, sharey=True, squeeze=False)
        for axis, k in zip(axes[0], keep, strict=True):
            rows = table[table["k"] == k]
            for row in rows.itertuples():
                height = order.get_loc(row.label)
                colour = GREY if row.strategy == "random" else BLUE if row.strategy in NAMES else ORANGE
                ring = {"mec": RED, "mew": 1.8, "ms": 8} if row.chosen else {"ms": 5}
                axis.plot(row.ppl_ratio, height, "o", color=colour, **ring)
                if row.strategy != "random":
                    axis.annotate(f"{row.forward_tokens / 1e3:.0f}k", (row.ppl_ratio, height), size=6,
                                  textcoords="offset points", xytext=(6, -2))  # fmt: skip
            axis.set_xscale("log")
            low, high = np.log10(axis.get_xlim())
            axis.set_xlim(right=10 ** (high + 0.15 * (high - low)))  # room for the numbers
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"k = {k}")
            axis.set_xlabel("perplexity / full model's")
        axes[0, 0].set_yticks(range(len(order)), order)
        axes[0, 0].invert_yaxis()
        for colour, text in ((BLUE, "published strategy or search"), (ORANGE, "score or rule"), (GREY, "control")):
            axes[0, 0].plot([], [], "o", ms=5, color=colour, label=text)
        axes[0, 0].plot([], [], "o", ms=8, color="white", mec=RED, mew=1.8, label="chosen")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.suptitle("Strategies on validation text (numbers: cost in thousands of tokens through the full model)")
    plt.close(figure)
    return figure


RECOVERIES = {"none": (GREY, "cut only"), "closed_form": (BLUE, "closed form"), "distilled": (GREEN, "distilled")}


def recovery(table: pd.DataFrame, curve: pd.DataFrame, target: float) -> Figure:
    """Cosine and perplexity of each stage of repair, and both over the distillation's tokens and seconds.

    Args:
        table: t5_recovery, on test text.
        curve: t5_curve, on validation text.
        target: cosine that was asked for.
    """
    rows = table[table["selection"] == "selected"]
    keep = sorted(set(rows["k"]), reverse=True)
    trivial = table[table["selection"] == "trivial"].iloc[0]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10, 5.6))
        for line, (metric, title) in zip(
            axes, (("cosine", "cosine to the full model"), ("ppl_ratio", "perplexity / full model's")), strict=True
        ):
            for place, (stage, (colour, label)) in enumerate(RECOVERIES.items()):
                part = rows[rows["recovery"] == stage].set_index("k").loc[keep]
                x = np.arange(len(keep)) + 0.18 * (place - 1)
                spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
                line[0].errorbar(x, part[metric], spread, fmt="o", ms=5, color=colour, label=label)
            line[0].axhline(trivial[metric], color="black", lw=1, ls="--", label="trivial predictor")
            line[0].set_xticks(range(len(keep)), [f"k = {k}" for k in keep])
            line[0].set_ylabel(title)
            for axis, over, unit in ((line[1], "tokens", 1e3), (line[2], "seconds", 1)):
                for k, colour in zip(keep, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
                    part = curve[curve["k"] == k]
                    axis.plot(part[over] / unit, part[metric], marker="o", ms=3, color=colour, label=f"k = {k}")
                axis.set_xlabel("distillation, thousands of tokens" if over == "tokens" else "distillation, seconds")
            if metric == "cosine":
                for axis in line:
                    axis.axhline(target, color=RED, lw=1, ls=":", label="target")
            else:
                for axis in line:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_formatter("{x:g}")
                for axis in line[1:]:  # less than a decade
                    axis.yaxis.set_minor_formatter("{x:g}")
        axes[0, 0].set_title("test text")
        axes[0, 1].set_title("validation text")
        axes[0, 2].set_title("validation text")
        axes[1, 0].legend(loc="best")
        axes[0, 1].legend(loc="best")
    plt.close(figure)
    return figure


METHODS = {
    "most_popular": (GREY, "most popular"),
    "item_knn": (GREY, "item-kNN"),
    "sasrec": (GREEN, "SASRec"),
    "frozen": (ORANGE, "frozen"),
    "trained": (BLUE, "trained"),
    "no_layers": (RED, "no layers"),
}
PLACES = (9, 0, -9)  # points above the marks of the compact models, from the best down: names that would overlap


def recommendation(tables: dict[str, pd.DataFrame]) -> Figure:
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


FAMILIES = {
    "full": ("black", "*"),
    "quantization": (PURPLE, "o"),
    "sparsity": (GREY, "s"),
    "width": (GREEN, "^"),
    "low rank": (SKY, "v"),
    "depth": (BLUE, "D"),
    "combination": (RED, "P"),
}

WORST = 1000  # perplexity ratios above it are all failures; they stand at the edge


def pareto(table: pd.DataFrame) -> Figure:
    """Perplexity over the full model's against measured speed and against bytes, with the frontier.

    Args:
        table: t7_baselines.
    """
    rows = table[table["ppl_ratio"].notna()]
    panels = {
        "prefill_hidden_speedup": "prefill speedup over the full model",
        "decode_speedup": "decode speedup over the full model",
        "memory_share": "bytes of weights / full model in float32",
    }
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 5.6), sharey=True)
        for axis, (cost, label) in zip(axes, panels.items(), strict=True):
            _methods(axis, rows, cost)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(0.5, WORST * 1.3)
            best = rows[frontier(rows, cost, cost.endswith("speedup")) & (rows["ppl_ratio"] <= WORST)].sort_values(cost)
            axis.plot(best[cost], best["ppl_ratio"], color="black", lw=0.8, zorder=2, label="frontier")
            names = [row.method + (f", k = {row.k}" if row.k and row.family != "full" else "")
                     for row in best.itertuples()]  # fmt: skip
            _numbered(axis, best[[cost, "ppl_ratio"]].to_numpy())
            listed = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
            axis.text(0, -0.2, listed, transform=axis.transAxes, va="top", size=7.5)
            axis.set_xlabel(label)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0].set_ylabel("perplexity / full model's")
        worse = (rows["ppl_ratio"] > WORST).sum()
        axes[1].set_title("hollow: as it is; filled: after training")
        axes[2].set_title(f"at the top edge: {worse} rows above {WORST:,} times" if worse else "")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    plt.close(figure)
    return figure


def _methods(axis: Axes, rows: pd.DataFrame, cost: str) -> None:
    """Every method as a point, hollow unless it was trained."""
    trained = rows["recovered"] | rows["method"].str.contains(LATER) | (rows["family"] == "full")
    for family, (colour, marker) in FAMILIES.items():
        axis.scatter([], [], marker=marker, color=colour, label=family)
        for done in (False, True):
            part = rows[(rows["family"] == family) & (trained == done)]
            axis.scatter(part[cost], part["ppl_ratio"].clip(upper=WORST), s=30, marker=marker, edgecolors=colour,
                         facecolors=colour if done else "none", zorder=3)  # fmt: skip


def _numbered(axis: Axes, points: np.ndarray) -> None:
    """Numbers beside the points [n, 2], from 1; neighbours too close for two numbers share one label."""
    places = axis.transData.transform(points) * 72 / axis.figure.dpi
    groups = [[0]]
    for index in range(1, len(points)):
        if np.abs(places[index] - places[groups[-1][0]]).max() < 9:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        text = str(group[0] + 1) + (f"-{group[-1] + 1}" if len(group) > 1 else "")
        axis.annotate(text, points[group[0]], size=8, textcoords="offset points", xytext=(5, -10))


def tradeoff(fidelity: pd.DataFrame, draws: pd.DataFrame, speed_by_k: pd.Series) -> Figure:
    """Cosine and perplexity ratio against measured speedup, with random selections and the trivial predictor.

    The strategies of one k share its speedup; their points stand side by side so that they can be seen.

    Args:
        fidelity: t4_fidelity.
        draws: t4_random, one row a random draw.
        speed_by_k: k -> measured prefill speedup.
    """
    labels = {"random": "random draws", "chosen": "chosen on validation text", "drop_block": "angular block"}
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
        for axis, metric in zip(axes, ("cosine", "ppl_ratio"), strict=True):
            for place, (strategy, (colour, marker)) in enumerate(STRATEGIES.items()):
                rows = draws if strategy == "random" else fidelity[fidelity["strategy"] == strategy]
                x = rows["k"].map(speed_by_k) * (1 + 0.011 * (place - len(STRATEGIES) // 2))
                size = 10 if strategy == "chosen" else 5
                axis.plot(x, rows[metric], ls="", marker=marker, ms=size, color=colour, mec="white", mew=0.4,
                          label=labels.get(strategy, strategy.replace("_", " ")))  # fmt: skip
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


def controls(
    drawn: pd.DataFrame, scores: pd.DataFrame, moved: pd.DataFrame, speed: pd.DataFrame, text: pd.DataFrame
) -> Figure:
    """One panel for each wrong practice beside the right one.

    Args:
        drawn: t8_random.
        scores: t8_scores.
        moved: t8_permuted.
        speed: t8_speed.
        text: t8_text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7))
        _made_up(axes[0, 0], drawn, scores)
        _moved(axes[0, 1], moved)
        _timed(axes[1, 0], speed)
        _texts(axes[1, 1], text)
    plt.close(figure)
    return figure


def _made_up(axis: Axes, drawn: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Outcomes of made-up scores, and below them those of real ones."""
    axis.hist(np.log10(drawn["ppl_ratio"]), bins=20, color="#b5b5b5", label=f"{len(drawn)} made-up scores")
    tops, unit = scores.sort_values("ppl_ratio"), axis.get_ylim()[1] / 20
    for index, row in enumerate(tops.itertuples()):
        axis.plot(np.log10(row.ppl_ratio), unit * (-1.4 - 1.2 * index), "o", ms=3.5, color=BLUE)
        label = f"{TITLES.get(row.score, row.score.replace('_', ' '))} (p = {row.p_ppl:.2f})"
        axis.annotate(label, (np.log10(row.ppl_ratio), unit * (-1.4 - 1.2 * index)), textcoords="offset points",
                      xytext=(5, -2), size=5.5)  # fmt: skip
    axis.margins(x=0.05)
    axis.set_xlim(right=axis.get_xlim()[1] + 0.45 * np.diff(axis.get_xlim()).item())  # room for the names
    axis.set_yticks([tick for tick in axis.get_yticks() if tick >= 0])
    axis.set_xlabel("log10 of perplexity / full model's")
    axis.set_ylabel("draws")
    axis.set_title("Scores from np.random.normal, and real ones (dots)")
    axis.legend(loc="upper right")


def _moved(axis: Axes, moved: pd.DataFrame) -> None:
    """What each way of choosing keeps of two models with the same layers in other places."""
    ways = list(dict.fromkeys(moved["chosen_by"]))
    for shift, (order, part), colour in zip((-0.2, 0.2), moved.groupby("model"), (BLUE, ORANGE), strict=True):
        height = part.set_index("chosen_by").loc[ways, "ppl_ratio"]
        axis.bar(np.arange(len(ways)) + shift, height, width=0.4, color=colour, label=f"{order} model")
        for place, kept in enumerate(part.set_index("chosen_by").loc[ways, "working_kept"]):
            axis.annotate(f"{kept} kept", (place + shift, height.iloc[place]), ha="center", va="bottom", size=7)
    axis.set_xticks(range(len(ways)), [way.replace("_", " ") for way in ways])
    axis.set_yscale("log")
    axis.set_ylabel("perplexity / full model's")
    axis.set_title("The same layers in other places (working layers kept)")
    axis.legend()


def _timed(axis: Axes, speed: pd.DataFrame) -> None:
    """The speedup that each way of timing finds."""
    error = [speed["speedup"] - speed["speedup_lo"], speed["speedup_hi"] - speed["speedup"]]
    colours = [BLUE, RED, BLUE, RED, RED]
    axis.barh(speed["timed"].str.replace("_", " "), speed["speedup"], xerr=error, color=colours)
    axis.axvline(1, color="black", lw=1)
    axis.invert_yaxis()
    axis.set_xlabel("speedup found (blue: right practice)")
    axis.set_title(f"Masks, and requests over HTTP (k = {speed['k'].iloc[0]})")


def _texts(axis: Axes, text: pd.DataFrame) -> None:
    """Text similarity against KL."""
    models = text[text["kl_nats"].notna()]
    axis.plot(models["kl_nats"], models["text_similarity"], "o", color=BLUE)
    for row in models.itertuples():
        axis.annotate(row.model, (row.kl_nats, row.text_similarity), textcoords="offset points", xytext=(4, 3), size=7)
    unrelated = text.loc[text["kl_nats"].isna(), "text_similarity"].item()
    axis.axhline(unrelated, color=GREY, ls="--", lw=1, label="texts of different prompts")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlabel("KL(full || model), nats/token")
    axis.set_ylabel("similarity to the full model's text")
    axis.set_title("Text similarity against KL")
    axis.set_ylim(0, 1.08)
    axis.margins(x=0.18)
    axis.legend(loc="lower left")
