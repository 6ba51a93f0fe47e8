"""Section 1: what the scores say of each layer, whether they have converged, and what a layer is worth."""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy.stats import kendalltau

from paper_src.coalitions import Cost, ShapleyValues
from paper_src.reporting import reported
from paper_src.reporting.findings import Findings, Read, ends
from paper_src.reporting.style import BLUE, RED, STYLE
from paper_src.scoring import SCORES, LayerScores, pass_name, title

CAUSAL = ("leave_one_out", "shapley")  # what a layer is worth, by leaving it out


def t1_importance(scores: LayerScores) -> pd.DataFrame:
    """A row a layer: every score and, where it has rows of its own, its standard error ``<score>_se``."""
    columns = {"layer": range(len(scores.parameters)), "parameters": scores.parameters.tolist()}
    for name, score in SCORES.items():
        columns[name] = scores.mean(name).tolist()
        if not score.made_of:
            columns[f"{name}_se"] = scores.standard_error(name).tolist()
    return pd.DataFrame(columns)


def t1_angular(scores: LayerScores) -> pd.DataFrame:
    """Column ``before_<m>`` of row l is the angular distance between the states before layers l and m."""
    return pd.DataFrame(scores.angular.numpy()).add_prefix("before_")


def t1_top10(importance: pd.DataFrame) -> pd.DataFrame:
    """The earlier report's ten best layers and scores beside the ten best of each of ours, the combined ones first."""
    columns = {"reported_layer": reported.TOP10.keys(), "reported": reported.TOP10.values()}
    frame = pd.DataFrame({"rank": range(1, 11), **{name: list(values) for name, values in columns.items()}})
    for name, score in sorted(SCORES.items(), key=lambda entry: entry[1].kind != "combined"):
        best = importance.nlargest(10, name)
        frame[f"{name}_layer"] = pd.Series(best["layer"].tolist(), dtype="Int64")
        if score.kind == "combined":  # its numbers can be compared with the reported ones
            frame[name] = pd.Series(best[name].tolist())
    return frame


