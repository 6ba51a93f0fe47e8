"""What to pick for a given budget: the frontier of a comparison, and the best method that meets a limit."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from paper_src import NotSupported, distillation, timing
from paper_src.baselines import sparsity
from paper_src.baselines.methods import Bench, Entry, Model
from paper_src.baselines.size import _zeros, bytes_of, count_of, require_alive
from paper_src.baselines.zero_shot import zero_shot as answered
from paper_src.checkpoints import run_folder
from paper_src.files import replacing
from paper_src.models import count_parameters, decoder_layers
from paper_src.reporting.style import BLUE, GREEN, GREY, PURPLE, RED, SKY, STYLE
from paper_src.sections.recovery import refit
from paper_src.sources import sha256

LATER = "section 5"  # in the name of a method: repaired before, with a larger budget


def frontier(frame: pd.DataFrame, cost: str, larger_is_better: bool) -> pd.Series:
    """Whether no other row has a lower perplexity at no worse a cost, for the rows of ``frame``."""
    sign = -1 if larger_is_better else 1
    costs, losses = sign * frame[cost].to_numpy(), frame["ppl_ratio"].to_numpy()
    better = (costs[None] <= costs[:, None]) & (losses[None] < losses[:, None])
    return pd.Series(~better.any(1) & np.isfinite(losses), frame.index)


def t7_budgets(frame: pd.DataFrame, speedups: Sequence[float], shares: Sequence[float]) -> pd.DataFrame:
    """t7_budgets: for each budget the method of lowest perplexity that meets it, of all and before any training.

    Args:
        frame: t7_baselines.
        speedups: of the prefill, each met from there up.
        shares: of the full model's float32 bytes, each met up to there.
    """
    rows = []
    limits = {"prefill_hidden_speedup": speedups, "memory_share": shares}
    for cost, limit in [(cost, limit) for cost, values in limits.items() for limit in values]:
        meets = frame[cost] >= limit if cost.endswith("speedup") else frame[cost] <= limit
        untrained = ~frame["recovered"] & ~frame["method"].str.contains(LATER)
        for name, part in (("as it is", frame[meets & untrained]), ("recovered or not", frame[meets])):
            if part["ppl_ratio"].notna().any():
                best = part.loc[part["ppl_ratio"].idxmin()]
                row = best[["method", "k", "recovered", "ppl_ratio", cost]].to_dict()
                rows.append({"budget": cost, "limit": limit, "of": name, **row})
    wanted = ["budget", "limit", "of", "method", "k", "recovered", "ppl_ratio", *limits]
    return pd.DataFrame(rows).reindex(columns=wanted)


def t7_baselines(
    bench: Bench, methods: Sequence[Entry], recover_k: Sequence[int], progress: Callable = iter
) -> pd.DataFrame:
    """t7_baselines: the full model, each method as it is, then each that can be trained, after the same recovery.

    ``status`` is empty, or says why a row has no numbers. Ratios are to the full model in its own dtype,
    ``*_share`` of the full model in float32. A killed run goes on from the rows in the bench's folder.

    Args:
        bench: shared.
        methods: of :func:`entries`.
        recover_k: sizes that are recovered; 0 are methods without a size.
        progress: wraps the iterable of jobs.
    """
    later = [entry for entry in methods if entry.training != "none" and entry.k in recover_k]
    jobs = [(entry, False) for entry in methods] + [(entry, True) for entry in later]
    context = {**asdict(bench.settings), "rounds": bench.rounds, "zero_shot_k": list(bench.zero_shot_k),
               "items": [[part.task, part.rows] for part in bench.items],
               "workloads": [str(work) for work in bench.workloads],
               "methods": [[entry.method, entry.k, list(entry.kept), _digest(entry.source)]
                           for entry in methods]}  # fmt: skip
    texts = [bench.blocks, bench.judge.first.blocks, bench.validation.blocks]
    kept_rows = run_folder(bench.folder, [*texts, *bench.full.parameters()], context) / "rows.jsonl"
    rows = [json.loads(line) for line in kept_rows.read_text().splitlines()] if kept_rows.is_file() else []
    if not rows:
        rows = [{"method": "full model", "family": "full", "k": len(decoder_layers(bench.full)), "recovered": False,
                 **measured(bench, bench.full, True)}]  # fmt: skip
    done = {(row["method"], row["k"], row["recovered"]) for row in rows}
    made: dict[tuple[str, int], tuple[Model, float]] = {}
    for entry, trained in progress([job for job in jobs if (job[0].method, job[0].k, job[1]) not in done]):
        row = {"method": entry.method, "family": entry.family, "k": entry.k, "recovered": trained}
        try:
            model, row["calibration_s"] = made.pop((entry.method, entry.k), None) or _make(bench, entry)
            if entry in later and not trained:
                made[entry.method, entry.k] = model, row["calibration_s"]
            if trained:
                model, row["recovery_s"] = recovered(bench, entry, model)
            row |= measured(bench, model, entry.k in bench.zero_shot_k)
        except NotSupported as error:
            row["status"] = f"not supported: {error}"
        rows.append(row)
        with replacing(kept_rows) as part:
            part.write_text("".join(json.dumps(each) + "\n" for each in rows))
    frame = pd.DataFrame(rows)
    single = 4 * count_parameters(bench.full)
    frame["status"] = frame["status"].fillna("") if "status" in frame else ""
    return frame.assign(memory_share=frame["memory_bytes"] / single, disk_share=frame["disk_bytes"] / single)


def _digest(checkpoint: Path | None) -> str:
    """SHA-256 of each file of a checkpoint's weights; nothing where there are none."""
    return " ".join(sha256(part) for part in sorted(checkpoint.glob("*.safetensors"))) if checkpoint else ""


