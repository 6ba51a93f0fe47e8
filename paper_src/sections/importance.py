"""Section 1: what the scores say of each layer, and whether they have converged; what a layer is worth is in worth."""

from collections.abc import Callable, Sequence
from itertools import combinations, product

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import kendalltau

from paper_src.coalitions import Cost
from paper_src.reporting import reported
from paper_src.reporting.findings import Findings, Read, ends
from paper_src.reporting.style import BLUE, STYLE
from paper_src.scoring import SCORES, LayerScores, pass_name, title
from paper_src.sections.formulas import FORMULAS, combined
from paper_src.sections.searches import SHARE, overlap_of
from paper_src.sections.worth import CAUSAL, redrawn, redrawn_score, tau_of, taus
from paper_src.selection import top_k


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
    samples = {name: redrawn_score(scores, name, draws, seed) for name in SCORES}
    rows = []
    for a in SCORES:
        for b in SCORES:
            row = {"score_a": a, "score_b": b, "n": min(scores.rows(a), scores.rows(b))}
            if a == b:
                row["kendall_tau"] = scores.half_split_tau(a)
            else:
                row["kendall_tau"] = float(kendalltau(importance[a], importance[b]).statistic)
                interval = np.quantile(taus(samples[a], samples[b]), [0.025, 0.975])
                row["kendall_tau_lo"], row["kendall_tau_hi"] = interval
            rows.append(row)
    return pd.DataFrame(rows)


def t1_stability(scores: LayerScores, keep: Sequence[int], parts: int = 3) -> pd.DataFrame:
    """How far the k best layers by a score are the same on other text: overlaps of the pairs of ``parts`` parts of its
    rows, as in t2_overlap.
    """
    rows = []
    for name, k in product(SCORES, keep):
        every = min(parts, scores.rows(name))
        found = [top_k(scores.mean(name, slice(start, None, every)), k) for start in range(every)]
        rows.append({"score": name, "k": k, **overlap_of(list(combinations(found, 2)))})
    return pd.DataFrame(rows)


def t1_cost(costs: dict[Callable, Cost]) -> pd.DataFrame:
    """What each pass cost; ``one pass`` gives every score that is not named."""
    return pd.DataFrame([{"scores": pass_name(measure), **vars(cost)} for measure, cost in costs.items()])


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
        figure.get_layout_engine().set(w_pad=0.12)
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


def reported_pattern(depth: int) -> set[int]:
    """The earlier report's ten best layers, carried over to ``depth`` layers."""
    return set(reported.at_depth(tuple(reported.TOP10), depth))


def t1_combined(importance: pd.DataFrame) -> pd.DataFrame:
    """The combined score under each of ``FORMULAS``: how many of its best layers are in the reported pattern, and its
    Kendall tau with what a layer is worth.

    Args:
        importance: t1_importance.
    """
    pattern, rows = reported_pattern(len(importance)), []
    for name, formula in FORMULAS.items():
        score = combined(importance, formula)
        best = score.nlargest(len(pattern)).index
        row = {"formula": name, "words": formula.words, "statistic": formula.statistic,
               "pattern": len(pattern & {*best}), "n": len(pattern)}  # fmt: skip
        row |= {f"tau_{causal}": kendalltau(score, importance[causal]).statistic for causal in CAUSAL}
        rows.append({**row, "layers": " ".join(map(str, best))})
    return pd.DataFrame(rows)


CONVERGED = 0.9  # Kendall's tau between halves of the text; below it layers of similar score change places
TAU = {"unit": "Kendall's tau"}
BY_ROWS = {**TAU, "test": "percentile bootstrap over sequences"}


def t1_findings(read: Read, seed: int = 0) -> pd.DataFrame:
    """t1_findings: how much of the reported pattern each score finds, how far it agrees with a layer's worth."""
    importance, causal, found = read("t1_importance"), read("t1_causal"), Findings()
    depth = len(importance)
    found.add("t1_importance", "layers", depth)
    names = [name for name in SCORES if name in importance]
    _patterns(found, read, importance, names, seed)
    ranks = importance["combined"].rank(ascending=False)
    found.add("t1_importance", "rank_of_first_layer", ranks.iloc[0], n=depth, unit="rank by the combined score")
    found.add("t1_importance", "rank_of_last_layer", ranks.iloc[-1], n=depth, unit="rank by the combined score")
    least = importance["leave_one_out"]
    found.add("t1_importance", "leave_one_out_median", least.median(), unit="nats/token", n=depth)
    found.add("t1_importance", "leave_one_out_least", least.min(), unit="nats/token", text=str(least.idxmin()))
    found.add("t1_saturation", "coalitions", read("t1_saturation")["n"].sum(), unit="coalitions")
    found.add("t1_cost", "shapley_tokens", read("t1_cost").set_index("scores").loc["shapley", "forward_tokens"],
              unit="tokens through the full model")  # fmt: skip
    for name in ("shapley", "shapley_uncapped"):
        error = causal[f"{name}_se"].max() / causal[name].abs().max()
        found.add("t1_causal", f"{name}_error", error, unit="largest standard error / largest value")
    _agreement(found, read("t1_agreement").set_index(["score_a", "score_b"]), read("t1_rows"), names, seed)
    _repaired(found, read("t1_repaired"), read("t1_predicts").set_index("score"), read("t1_rows"), seed)
    same = read("t1_stability")
    for row in same[same["k"] == same["k"].min()].itertuples():
        found.add("t1_stability", f"same_layers_{row.score}", row.jaccard, unit=SHARE, n=row.pairs, test="count",
                  text=f"{row.identical} of {row.pairs}")  # fmt: skip
    return found.frame()