def t1_agreement(scores: LayerScores, importance: pd.DataFrame, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Kendall's tau of every pair of scores; of a score with itself, between the two halves of its rows.

    The 95% intervals of the pairs are percentile bootstraps: the rows are drawn anew, for scores that share them
    together. Redrawing adds to a score's noise, so that the interval of a tau between noisy scores can lie below it.
    """
    redrawn = {name: _redrawn(scores, name, draws, seed) for name in SCORES}
    rows = []
    for a in SCORES:
        for b in SCORES:
            row = {"score_a": a, "score_b": b}
            if a == b:
                row["kendall_tau"] = scores.half_split_tau(a)
            else:
                row["kendall_tau"] = float(kendalltau(importance[a], importance[b]).statistic)
                interval = np.quantile(_taus(redrawn[a], redrawn[b]), [0.025, 0.975])
                row["kendall_tau_lo"], row["kendall_tau_hi"] = interval
            rows.append(row)
    return pd.DataFrame(rows)


def _redrawn(scores: LayerScores, name: str, draws: int, seed: int) -> np.ndarray:
    """(draws, L) means over bootstrap samples of a score's rows."""
    count = scores.rows(name)
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    return np.stack([scores.mean(name, pick).numpy() for pick in picks])


def _taus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D,) Kendall's tau-b of each row of a (D, L) with that of b, all at once; a test holds it equal to scipy's."""
    first, second = np.triu_indices(a.shape[1], 1)
    orders = [np.sign(values[:, first] - values[:, second]) for values in (a, b)]  # (D, L (L - 1) / 2)
    untied = [np.square(order).sum(axis=1) for order in orders]
    return (orders[0] * orders[1]).sum(axis=1) / np.sqrt(untied[0] * untied[1])


def t1_cost(costs: dict[Callable, Cost]) -> pd.DataFrame:
    """What each pass cost; ``one pass`` gives every score that is not named."""
    return pd.DataFrame([{"scores": pass_name(measure), **vars(cost)} for measure, cost in costs.items()])


def t1_causal(scores: LayerScores, values: ShapleyValues) -> pd.DataFrame:
    """Leave-one-out and Shapley values of each layer, the latter with and without the cap of the loss."""
    leave_one_out = scores.per_sequence["leave_one_out"].numpy().mean(axis=0)
    columns = {"layer": range(len(leave_one_out)), "leave_one_out": leave_one_out}
    for index, name in enumerate(("shapley", "shapley_uncapped")):
        columns[name] = values.mean[:, index]
        columns[f"{name}_se"] = values.standard_error[:, index]
    return pd.DataFrame(columns)


def t1_saturation(values: ShapleyValues) -> pd.DataFrame:
    """Loss of the coalitions of each size that the Shapley values rest on, with and without the cap."""
    frame = pd.DataFrame(values.coalitions, columns=["layers", "nll_capped_nats", "nll_nats"]).astype({"layers": int})
    rows = []
    for layers, part in frame.groupby("layers"):
        low, middle, high = np.quantile(part["nll_nats"], [0.1, 0.5, 0.9])
        rows.append({
            "layers": layers, "n": len(part), "nll_nats_p10": low, "nll_nats_median": middle, "nll_nats_p90": high,
            "nll_capped_nats_median": part["nll_capped_nats"].median(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def f1_importance(importance: pd.DataFrame) -> Figure:
    """Every score over the depth, as a multiple of its median over the layers, on one axis: linear up to 1 and
    logarithmic above. Bars: standard error over calibration sequences or groups of them (n: `sequences` and the other
    parameters of notebook 1); the combined score has none.

    Args:
        importance: t1_importance.
    """
    names = [name for name in SCORES if name in importance]
    columns = 4
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(10, 1.8 * rows), sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            scale = importance[name].abs().median()
            error = importance.get(f"{name}_se", 0 * importance[name]) / scale
            axis.errorbar(importance["layer"], importance[name] / scale, error, color=BLUE, marker="o", ms=2.5, lw=0.6)
            axis.set_title(title(name))
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        figure.supxlabel("layer", size=9)
        figure.supylabel("score / its median over the layers", size=9)
    plt.close(figure)
    return figure


def f1_agreement(agreement: pd.DataFrame) -> Figure:
    """Do scores rank layers alike? Kendall's tau of every pair; in bold, of a score with itself between the two halves
    of its calibration text (n: `sequences` and the other parameters of notebook 1; 95% intervals in t1_agreement).

    Args:
        agreement: t1_agreement, which has the intervals.
    """
    names = list(dict.fromkeys(agreement["score_a"]))
    matrix = agreement.pivot(index="score_a", columns="score_b", values="kendall_tau").loc[names, names]
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(7.4, 6.2))
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        labels = [title(name) for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), labels)
        for (row, column), value in np.ndenumerate(matrix.to_numpy()):
            colour = "white" if abs(value) > 0.6 else "black"
            weight = "bold" if row == column else "normal"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", size=6.5, color=colour, weight=weight)
        figure.colorbar(image, label="Kendall's tau", shrink=0.8)
        axis.set_title("Agreement of scores (diagonal: of two halves of the text)")
    plt.close(figure)
    return figure


def f1_causal(importance: pd.DataFrame, agreement: pd.DataFrame, scores: Sequence[str]) -> Figure:
    """Do cheap scores say what a layer is worth? A dot a layer, the four that are worth most numbered; bars: standard
    errors; tau: Kendall's, with its 95% bootstrap interval over sequences.

    Args:
        importance: t1_importance.
        agreement: t1_agreement.
        scores: the columns.
    """
    taus = agreement.set_index(["score_a", "score_b"])
    with matplotlib.rc_context(STYLE):
        size = (2.5 * len(scores), 2.6 * len(CAUSAL))
        figure, axes = plt.subplots(len(CAUSAL), len(scores), figsize=size, sharex="col", sharey="row", squeeze=False)
        for row, causal in zip(axes, CAUSAL, strict=True):
            for axis, score in zip(row, scores, strict=True):
                _against(axis, importance, score, causal)
                tau = taus.loc[(score, causal)]
                low, high = tau["kendall_tau_lo"], tau["kendall_tau_hi"]
                axis.set_title(f"tau {tau['kendall_tau']:.2f} [{low:.2f}, {high:.2f}]", weight="normal")
            row[0].set_ylabel(f"{title(causal)}, nats/token")
        for axis, score in zip(axes[-1], scores, strict=True):
            axis.set_xlabel(title(score))
    plt.close(figure)
    return figure


def _against(axis: Axes, importance: pd.DataFrame, score: str, causal: str) -> None:
    """One panel of :func:`f1_causal`; all share one kind of axes."""
    error = {"xerr": importance[f"{score}_se"], "yerr": importance[f"{causal}_se"]}
    style = {"ls": "", "marker": "o", "ms": 3, "color": BLUE, "elinewidth": 0.6}
    axis.errorbar(importance[score], importance[causal], **error, **style)
    best = importance.nlargest(4, causal).sort_values(score)
    for place, row in enumerate(best.to_dict("records")):  # the first number on the other side: neighbours do not meet
        side = {"xytext": (4, 3), "ha": "left"} if place else {"xytext": (-4, 3), "ha": "right"}
        axis.annotate(f"{row['layer']:.0f}", (row[score], row[causal]), textcoords="offset points", size=7, **side)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yscale("symlog", linthresh=0.1)


def f1_saturation(coalitions: pd.DataFrame, causal: pd.DataFrame, cap: float) -> Figure:
    """Why the loss is capped. Left: what random coalitions of each size lose (median; band: 10% to 90% of them).
    Right: Shapley values with and without the cap, as a share of the largest (bars: standard error over groups of
    permutations, each on a text window of its own).

    Args:
        coalitions: t1_saturation.
        causal: t1_causal.
        cap: log V, nats.
    """
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        rows = coalitions[coalitions["layers"] > 0]
        left.fill_between(rows["layers"], rows["nll_nats_p10"], rows["nll_nats_p90"], color=RED, alpha=0.2, lw=0)
        left.plot(rows["layers"], rows["nll_nats_median"], color=RED, label="uncapped")
        left.plot(rows["layers"], rows["nll_capped_nats_median"], color=BLUE, label="each token capped")
        left.axhline(cap, color="black", ls="--", lw=1, label="uniform guess, log V")
        left.set_xlabel("layers in the coalition")
        left.set_ylabel("nats/token")
        none = coalitions.loc[coalitions["layers"] == 0, "nll_nats_median"].item()
        left.set_title(f"Loss of {coalitions['n'].sum():,} coalitions (without any layer: {none:.0f} nats)")
        left.legend()
        bars = (("shapley", BLUE, -0.2, "capped"), ("shapley_uncapped", RED, 0.2, "uncapped"))
        for name, colour, shift, label in bars:
            scale = causal[name].abs().max()
            right.bar(causal["layer"] + shift, causal[name] / scale, yerr=causal[f"{name}_se"] / scale, width=0.4,
                      color=colour, error_kw={"elinewidth": 0.7}, label=label)  # fmt: skip
        right.set_xlabel("layer")
        right.set_ylabel("Shapley value / largest")
        right.set_title("Shapley values")
        right.legend()
    plt.close(figure)
    return figure


CONVERGED = 0.9  # Kendall's tau between halves of the text; below it layers of similar score change places


def t1_findings(read: Read) -> pd.DataFrame:
    """t1_findings: how much of the reported pattern each score finds, how far it agrees with a layer's worth."""
    importance, causal, found = read("t1_importance"), read("t1_causal"), Findings()
    depth = len(importance)
    pattern = set(reported.at_depth(tuple(reported.TOP10), depth))
    found.add("t1_importance", "layers", depth)
    found.add("t1_importance", "pattern_by_chance", len(pattern) ** 2 / depth, n=len(pattern), unit="layers")
    names = [name for name in SCORES if name in importance]
    for score in names:
        best = importance.nlargest(len(pattern), score)["layer"].tolist()
        found.add("t1_importance", f"pattern_{score}", len(pattern & set(best)), n=len(pattern), unit="layers",
                  text=", ".join(map(str, best)))  # fmt: skip
    ranks = importance["combined"].rank(ascending=False)
    found.add("t1_importance", "rank_of_first_layer", ranks.iloc[0], n=depth, unit="rank by the combined score")
    found.add("t1_importance", "rank_of_last_layer", ranks.iloc[-1], n=depth, unit="rank by the combined score")
    least = importance["leave_one_out"]
    found.add("t1_importance", "leave_one_out_median", least.median(), unit="nats/token", n=depth)
    found.add("t1_importance", "leave_one_out_least", least.min(), unit="nats/token", text=str(least.idxmin()))
    found.add("t1_saturation", "coalitions", read("t1_saturation")["n"].sum(), unit="coalitions")
    for name in ("shapley", "shapley_uncapped"):
        error = causal[f"{name}_se"].max() / causal[name].abs().max()
        found.add("t1_causal", f"{name}_error", error, unit="largest standard error / largest value")
    _agreement(found, read("t1_agreement").set_index(["score_a", "score_b"]), names)
    return found.frame()


