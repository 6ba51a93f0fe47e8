"""Section 5, last part: how the loss falls with the tokens of training, and whether the start still matters."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, NullFormatter
from torch import Tensor
from transformers import PreTrainedModel

from paper_src.baselines import control
from paper_src.reporting.findings import BOOTSTRAP, SIGN_FLIP, Findings, Read
from paper_src.reporting.style import GREEN, GREY, ORANGE, PURPLE, SKY, STYLE
from paper_src.sections.judge import few_text
from paper_src.sections.recovery import Stage, refit
from paper_src.sections.windows import losses
from paper_src.stats import paired

RANDOM = "random_layers"
DRAWS = 2000  # resamples of the windows for the interval of an exponent
COLOURS = {"selected": GREEN, "distributed": ORANGE, "first_layers": SKY, RANDOM: GREY}


def begun(
    full: PreTrainedModel, start: str, kept: Sequence[int], blocks: Tensor, form: str, reach: str, seed: int
) -> Stage:
    """What a training starts from: the layers ``kept`` after their closed form, or random ones in their shape.

    ``random_layers`` has the embedding, the last norm and the head of the full model, which no training here changes.
    """
    if start == RANDOM:
        return Stage(control.random_layers(full, kept, seed))
    return refit(full, kept, blocks, form, reach)


def best_rate(runs: Mapping[float, Stage]) -> float:
    """The learning rate whose training had the lowest KL divergence on validation text at any look."""
    return min(runs, key=lambda rate: min(look["kl_nats"] for look in runs[rate].history))


def t5_scaling(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """t5_scaling: a complete training a row: start (``selection``), k, ``training_tokens``, ``rate``; test text."""
    wanted = ["row", "selection", "k", "kept", "training_tokens", "rate", "seconds", "ppl_ratio", "ppl_ratio_lo",
              "ppl_ratio_hi", "ppl_ratio_mean", "cosine", "cosine_lo", "cosine_hi", "kl_nats", "n_windows",
              "n_tokens"]  # fmt: skip
    frame = pd.DataFrame(rows).reindex(columns=wanted)
    return frame.sort_values(["k", "selection", "training_tokens"], ignore_index=True)


def power_law(tokens: Sequence[float], gaps: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The straight line through log g over log D: g = a D^-b, for ``gaps`` (B, W) in nats/token above the full model
    of B trainings on W windows and their ``tokens`` (B,). The interval of b is of windows drawn again.

    Example:
        >>> found = power_law([10, 100, 1000], [[1.0], [0.1], [0.01]])
        >>> round(found["exponent"], 6), round(found["at_one"], 6)
        (1.0, 10.0)
    """
    gaps, x = np.asarray(gaps, dtype=float), np.log(np.asarray(tokens, dtype=float))
    fit = np.polyfit(x, np.log(gaps.mean(axis=1)), 1)
    drawn = np.random.default_rng(seed).integers(gaps.shape[1], size=(DRAWS, gaps.shape[1]))
    means = gaps[:, drawn].mean(axis=-1)  # (B, draws)
    slopes = -np.polyfit(x, np.log(means.clip(min=1e-9)), 1)[0]
    low, high = np.quantile(slopes, (0.025, 0.975))
    ends = {"exponent_lo": float(low), "exponent_hi": float(high)}
    return {"exponent": float(-fit[0]), **ends, "at_one": float(np.exp(fit[1]))}


def t5_laws(scaling: pd.DataFrame, windows: pd.DataFrame) -> pd.DataFrame:
    """t5_laws: :func:`power_law` of the nats above the full model on the first kind of text, for each start and k with
    three budgets or more that stay above the full model, and the tokens at which the line reaches 1.5 times the full
    model's perplexity: an extrapolation, where that is more than ``most_tokens``.
    """
    rows, text = [], few_text(windows)
    for (k, start), runs in scaling.groupby(["k", "selection"], sort=False):
        own = [losses(windows, row, text).values for row in runs["row"]]
        gaps = np.stack(own) - losses(windows, "full", text).values
        above = gaps.mean(axis=1) > 0
        part, gaps = runs[above], gaps[above]
        if part["training_tokens"].nunique() < 3:
            continue
        law = power_law(part["training_tokens"], gaps)
        needed = (law["at_one"] / np.log(1.5)) ** (1 / law["exponent"]) if law["exponent"] > 0 else np.inf
        rows.append({"k": k, "selection": start, **law, "n_runs": len(part), "n_windows": gaps.shape[1],
                     "most_tokens": part["training_tokens"].max(), "tokens_for_1.5": needed})  # fmt: skip
    columns = ["k", "selection", "exponent", "exponent_lo", "exponent_hi", "at_one", "n_runs", "n_windows",
               "most_tokens", "tokens_for_1.5"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def f5_scaling(scaling: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    """How far complete trainings get, over their tokens: cosine to the full model's last hidden state, and perplexity
    over the full model's, test text of the first kind (`n_windows` of t5_scaling); bars: 95% bootstrap over windows.
    Colours: starts; markers: numbers of layers. Lines: the power laws of t5_laws.
    """
    marks = dict(zip(sorted(set(scaling["k"])), "osD^", strict=False))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
        for axis, metric in zip(axes, ("cosine", "ppl_ratio"), strict=True):
            for (k, start), part in scaling.groupby(["k", "selection"]):
                spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
                label = f"{start.replace('_', ' ')}, k = {k}"
                axis.errorbar(part["training_tokens"], part[metric], spread, fmt=marks[k], ms=4, label=label,
                              color=COLOURS.get(start, PURPLE))  # fmt: skip
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter(EngFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("tokens of training, each pass counted")
        for law in laws.to_dict("records"):
            part = scaling[(scaling["k"] == law["k"]) & (scaling["selection"] == law["selection"])]
            x = np.geomspace(part["training_tokens"].min(), part["training_tokens"].max())
            axes[1].plot(x, np.exp(law["at_one"] * x ** -law["exponent"]), color=COLOURS.get(law["selection"], PURPLE),
                         lw=1)  # fmt: skip
        axes[0].set_title("cosine to the full model")
        axes[1].set_title("perplexity / full model's")
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    plt.close(figure)
    return figure


def scaling_findings(found: Findings, read: Read, seed: int = 0) -> None:
    """Adds the exponents, and every other start against the selected layers after the largest common training."""
    scaling, windows, laws = read("t5_scaling"), read("t5_windows"), read("t5_laws")
    for law in laws.to_dict("records"):
        name = f"exponent_{law['selection']}_{law['k']}"
        found.add("t5_laws", name, law["exponent"], law["exponent_lo"], law["exponent_hi"], n=law["n_windows"],
                  unit="power of the tokens", test=BOOTSTRAP)  # fmt: skip
    small = scaling[scaling["k"] == scaling["k"].min()]
    own = small[small["selection"] == "selected"].set_index("training_tokens")["row"]
    for start, part in small[small["selection"] != "selected"].groupby("selection"):
        common = sorted(set(part["training_tokens"]) & set(own.index))
        if not common:
            continue
        other = part.set_index("training_tokens").loc[common[-1], "row"]
        text = few_text(windows)
        test = paired(losses(windows, own[common[-1]], text), losses(windows, other, text), seed)
        found.add("t5_windows", f"selected_over_{start}", *test.ratio(), n=test.n, p=test.p,
                  unit="perplexity ratio after the same training", test=SIGN_FLIP,
                  text=f"{common[-1]:,} tokens")  # fmt: skip
