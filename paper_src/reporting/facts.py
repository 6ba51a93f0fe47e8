"""Numbers of the summary and of its claims, each taken from the cells of tables."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pandas as pd

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.sections.compaction import prefill_rows
from paper_src.sections.importance import CAUSAL
from paper_src.selection import kept_tuple

Read = Callable[[str], pd.DataFrame]
Values = dict[str, object]
Of, Made = TypeVar("Of"), TypeVar("Made")
GRADIENT_SCORES = ("fisher", "fisher_true", "fisher_per_parameter", "grad_norm", "taylor", "weight_taylor")


def all_facts(read: Read) -> Values:
    """Numbers of the summary's prose and tables."""
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
        "converged": halves(read),
        "rounds": int(speed["rounds"].max()),
        "dtype": read("t3_size")["dtype"].iloc[0],
        "causal": worth_of_layers(read),
        "strategies": strategy_rows(read),
        "long": read("t4_strategies").iloc[0].to_dict(),
        "controls": read("t8_controls").to_dict("records"),
        "recovery": recovery_rows(read),
        "recommendation": recommender_rows(read),
        "baselines": baseline_rows(read),
        "larger": larger(read),
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


def worth_of_layers(read: Read) -> Values:
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


def worth(read: Read) -> Values:
    causal = worth_of_layers(read)
    fisher = next(row for row in causal["taus"] if row["score"] == "fisher")
    loo, shapley = fisher["leave_one_out"], fisher["shapley"]
    best = max(causal["taus"], key=lambda row: row["leave_one_out"]["kendall_tau"])
    return {
        "loo": loo["kendall_tau"], "loo_lo": loo["kendall_tau_lo"], "loo_hi": loo["kendall_tau_hi"],
        "shapley": shapley["kendall_tau"], "shapley_lo": shapley["kendall_tau_lo"],
        "shapley_hi": shapley["kendall_tau_hi"], "best": best["score"],
        "best_tau": best["leave_one_out"]["kendall_tau"], "best_shapley": best["shapley"]["kendall_tau"],
    }  # fmt: skip


def causal_pattern(read: Read) -> Values:
    causal = worth_of_layers(read)
    return {"of": causal["of"], **causal["overlap"], "relative_error": causal["relative_error"],
            "coalitions": causal["coalitions"]}  # fmt: skip


def recommended_or_chosen(read: Read) -> Values:
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


def recovery_rows(read: Read) -> Values:
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
        "mix": mix["mix"].iloc[0] if len(mix) else "all, for no mix repaired one kind of text and harmed none",
        "random_best": selections.loc[selections["strategy"] == "random", "ppl_ratio_refitted"].min(),
        "random_median": selections.loc[selections["strategy"] == "random", "ppl_ratio_refitted"].median(),
        "smallest_best": real.loc[real["k"] == real["k"].min(), "ppl_ratio_refitted"].min(),
    }


def repaired(read: Read) -> Values:
    table = read("t5_recovery")
    rows = table[(table["selection"] == "selected") & (table["recovery"] == "distilled")].set_index("k")
    smallest, largest = rows.index.min(), rows.index.max()
    cut = table[(table["selection"] == "selected") & (table["recovery"] == "none")].set_index("k")
    low, high = rows.loc[smallest], rows.loc[largest]
    stages = table[(table["selection"] == "selected") & (table["k"] == smallest)].set_index("recovery")["tokens"]
    refit = int(stages["closed_form"])
    return {
        "k": smallest, "cosine": low["cosine"], "cosine_hi": low["cosine_hi"], "centred": low["cosine_centred"],
        "ppl": low["ppl_ratio"], "cut": cut.loc[smallest, "ppl_ratio"], "mean": low["ppl_ratio_mean"],
        "refit": refit, "distil": int(low["tokens"]) - refit, "agreement": low["top1_agreement"],
        "large_k": largest, "large_cosine": high["cosine"], "large_ppl": high["ppl_ratio"],
        "trivial": table.loc[table["selection"] == "trivial", "cosine"].item(),
    }  # fmt: skip


def if_made(make: Callable[[Of], Made], of: Of) -> Made | None:
    """``make(of)``, a table of its name or a fact; None where its section was not run or its data are not at hand."""
    try:
        return make(of)
    except (InputError, FileNotFoundError):
        return None


def with_larger_budgets(fact: Callable[[Read], Values | None]) -> Callable[[Read], Values | None]:
    """``fact`` of the run with larger budgets; None where there is none on this model."""
    return lambda read: if_made(fact, of_larger(read))


def of_larger(read: Read) -> Read:
    """Reads a table of the run with larger budgets."""
    return lambda name: read(f"long/{name}")


