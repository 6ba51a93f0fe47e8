"""Section 7: what else one could do for the same bytes or the same speed."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import NotSupported, distillation, timing
from paper_src.baselines import sparsity, zero_shot
from paper_src.baselines.methods import METHODS
from paper_src.baselines.setting import Repaired, Setting
from paper_src.baselines.size import bytes_of, count_of, require_alive
from paper_src.models import count_parameters
from paper_src.reporting.findings import Findings, Read, ends
from paper_src.reporting.style import BLUE, GREEN, GREY, PURPLE, RED, SKY, STYLE
from paper_src.sections.judge import Judge
from paper_src.sections.recovery import refit, start_of
from paper_src.support.checkpoints import run_folder
from paper_src.support.files import replacing
from paper_src.support.sources import sha256


@dataclass
class Measurement:
    """How every model is measured.

    Attributes:
        judge: on test text.
        tokenizer: of the full model.
        items: of zero-shot tasks.
        asked: k -> whether models of this size answer them; 0 are methods without a size.
        workloads: what is timed; the first is the prefill.
        rounds: timed rounds.
    """

    judge: Judge
    tokenizer: PreTrainedTokenizerBase
    items: Sequence[zero_shot.Items]
    asked: Sequence[int]
    workloads: Sequence[timing.Workload]
    rounds: int


def repaired(recovered: pd.DataFrame, folder: Path) -> dict[int, Repaired]:
    """k -> the checkpoint of section 5, with its budget from t5_recovery."""
    rows = recovered[(recovered["selection"] == "selected") & (recovered["recovery"] == "distilled")]
    return {row.k: Repaired(folder / f"recovered_{row.k}", row.tokens, start_of(row.form)) for row in rows.itertuples()}


class Rows:
    """Finished rows of one setting, measurement and state of section 5, in a file from which a killed run goes on."""

    def __init__(self, on: Setting, by: Measurement):
        weights = {k: [sha256(part) for part in sorted(found.folder.glob("*.safetensors"))]
                   for k, found in on.repaired.items()}  # fmt: skip
        context = {
            "training": asdict(on.training), "kept": sorted(on.kept.items()), "block_cut": sorted(on.block_cut.items()),
            "repaired": weights, "items": [[part.task, part.rows] for part in by.items], "asked": list(by.asked),
            "workloads": [str(work) for work in by.workloads], "rounds": by.rounds,
        }  # fmt: skip
        data = [on.blocks, by.judge.first.blocks, on.validation.blocks, *on.full.parameters()]
        self.on, self.file = on, run_folder(on.folder, data, context) / "rows.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def missing(self, jobs: Sequence[tuple[str, int, bool]]) -> list[tuple[str, int, bool]]:
        """Those of ``jobs`` (name, k, recovered) that have no row yet."""
        done = {(row["name"], row["k"], row["recovered"]) for row in self.rows}
        return [job for job in jobs if job not in done]

    @contextmanager
    def row(self, name: str, k: int, recovered: bool) -> Iterator[dict[str, object]]:
        """The row of a method, to be filled inside and written behind; ``status`` says why one has no numbers."""
        row = described(self.on, name, k, recovered)
        try:
            yield row
        except NotSupported as error:
            row |= {"status": f"not supported: {error}", "tokens": 0}
        self.rows.append(row)
        with replacing(self.file) as part:
            part.write_text("".join(json.dumps(each) + "\n" for each in self.rows))


def described(on: Setting, name: str, k: int, recovered: bool) -> dict[str, object]:
    """What a row of t7_baselines says of its method and of the repair that its model has had.

    ``repaired_by`` is the section whose budget the repair took, ``start`` what the training started from, ``tokens``
    are those of calibration and training; the choice of layers is not counted.
    """
    method = METHODS[name]
    repair = "distilled" if recovered else method.repair
    earlier = "repaired" in method.needs
    start = on.repaired[k].start if earlier else "closed_form" if method.repair == "closed_form" else "as_it_is"
    return {
        "method": method.title, "name": name, "family": method.family, "k": k, "recovered": recovered,
        "trained": repair == "distilled", "bits": method.bits or on.bits, "repair": repair,
        "repaired_by": "none" if repair == "none" else "section 5" if earlier else "section 7",
        "start": start if repair == "distilled" else "none", "tokens": on.tokens(METHODS[name].needs, k),
    }  # fmt: skip


def trained(on: Setting, name: str, k: int, model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, object]]:
    """``model`` after the short distillation that every method gets, and what that adds to its row."""
    training, row = METHODS[name].training, {"tokens": on.tokens(METHODS[name].needs, k), "recovery_s": 0.0}
    if training == "refit":
        refitted = refit(on.full, on.kept[k], on.blocks)
        model = refitted.model
        row = {"start": start_of(refitted.form), "tokens": refitted.tokens, "recovery_s": refitted.seconds}
    if training == "masked":
        model = sparsity.masked(model)
    found = distillation.distil(on.full, model, on.blocks, on.validation, on.folder / f"{name}_{k}", on.training)
    row["tokens"] += int(found.history[-1]["tokens"])
    row["recovery_s"] += found.history[-1]["seconds"]
    return sparsity.unmasked(found.model) if training == "masked" else found.model, row


def measured(on: Setting, by: Measurement, model: PreTrainedModel, k: int) -> dict[str, float]:
    """Fidelity, perplexity, accuracy, bytes and speed of one model; ``<task>_speedup`` over the full one, interleaved.

    Raises:
        InputError: a layer is lost or does nothing.
    """
    require_alive(model, on.blocks[:1, :8])
    row = {"parameters": count_of(model), "zeros": sparsity.zeros(model), **bytes_of(model), **by.judge.row(model)}
    for work in by.workloads:
        ratio = {f"speedup{end}": 1.0 for end in ("", "_lo", "_hi")}
        if model is not on.full:
            seconds = timing.pair_seconds(on.full, model, work, by.rounds)
            ratio = timing.ratio_interval(np.divide(*seconds), by.judge.seed)
        row |= {f"{work.task}_{name}": value for name, value in ratio.items()}
    asked = by.items and (k in by.asked or model is on.full)
    return row | (zero_shot.zero_shot(model, by.tokenizer, by.items) if asked else {})


def t7_baselines(rows: Sequence[dict[str, object]], full: PreTrainedModel, judge: Judge) -> pd.DataFrame:
    """t7_baselines: the full model, each method as it is, then those that were trained here.

    Ratios are to the full model in its own dtype, ``*_share`` to the full model in float32.
    """
    frame = pd.DataFrame(rows).sort_values("recovered", kind="stable", ignore_index=True)
    frame.loc[frame["name"] == "full", "k"] = full.config.get_text_config().num_hidden_layers
    frame["status"] = frame["status"].fillna("") if "status" in frame else ""
    single = 4 * count_parameters(full)
    shares = {"memory_share": frame["memory_bytes"] / single, "disk_share": frame["disk_bytes"] / single}
    return frame.assign(**shares, n_tokens=judge.first.blocks.numel())


def t7_budgets(frame: pd.DataFrame, speedups: Sequence[float], shares: Sequence[float]) -> pd.DataFrame:
    """t7_budgets: for each budget the method of lowest perplexity that meets it, of all and before any training.

    Budgets are at least a speedup of the prefill, and at most a share of the full model's float32 bytes.
    """
    rows = []
    limits = {"prefill_hidden_speedup": speedups, "memory_share": shares}
    for cost, limit in [(cost, limit) for cost, values in limits.items() for limit in values]:
        meets = frame[cost] >= limit if cost.endswith("speedup") else frame[cost] <= limit
        for name, part in (("as it is", frame[meets & ~frame["trained"]]), ("recovered or not", frame[meets])):
            if part["ppl_ratio"].notna().any():
                best = part.loc[part["ppl_ratio"].idxmin()].to_dict()
                rows.append({**best, "budget": cost, "limit": limit, "of": name,
                             **{other: np.nan for other in limits if other != cost}})  # fmt: skip
    wanted = ["budget", "limit", "of", "method", "k", "recovered", "ppl_ratio", *limits, "name", "trained", "repair",
              "tokens"]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=wanted)


FAMILIES = {"full": "black", "quantization": PURPLE, "sparsity": GREY, "width": GREEN, "low rank": SKY, "depth": BLUE,
            "combination": RED}  # fmt: skip
PANELS = {
    "ppl_ratio": "perplexity / full model's",
    "prefill_hidden_speedup": "prefill speedup",
    "decode_speedup": "decode speedup",
    "memory_share": "bytes / float32 model's",
}
WORST = 1000  # a perplexity ratio above it is a failure


def f7_pareto(table: pd.DataFrame) -> Figure:
    """Every method, the best perplexity on top, with what it buys: speed beside the full model, bytes of its weights.
    Hollow: as it is; filled: trained, by the short training of this section ("trained") or by section 5. n: `n_tokens`
    of t7_baselines; bars: 95% bootstrap over windows, for speed over timed rounds. The line is the frontier: no method
    above it is as fast, or as small. Perplexities above 1,000 times the full model's are left out and counted.
    """
    known = table[table["ppl_ratio"].notna()]
    rows = known[known["ppl_ratio"] <= WORST].sort_values("ppl_ratio", kind="stable")
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 1.4 + 0.19 * len(rows)), sharey=True)
        for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
            _dots(axis, rows, metric)
            if metric != "ppl_ratio":
                _staircase(axis, rows, metric)
            axis.set_title(title)
            axis.set_xscale("log")
            wide = rows[metric].max() > 50 * rows[metric].min()
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows.itertuples()], size=7.5)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        worse = len(known) - len(rows)
        if worse:
            axes[0].set_xlabel(f"above {WORST:,} and left out: {worse}")
        for family, colour in FAMILIES.items():
            axes[0].scatter([], [], color=colour, label=family)
        figure.legend(loc="outside lower center", ncols=len(FAMILIES))
    plt.close(figure)
    return figure


def _label(row: tuple) -> str:
    size = f", k = {row.k}" if row.k and row.family != "full" else ""
    return row.method + size + (", trained" if row.recovered else "")


def _dots(axis: Axes, rows: pd.DataFrame, metric: str) -> None:
    """A dot for each row with its interval, hollow unless it was trained."""
    for place, row in enumerate(rows.to_dict("records")):
        colour, filled = FAMILIES[row["family"]], row["trained"] or row["family"] == "full"
        low, high = (row.get(f"{metric}{end}", row[metric]) for end in ("_lo", "_hi"))
        axis.plot([low, high], [place, place], color=colour, lw=1)
        axis.plot(row[metric], place, "o", ms=5, mec=colour, mfc=colour if filled else "white")


def _staircase(axis: Axes, rows: pd.DataFrame, cost: str) -> None:
    """The frontier of quality and ``cost`` in rows sorted by quality."""
    best = rows[cost].cummax() if cost.endswith("speedup") else rows[cost].cummin()
    axis.step(best, np.arange(len(rows)), where="pre", color="black", lw=0.8, zorder=1)


def t7_findings(read: Read) -> pd.DataFrame:
    """t7_findings: cut layers beside what else one could do, at the smallest size and at the largest."""
    table, found = read("t7_baselines"), Findings()
    table = table[table["ppl_ratio"].notna()]
    sizes = table.loc[table["family"].isin(["depth", "width"]), "k"]
    found.add("t7_baselines", "methods_compared", table["name"].nunique() - 1, unit="methods")
    for role, k in (("smallest", sizes.min()), ("largest", sizes.max())):
        found.add("t7_baselines", f"compared_{role}_k", k, unit="layers")
        for name in ("cut", "width", "replace_me", "cut_repaired", "cut_repaired_int8"):
            _method(found, f"{name}_{role}", table[(table["name"] == name) & (table["k"] == k) & ~table["recovered"]])
    for name in ("int8_weight", "int4_unpacked", "wanda_50"):
        _method(found, name, table[(table["name"] == name) & ~table["recovered"]])
    after = table[table["recovered"] & (table["k"] == sizes.min())]
    if len(after):
        _after_the_same_recovery(found, after)
    return found.frame()


def _method(found: Findings, role: str, rows: pd.DataFrame) -> None:
    """Adds quality, speed, bytes and budget of the one row of t7_baselines; nothing where it is not supported here."""
    if rows.empty:
        return
    row = rows.iloc[0]
    found.add("t7_baselines", f"ppl_{role}", *ends(row, "ppl_ratio"), unit="perplexity / full", text=row["method"])
    found.add("t7_baselines", f"speed_{role}", *ends(row, "prefill_hidden_speedup"), unit="times, prefill")
    found.add("t7_baselines", f"bytes_{role}", row["memory_share"], unit="bytes / full model in float32")
    found.add("t7_baselines", f"budget_{role}", row["tokens"], unit="tokens of calibration and training")


def _after_the_same_recovery(found: Findings, after: pd.DataFrame) -> None:
    """Adds what the section's own short recovery makes of each kind of method, and whether all began alike."""
    others = after[after["family"] != "depth"]
    for role, name in (("cut", "cut"), ("width", "width"), ("low_rank", "svd_aware"), ("replace_me", "replace_me")):
        _method(found, f"recovered_{role}", after[after["name"] == name])
    _method(found, "recovered_best", after.nsmallest(1, "ppl_ratio"))
    _method(found, "recovered_best_other", others.nsmallest(1, "ppl_ratio"))
    own = after[after["name"] == "cut"].iloc[0]
    alike = (others["start"] == own["start"]) & (others["tokens"] == own["tokens"])
    found.add("t7_baselines", "compared_alike", alike.sum(), n=len(others),
              unit="methods with the start and tokens of cut layers")  # fmt: skip
    found.add("t7_baselines", "recovery_seconds", after["recovery_s"].max(), unit="s")
