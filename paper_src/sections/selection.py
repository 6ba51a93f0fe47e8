"""Section 2: which layers each strategy keeps, how good that is on validation text, and what finding it cost."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from paper_src import InputError, selection
from paper_src.coalitions import Cost, Evaluator
from paper_src.reporting import reported
from paper_src.reporting.style import BLUE, GREY, ORANGE, RED, STYLE, TITLES
from paper_src.sections.importance import CAUSAL, SCORES
from paper_src.selection import kept_text, kept_tuple
from paper_src.stats import control_p_value


def f2_selection(table: pd.DataFrame, k: int, depth: int) -> Figure:
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


NAMES = {
    "drop_block": "angular block", "shortgpt": "ShortGPT", "shortened_llama_ppl": "PPL",
    "shortened_llama_taylor_plus": "Taylor+", "sleb": "SLEB",
    "evopress": "EvoPress", "staged": "staged removal", "swap": "swaps",
}  # fmt: skip


def f2_strategies(table: pd.DataFrame) -> Figure:
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


def selections(
    importance: pd.DataFrame, angular: pd.DataFrame, keep: Sequence[int], regions: int, draws: int, seed: int
) -> pd.DataFrame:
    """t2_selection: the kept layers of every strategy, score and k, and ``draws`` random sets for each k."""
    depth = len(importance)
    rows = []
    for k in keep:
        for score in SCORES:
            values = importance[score].tolist()
            rows.append({"strategy": "top_k", "score": score, "k": k, "kept": selection.top_k(values, k)})
            kept = selection.distributed(values, k, regions)
            rows.append({"strategy": "distributed", "score": score, "k": k, "kept": kept})
        plain = {
            "shortgpt": selection.shortgpt(importance["block_influence"], k),
            "shortened_llama_ppl": selection.shortened_llama_ppl(importance["leave_one_out"], k),
            "shortened_llama_taylor_plus": selection.shortened_llama_taylor_plus(importance["weight_taylor"], k),
            "drop_block": selection.drop_block(angular.to_numpy(), k),
            "evenly_spaced": selection.evenly_spaced(depth, k),
            "first_and_last": selection.first_and_last(depth, k),
        }
        if k == len(scaled := reported.at_depth(reported.RECOMMENDED, depth)):
            plain["reported_list"] = scaled
        rows += [{"strategy": name, "k": k, "kept": kept} for name, kept in plain.items()]
        random = selection.random_draws(depth, k, draws, seed)
        rows += [{"strategy": "random", "k": k, "draw": i, "kept": kept} for i, kept in enumerate(random)]
    frame = pd.DataFrame(rows, columns=["strategy", "score", "k", "draw", "kept"])
    return frame.assign(kept=frame["kept"].map(kept_text), draw=frame["draw"].astype("Int64"))


SEARCHES = ("sleb", "evopress", "staged", "swap")


def searches(
    looks: Sequence[Evaluator],
    keep: Sequence[int],
    survivors: int,
    evolution: dict[str, int],
    progress: Callable = iter,
) -> pd.DataFrame:
    """What each search keeps at each k: rows of t2_selection, with what they asked of the evaluators.

    ``sleb`` and ``evopress`` stand on the second look. ``staged`` is greedy removal that shows all candidates
    to the first and the best ``survivors`` to the last; ``swap`` improves the best of the three in the same
    stages, and its cost comes on top of theirs.

    Args:
        looks: three evaluators, from little calibration text to much.
        keep: numbers of layers to keep.
        survivors: candidates that reach the last look.
        evolution: ``generations``, ``offspring``, ``initial`` and ``seed`` of EvoPress.
        progress: wraps the iterable of searches.
    """
    rows = []
    for k in progress(sorted(keep, reverse=True)):
        found: dict[str, selection.KeptLayers] = {}
        for strategy in SEARCHES:
            with ExitStack() as stack:
                spent = [stack.enter_context(look.cost()) for look in looks]
                found[strategy] = _search(strategy, looks, k, survivors, evolution, found)
            cost = Cost()
            for part in spent:
                cost.add(part)
            rows.append({"strategy": strategy, "k": k, "kept": kept_text(found[strategy]), **vars(cost)})
    return pd.DataFrame(rows)


def _search(
    strategy: str, looks: Sequence[Evaluator], k: int, survivors: int, evolution: dict, found: dict
) -> selection.KeptLayers:
    first, second, last = looks
    if strategy == "sleb":
        return selection.sleb(second, k)
    if strategy == "evopress":
        return selection.evopress([(first, 2), (second, 1)], k, **evolution)
    stages = [(first, survivors), (last, 1)]
    if strategy == "staged":
        return selection.beam_search(stages, k)
    return selection.swap_refinement(stages, min(found.values(), key=last))


# What notebook 2 judges on validation text: every published strategy and search, and these scores.
JUDGED = ("fisher", "combined", *CAUSAL)


def judged(table: pd.DataFrame, keep: Sequence[int]) -> pd.DataFrame:
    """Rows of t2_selection that are compared on validation text."""
    by_score = table["strategy"].isin(["top_k", "distributed"])
    return table[table["k"].isin(keep) & (~by_score | table["score"].isin(JUDGED))]


def t2_strategies(
    table: pd.DataFrame, measured: dict, searched: pd.DataFrame, costs: pd.DataFrame, depth: int
) -> pd.DataFrame:
    """t2_strategies: perplexity and cosine on validation text of each strategy, and what finding it cost.

    ``p_ppl`` is the chance that a random selection of the same k does at least as well; ``chosen`` marks the
    lowest perplexity at each k. Scores cost what t1_cost says, whatever the number of selections made from them.

    Args:
        table: rows of t2_selection.
        measured: from :func:`measure` on validation text.
        searched: from :func:`searches`.
        costs: t1_cost.
        depth: number of layers L.
    """
    full = float(measured[kept_text(range(depth))]["nll_nats"].mean())
    nll = table["kept"].map(lambda kept: float(measured[kept]["nll_nats"].mean()))
    table = table.assign(
        nll_nats=nll, ppl_ratio=np.exp(nll - full), cosine=table["kept"].map(lambda k: measured[k]["cosine"].mean())
    )
    random, table = table[table["strategy"] == "random"], table[table["strategy"] != "random"]
    rows = []
    for row in table.to_dict("records"):
        control = random.loc[random["k"] == row["k"], "nll_nats"]
        p_value = control_p_value(row["nll_nats"], control, higher_is_better=False)
        rows.append({**row, "p_ppl": p_value, **_cost(row, searched, costs)})
    for k, same in random.groupby("k"):
        means = same[["nll_nats", "cosine"]].mean()
        rows.append({"strategy": "random", "k": k, **means, "ppl_ratio": np.exp(means["nll_nats"] - full)})
    frame = pd.DataFrame(rows).drop(columns="draw")
    best = frame[frame["strategy"] != "random"].groupby("k")["nll_nats"].idxmin()
    return frame.assign(chosen=frame.index.isin(best)).sort_values(["k", "nll_nats"], ignore_index=True)


SOURCES = {"shortened_llama_ppl": "leave_one_out", "shortened_llama_taylor_plus": "weight_taylor"}


def _cost(row: dict, searched: pd.DataFrame, costs: pd.DataFrame) -> dict[str, float]:
    """What finding one selection cost."""
    names = ["evaluations", "forward_tokens", "seconds"]
    if row["strategy"] in set(searched["strategy"]):
        same = searched[(searched["strategy"] == row["strategy"]) & (searched["k"] == row["k"])]
        return same[names].iloc[0].to_dict()
    if row["strategy"] in ("evenly_spaced", "first_and_last", "reported_list"):
        return dict.fromkeys(names, 0)
    by_scores = costs.set_index("scores")[names]
    source = SOURCES.get(row["strategy"], row["score"])
    return by_scores.loc[source if source in by_scores.index else "one pass"].to_dict()


def with_searches(table: pd.DataFrame, searched: pd.DataFrame) -> pd.DataFrame:
    """Rows of t2_selection with those of the searches."""
    return pd.concat([table, searched[["strategy", "k", "kept"]]], ignore_index=True)


def with_chosen(table: pd.DataFrame, strategies: pd.DataFrame) -> pd.DataFrame:
    """t2_selection with the rows ``chosen``: what validation text says is best at each k."""
    rows = strategies.loc[strategies["chosen"], ["k", "kept"]].assign(strategy="chosen")
    return pd.concat([table, rows], ignore_index=True)


def chosen(table: pd.DataFrame, strategy: str, score: str) -> dict[int, tuple[int, ...]]:
    """k -> kept layers of one strategy and score of t2_selection."""
    rows = table[(table["strategy"] == strategy) & (table["score"] == score)]
    if rows.empty:
        raise InputError(
            f"no selection by {strategy!r} of {score!r}: t2_selection has {sorted(set(table['score'].dropna()))}"
        )
    return {k: kept_tuple(kept) for k, kept in zip(rows["k"], rows["kept"], strict=True)}
