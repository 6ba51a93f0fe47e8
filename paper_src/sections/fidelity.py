"""Section 4: fidelity of every selection on test text, beside random selections and the trivial predictor."""

from collections.abc import Callable, Collection, Iterable
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import fidelity
from paper_src.layers import SubsetRunner
from paper_src.reporting import reported
from paper_src.reporting.findings import Findings, Read, ends, spread
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from paper_src.scoring import SCORES, title
from paper_src.sections.selection import label
from paper_src.selection import kept_text, kept_tuple, of_kind
from paper_src.stats import control_p_value

Measured = dict[str, dict[str, np.ndarray]]


def measure(
    model: PreTrainedModel,
    full: fidelity.Reference,
    table: pd.DataFrame,
    metrics: Collection[str] = fidelity.METRICS,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Measured:
    """Fidelity of the full model (first) and of every different selection in ``table``: kept -> metric -> (N,).

    Selections that begin alike share the work, see :class:`paper_src.layers.SubsetRunner`; the values are
    those of the compacted models.
    """
    runner = SubsetRunner(model, full.blocks, memory_bytes=2**26)  # smaller batches, for the bar
    everything = tuple(range(runner.depth))
    measured = {kept_text(everything): {}}
    for batch in progress(list(runner.batches([everything, *map(kept_tuple, table["kept"])]))):
        for kept, hidden in zip(batch, runner.last_hidden(batch), strict=True):
            measured[kept_text(kept)] = fidelity.compare_states(model, full, hidden, metrics)
    return measured


def full_nll(measured: Measured) -> np.ndarray:
    """(N,) NLL of the full model, the selection of all layers, which :func:`measure` puts first."""
    return next(iter(measured.values()))["nll_nats"]


def t4_random(measured: Measured, table: pd.DataFrame) -> pd.DataFrame:
    """A row per random draw of ``table``: means over blocks, ``ppl`` and ``ppl_ratio`` to the full model."""
    rows = []
    for row in table[table["strategy"] == "random"].itertuples():
        means = {name: float(values.mean()) for name, values in measured[row.kept].items()}
        rows.append({"k": row.k, "draw": row.draw, "kept": row.kept, **means})
    frame = pd.DataFrame(rows)
    return frame.assign(ppl=np.exp(frame["nll_nats"]), ppl_ratio=np.exp(frame["nll_nats"] - full_nll(measured).mean()))


def t4_fidelity(
    measured: Measured, constant: dict[str, np.ndarray], table: pd.DataFrame, blocks: Tensor, seed: int
) -> pd.DataFrame:
    """Full model, trivial predictor, every selection of ``table``, and the mean of the random draws at each k.

    Intervals are 95% bootstraps: over test blocks, for ``ppl_ratio`` of the paired differences, and for ``random``
    over draws. ``p_cosine`` and ``p_ppl`` are the chance that a random draw of the same k does at least as well.

    Args:
        measured: from :func:`measure` on ``blocks`` (N, T).
        constant: the trivial predictor's metrics there.
        table: t2_selection.
    """
    everything, full = next(iter(measured)), full_nll(measured)
    size = {"n_blocks": len(blocks), "n_tokens": blocks.numel()}

    def summary(values: dict[str, np.ndarray], base: np.ndarray | float) -> dict[str, float]:
        return {**size, **fidelity.summarize(values, seed), **fidelity.ppl_ratio(values["nll_nats"], base, seed)}

    rows = [
        {"strategy": "full", "k": len(everything.split()), "kept": everything, **summary(measured[everything], full)},
        {"strategy": "trivial", "k": 0, "kept": "", **summary(constant, full)},
    ]
    draws = dict(iter(t4_random(measured, table).groupby("k")))
    for row in table[table["strategy"] != "random"].itertuples():
        values = summary(measured[row.kept], full)
        p_values = {"p_cosine": control_p_value(values["cosine"], draws[row.k]["cosine"], higher_is_better=True),
                    "p_ppl": control_p_value(values["ppl"], draws[row.k]["ppl"], higher_is_better=False)}  # fmt: skip
        rows.append({"strategy": row.strategy, "score": row.score, "k": row.k, "kept": row.kept, **values, **p_values})
    for k, same in draws.items():
        means = {name: same[name].to_numpy() for name in fidelity.METRICS}
        values = summary(means, float(full.mean()))
        rows.append({"strategy": "random", "k": k, "kept": "", "n_draws": len(same), **values})
    return pd.DataFrame(rows).astype({"n_draws": "Int64"})


def found(strategies: pd.DataFrame) -> pd.DataFrame:
    """Rows of t2_strategies that are a selection; the others are means over random ones."""
    return strategies[strategies["strategy"] != "random"]


def t4_strategies(measured: Measured, strategies: pd.DataFrame, blocks: Tensor, seed: int) -> pd.DataFrame:
    """The selections of t2_strategies on much test text, with ``ppl_ratio`` as in :func:`fidelity.ppl_ratio`.

    Args:
        measured: from :func:`measure` on ``blocks`` (N, T).
        strategies: t2_strategies.
    """
    full, rows = full_nll(measured), []
    for row in found(strategies)[["strategy", "score", "k", "kept", "chosen"]].to_dict("records"):
        values = measured[row["kept"]]
        rows.append({**row, **fidelity.ppl_ratio(values["nll_nats"], full, seed), "cosine": values["cosine"].mean()})
    frame = pd.DataFrame(rows).assign(ppl_full=np.exp(full.mean()), n_blocks=len(blocks), n_tokens=blocks.numel())
    return frame.sort_values(["k", "ppl_ratio"], ignore_index=True)


PANELS = {"ppl_ratio": "perplexity / full model's", "cosine": "cosine to the full model's last hidden state"}


def f4_tradeoff(table: pd.DataFrame, draws: pd.DataFrame, speed_by_k: pd.Series) -> Figure:
    """What each selection costs on test text, without any repair: a column per number of kept layers k, with the
    measured speedup of prefill. A row is a score (with a marker per strategy that uses it) or a strategy of its own,
    sorted by the perplexity at the smallest k. Bars: 95% bootstrap over windows, paired with the full model for
    perplexity. Grey: random selections of the same k, and the range of 90% of them. Dashed: the trivial predictor,
    which answers every token with the mean state of calibration text.

    Args:
        table: t4_fidelity.
        draws: t4_random.
        speed_by_k: k -> measured prefill speedup.
    """
    rows = table[~table["strategy"].isin(["full", "trivial", "random"])].copy()
    scored = rows["strategy"].isin(of_kind("score"))
    rows["row"] = [title(score) if own else label(name)
                   for own, name, score in zip(scored, rows["strategy"], rows["score"], strict=True)]  # fmt: skip
    keep = sorted(set(rows["k"]))
    order = [*rows.sort_values(["k", "ppl_ratio"])["row"].drop_duplicates(), "random draws"]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(keep), figsize=(10, 1.7 + 0.27 * len(order)), sharex="row", sharey=True, squeeze=False
        )
        for line, (metric, name) in zip(axes, PANELS.items(), strict=True):
            trivial = table.loc[table["strategy"] == "trivial", metric].item()
            for axis, k in zip(line, keep, strict=True):
                _selections(axis, rows[rows["k"] == k], metric, order)
                _random(axis, draws.loc[draws["k"] == k, metric], order)
                axis.axvline(trivial, color="black", lw=1, ls="--", label="trivial predictor")
                axis.set_title(f"k = {k}, speedup {speed_by_k[k]:.2f}")
            line[len(keep) // 2].set_xlabel(f"{name} (n = {table['n_blocks'].iloc[0]} windows)", loc="left")
        axes[0, 0].set_xscale("log")  # of the whole line
        for axis in axes[1]:
            axis.axvspan(*reported.COSINE_RANGE, color=RED, alpha=0.25, lw=0, label="earlier report")
            axis.axvline(reported.COSINE_TARGET, color=RED, lw=1, ls=":", label="its target")
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    plt.close(figure)
    return figure


def _selections(axis: Axes, rows: pd.DataFrame, metric: str, order: list[str]) -> None:
    """A point with its interval for each selection, on the line of its score or strategy."""
    looks = cycle([(BLUE, "o"), (ORANGE, "s"), (GREY, "D")])
    styles = dict(zip(of_kind("score"), looks, strict=False))
    for name, (colour, marker) in {**styles, "": (GREEN, "^")}.items():
        part = rows[rows["strategy"] == name] if name else rows[~rows["strategy"].isin(styles)]
        spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
        legend = f"{label(name)} by this score" if name else "its own score or rule"
        axis.errorbar(part[metric], part["row"].map(order.index), xerr=spread, fmt=marker, ms=4, lw=0.9, color=colour,
                      mec="white", mew=0.4, label=legend)  # fmt: skip


def _random(axis: Axes, values: pd.Series, order: list[str]) -> None:
    """Random draws in a line of their own, and the range of 90% of them behind all others."""
    axis.axvspan(*values.quantile([0.05, 0.95]), color=GREY, alpha=0.2, lw=0, label="90% of random draws")
    axis.plot(values, [len(order) - 1] * len(values), "|", color=GREY, ms=7)
    axis.set_yticks(range(len(order)), order, size=7)
    axis.set_ylim(len(order) - 0.5, -0.5)


def t4_findings(read: Read) -> pd.DataFrame:
    """t4_findings: the smallest models against a constant, random selections and one another."""
    table, found = read("t4_fidelity"), Findings()
    by_name = table.drop_duplicates("strategy").set_index("strategy")
    full, trivial = by_name.loc["full"], by_name.loc["trivial"]
    found.add("t4_fidelity", "test_blocks", full["n_blocks"], unit="windows")
    found.add("t4_fidelity", "test_tokens", full["n_tokens"], unit="tokens")
    found.add("t4_fidelity", "full_ppl", *ends(full, "ppl"), unit="perplexity", n=full["n_blocks"])
    draws = table["n_draws"].max()
    found.add("t4_fidelity", "random_draws", draws, unit="selections at each k")
    found.add("t4_fidelity", "smallest_p", 1 / (1 + draws), unit="p")
    small = table[table["k"] == table.loc[table["strategy"] == "chosen", "k"].min()]
    own = small[(small["strategy"] == "distributed") & (small["score"] == "combined")].iloc[0]
    real = small[small["strategy"] != "random"]
    rows = {"trivial": trivial, "recommended": own, "best": real.loc[real["cosine"].idxmax()],
            "chosen": small[small["strategy"] == "chosen"].iloc[0],
            "random": small[small["strategy"] == "random"].iloc[0]}  # fmt: skip
    for role, row in rows.items():
        n = draws if role == "random" else full["n_blocks"]
        for column, unit in (("cosine", "cosine"), ("cosine_centred", "cosine"), ("ppl_ratio", "perplexity / full")):
            found.add("t4_fidelity", f"{column}_{role}", *ends(row, column), unit=unit, n=n)
    gradient = small[small["strategy"].isin(["top_k", "distributed"]) & _by_gradient(small)]
    found.add("t4_fidelity", "cosine_gradient", *spread(gradient["cosine"]), n=len(gradient),
              unit="cosine: median and range over selections by gradient scores")  # fmt: skip
    tested = read("t4_strategies")
    picked = tested[tested["chosen"] & (tested["k"] == small["k"].iloc[0])].iloc[0]
    found.add("t4_strategies", "ppl_ratio_chosen_long_windows", *ends(picked, "ppl_ratio"), unit="perplexity / full",
              n=picked["n_blocks"])  # fmt: skip
    _against_random(found, table)
    _spread_against_top_k(found, table)
    return found.frame()


def _by_gradient(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of a score by gradients, the combined one included."""
    return rows["score"].map({name: score.kind for name, score in SCORES.items()}).isin(["gradient", "combined"])


def _against_random(found: Findings, table: pd.DataFrame) -> None:
    """Adds how many different selections by gradient scores are better or worse than random ones, both at 5%."""
    draws = table["n_draws"].max()
    rows = table[_by_gradient(table)].drop_duplicates(["strategy", "kept"])
    worse = 1 + 1 / (1 + draws) - rows["p_ppl"]  # the same test from the other side: (1 + worse) / (1 + draws)
    for strategy, part in rows.groupby("strategy"):
        for side, p in (("better", part["p_ppl"]), ("worse", worse[part.index])):
            found.add("t4_fidelity", f"{strategy}_{side}_than_random", (p.round(9) <= 1 / 20).sum(), n=len(part),
                      unit="selections, p <= 0.05")  # fmt: skip


def _spread_against_top_k(found: Findings, table: pd.DataFrame) -> None:
    """Adds in how many different pairs (score, k) ``distributed`` has a lower loss than Top-K, by kind of score."""
    kinds = {name: score.kind.replace("combined", "gradient") for name, score in SCORES.items()}
    wide, top = (table[table["strategy"] == name] for name in ("distributed", "top_k"))
    pairs = wide.merge(top, on=["score", "k"], suffixes=("", "_top"))
    pairs = pairs[pairs["kept"] != pairs["kept_top"]]
    pairs = pairs.assign(kind=pairs["score"].map(kinds)).drop_duplicates(["kind", "kept", "kept_top"])
    for kind in dict.fromkeys(kinds.values()):
        part = pairs[pairs["kind"] == kind]
        wins = (part["nll_nats"] < part["nll_nats_top"]).sum()
        found.add("t4_fidelity", f"distributed_wins_{kind}", wins, n=len(part), unit="pairs of selections")
