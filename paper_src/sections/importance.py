"""Section 1: what the scores say of each layer, whether they have converged, and what a layer is worth."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from paper_src.coalitions import Cost, ShapleyValues
from paper_src.reporting import reported
from paper_src.reporting.style import BLUE, RED, STYLE, TITLES
from paper_src.scoring import LayerScores, combined_score


def f1_importance(table: pd.DataFrame, scores: list[str]) -> Figure:
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


def f1_agreement(table: pd.DataFrame) -> Figure:
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


def f1_causal(table: pd.DataFrame, agreement: pd.DataFrame, scores: list[str]) -> Figure:
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


def f1_saturation(coalitions: pd.DataFrame, causal: pd.DataFrame, cap: float) -> Figure:
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


COMBINED_FROM = ("fisher", "grad_norm", "activation_variance")
CAUSAL = ("leave_one_out", "shapley")
SCORES = (
    "fisher", "fisher_true", "fisher_per_parameter", "grad_norm", "taylor", "weight_taylor", "block_influence",
    "activation_variance", "activation_variance_no_sink", "activation_mean_abs", "activation_mean_abs_no_sink",
    "activation_kurtosis", "activation_kurtosis_no_sink", *CAUSAL, "combined",
)  # fmt: skip


def t1_importance(scores: LayerScores) -> pd.DataFrame:
    """t1_importance: a row a layer; every score, its standard error ``<score>_se``, and ``combined``."""
    columns = {"layer": range(len(scores.parameters)), "parameters": scores.parameters.tolist()}
    for name in SCORES[:-1]:
        columns[name] = scores.mean(name).tolist()
        columns[f"{name}_se"] = scores.standard_error(name).tolist()
    columns["combined"] = combined_score({name: scores.mean(name) for name in COMBINED_FROM}).tolist()
    return pd.DataFrame(columns)


def t1_angular(scores: LayerScores) -> pd.DataFrame:
    """t1_angular: column ``before_<m>`` of row l is the distance between the states before layers l and m."""
    return pd.DataFrame(scores.angular.numpy()).add_prefix("before_")


def t1_top10(importance: pd.DataFrame) -> pd.DataFrame:
    """t1_top10: the earlier report's ten best layers and scores beside the ten best of each of ours."""
    columns = {
        "rank": range(1, 11),
        "reported_layer": reported.TOP10.keys(),
        "reported": reported.TOP10.values(),
    }
    frame = pd.DataFrame({key: list(value) for key, value in columns.items()})
    for name in ("combined", *(name for name in SCORES if name != "combined")):
        best = importance.nlargest(10, name)
        frame[f"{name}_layer"] = pd.Series(best["layer"].tolist(), dtype="Int64")
        if name == "combined":
            frame["combined"] = pd.Series(best["combined"].tolist())
    return frame


def t1_agreement(scores: LayerScores, importance: pd.DataFrame, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """t1_agreement: Kendall's tau of every pair of scores; of a score with itself, between halves of the text.

    ``combined`` with itself is the tau between the combined scores of the two halves. The 95% intervals of
    the pairs are percentile bootstraps: the sequences are drawn anew, with the scores that share them together.
    Redrawing adds to a score's noise, so that the interval of a tau between noisy scores can lie below it.
    """
    halves = {name: scores.half_split_tau(name) for name in SCORES[:-1]}
    parts = [
        combined_score({name: scores.per_sequence[name][start::2].mean(dim=0) for name in COMBINED_FROM})
        for start in (0, 1)
    ]
    halves["combined"] = _tau(*parts)
    redrawn = _redrawn(scores, draws, seed)
    rows = []
    for a in SCORES:
        for b in SCORES:
            row = {
                "score_a": a,
                "score_b": b,
                "kendall_tau": halves[a] if a == b else _tau(importance[a], importance[b]),
            }
            if a != b:
                row["kendall_tau_lo"], row["kendall_tau_hi"] = np.quantile(
                    _taus(redrawn[a], redrawn[b]), [0.025, 0.975]
                )
            rows.append(row)
    return pd.DataFrame(rows)


def _redrawn(scores: LayerScores, draws: int, seed: int) -> dict[str, np.ndarray]:
    """score -> (draws, L) means over bootstrap samples of the sequences."""
    means = {}
    for name in SCORES[:-1]:
        values = scores.per_sequence[name].numpy()
        picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
        means[name] = np.stack([values[pick].mean(axis=0) for pick in picks])
    parts = [{name: torch.from_numpy(means[name][draw]) for name in COMBINED_FROM} for draw in range(draws)]
    means["combined"] = np.stack([combined_score(part).numpy() for part in parts])
    return means


def _taus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D,) Kendall's tau-b of each row of a (D, L) with that of b, all at once; a test holds it equal to scipy's."""
    first, second = np.triu_indices(a.shape[1], 1)
    orders = [np.sign(values[:, first] - values[:, second]) for values in (a, b)]  # (D, L (L - 1) / 2)
    untied = [np.square(order).sum(axis=1) for order in orders]
    return (orders[0] * orders[1]).sum(axis=1) / np.sqrt(untied[0] * untied[1])


def _tau(a: Sequence[float], b: Sequence[float]) -> float:
    return float(kendalltau(a, b).statistic)


def t1_cost(spent: dict[str, Cost]) -> pd.DataFrame:
    """t1_cost: what each kind of score cost; ``one pass`` gives all that are not named."""
    return pd.DataFrame([{"scores": name, **vars(cost)} for name, cost in spent.items()])


def t1_causal(leave_one_out: np.ndarray, values: ShapleyValues) -> pd.DataFrame:
    """t1_causal: leave-one-out and Shapley values of each layer, the latter with and without the cap of the loss."""
    columns = {"layer": range(leave_one_out.shape[1]), "leave_one_out": leave_one_out.mean(axis=0)}
    for index, name in enumerate(("shapley", "shapley_uncapped")):
        columns[name] = values.mean[:, index]
        columns[f"{name}_se"] = values.standard_error[:, index]
    return pd.DataFrame(columns)


def t1_saturation(values: ShapleyValues) -> pd.DataFrame:
    """t1_saturation: loss of the coalitions of each size that the Shapley values rest on, with and without the cap."""
    frame = pd.DataFrame(values.coalitions, columns=["layers", "nll_capped_nats", "nll_nats"]).astype({"layers": int})
    rows = []
    for layers, part in frame.groupby("layers"):
        low, middle, high = np.quantile(part["nll_nats"], [0.1, 0.5, 0.9])
        rows.append({
            "layers": layers, "n": len(part), "nll_nats_p10": low, "nll_nats_median": middle, "nll_nats_p90": high,
            "nll_capped_nats_median": part["nll_capped_nats"].median(),
        })  # fmt: skip
    return pd.DataFrame(rows)