def _patterns(found: Findings, read: Read, importance: pd.DataFrame, names: Sequence[str], seed: int) -> None:
    """Adds how many of the reported layers are among the best by each score, and by each combined one."""
    pattern, formulas, rows = reported_pattern(len(importance)), read("t1_combined"), read("t1_rows")
    worth = {**importance[list(names)], "shapley_uncapped": read("t1_causal")["shapley_uncapped"],
             "repaired": read("t1_repaired")["repaired_nats"]}  # fmt: skip
    size, chance = len(pattern), len(pattern) ** 2 / len(importance)
    found.add("t1_importance", "pattern_by_chance", chance, n=size, unit="layers", test="count")
    for score, values in worth.items():
        best = values.nlargest(size).index
        source = {"shapley_uncapped": "t1_causal", "repaired": "t1_repaired"}.get(score, "t1_importance")
        tested = _interval(rows[rows["score"] == score].drop(columns="score"), pattern, seed)
        found.add(source, f"pattern_{score}", len(pattern & {*best}), **tested, n=size, unit="layers",
                  text=", ".join(map(str, best)))  # fmt: skip
    for end, place in (("least", formulas["pattern"].idxmin()), ("most", formulas["pattern"].idxmax())):
        row = formulas.loc[place]
        found.add("t1_combined", f"pattern_combined_{end}", row["pattern"], n=size, unit="layers", test="count",
                  text=row["formula"])  # fmt: skip
    found.add("t1_combined", "pattern_combined_formulas", len(formulas), n=len(formulas), unit="formulas")


def _interval(rows: pd.DataFrame, pattern: set[int], seed: int) -> dict[str, float | str]:
    """95% interval of that count and its test, from a score's rows (N, L) if they are known; else it is a count."""
    if rows.empty:
        return {"test": "count"}
    best = np.argsort(-redrawn(rows.to_numpy(), 1000, seed), axis=1)[:, : len(pattern)]
    lo, hi = np.quantile(np.isin(best, list(pattern)).sum(axis=1), [0.025, 0.975])
    return {"lo": lo, "hi": hi, "test": f"percentile bootstrap over {len(rows)} sequences"}


def _agreement(found: Findings, table: pd.DataFrame, rows: pd.DataFrame, names: Sequence[str], seed: int) -> None:
    """Adds Kendall's tau of each score between halves of the text, and with what removing layers says."""
    halves = pd.Series({name: table.loc[(name, name), "kendall_tau"] for name in names})
    for name, tau in halves.items():
        found.add("t1_agreement", f"halves_tau_{name}", tau, **TAU)
    found.add("t1_agreement", "scores_converged", (halves >= CONVERGED).sum(), n=len(halves),
              unit="scores whose tau between halves is at least that of the text", text=str(CONVERGED))  # fmt: skip
    counts, cheap = rows["score"].value_counts(), [name for name in names if name not in CAUSAL]

    def add(name: str, first: str, second: str, text: str = "") -> None:
        if first in counts and second in counts:  # from their rows, with this seed
            n = min(counts[first], counts[second])
            found.add("t1_rows", name, *tau_of(rows, first, second, seed), **BY_ROWS, n=n, text=text)
        else:
            row = table.loc[(first, second)]
            found.add("t1_agreement", name, *ends(row, "kendall_tau"), **BY_ROWS, n=row["n"], text=text)

    nearest = max(cheap, key=lambda name: table.loc[(name, "leave_one_out"), "kendall_tau"])
    for causal in CAUSAL:
        for name in cheap:
            add(f"tau_{causal}_{name}", name, causal)
        add(f"tau_{causal}_nearest", nearest, causal, nearest)
    add("tau_leave_one_out_shapley", *CAUSAL)
    add("tau_shapley_capped_uncapped", "shapley", "shapley_uncapped")


def _repaired(found: Findings, repaired: pd.DataFrame, predicts: pd.DataFrame, rows: pd.DataFrame, seed: int) -> None:
    """Adds what is left of a layer's worth once a linear map stands in its place, and which score predicts that."""
    removed, left = repaired["removed_nats"], repaired["repaired_nats"]
    for name, values in (("removed", removed), ("repaired", left)):
        found.add("t1_repaired", f"{name}_median", values.median(), unit="nats/token", n=len(values))
    found.add("t1_repaired", "repaired_share", left.sum() / removed.sum(), n=len(left),
              unit="loss after the map / loss before, sums over layers")  # fmt: skip
    found.add("t1_repaired", "tau_removed_repaired", kendalltau(removed, left).statistic, n=len(left), **TAU)
    tau, tested = predicts["tau_repaired"], set(rows["score"])
    names = {name: name for name in predicts.index}
    names |= {"nearest": tau.idxmax(), "nearest_cheap": tau.drop(index=list(CAUSAL)).idxmax()}
    for name, score in names.items():
        values = tau_of(rows, score, "repaired", seed) if score in tested else ends(predicts.loc[score], "tau_repaired")
        found.add("t1_rows" if score in tested else "t1_predicts", f"tau_repaired_{name}", *values, **BY_ROWS,
                  n=predicts.loc[score, "n"], text="" if name == score else score)  # fmt: skip
