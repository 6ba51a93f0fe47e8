"""Section 9: what the paper finds on several models, each a folder of tables of a run; and what differs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import hypergeom

from paper_src import InputError
from paper_src.reporting.claims import judge, read_claims
from paper_src.reporting.findings import LARGER, NAN, Finding, load
from paper_src.reporting.style import BLUE, GREEN, ORANGE, PURPLE, RED, STYLE
from paper_src.scoring import SCORES
from paper_src.sections.worth import CAUSAL

COLUMNS = {  # column of t9_models -> finding, and what of it
    "nearest_score": ("tau_leave_one_out_nearest", "text"),
    "tau_nearest": ("tau_leave_one_out_nearest", "value"),
    "top_k_selections": ("top_k_better_than_random", "n"),
    "top_k_better_than_random": ("top_k_better_than_random", "value"),
    "distributed_selections": ("distributed_better_than_random", "n"),
    "distributed_better_than_random": ("distributed_better_than_random", "value"),
    "k": ("k_smallest", "value"),
    "ppl_ratio_distributed": ("ppl_ratio_recommended", "value"),
    "ppl_ratio_chosen": ("ppl_ratio_chosen", "value"),
    "cosine_constant": ("cosine_constant", "value"),
}
COUNTS = ("top_k", "distributed", "k")  # columns that begin so hold whole numbers
STAGES = {"none": "cut", "closed_form": "closed form", "distilled": "distilled"}
METRICS = ("ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi", "ppl_ratio_mean", "cosine", "cosine_lo", "cosine_hi")
SINK = 10.0  # times the variance of the other tokens: an attention sink
COLOURS, MARKERS = (BLUE, ORANGE, GREEN, PURPLE, RED), "osD^v"


class Run:
    """The tables of one model's run.

    Raises:
        InputError: the folder does not hold sections 1 to 5.
    """

    def __init__(self, tables: str | Path):
        self.tables = Path(tables)
        for section in range(1, 6):
            self._file(f"t{section}_findings.csv")
        made = json.loads(self._file("01_importance.json").read_text(encoding="utf-8"))["model"]
        self.name, self.sha256 = Path(made["name"]).name, made["sha256"][:12]
        self.found: Mapping[str, Finding] = load(self.read)
        self.depth = int(self.found["layers"].value)

    def read(self, table: str) -> pd.DataFrame:
        """One of its tables."""
        return pd.read_csv(self._file(f"{table}.csv"))

    def _file(self, name: str) -> Path:
        path = self.tables / name
        if not path.is_file():
            raise InputError(f"{path} is missing: run ./reproduce.sh --model NAME first")
        return path


def runs_of(own: str | Path, others: Sequence[str | Path]) -> list[Run]:
    """The run in the folder of tables ``own``, then those of ``others`` that are of other weights."""
    runs = [Run(own)]
    for run in map(Run, others):
        if run.sha256 not in {known.sha256 for known in runs}:
            runs.append(run)
    return runs


def t9_models(runs: Sequence[Run]) -> pd.DataFrame:
    """A row a model. ``sink_from``, ``sink_to``: layers whose activations vary ten times as much with attention sinks
    as without; ``combined_rank_of_sink``: the place of the first of them by the combined score, 1 for the best.
    """
    rows = []
    for run in runs:
        importance = run.read("t1_importance")
        with np.errstate(all="ignore"):
            share = importance["activation_variance"] / importance["activation_variance_no_sink"]
        sinks = [int(layer) for layer in importance.loc[share >= SINK, "layer"]]
        ranks = importance["combined"].rank(ascending=False, method="min")
        row = {"model": run.name, "sha256": run.sha256, "layers": run.depth,
               "parameters": int(run.found["parameters_full"].value),
               "sink_from": min(sinks, default=NAN), "sink_to": max(sinks, default=NAN),
               "combined_rank_of_sink": ranks[min(sinks)] if sinks else NAN}  # fmt: skip
        for column, (finding, part) in COLUMNS.items():
            value = getattr(run.found[finding], part)
            row[column] = int(value) if column.startswith(COUNTS) else value
        rows.append(row)
    return pd.DataFrame(rows)


def t9_model_scores(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each model and score: Kendall's tau with what layers are worth, and the earlier report's pattern.

    ``in_pattern``: how many of the ``pattern_layers`` best layers are in that pattern, the first 9 and the last of
    32, carried over by relative depth; ``by_chance`` are expected of a random order, which has at least as many with
    probability ``p`` (hypergeometric).
    """
    rows = []
    for run in runs:
        size, chance = int(run.found["pattern_fisher"].n), run.found["pattern_by_chance"].value
        for score in SCORES:
            row = {"model": run.name, "score": score}
            for worth in CAUSAL:
                found = run.found.get(f"tau_{worth}_{score}")
                parts = {"": "value", "_lo": "lo", "_hi": "hi"}
                row |= {f"tau_{worth}{end}": getattr(found, part) if found else NAN for end, part in parts.items()}
            inside = int(run.found[f"pattern_{score}"].value)
            p = hypergeom.sf(inside - 1, run.depth, size, size)
            rows.append(row | {"in_pattern": inside, "pattern_layers": size, "by_chance": chance, "p": p})
    return pd.DataFrame(rows)


