"""The rows of the paper's tables, built from what the measuring modules return."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau
from transformers import PreTrainedModel

from paper_src import InputError, fidelity, reported, selection, timing
from paper_src.compaction import compact
from paper_src.models import count_parameters
from paper_src.report import kept_text, kept_tuple
from paper_src.scoring import LayerScores, combined_score

COMBINED_FROM = ("fisher", "grad_norm", "activation_variance")
SCORES = (
    "fisher", "fisher_true", "fisher_per_parameter", "grad_norm", "taylor", "block_influence",
    "activation_variance", "activation_variance_no_sink", "activation_mean_abs", "activation_mean_abs_no_sink",
    "activation_kurtosis", "activation_kurtosis_no_sink", "combined",
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


def agreement(scores: LayerScores, importance: pd.DataFrame) -> pd.DataFrame:
    """t1_agreement: Kendall's tau of every pair of scores; of a score with itself, between halves of the text.

    ``combined`` with itself is the tau between the combined scores of the two halves.
    """
    halves = {name: scores.half_split_tau(name) for name in SCORES[:-1]}
    parts = [
        combined_score({name: scores.per_sequence[name][start::2].mean(dim=0) for name in COMBINED_FROM})
        for start in (0, 1)
    ]
    halves["combined"] = float(kendalltau(*parts).statistic)
    rows = [
        {"score_a": a, "score_b": b,
         "kendall_tau": halves[a] if a == b else float(kendalltau(importance[a], importance[b]).statistic)}
        for a in SCORES for b in SCORES
    ]  # fmt: skip
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
    batch_size: int,
    progress: Callable = iter,
) -> dict[str, dict[str, np.ndarray]]:
    """Fidelity of every different selection of t2_selection, and of the full model: kept -> metric -> (N,)."""
    everything = kept_text(range(model.config.get_text_config().num_hidden_layers))
    names = dict.fromkeys([everything, *table["kept"]])
    return {
        kept: fidelity.compare(compact(model, kept_tuple(kept)), full, batch_size) for kept in progress(list(names))
    }


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

    Intervals are 95% bootstraps: over test blocks, and for ``random`` over draws. ``p_cosine`` and
    ``p_ppl`` are the chance that a random draw of the same k does at least as well.
    """
    blocks, tokens = full.blocks.shape[0], full.blocks.numel()
    base = {"n_blocks": blocks, "n_tokens": tokens}
    depth = model.config.get_text_config().num_hidden_layers
    constant = fidelity.compare_constant(model, full)
    rows = [
        {"strategy": "full", "k": depth, "kept": kept_text(range(depth)), **base,
         **fidelity.summarize(measured[kept_text(range(depth))], seed)},
        {"strategy": "trivial", "k": 0, "kept": "", **base, **fidelity.summarize(constant, seed)},
    ]  # fmt: skip
    control = draws(measured, table)
    for row in table[table["strategy"] != "random"].itertuples():
        values = fidelity.summarize(measured[row.kept], seed)
        same = control[control["k"] == row.k]
        rows.append({
            "strategy": row.strategy, "score": row.score, "k": row.k, "kept": row.kept, **base, **values,
            "p_cosine": fidelity.control_p_value(values["cosine"], same["cosine"], higher_is_better=True),
            "p_ppl": fidelity.control_p_value(values["ppl"], same["ppl"], higher_is_better=False),
        })  # fmt: skip
    for k, same in control.groupby("k"):
        values = fidelity.summarize({name: same[name].to_numpy() for name in fidelity.METRICS}, seed)
        rows.append({"strategy": "random", "k": k, "kept": "", "n_draws": len(same), **base, **values})
    frame = pd.DataFrame(rows)
    for suffix in ("", "_lo", "_hi"):
        frame[f"ppl_ratio{suffix}"] = np.exp(frame[f"nll_nats{suffix}"] - _full_nll(measured))
    return frame.assign(n_draws=frame["n_draws"].astype("Int64"))


def _full_nll(measured: dict) -> float:
    """NLL of the full model, the selection of all layers, which :func:`measure` puts first."""
    return float(next(iter(measured.values()))["nll_nats"].mean())
