"""Section 2: which layers each strategy keeps, how good that is on validation text, and what finding it cost."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.reporting.findings import Findings, Read
from paper_src.reporting.style import BLUE, GREY, ORANGE, RED, STYLE
from paper_src.scoring import passes, title
from paper_src.sections.formulas import FORMULAS, combined
from paper_src.sections.searches import stability
from paper_src.selection import STRATEGIES, KeptLayers, distributed, kept_text, kept_tuple

COST = ["evaluations", "forward_tokens", "seconds"]
SEARCH = ["objective", *COST]
SELECTION = ["strategy", "score", "k", "draw", "kept"]


def selections(found: Sequence[dict]) -> pd.DataFrame:
    """What was found, a row a selection: strategy, score, k, draw, kept and, of a search, its loss and what it cost."""
    frame = pd.DataFrame(found, columns=[*SELECTION, *SEARCH])
    return frame.assign(kept=frame["kept"].map(kept_text), draw=frame["draw"].astype("Int64"))


def t2_selection(selected: pd.DataFrame, strategies: pd.DataFrame) -> pd.DataFrame:
    """The kept layers of every strategy, score and k, and of random draws; ``chosen``: the best on validation text.

    Args:
        selected: from :func:`selections`.
        strategies: t2_strategies.
    """
    best = strategies.loc[strategies["chosen"], ["k", "kept"]].assign(strategy="chosen")
    return pd.concat([selected[SELECTION], best], ignore_index=True)


def t2_strategies(selected: pd.DataFrame, measured: dict, costs: pd.DataFrame, depth: int) -> pd.DataFrame:
    """Perplexity and cosine on validation text of each selection, and what finding it cost.

    ``chosen`` marks the lowest perplexity at each k; ``random`` is the mean of ``n_draws`` draws, a look at the
    control, which section 4 judges in full. Scores cost what t1_cost says, whatever the number of selections made from
    them; a search that starts from what others found costs what they cost too. ``objective``: the loss it asks for.

    Args:
        selected: rows of :func:`selections`, those that were judged.
        measured: from :func:`paper_src.sections.fidelity.measure` on validation text.
        costs: t1_cost.
        depth: number of layers L.
    """
    full = float(measured[kept_text(range(depth))]["nll_nats"].mean())
    nll = selected["kept"].map(lambda kept: float(measured[kept]["nll_nats"].mean()))
    cosine = selected["kept"].map(lambda kept: measured[kept]["cosine"].mean())
    quality = selected[SELECTION].assign(nll_nats=nll, ppl_ratio=np.exp(nll - full), cosine=cosine)
    rows = []
    control = quality[quality["strategy"] == "random"].groupby("k")
    for row, own in zip(quality.to_dict("records"), selected[SEARCH].to_dict("records"), strict=True):
        if row["strategy"] != "random":
            rows.append({**row, **_cost(row, own, costs)})
    for k, draws in control:
        means = draws[["nll_nats", "cosine"]].mean()
        rows.append({"strategy": "random", "k": k, "n_draws": len(draws), **means,
                     "ppl_ratio": np.exp(means["nll_nats"] - full)})  # fmt: skip
    frame = pd.DataFrame(rows).drop(columns="draw").astype({"n_draws": "Int64"})
    best = frame[frame["strategy"] != "random"].groupby("k")["nll_nats"].idxmin()
    return frame.assign(chosen=frame.index.isin(best)).sort_values(["k", "nll_nats"], ignore_index=True)


def _cost(row: dict, own: dict, costs: pd.DataFrame) -> dict[str, float]:
    """What finding one selection cost: ``own`` of a search, the passes of the score it rests on, or nothing."""
    strategy = STRATEGIES.get(row["strategy"])
    if strategy is None or strategy.kind == "rule":
        return dict.fromkeys(COST, 0)
    if strategy.kind == "search":
        return own
    needs = row["score"] if strategy.kind == "score" else strategy.needs
    return costs.set_index("scores").loc[passes(needs), COST].sum().to_dict()


def chosen(table: pd.DataFrame, strategy: str, score: str) -> dict[int, KeptLayers]:
    """k -> kept layers of one strategy and score of t2_selection."""
    rows = table[(table["strategy"] == strategy) & (table["score"] == score)]
    if rows.empty:
        raise InputError(
            f"no selection by {strategy!r} of {score!r}: t2_selection has {sorted(set(table['score'].dropna()))}"
        )
    return {k: kept_tuple(kept) for k, kept in zip(rows["k"], rows["kept"], strict=True)}


def label(strategy: str, score: str | None = None) -> str:
    """Readable name of a strategy, or of a strategy with its score."""
    name = STRATEGIES[strategy].title if strategy in STRATEGIES else strategy.replace("_", " ")
    return name if pd.isna(score) else f"{name}: {title(score)}"


def colour(strategy: str) -> str:
    """Of its kind: what papers propose, what a score or a rule gives, the random control."""
    kind = STRATEGIES[strategy].kind if strategy in STRATEGIES else strategy
    return {"published": BLUE, "search": BLUE, "random": GREY}.get(kind, ORANGE)


def f2_selection(selected: pd.DataFrame, strategies: pd.DataFrame, k: int, depth: int) -> Figure:
    """Which layers are kept at the smallest k: each different selection once, the best first, with its perplexity on
    validation text (n: `valid_blocks` windows) as a multiple of the full model's; below them those that were not judged
    on it. Dashed: the mean of random selections (n: `judged_draws`).

    Args:
        selected: t2_selection.
        strategies: t2_strategies.
        k: number of layers kept.
        depth: number of layers L.
    """
    rows = selected[(selected["k"] == k) & ~selected["strategy"].isin(["random", "chosen"])]
    rows = rows.sort_values("strategy", key=lambda names: names.map(list(dict.fromkeys(names)).index), kind="stable")
    names = {kept: _names(same) for kept, same in rows.groupby("kept", sort=False)}
    judged = strategies[strategies["k"] == k]
    quality = judged.dropna(subset="kept").drop_duplicates("kept").set_index("kept")["ppl_ratio"]
    order = sorted(names, key=lambda kept: quality.get(kept, np.inf))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 0.9 + 0.2 * len(order)), sharey=True, width_ratios=[2, 1]
        )
        grid = np.array([[layer in kept_tuple(kept) for layer in range(depth)] for kept in order], dtype=float)
        left.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1.3, edgecolors="white", linewidth=1)
        left.set_yticks(np.arange(len(order)) + 0.5, [names[kept] for kept in order], size=7.5)
        step = 2 if depth > 12 else 1
        left.set_xticks(np.arange(0, depth, step) + 0.5, range(0, depth, step))
        left.set_xlabel("layer")
        left.set_title(f"Layers kept at k = {k} of {depth}")
        _qualities(right, order, quality, judged.loc[judged["strategy"] == "random", "ppl_ratio"])
        left.invert_yaxis()
    plt.close(figure)
    return figure


def _qualities(axis: Axes, order: list[str], quality: pd.Series, random: pd.Series) -> None:
    """Right panel of :func:`f2_selection`: ``quality`` of the selections in ``order``, those that have one first."""
    judged = [kept for kept in order if kept in quality]
    for height, kept in enumerate(judged):
        axis.plot(quality[kept], height + 0.5, "o", color=BLUE, ms=4)
        text = f"{quality[kept]:.3g}" if quality[kept] < 1e3 else f"{quality[kept]:.1e}".replace("e+0", "e")
        _beside(axis, text, quality[kept], height + 0.5)
    if unjudged := len(order) - len(judged):
        axis.text(0.5, unjudged / len(order) / 2, "not judged", transform=axis.transAxes, ha="center")
    for value in random:
        axis.axvline(value, color=GREY, lw=1, ls="--", label="random, mean")
        axis.legend(loc="lower right")
    _log_with_room(axis)
    axis.set_title("On validation text")


def _names(same: pd.DataFrame, width: int = 62) -> str:
    """The strategies that found one selection, as many as fit: ``top k: Fisher (true), gradient norm; SLEB +2``."""
    pieces, last = [], None
    for strategy, score in zip(same["strategy"], same["score"], strict=True):
        pieces.append(f", {title(score)}" if strategy == last else f"; {label(strategy, score)}")
        last = strategy
    text, *others = pieces
    while others and len(text) + len(others[0]) < width:
        text += others.pop(0)
    return text.removeprefix("; ") + (f" +{len(others)}" if others else "")


def _beside(axis: Axes, text: str, x: float, y: float) -> None:
    ground = {"fc": "white", "lw": 0, "pad": 0.2}  # over grid lines
    axis.annotate(text, (x, y), size=6.5, textcoords="offset points", xytext=(6, -2), bbox=ground)


def _log_with_room(axis: Axes) -> None:
    """A logarithmic axis of perplexities with room on the right for the numbers beside the dots."""
    axis.set_xscale("log")
    low, high = np.log10(axis.get_xlim())
    axis.set_xlim(right=10 ** (high + 0.15 * (high - low)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("perplexity / full model's")


def f2_strategies(strategies: pd.DataFrame) -> Figure:
    """Perplexity on validation text (n: `valid_blocks` windows) of every strategy, a panel for each k, the best on
    average first; beside each dot what finding it cost, in thousands of tokens through the full model; ringed: the best
    at its k. Random: the mean of `judged_draws` selections. Intervals on test text are in t4_fidelity.

    Args:
        strategies: t2_strategies.
    """
    keep = sorted(set(strategies["k"]), reverse=True)
    labels = [label(*pair) for pair in zip(strategies["strategy"], strategies["score"], strict=True)]
    table = strategies.assign(label=labels).replace({"label": {"random": "random, mean"}})
    order = table.groupby("label")["nll_nats"].mean().sort_values().index
    with matplotlib.rc_context(STYLE):
        size = (3.2 * len(keep) + 1.5, 0.8 + 0.24 * len(order))
        figure, axes = plt.subplots(1, len(keep), figsize=size, sharey=True, squeeze=False)
        for axis, k in zip(axes[0], keep, strict=True):
            for row in table[table["k"] == k].itertuples():
                height = order.get_loc(row.label)
                ring = {"mec": RED, "mew": 1.8, "ms": 8} if row.chosen else {"ms": 5}
                axis.plot(row.ppl_ratio, height, "o", color=colour(row.strategy), **ring)
                if row.strategy != "random":
                    _beside(axis, f"{row.forward_tokens / 1e3:.0f}", row.ppl_ratio, height)
            _log_with_room(axis)
            axis.set_title(f"k = {k}")
        first = axes[0, 0]
        first.set_yticks(range(len(order)), order)
        first.invert_yaxis()
        for shade, text in ((BLUE, "published strategy or search"), (ORANGE, "score or rule"), (GREY, "control")):
            first.plot([], [], "o", ms=5, color=shade, label=text)
        first.plot([], [], "o", ms=8, color="white", mec=RED, mew=1.8, label="chosen")
        first.plot([], [], color="black", ls="", marker="$12$", ms=9, label="cost, thousands of tokens")
        figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    plt.close(figure)
    return figure


def t2_findings(read: Read, seed: int = 0, regions: int = 4) -> pd.DataFrame:
    """t2_findings: how many of the reported layers are selected here, what validation text chooses, and how far
    searches repeat. All are counts or read off; nothing is drawn with ``seed``. ``regions``: of the depth.
    """
    table, strategies, importance = (read(name) for name in ("t2_selection", "t2_strategies", "t1_importance"))
    found, depth = Findings(), len(importance)
    expected = set(reported.at_depth(reported.RECOMMENDED, depth))
    smallest = table["k"].min()
    found.add("t2_selection", "k_smallest", smallest, unit="layers")
    found.add("t2_selection", "recommended_by_chance", smallest * len(expected) / depth, unit="layers")
    own = table[(table["strategy"] == "distributed") & (table["k"] == smallest)].set_index("score")["kept"]
    for score in ("fisher", "combined"):
        inside = len(expected & set(kept_tuple(own[score])))
        found.add("t2_selection", f"recommended_{score}", inside, n=min(len(expected), smallest), unit="layers",
                  test="count", text=own[score].replace(" ", ", "))  # fmt: skip
    _by_formula(found, importance, expected, smallest, regions)
    best = strategies[strategies["chosen"]].set_index("k")
    for role, k in (("smallest", best.index.min()), ("largest", best.index.max())):
        row = best.loc[k]
        found.add("t2_strategies", f"chosen_{role}", row["ppl_ratio"], unit="perplexity / full, validation text",
                  text=row["strategy"])  # fmt: skip
        found.add("t2_strategies", f"chosen_{role}_kept", k, unit="layers", text=row["kept"].replace(" ", ", "))
        found.add("t2_strategies", f"chosen_{role}_tokens", row["forward_tokens"], unit="tokens through the full model")
        found.add("t2_strategies", f"chosen_{role}_seconds", row["seconds"], unit="s")
    runs = read("t2_stability")
    found.add(
        "t2_stability", "search_runs", len(runs[["objective", "seed"]].drop_duplicates()), unit="seeds and losses"
    )
    stability(found, read("t2_overlap"))
    return found.frame()


def _by_formula(found: Findings, importance: pd.DataFrame, expected: set[int], k: int, regions: int) -> None:
    """Adds the fewest and the most of the reported layers that are selected by any formula of a combined score."""
    inside = {name: len(expected & {*distributed(combined(importance, formula), k, regions)})
              for name, formula in FORMULAS.items()}  # fmt: skip
    for end, pick in (("least", min), ("most", max)):
        name = pick(inside, key=inside.get)
        found.add("t1_importance", f"recommended_combined_{end}", inside[name], n=min(len(expected), k), unit="layers",
                  test="count", text=name)  # fmt: skip