def _agreement(found: Findings, taus: pd.DataFrame, names: Sequence[str]) -> None:
    """Adds Kendall's tau of each score between halves of the text, and with what removing layers says."""
    halves = pd.Series({name: taus.loc[(name, name), "kendall_tau"] for name in names})
    for name, tau in halves.items():
        found.add("t1_agreement", f"halves_tau_{name}", tau, unit="Kendall's tau")
    found.add("t1_agreement", "scores_converged", (halves >= CONVERGED).sum(), n=len(halves),
              unit="scores whose tau between halves is at least that of the text", text=str(CONVERGED))  # fmt: skip
    cheap = [name for name in names if name not in CAUSAL]
    for causal in CAUSAL:
        for name in cheap:
            found.add("t1_agreement", f"tau_{causal}_{name}", *ends(taus.loc[(name, causal)], "kendall_tau"),
                      unit="Kendall's tau")  # fmt: skip
    nearest = max(cheap, key=lambda name: taus.loc[(name, "leave_one_out"), "kendall_tau"])
    for causal in CAUSAL:
        row = taus.loc[(nearest, causal)]
        found.add("t1_agreement", f"tau_{causal}_nearest", *ends(row, "kendall_tau"), unit="Kendall's tau",
                  text=nearest)  # fmt: skip
    row = taus.loc[CAUSAL]
    found.add("t1_agreement", "tau_leave_one_out_shapley", *ends(row, "kendall_tau"), unit="Kendall's tau")