def _make(bench: Bench, entry: Entry) -> tuple[Model, float]:
    """The model of ``entry``, and the seconds that it took with what it shares."""
    shared, start = bench.prepare(entry.uses), time.perf_counter()
    model = entry.make()
    return model, shared + time.perf_counter() - start


def recovered(bench: Bench, entry: Entry, model: Model) -> tuple[Model, float]:
    """``model`` after the recovery that every method gets, and its seconds."""
    start = time.perf_counter()
    if entry.training == "refit":
        model = refit(bench.full, entry.kept, bench.blocks).model
    if entry.training == "masked":
        model = sparsity.masked(model)
    name = f"{entry.method}_{entry.k}".replace(" ", "_").replace(":", "")
    folder = bench.folder / name
    found = distillation.distil(bench.full, model, bench.blocks, bench.validation, folder, bench.settings).model
    if entry.training == "masked":
        found = sparsity.unmasked(found)
    return found, time.perf_counter() - start


def measured(bench: Bench, model: Model, zero_shot: bool) -> dict[str, float]:
    """Fidelity, perplexity, accuracy, bytes and speed of one model.

    Raises:
        InputError: a layer is lost or does nothing.
    """
    require_alive(model, bench.blocks[:1, :8])
    row = {"parameters": count_of(model), "zeros": _zeros(model), **bytes_of(model), **bench.judge.row(model)}
    row |= speeds(bench, model)
    return row | (answered(model, bench.tokenizer, bench.items) if zero_shot and bench.items else {})


def speeds(bench: Bench, model: Model) -> dict[str, float]:
    """``<task>_speedup`` with its interval for each workload, interleaved with the full model."""
    row = {}
    for work in bench.workloads:
        if model is bench.full:
            row |= {f"{work.task}_speedup{side}": 1.0 for side in ("", "_lo", "_hi")}
            continue
        seconds = timing.pair_seconds(bench.full, model, work, bench.rounds)
        ratio = timing.ratio_interval(np.divide(*seconds), bench.judge.seed)
        row |= {f"{work.task}_{name}": value for name, value in ratio.items()}
    return row


FAMILIES = {
    "full": ("black", "*"),
    "quantization": (PURPLE, "o"),
    "sparsity": (GREY, "s"),
    "width": (GREEN, "^"),
    "low rank": (SKY, "v"),
    "depth": (BLUE, "D"),
    "combination": (RED, "P"),
}

WORST = 1000  # perplexity ratios above it are all failures; they stand at the edge


def f7_pareto(table: pd.DataFrame) -> Figure:
    """Perplexity over the full model's against measured speed and against bytes, with the frontier.

    Args:
        table: t7_baselines.
    """
    rows = table[table["ppl_ratio"].notna()]
    panels = {
        "prefill_hidden_speedup": "prefill speedup over the full model",
        "decode_speedup": "decode speedup over the full model",
        "memory_share": "bytes of weights / full model in float32",
    }
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 5.6), sharey=True)
        for axis, (cost, label) in zip(axes, panels.items(), strict=True):
            _methods(axis, rows, cost)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(0.5, WORST * 1.3)
            best = rows[frontier(rows, cost, cost.endswith("speedup")) & (rows["ppl_ratio"] <= WORST)].sort_values(cost)
            axis.plot(best[cost], best["ppl_ratio"], color="black", lw=0.8, zorder=2, label="frontier")
            names = [row.method + (f", k = {row.k}" if row.k and row.family != "full" else "")
                     for row in best.itertuples()]  # fmt: skip
            _numbered(axis, best[[cost, "ppl_ratio"]].to_numpy())
            listed = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
            axis.text(0, -0.2, listed, transform=axis.transAxes, va="top", size=7.5)
            axis.set_xlabel(label)
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0].set_ylabel("perplexity / full model's")
        worse = (rows["ppl_ratio"] > WORST).sum()
        axes[1].set_title("hollow: as it is; filled: after training")
        axes[2].set_title(f"at the top edge: {worse} rows above {WORST:,} times" if worse else "")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    plt.close(figure)
    return figure


def _methods(axis: Axes, rows: pd.DataFrame, cost: str) -> None:
    """Every method as a point, hollow unless it was trained."""
    trained = rows["recovered"] | rows["method"].str.contains(LATER) | (rows["family"] == "full")
    for family, (colour, marker) in FAMILIES.items():
        axis.scatter([], [], marker=marker, color=colour, label=family)
        for done in (False, True):
            part = rows[(rows["family"] == family) & (trained == done)]
            axis.scatter(part[cost], part["ppl_ratio"].clip(upper=WORST), s=30, marker=marker, edgecolors=colour,
                         facecolors=colour if done else "none", zorder=3)  # fmt: skip


def _numbered(axis: Axes, points: np.ndarray) -> None:
    """Numbers beside the points [n, 2], from 1; neighbours too close for two numbers share one label."""
    places = axis.transData.transform(points) * 72 / axis.figure.dpi
    groups = [[0]]
    for index in range(1, len(points)):
        if np.abs(places[index] - places[groups[-1][0]]).max() < 9:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        text = str(group[0] + 1) + (f"-{group[-1] + 1}" if len(group) > 1 else "")
        axis.annotate(text, points[group[0]], size=8, textcoords="offset points", xytext=(5, -10))
