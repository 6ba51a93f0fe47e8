"""The rows of the paper's tables, built from what the measuring modules return."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, fidelity, reported, selection, timing
from paper_src.coalitions import Cost, Evaluator, ShapleyValues
from paper_src.layers import SubsetRunner
from paper_src.models import count_parameters
from paper_src.report import kept_text, kept_tuple
from paper_src.scoring import LayerScores, combined_score

COMBINED_FROM = ("fisher", "grad_norm", "activation_variance")
CAUSAL = ("leave_one_out", "shapley")
SCORES = (
    "fisher", "fisher_true", "fisher_per_parameter", "grad_norm", "taylor", "weight_taylor", "block_influence",
    "activation_variance", "activation_variance_no_sink", "activation_mean_abs", "activation_mean_abs_no_sink",
    "activation_kurtosis", "activation_kurtosis_no_sink", *CAUSAL, "combined",
)  # fmt: skip


def importance(scores: LayerScores) -> pd.DataFrame:
    """t1_importance: a row a layer; every score, its standard error ``<score>_se``, and ``combined``."""
    columns = {"layer": range(len(scores.parameters)), "parameters": scores.parameters.tolist()}
    for name in SCORES[:-1]:
        columns[name] = scores.mean(name).tolist()
        columns[f"{name}_se"] = scores.standard_error(name).tolist()
    columns["combined"] = combined_score({name: scores.mean(name) for name in COMBINED_FROM}).tolist()
    return pd.DataFrame(columns)


def angular(scores: LayerScores) -> pd.DataFrame:
    """t1_angular: column ``before_<m>`` of row l is the distance between the states before layers l and m."""
    return pd.DataFrame(scores.angular.numpy()).add_prefix("before_")


def top10(importance: pd.DataFrame) -> pd.DataFrame:
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


def agreement(scores: LayerScores, importance: pd.DataFrame, draws: int = 200, seed: int = 0) -> pd.DataFrame:
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


def costs(spent: dict[str, Cost]) -> pd.DataFrame:
    """t1_cost: what each kind of score cost; ``one pass`` gives all that are not named."""
    return pd.DataFrame([{"scores": name, **vars(cost)} for name, cost in spent.items()])


def causal(leave_one_out: np.ndarray, values: ShapleyValues) -> pd.DataFrame:
    """t1_causal: leave-one-out and Shapley values of each layer, the latter with and without the cap of the loss."""
    columns = {"layer": range(leave_one_out.shape[1]), "leave_one_out": leave_one_out.mean(axis=0)}
    for index, name in enumerate(("shapley", "shapley_uncapped")):
        columns[name] = values.mean[:, index]
        columns[f"{name}_se"] = values.standard_error[:, index]
    return pd.DataFrame(columns)


def saturation(values: ShapleyValues) -> pd.DataFrame:
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


def strategies(
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
        p_value = fidelity.control_p_value(row["nll_nats"], control, higher_is_better=False)
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


def size(
    full: PreTrainedModel,
    models: dict[int, PreTrainedModel],
    folders: dict[int, Path],
    workload: timing.Workload,
    progress: Callable = iter,
) -> pd.DataFrame:
    """t3_size: parameters, bytes on disk and peak memory of the full (first row) and the compact models."""
    depth = max(folders)
    dtype = str(full.dtype).removeprefix("torch.")
    rows = []
    for k in progress(list(folders)):
        parameters = count_parameters(models.get(k, full))
        rows.append({
            "k": k,
            "layer_compression": depth / k,
            "parameters": parameters,
            "parameter_compression": count_parameters(full) / parameters,
            "disk_bytes": timing.checkpoint_bytes(folders[k]),
            "peak_memory_bytes": timing.peak_memory(folders[k], workload, dtype, str(full.device)),
            "dtype": dtype,
        })  # fmt: skip
    return pd.DataFrame(rows)


def speed(
    full: PreTrainedModel,
    models: dict[int, PreTrainedModel],
    workloads: Sequence[timing.Workload],
    rounds: int,
    seed: int,
    progress: Callable = iter,
) -> pd.DataFrame:
    """t3_speed: a row a workload and k, see :func:`paper_src.timing.compare_speed`."""
    rows = [timing.compare_speed(full, models, workload, rounds, seed) for workload in progress(list(workloads))]
    return pd.DataFrame([row for part in rows for row in part])


def prefill_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of t3_speed of the largest hidden-state prefill, by k."""
    rows = speed[speed["task"] == "prefill_hidden"]
    tokens = rows["batch"] * rows["length"]
    return rows[tokens == tokens.max()].set_index("k")


def prefill_speed(speed: pd.DataFrame) -> pd.Series:
    """k -> measured speedup of the largest hidden-state prefill, the x axis of the trade-off."""
    return prefill_rows(speed)["speedup"]


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


def draws(measured: dict, table: pd.DataFrame) -> pd.DataFrame:
    """t4_random: a row a random draw, its means over blocks, ``ppl`` and ``ppl_ratio`` to the full model."""
    rows = []
    for row in table[table["strategy"] == "random"].itertuples():
        means = {name: float(values.mean()) for name, values in measured[row.kept].items()}
        rows.append({"k": row.k, "draw": row.draw, "kept": row.kept, **means})
    frame = pd.DataFrame(rows)
    return frame.assign(ppl=np.exp(frame["nll_nats"]), ppl_ratio=np.exp(frame["nll_nats"] - _full_nll(measured)))


def fidelities(
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
    control = draws(measured, table)
    for row in table[table["strategy"] != "random"].itertuples():
        values = summary(measured[row.kept])
        same = control[control["k"] == row.k]
        rows.append({
            "strategy": row.strategy, "score": row.score, "k": row.k, "kept": row.kept, **values,
            "p_cosine": fidelity.control_p_value(values["cosine"], same["cosine"], higher_is_better=True),
            "p_ppl": fidelity.control_p_value(values["ppl"], same["ppl"], higher_is_better=False),
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


def on_long_text(measured: dict, strategies: pd.DataFrame, blocks: Tensor, seed: int) -> pd.DataFrame:
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
