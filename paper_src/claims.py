"""The earlier report's claims against our tables, and the summary that is rendered from both.

A claim is a sentence whose numbers are table cells and a condition on those cells. ``expected`` is the
verdict the paper commits to: ``./reproduce.sh check`` fails when the tables no longer give it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from paper_src import InputError, reported
from paper_src.report import kept_tuple
from paper_src.tables import CAUSAL, prefill_rows

Read = Callable[[str], pd.DataFrame]
GRADIENT_SCORES = ("fisher", "fisher_true", "grad_norm", "taylor")
TEMPLATE = Path(__file__).with_name("summary.md.j2")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: stable identifier.
        reported: what the earlier report says.
        values: from the tables to the numbers of ``ours``; None where an optional section was not run.
        ours: our finding; its fields are filled from ``values``.
        holds: whether the earlier claim holds on our numbers.
        rule: ``holds`` in words.
        expected: the verdict committed to: True, False, or None where it may go either way with the machine.
        source: table and notebook of the numbers.
    """

    name: str
    reported: str
    values: Callable[[Read], dict[str, float] | None]
    ours: str
    holds: Callable[[dict[str, float]], bool]
    rule: str
    expected: bool | None
    source: str


def table(read: Read, claims: tuple[Claim, ...] | None = None) -> pd.DataFrame:
    """t9_claims: name, what was reported, what we find, whether the claim holds, and the source."""
    rows = []
    for claim in claims or CLAIMS:
        values = claim.values(read)
        if values is None:  # a section that was not run
            continue
        rows.append({
            "name": claim.name,
            "reported": claim.reported,
            "ours": claim.ours.format(**values),
            "holds": bool(claim.holds(values)),
            "rule": claim.rule,
            "expected": claim.expected,
            "source": claim.source,
        })  # fmt: skip
    return pd.DataFrame(rows)


def broken(read: Read) -> list[str]:
    """Names of the claims whose verdict is not the expected one; empty when the paper stands."""
    frame = table(read)
    wrong = frame[frame["expected"].notna() & (frame["holds"] != frame["expected"])]
    return wrong["name"].tolist()


def summary(read: Read, claims: pd.DataFrame) -> str:
    """The text of SUMMARY.md."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(claims=claims.to_dict("records"), fidelity=main_rows(read), **facts(read))


def facts(read: Read) -> dict[str, object]:
    """Numbers of the summary's prose."""
    fidelity, importance, speed = read("t4_fidelity"), read("t1_importance"), read("t3_speed")
    full = fidelity[fidelity["strategy"] == "full"].iloc[0]
    trivial = fidelity[fidelity["strategy"] == "trivial"].iloc[0]
    return {
        "depth": len(importance),
        "k": int(speed["k"].min()),
        "parameters": read("t3_size")["parameters"].max(),
        "full_ppl": full["ppl"],
        "n_blocks": int(full["n_blocks"]),
        "n_tokens": int(full["n_tokens"]),
        "trivial_cosine": trivial["cosine"],
        "trivial_ppl_ratio": trivial["ppl_ratio"],
        "draws": int(fidelity["n_draws"].max()),
        "converged": _halves(read),
        "rounds": int(speed["rounds"].max()),
        "dtype": read("t3_size")["dtype"].iloc[0],
        "causal": _causal(read),
        "strategies": strategy_rows(read),
        "long": read("t4_strategies").iloc[0].to_dict(),
        "controls": read("t8_controls").to_dict("records"),
        "recovery": _recovery(read),
        "recommendation": _recommendation(read),
        "baselines": _baselines(read),
    }


def main_rows(read: Read) -> list[dict[str, object]]:
    """Rows of the summary's main table: at every k, the recommended kind, Fisher, block influence, random."""
    fidelity = read("t4_fidelity")
    speed = prefill_rows(read("t3_speed"))
    wanted = [("chosen", None), ("distributed", "combined"), ("top_k", "combined"), ("top_k", "fisher"),
              ("top_k", "leave_one_out"), ("top_k", "shapley"), ("random", None)]  # fmt: skip
    rows = []
    for k in sorted(speed.index):
        for strategy, score in wanted:
            same = fidelity[(fidelity["strategy"] == strategy) & (fidelity["k"] == k)]
            same = same[same["score"].isna() if score is None else same["score"] == score]
            if len(same):
                rows.append({**same.iloc[0].to_dict(), "k": k, "speedup": speed.loc[k, "speedup"]})
    return rows