def t9_model_depths(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each model, k and stage of recovery: quality on test text, and speed beside the FLOP ratio.

    ``strategy`` chose the layers, which were best of all before a repair if ``best_unrepaired``. ``speedup`` is of a
    prefill without the head, ``speedup_head`` with it, each beside its ratio of operations. ``best_step`` of the
    distillation is 0 where none was better on validation text than its start.
    """
    rows = []
    for run in runs:
        chosen = run.read("t5_selection").query("chosen").set_index("k")
        tests = run.read("t5_recovery").query("selection == 'selected'")
        looks = run.read("t5_curve").sort_values("kl_nats", kind="stable").groupby("k")["step"].first()
        speed = run.read("t3_speed").query("batch == 1").sort_values("length")
        speed = speed.drop_duplicates(["task", "k"], keep="last")
        tasks = {"": "prefill_hidden", "_head": "prefill_logits"}
        for test in tests.to_dict("records"):
            k = test["k"]
            strategy = ", ".join(str(chosen.loc[k, name]) for name in ("strategy", "score") if chosen[name].notna()[k])
            row = {"model": run.name, "k": k, "layers": run.depth, "share": k / run.depth, "strategy": strategy,
                   "best_unrepaired": chosen.loc[k, "rank_cut"] == 1, "stage": STAGES[test["recovery"]],
                   "tokens": test["tokens"], "n": test["n_windows"],
                   "best_step": looks[k] if test["recovery"] == "distilled" else NAN,
                   **{name: test[name] for name in METRICS}}  # fmt: skip
            for end, task in tasks.items():
                timed = speed[(speed["task"] == task) & (speed["k"] == k)]
                for column, name in (("speedup", "speedup"), ("flop_ratio", "ideal")):
                    row[f"{column}{end}"] = timed[name].iloc[-1] if len(timed) else NAN
            rows.append(row)
    return pd.DataFrame(rows)


def t9_model_claims(runs: Sequence[Run]) -> pd.DataFrame:
    """A row a claim: its verdict on each model by that run's own tables, and whether it ``differs`` between them.

    What was not run on a model is ``not testable`` there, and makes no difference. Claims of a run with a larger
    budget alone are left out.
    """
    rows = []
    for claim in (claim for claim in read_claims() if claim.folder not in LARGER):
        verdicts = {run.name: judge(claim, run.found)[0] for run in runs}
        decided = set(verdicts.values()) - {"not testable"}
        rows.append({"name": claim.name, **verdicts, "differs": len(decided) > 1})
    return pd.DataFrame(rows)


def f9_models(depths: pd.DataFrame) -> Figure:
    """Perplexity over the full model's against the share of the layers that is kept: as cut, after the closed form,
    and distilled, on test text of the first kind. n: `n` windows of t9_model_depths; bars: 95% BCa bootstrap over
    windows; hollow: geometric mean over all kinds of text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(STAGES), figsize=(7.6, 3.2), sharey=True)
        for axis, stage in zip(axes, STAGES.values(), strict=True):
            for (name, rows), colour, marker in zip(
                depths.groupby("model", sort=False), COLOURS, MARKERS, strict=False
            ):
                _line(axis, rows[rows["stage"] == stage].sort_values("share"), name, colour, marker)
            axis.axhline(1, color="black", lw=0.8, ls="--")
            axis.set(title=stage, xlabel="share of the layers kept", yscale="log", xticks=(0.25, 0.5, 0.75))
            axis.xaxis.set_major_formatter("{x:.0%}")
            axis.yaxis.set_major_formatter("{x:g}")
        axes[0].set_ylabel("perplexity / full model's")
        axes[0].errorbar([], [], [], fmt="o", ms=5, mec="black", mfc="white", elinewidth=0, label="all kinds of text")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.close(figure)
    return figure


def _line(axis: Axes, rows: pd.DataFrame, name: str, colour: str, marker: str) -> None:
    bars = [rows["ppl_ratio"] - rows["ppl_ratio_lo"], rows["ppl_ratio_hi"] - rows["ppl_ratio"]]
    axis.errorbar(rows["share"], rows["ppl_ratio"], bars, color=colour, marker=marker, lw=1, label=name)
    axis.plot(rows["share"], rows["ppl_ratio_mean"], marker, color=colour, mfc="white", ms=5)