def larger(read: Read) -> Values:
    """Rows of sections 5 to 7 from a run with larger budgets; each empty where there is none on this model."""
    read_larger = of_larger(read)
    return {
        "recovery": if_made(recovery_rows, read_larger),
        "recommendation": recommender_rows(read_larger),
        "baselines": baseline_rows(read_larger),
    }


def baseline_rows(read: Read) -> Values | None:
    """The comparison at the smallest size and of methods without one, and what to pick for a budget."""
    if (table := if_made(read, "t7_baselines")) is None:
        return None
    table = table.assign(status=table["status"].fillna(""), zeros=table["zeros"].fillna(0))
    k = int(table.loc[table["k"] > 0, "k"].min())
    rows = table[table["k"].isin([0, k]) | (table["family"] == "full")]
    return {
        "k": k,
        "rows": rows.to_dict("records"),
        "columns": [name.removesuffix("_lo") for name in table if name.endswith(("_acc_lo", "_acc_norm_lo"))],
        "asked": int(table[[name for name in table if name.endswith("_n")]].max().max()),
        "budgets": read("t7_budgets").to_dict("records"),
    }


def pruned(read: Read) -> Values | None:
    """Removing layers beside narrower and thinner ones after the same recovery, and beside zeros."""
    if (table := if_made(read, "t7_baselines")) is None:
        return None
    k = int(table.loc[table["recovered"], "k"].replace(0, np.nan).min())
    after = table[table["recovered"] & (table["k"] == k)].set_index("method")
    ranked = after.sort_values("ppl_ratio")
    thin = next((name for name in ranked.index if name.startswith("SVD")), "SVD")
    others = after.loc[after["family"] != "depth", "ppl_ratio_lo"]
    zeros = table[(table["method"] == "Wanda 50%") & ~table["recovered"]].iloc[0]
    best = ranked.index[0]
    rows = {}
    for name, method in {"cut": "layers cut", "width": "width", "thin": thin}.items():
        rows |= quality_and_speed(after.loc[method], name)
    return rows | {
        "k": k, "best": best, "best_ppl": after.loc[best, "ppl_ratio"], "least_other": others.min(),
        "seconds": after["recovery_s"].max(), "zeros": zeros["ppl_ratio"], "zeros_x": zeros["prefill_hidden_speedup"],
    }  # fmt: skip


def quantized(read: Read) -> Values | None:
    """int8 weights beside the smallest repaired model, and both together."""
    if (table := if_made(read, "t7_baselines")) is None:
        return None
    table = table[~table["recovered"]]
    k = int(table.loc[table["k"] > 0, "k"].min())
    methods = {"int8": "int8 weights, torchao", "cut": "layers cut, section 5", "both": "cut, section 5, + int8"}
    rows = {"k": k}
    for name, method in methods.items():
        row = table[(table["method"] == method) & table["k"].isin([0, k])].iloc[0]
        rows |= quality_and_speed(row, name) | {f"{name}_share": row["memory_share"]}
    return rows


def quality_and_speed(row: pd.Series, name: str) -> Values:
    """Perplexity ratio with its interval, and speedup, of a row of t7_baselines, as ``name`` with endings."""
    columns = {"": "ppl_ratio", "_lo": "ppl_ratio_lo", "_hi": "ppl_ratio_hi", "_x": "prefill_hidden_speedup"}
    return {name + end: row[column] for end, column in columns.items()}


def recommender_rows(read: Read) -> list[dict[str, object]]:
    """Rows of the recommenders of every data set that was at hand."""
    tables = [if_made(read, name) for name in ("t6_movielens", "t6_amazon")]
    rows = [row for table in tables if table is not None for row in table.to_dict("records")]
    return rows


def still_recommends(read: Read) -> Values | None:
    """The better of the cut and the repaired model, trained, beside the full one, no layers and SASRec."""
    rows = pd.DataFrame(recommender_rows(read))
    if rows.empty:
        return None
    found = []
    for name, table in rows.groupby("dataset", sort=False):
        by_name = table.set_index(["method", "model"])
        small = by_name.loc["trained"].loc[["compact", "recovered"]]
        best = small.loc[small["valid_ndcg10"].idxmax()]
        others = [("most_popular", "none"), ("sasrec", "same users"), ("sasrec", "all users"), ("no_layers", best.name),
                  ("no_layers", "compact, all users")]  # fmt: skip
        names = ("popular", "same", "everyone", "bare", "bare_everyone")
        found.append(
            {**best.to_dict(), "dataset": name, **dict(zip(names, by_name.loc[others, "ndcg10"], strict=True))}
        )
    lead = min(row["ndcg10"] - row["popular"] for row in found)
    return {"each": found, "lowest": min(row["share_lo"] for row in found), "lead": lead,
            "gain": min(row["over_no_layers_lo"] for row in found)}  # fmt: skip