def strategy_rows(read: Read) -> list[dict[str, object]]:
    """Rows of the summary's table of strategies: validation and test text side by side, and the cost."""
    strategies, tested = (read(name).fillna({"score": ""}) for name in ("t2_strategies", "t4_strategies"))
    columns = ["ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi"]
    tested = tested.set_index(["strategy", "score", "k"])[columns].rename(columns=lambda name: f"test_{name}")
    rows = []
    for row in strategies.to_dict("records"):
        by_score = f"{row['strategy']}, {row['score']}" if row["score"] else row["strategy"]
        key = (row["strategy"], row["score"], row["k"])  # random selections are only on validation text
        rows.append({**row, "name": by_score, **(tested.loc[key].to_dict() if key in tested.index else {})})
    return sorted(rows, key=lambda row: (-row["k"], row["nll_nats"]))


def _causal(read: Read) -> dict[str, object]:
    """What removing layers says of their worth, and how the cheap scores agree with it."""
    importance, causal, agreement = read("t1_importance"), read("t1_causal"), read("t1_agreement")
    coalitions = read("t1_saturation")
    rows = agreement.set_index(["score_a", "score_b"])
    others = [name for name in dict.fromkeys(agreement["score_a"]) if name not in CAUSAL]
    expected = set(reported.at_depth(tuple(reported.TOP10), len(importance)))
    best = {name: importance.nlargest(len(expected), name)["layer"].tolist() for name in CAUSAL}
    return {
        "best": best,
        "overlap": {name: len(expected & set(layers)) for name, layers in best.items()},
        "of": len(expected),
        "median": importance["leave_one_out"].median(),
        "least": int(importance["leave_one_out"].idxmin()),
        "least_loss": importance["leave_one_out"].min(),
        "relative_error": causal["shapley_se"].max() / causal["shapley"].abs().max(),
        "uncapped_error": causal["shapley_uncapped_se"].max() / causal["shapley_uncapped"].abs().max(),
        "coalitions": int(coalitions["n"].sum()),
        "taus": [
            {"score": name, **{causal: rows.loc[(name, causal)].to_dict() for causal in CAUSAL}} for name in others
        ],
        "agree": rows.loc[CAUSAL, "kendall_tau"],
    }


def _worth(read: Read) -> dict[str, float]:
    causal = _causal(read)
    fisher = next(row for row in causal["taus"] if row["score"] == "fisher")
    loo, shapley = fisher["leave_one_out"], fisher["shapley"]
    best = max(causal["taus"], key=lambda row: row["leave_one_out"]["kendall_tau"])
    return {
        "loo": loo["kendall_tau"], "loo_lo": loo["kendall_tau_lo"], "loo_hi": loo["kendall_tau_hi"],
        "shapley": shapley["kendall_tau"], "shapley_lo": shapley["kendall_tau_lo"],
        "shapley_hi": shapley["kendall_tau_hi"], "best": best["score"],
        "best_tau": best["leave_one_out"]["kendall_tau"], "best_shapley": best["shapley"]["kendall_tau"],
    }  # fmt: skip


def _causal_pattern(read: Read) -> dict[str, float]:
    causal = _causal(read)
    return {"of": causal["of"], **causal["overlap"], "relative_error": causal["relative_error"],
            "coalitions": causal["coalitions"]}  # fmt: skip


