"""Section 4: fidelity of every selection on test text, beside random selections and the trivial predictor."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import fidelity
from paper_src.layers import SubsetRunner
from paper_src.reporting import reported
from paper_src.reporting.style import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, STYLE
from paper_src.selection import kept_text, kept_tuple
from paper_src.stats import control_p_value

STRATEGIES = {
    "random": ("#b5b5b5", "."), "top_k": (BLUE, "o"), "distributed": (ORANGE, "s"), "drop_block": (GREEN, "^"),
    "first_and_last": (PURPLE, "v"), "evenly_spaced": (SKY, "D"), "reported_list": (RED, "X"),
    "chosen": ("black", "*"),
}  # fmt: skip


def f4_tradeoff(fidelity: pd.DataFrame, draws: pd.DataFrame, speed_by_k: pd.Series) -> Figure:
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


def measure(
    model: PreTrainedModel,
    full: fidelity.Reference,
    table: pd.DataFrame,
    metrics: Sequence[str] = fidelity.METRICS,
    progress: Callable = iter,
) -> dict[str, dict[str, np.ndarray]]:
    """Fidelity of every different selection of t2_selection, and of the full model: kept -> metric -> (N,).

    Selections that begin alike share the work, see :class:`paper_src.layers.SubsetRunner`; the values are
    those of the compacted models.
    """
    runner = SubsetRunner(model, full.blocks, memory_bytes=2**26)  # smaller batches, for the bar
    everything = tuple(range(runner.depth))
    measured = {kept_text(everything): {}}  # first, as the reference of all
    for batch in progress(list(runner.batches([everything, *map(kept_tuple, table["kept"])]))):
        for kept, hidden in zip(batch, runner.last_hidden(batch), strict=True):
            measured[kept_text(kept)] = fidelity.compare_states(model, full, hidden, metrics)
    return measured


def t4_random(measured: dict, table: pd.DataFrame) -> pd.DataFrame:
    """t4_random: a row a random draw, its means over blocks, ``ppl`` and ``ppl_ratio`` to the full model."""
    rows = []
    for row in table[table["strategy"] == "random"].itertuples():
        means = {name: float(values.mean()) for name, values in measured[row.kept].items()}
        rows.append({"k": row.k, "draw": row.draw, "kept": row.kept, **means})
    frame = pd.DataFrame(rows)
    return frame.assign(ppl=np.exp(frame["nll_nats"]), ppl_ratio=np.exp(frame["nll_nats"] - _full_nll(measured)))


def t4_fidelity(
    model: PreTrainedModel, full: fidelity.Reference, measured: dict, table: pd.DataFrame, seed: int
) -> pd.DataFrame:
    """t4_fidelity: full model, trivial predictor, every selection, and the mean of the random draws at each k.

    Intervals are 95% bootstraps: over test blocks, for ``ppl_ratio`` of the paired differences, and for ``random``
    over draws. ``p_cosine`` and ``p_ppl`` are the chance that a random draw of the same k does at least as well.
    """
    blocks, tokens = full.blocks.shape[0], full.blocks.numel()
    base = {"n_blocks": blocks, "n_tokens": tokens}
    depth = model.config.get_text_config().num_hidden_layers
    everything = measured[kept_text(range(depth))]

    def summary(values: dict[str, np.ndarray]) -> dict[str, float]:
        ratio = fidelity.ppl_ratio(values["nll_nats"], everything["nll_nats"], seed)
        return {**base, **fidelity.summarize(values, seed), **ratio}

    constant = fidelity.compare_constant(model, full)
    rows = [
        {"strategy": "full", "k": depth, "kept": kept_text(range(depth)), **summary(everything)},
        {"strategy": "trivial", "k": 0, "kept": "", **summary(constant)},
    ]
    control = t4_random(measured, table)
    for row in table[table["strategy"] != "random"].itertuples():
        values = summary(measured[row.kept])
        same = control[control["k"] == row.k]
        rows.append({
            "strategy": row.strategy, "score": row.score, "k": row.k, "kept": row.kept, **values,
            "p_cosine": control_p_value(values["cosine"], same["cosine"], higher_is_better=True),
            "p_ppl": control_p_value(values["ppl"], same["ppl"], higher_is_better=False),
        })  # fmt: skip
    for k, same in control.groupby("k"):
        values = fidelity.summarize({name: same[name].to_numpy() for name in fidelity.METRICS}, seed)
        ratio = fidelity.ppl_ratio(same["nll_nats"], _full_nll(measured), seed)
        rows.append({"strategy": "random", "k": k, "kept": "", "n_draws": len(same), **base, **values, **ratio})
    frame = pd.DataFrame(rows)
    return frame.assign(n_draws=frame["n_draws"].astype("Int64"))


def found(strategies: pd.DataFrame) -> pd.DataFrame:
    """Rows of t2_strategies that are a selection; the others are means over random ones."""
    return strategies[strategies["strategy"] != "random"]


def t4_strategies(measured: dict, strategies: pd.DataFrame, blocks: Tensor, seed: int) -> pd.DataFrame:
    """t4_strategies: the selections of t2_strategies on much test text.

    ``ppl_ratio`` with its interval as in :func:`fidelity.ppl_ratio`.

    Args:
        measured: from :func:`measure` on ``blocks``.
        strategies: t2_strategies.
        blocks: (N, T) token ids.
        seed: of the bootstrap.
    """
    full = next(iter(measured.values()))["nll_nats"]  # (N,)
    rows = []
    for row in found(strategies)[["strategy", "score", "k", "kept", "chosen"]].to_dict("records"):
        values = measured[row["kept"]]
        rows.append({**row, **fidelity.ppl_ratio(values["nll_nats"], full, seed), "cosine": values["cosine"].mean()})
    frame = pd.DataFrame(rows).assign(ppl_full=np.exp(full.mean()), n_blocks=len(blocks), n_tokens=blocks.numel())
    return frame.sort_values(["k", "ppl_ratio"], ignore_index=True)


def _full_nll(measured: dict) -> float:
    """NLL of the full model, the selection of all layers, which :func:`measure` puts first."""
    return float(next(iter(measured.values()))["nll_nats"].mean())