def halves(read: Read) -> dict[str, float]:
    """score -> Kendall's tau between halves of the calibration text."""
    agreement = read("t1_agreement")
    same = agreement[agreement["score_a"] == agreement["score_b"]]
    return dict(zip(same["score_a"], same["kendall_tau"], strict=True))


def pattern(read: Read) -> Values:
    importance = read("t1_importance")
    tau = halves(read)["fisher"]
    expected = set(reported.at_depth(tuple(reported.TOP10), len(importance)))
    ranks = importance["combined"].rank(ascending=False).astype(int)
    best = set(importance.nlargest(len(expected), "combined")["layer"])
    fisher = set(importance.nlargest(len(expected), "fisher")["layer"])
    return {"fisher": len(fisher & expected), "tau": tau, "overlap": len(best & expected),
            "of": len(expected), "chance": len(expected) ** 2 / len(importance), "last_rank": ranks.iloc[-1],
            "first_rank": ranks.iloc[0], "depth": len(importance)}  # fmt: skip


def recommended(read: Read) -> Values:
    selection, depth = read("t2_selection"), len(read("t1_importance"))
    expected = set(reported.at_depth(reported.RECOMMENDED, depth))
    rows = selection[(selection["strategy"] == "distributed") & (selection["k"] == selection["k"].min())]
    rows = rows.set_index("score")["kept"].map(lambda kept: len(expected & set(kept_tuple(kept))))
    k = selection["k"].min()
    return {"fisher": rows["fisher"], "combined": rows["combined"], "of": min(len(expected), k),
            "chance": k * len(expected) / depth}  # fmt: skip


def largest_speedup(read: Read) -> Values:
    rows = prefill_rows(read("t3_speed"))
    return {"k": rows.index.min(), **rows.loc[rows.index.min()].to_dict()}


def speed_range(read: Read) -> Values | None:
    """Speed at the reported compressions, with and without the head; None where no k of this run has one."""
    speed, depth = read("t3_speed"), len(read("t1_importance"))
    low, high = reported.COMPRESSION_RANGE
    part = speed[(depth / speed["k"]).round(1).between(low, high)]
    if part.empty:
        return None
    hidden = part["task"] == "prefill_hidden"
    sizes = sorted(part["k"].unique())
    return {"hidden_low": part.loc[hidden, "speedup"].min(), "hidden_high": part.loc[hidden, "speedup"].max(),
            "head_low": part.loc[~hidden, "speedup"].min(), "head_high": part.loc[~hidden, "speedup"].max(),
            "k": ", ".join(map(str, sizes)), "compression": ", ".join(f"{depth / k:.2f}" for k in sizes)}  # fmt: skip


def smallest_size(read: Read) -> Values:
    size = read("t3_size")
    return size.loc[size["k"].idxmin()].to_dict()


def cosines(read: Read) -> Values:
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


def by_gradients(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of a score by gradients, the combined one included."""
    return rows["score"].isin([*GRADIENT_SCORES, "combined"])


def against_random(read: Read) -> Values:
    """Different selections by gradient scores against random ones, Top-K and distributed apart."""
    fidelity = read("t4_fidelity")
    rows = fidelity[by_gradients(fidelity)].drop_duplicates(["strategy", "kept"])
    found = {}
    for strategy, part in rows.groupby("strategy"):
        found |= {strategy: len(part), f"{strategy}_better": int((part["p_ppl"] <= 0.05).sum()),
                  f"{strategy}_worse": int((part["p_ppl"] > 0.5).sum())}  # fmt: skip
    return found


def distributed(read: Read) -> Values:
    """Different pairs of a distributed and a Top-K selection (same score and k): how often the first is better.

    By the earlier report's two kinds of scores: gradients, the combined one included, and activation statistics.
    """
    fidelity = read("t4_fidelity")
    spread, top = (fidelity[fidelity["strategy"] == name] for name in ("distributed", "top_k"))
    pairs = spread.merge(top, on=["score", "k"], suffixes=("", "_top"))
    pairs = pairs[pairs["kept"] != pairs["kept_top"]].assign(gradient=by_gradients)
    pairs = pairs[pairs["gradient"] | pairs["score"].str.startswith("activation")]
    pairs = pairs.drop_duplicates(["gradient", "kept", "kept_top"])
    won = (pairs["nll_nats"] < pairs["nll_nats_top"]).groupby(pairs["gradient"])
    wins, sizes = (counts.reindex([True, False], fill_value=0) for counts in (won.sum(), won.size()))
    return {"wins": wins[True], "of": sizes[True], "activation_wins": wins[False],
            "activation_of": sizes[False]}  # fmt: skip