def _recommended_or_chosen(read: Read) -> dict[str, float]:
    fidelity = read("t4_fidelity")
    chosen = fidelity[fidelity["strategy"] == "chosen"]
    k = chosen["k"].min()
    same = fidelity[fidelity["k"] == k]
    own = same[(same["strategy"] == "distributed") & (same["score"] == "combined")].iloc[0]
    best = same[same["strategy"] == "chosen"].iloc[0]
    strategies = read("t2_strategies")
    name = strategies[strategies["chosen"] & (strategies["k"] == k)].iloc[0]["strategy"]
    return {"k": k, "own": own["ppl_ratio"], "chosen": best["ppl_ratio"], "name": name, "own_cosine": own["cosine"],
            "chosen_cosine": best["cosine"], "chosen_kept": best["kept"].replace(" ", ", ")}  # fmt: skip


def _recovery(read: Read) -> dict[str, object]:
    """What each stage of repair brings, and what the order of selections does."""
    table, selections, mixes = read("t5_recovery"), read("t5_selection"), read("t5_mix")
    rows = table.sort_values(["k", "selection"], ascending=[False, False], kind="stable").to_dict("records")
    real = selections[selections["strategy"] != "random"]
    changed = [int(k) for k, part in real.groupby("k") if part.loc[part["rank_cut"] == 1, "rank_refitted"].item() != 1]
    mix = mixes[mixes["chosen"]]
    return {
        "rows": rows,
        "n_tokens": int(table["n_tokens"].max()),
        "kinds": [column.removeprefix("ppl_ratio_") for column in mixes if column.startswith("ppl_ratio_")][:-1],
        "changed": changed,
        "keep": sorted({int(k) for k in real["k"]}, reverse=True),
        "mix": mix["mix"].iloc[0] if len(mix) else "all, though one kind of text got worse",
        "random_best": selections.loc[selections["strategy"] == "random", "ppl_ratio_refitted"].min(),
        "random_median": selections.loc[selections["strategy"] == "random", "ppl_ratio_refitted"].median(),
        "smallest_best": real.loc[real["k"] == real["k"].min(), "ppl_ratio_refitted"].min(),
    }


def _repaired(read: Read) -> dict[str, float]:
    table = read("t5_recovery")
    rows = table[(table["selection"] == "selected") & (table["recovery"] == "distilled")].set_index("k")
    smallest, largest = rows.index.min(), rows.index.max()
    cut = table[(table["selection"] == "selected") & (table["recovery"] == "none")].set_index("k")
    low, high = rows.loc[smallest], rows.loc[largest]
    return {
        "k": smallest, "cosine": low["cosine"], "cosine_hi": low["cosine_hi"], "centred": low["cosine_centred"],
        "ppl": low["ppl_ratio"], "cut": cut.loc[smallest, "ppl_ratio"], "mean": low["ppl_ratio_mean"],
        "agreement": low["top1_agreement"], "tokens": int(low["tokens"]), "large_k": largest,
        "large_cosine": high["cosine"], "large_ppl": high["ppl_ratio"],
        "trivial": table.loc[table["selection"] == "trivial", "cosine"].item(),
    }  # fmt: skip


def _baselines(read: Read) -> dict[str, object]:
    """The comparison at the smallest size and of methods without one, and what to pick for a budget."""
    table = read("t7_baselines")
    table = table.assign(status=table["status"].fillna(""), zeros=table["zeros"].fillna(0))
    k = int(table.loc[table["k"] > 0, "k"].min())
    rows = table[table["k"].isin([0, k]) | (table["family"] == "full")]
    return {
        "k": k,
        "rows": rows.to_dict("records"),
        "columns": [name.removesuffix("_se") for name in table if name.endswith(("_acc_se", "_acc_norm_se"))],
        "items": int(table[[name for name in table if name.endswith("_n")]].max().max()),
        "budgets": read("t7_budgets").to_dict("records"),
    }


def _compared(read: Read) -> dict[str, float]:
    """Removing layers beside narrower and thinner ones after the same recovery, and beside int8."""
    table = read("t7_baselines")
    k = int(table.loc[table["recovered"], "k"].replace(0, np.nan).min())
    after = table[table["recovered"] & (table["k"] == k)].set_index("method")
    before = table[~table["recovered"]]
    thin = after.loc[after.index.str.startswith("SVD"), "ppl_ratio"].idxmin()
    int8, both, alone = (before[(before["method"] == name) & before["k"].isin([0, k])].iloc[0] for name in
                         ("int8 weights, torchao", "cut, section 5, + int8", "layers cut, section 5"))  # fmt: skip
    best = after["ppl_ratio"].idxmin()
    return {
        "k": k, "cut": after.loc["layers cut", "ppl_ratio"], "cut_x": after.loc["layers cut", "prefill_hidden_speedup"],
        "width": after.loc["width", "ppl_ratio"], "width_x": after.loc["width", "prefill_hidden_speedup"],
        "thin": after.loc[thin, "ppl_ratio"], "thin_x": after.loc[thin, "prefill_hidden_speedup"],
        "best": best, "best_ppl": after.loc[best, "ppl_ratio"],
        "int8": int8["ppl_ratio"], "int8_x": int8["prefill_hidden_speedup"], "int8_share": int8["memory_share"],
        "both": both["ppl_ratio"], "both_x": both["prefill_hidden_speedup"], "both_share": both["memory_share"],
        "alone": alone["ppl_ratio"],
    }  # fmt: skip


def _recommendation(read: Read) -> list[dict[str, object]]:
    """Rows of the recommenders of every data set that was at hand."""
    rows = []
    for name in ("t6_movielens", "t6_amazon"):
        try:
            table = read(name)
        except (InputError, FileNotFoundError):  # not run, or its data are not on this machine
            continue
        rows += table.to_dict("records")
    return rows


def _still_recommends(read: Read) -> dict[str, object] | None:
    """The better of the cut and the repaired model, trained, beside the full one and SASRec on the same users."""
    rows = pd.DataFrame(_recommendation(read))
    if rows.empty:
        return None
    parts, shares = [], []
    for name, table in rows.groupby("dataset", sort=False):
        by_name = table.set_index(["method", "model"])
        small = by_name.loc["trained"].loc[["compact", "recovered"]]
        best = small.loc[small["valid_ndcg10"].idxmax()]
        others = [("most_popular", "none"), ("sasrec", "same users"), ("sasrec", "all users")]
        popular, same, everyone = by_name.loc[others, "ndcg10"]
        shares.append(best["share_of_full"])
        parts.append(
            f"{name}: NDCG@10 {best['ndcg10']:.4f}, {best['share_of_full']:.0%} [{best['share_lo']:.0%}, "
            f"{best['share_hi']:.0%}] of the full model's, at {best['speedup']:.2f} times its speed (most popular "
            f"{popular:.4f}, SASRec on the same users {same:.4f}, on all {everyone:.4f})"
        )
    return {"text": "; ".join(parts), "lowest": min(shares)}


def _halves(read: Read) -> dict[str, float]:
    """score -> Kendall's tau between halves of the calibration text."""
    agreement = read("t1_agreement")
    same = agreement[agreement["score_a"] == agreement["score_b"]]
    return dict(zip(same["score_a"], same["kendall_tau"], strict=True))


def _pattern(read: Read) -> dict[str, float]:
    importance = read("t1_importance")
    halves = _halves(read)
    expected = set(reported.at_depth(tuple(reported.TOP10), len(importance)))
    ranks = importance["combined"].rank(ascending=False).astype(int)
    best = set(importance.nlargest(len(expected), "combined")["layer"])
    fisher = set(importance.nlargest(len(expected), "fisher")["layer"])
    return {"fisher": len(fisher & expected), "tau": halves["fisher"], "overlap": len(best & expected),
            "of": len(expected), "last_rank": ranks.iloc[-1],
            "first_rank": ranks.iloc[0], "depth": len(importance)}  # fmt: skip


def _recommended(read: Read) -> dict[str, float]:
    selection, depth = read("t2_selection"), len(read("t1_importance"))
    expected = set(reported.at_depth(reported.RECOMMENDED, depth))
    rows = selection[(selection["strategy"] == "distributed") & (selection["k"] == selection["k"].min())]
    rows = rows.set_index("score")["kept"].map(lambda kept: len(expected & set(kept_tuple(kept))))
    return {"fisher": rows["fisher"], "combined": rows["combined"], "of": len(expected)}


def _speed(read: Read) -> dict[str, float]:
    rows = prefill_rows(read("t3_speed"))
    return {"k": rows.index.min(), **rows.loc[rows.index.min()].to_dict()}


def _speed_range(read: Read) -> dict[str, float]:
    speed, depth = read("t3_speed"), len(read("t1_importance"))
    low, high = reported.COMPRESSION_RANGE
    part = speed[(depth / speed["k"]).between(0.92 * low, high)]
    return {"low": part["speedup"].min(), "high": part["speedup"].max(), "k_low": part["k"].min(),
            "k_high": part["k"].max(), "ideal_high": part["ideal"].max()}  # fmt: skip


def _parameters(read: Read) -> dict[str, float]:
    size = read("t3_size")
    return size.loc[size["k"].idxmin()].to_dict()


def _cosines(read: Read) -> dict[str, float]:
    fidelity = read("t4_fidelity")
    k = fidelity.loc[fidelity["strategy"] == "distributed", "k"].min()
    rows = fidelity[(fidelity["k"] == k) & fidelity["strategy"].isin(["top_k", "distributed"])]
    gradient = rows[rows["score"].isin([*GRADIENT_SCORES, "combined"])]
    own = rows[(rows["strategy"] == "distributed") & (rows["score"] == "combined")].iloc[0]
    best = fidelity[fidelity["k"] == k].nlargest(1, "cosine").iloc[0]
    return {
        "k": k, "own": own["cosine"], "own_ppl": own["ppl_ratio"], "own_centred": own["cosine_centred"],
        "low": gradient["cosine"].min(), "high": gradient["cosine"].max(), "best": best["cosine"],
        "best_centred": best["cosine_centred"], "best_ppl": best["ppl_ratio"],
        "trivial": fidelity.loc[fidelity["strategy"] == "trivial", "cosine"].item(),
        "trivial_ppl": fidelity.loc[fidelity["strategy"] == "trivial", "ppl_ratio"].item(),
    }  # fmt: skip


def _control(read: Read) -> dict[str, float]:
    fidelity = read("t4_fidelity")
    rows = fidelity[fidelity["score"].isin([*GRADIENT_SCORES, "combined"])]
    return {
        "tests": len(rows),
        "better": int((rows["p_ppl"] <= 0.05).sum()),
        "median_p": rows["p_ppl"].median(),
        "worse_half": int((rows["p_ppl"] > 0.5).sum()),
    }


def _distributed(read: Read) -> dict[str, float]:
    fidelity = read("t4_fidelity")
    pair = fidelity[fidelity["strategy"].isin(["top_k", "distributed"])]
    wide = pair.pivot(index=["score", "k"], columns="strategy", values="nll_nats")
    return {"wins": int((wide["distributed"] < wide["top_k"]).sum()), "of": len(wide)}


CLAIMS = (
    Claim(
        name="first-and-last",
        reported="The most important layers are the first nine and the last one (10 of 32).",
        values=_pattern,
        ours="In that pattern are {overlap} of the {of} best layers by our combined score and {fisher} of {of} by "
        "Fisher information (halves of the text agree with tau {tau:.2f}); by the combined score the first layer ranks "
        "{first_rank}, the last {last_rank} of {depth}.",
        holds=lambda v: v["fisher"] >= 0.8 * v["of"],
        rule="80% of the pattern by Fisher",
        expected=None,
        source="t1_importance (01_importance)",
    ),
    Claim(
        name="recommended-layers",
        reported="Distributed selection recommends layers " + ", ".join(map(str, reported.RECOMMENDED)) + " of 32.",
        values=_recommended,
        ours="Carried over by relative depth, {fisher} of these {of} layers are chosen by Fisher information and "
        "{combined} by our combined score.",
        holds=lambda v: v["fisher"] >= 0.75 * v["of"],
        rule="75% of the layers by Fisher",
        expected=None,
        source="t2_selection (02_selection)",
    ),
    Claim(
        name="speed-of-recommended",
        reported=f"Keeping 8 of 32 layers (layer compression {reported.LAYER_COMPRESSION:.2f}) is "
        f"{reported.SPEEDUP:.2f} times as fast.",
        values=_speed,
        ours="k = {k}: {speedup:.2f} times [{speedup_lo:.2f}, {speedup_hi:.2f}] for prefill of hidden states, "
        "{share_of_ideal:.0%} of the ideal {ideal:.2f}.",
        holds=lambda v: v["speedup_hi"] >= reported.SPEEDUP,
        rule="the interval reaches the reported speedup",
        expected=True,
        source="t3_speed (03_compaction)",
    ),
    Claim(
        name="speed-range",
        reported=f"Over all configurations the speedup is {reported.SPEEDUP_RANGE[0]}-{reported.SPEEDUP_RANGE[1]} "
        f"at a layer compression of {reported.COMPRESSION_RANGE[0]}-{reported.COMPRESSION_RANGE[1]}.",
        values=_speed_range,
        ours="k = {k_low} to {k_high}, over prefill, prefill with logits and decode: {low:.2f}-{high:.2f} "
        "(ideal at most {ideal_high:.2f}).",
        holds=lambda v: v["low"] <= reported.SPEEDUP_RANGE[1] and v["high"] >= reported.SPEEDUP_RANGE[0],
        rule="the ranges overlap",
        expected=True,
        source="t3_speed (03_compaction)",
    ),
    Claim(
        name="parameters",
        reported=f"Keeping 8 of 32 layers divides the parameters by {reported.PARAMETER_COMPRESSION:.2f}.",
        values=_parameters,
        ours="k = {k}: parameters divided by {parameter_compression:.2f}, layers by {layer_compression:.2f}; "
        "embedding and head are not cut.",
        holds=lambda v: v["parameter_compression"] >= reported.PARAMETER_COMPRESSION,
        rule="at least the reported factor",
        expected=True,
        source="t3_size (03_compaction)",
    ),
    Claim(
        name="cosine-means-something",
        reported=f"The compact models reach cosine {reported.COSINE_RANGE[0]}-{reported.COSINE_RANGE[1]} to the full "
        "model, read as partly kept semantics.",
        values=_cosines,
        ours="k = {k}: {own:.2f} for the recommended kind ({low:.2f}-{high:.2f} over gradient scores), but a constant "
        "vector reaches {trivial:.2f}; centred cosine {own_centred:.2f}, perplexity {own_ppl:,.0f} times the full "
        "model's (constant: {trivial_ppl:,.0f} times).",
        holds=lambda v: v["own"] > v["trivial"],
        rule="above the constant's cosine",
        expected=False,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="cosine-target",
        reported=f"A cosine above {reported.COSINE_TARGET} is the target.",
        values=_cosines,
        ours="k = {k}, no training: the best of all selections reaches {best:.2f} (centred {best_centred:.2f}, "
        "perplexity {best_ppl:,.0f} times the full model's).",
        holds=lambda v: v["best"] > reported.COSINE_TARGET,
        rule="any selection above the target",
        expected=False,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="gradient-scores-select",
        reported="Layers with high Fisher information and gradient norm are the ones to keep.",
        values=_control,
        ours="Of {tests} selections by gradient scores, {better} have a lower perplexity than random selections at "
        "p <= 0.05; the median p is {median_p:.2f}, and {worse_half} do worse than most random draws.",
        holds=lambda v: v["better"] > v["tests"] / 2,
        rule="more than half better than random at p <= 0.05",
        expected=False,
        source="t4_fidelity, t4_random (04_fidelity)",
    ),
    Claim(
        name="distributed-beats-top-k",
        reported="Spreading the kept layers over the depth is better than Top-K.",
        values=_distributed,
        ours="Of {of} pairs (score and k), distributed has the lower perplexity in {wins}.",
        holds=lambda v: v["wins"] > v["of"] / 2,
        rule="lower perplexity in more than half of the pairs",
        expected=True,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="fisher-says-what-layers-are-worth",
        reported="Fisher information and gradient norm say which layers matter; SHAP was skipped.",
        values=_worth,
        ours="Kendall's tau of Fisher with the loss without each layer is {loo:.2f} [{loo_lo:.2f}, {loo_hi:.2f}], with "
        "Shapley values {shapley:.2f} [{shapley_lo:.2f}, {shapley_hi:.2f}]; nearest to leave-one-out is {best} "
        "({best_tau:.2f}, with Shapley {best_shapley:.2f}).",
        holds=lambda v: min(v["loo_lo"], v["shapley_lo"]) > 0.5,
        rule="both intervals above 0.5",
        expected=None,
        source="t1_agreement (01_importance)",
    ),
    Claim(
        name="first-and-last-are-worth-most",
        reported="The most important layers are the first nine and the last one, by scores without SHAP.",
        values=_causal_pattern,
        ours="Asked of the model itself: in that pattern are {leave_one_out} of the {of} layers whose removal costs "
        "most and {shapley} of the {of} of highest Shapley value (standard error at most {relative_error:.1%} of the "
        "largest, {coalitions:,} coalitions).",
        holds=lambda v: min(v["leave_one_out"], v["shapley"]) >= 0.8 * v["of"],
        rule="80% of the pattern by both",
        expected=None,
        source="t1_importance, t1_causal (01_importance)",
    ),
    Claim(
        name="recommended-is-best",
        reported="The distributed selection is the one to recommend.",
        values=_recommended_or_chosen,
        ours="k = {k}, test text: {own:,.0f} times the full model's perplexity, cosine {own_cosine:.2f}; layers "
        "{chosen_kept}, chosen on validation text ({name}), {chosen:,.0f} times, cosine {chosen_cosine:.2f}.",
        holds=lambda v: v["own"] <= v["chosen"],
        rule="perplexity no higher than that of what validation text chooses",
        expected=False,
        source="t4_fidelity (04_fidelity), t2_strategies (02_selection)",
    ),
    Claim(
        name="cosine-after-recovery",
        reported=f"A cosine above {reported.COSINE_TARGET} by fine-tuning the kept layers is left open.",
        values=_repaired,
        ours="k = {k}, closed form and distillation on {tokens:,} tokens: cosine {cosine:.2f} (centred {centred:.2f}, "
        "constant {trivial:.2f}), the same first token in {agreement:.0%}, perplexity {ppl:.1f} times the full model's "
        "({cut:,.0f} before), {mean:.1f} times over all kinds of text; k = {large_k}: cosine {large_cosine:.2f}, "
        "{large_ppl:.2f} times.",
        holds=lambda v: v["cosine"] >= reported.COSINE_TARGET,
        rule="the smallest model reaches the target on test text",
        expected=None,
        source="t5_recovery (05_recovery)",
    ),
    Claim(
        name="against-pruning-and-quantization",
        reported="A comparison with pruning and quantization is left open.",
        values=_compared,
        ours="At the size of k = {k}, after the same small recovery: layers cut {cut:.1f} times the full model's "
        "perplexity at {cut_x:.2f} times its speed, narrower layers {width:.1f} at {width_x:.2f}, low rank {thin:.1f} "
        "at {thin_x:.2f} (lowest of all: {best}, {best_ppl:.1f}). Untrained int8 weights: {int8:.3f} at {int8_x:.2f} "
        "and {int8_share:.0%} of the float32 bytes; the model of section 5 in int8: {both:.2f} ({alone:.2f} before) "
        "at {both_x:.2f} and {both_share:.0%}.",
        holds=lambda v: v["cut"] <= min(v["width"], v["thin"], v["best_ppl"]) and v["cut_x"] >= 3,
        rule="at three times the speed and of all at this size the lowest perplexity",
        expected=None,
        source="t7_baselines (07_baselines)",
    ),
    Claim(
        name="recommendation",
        reported="Validation on real recommendation data (MovieLens, Amazon) is left open.",
        values=_still_recommends,
        ours="Trained on a sample of users, ranked over the whole catalogue, the smallest model keeps: {text}.",
        holds=lambda v: v["lowest"] >= 0.95,
        rule="at least 95% of the full model's NDCG@10 on every data set",
        expected=None,
        source="t6_movielens, t6_amazon (06_recommendation)",
    ),
)
