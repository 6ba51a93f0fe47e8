"""The paper's figures, each drawn from tables alone."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, NotSupported, data, distillation, fidelity, recovery, selection
from paper_src.compaction import compact
from paper_src.models import layer_counts
from paper_src.reporting.progress import progress_bar
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, STYLE
from paper_src.selection import kept_text, kept_tuple
from paper_src.stats import control_p_value

RECOVERIES = {"none": (GREY, "cut only"), "closed_form": (BLUE, "closed form"), "distilled": (GREEN, "distilled")}


def f5_recovery(table: pd.DataFrame, curve: pd.DataFrame, target: float) -> Figure:
    """Cosine and perplexity of each stage of repair, and both over the distillation's tokens and seconds.

    Args:
        table: t5_recovery, on test text.
        curve: t5_curve, on validation text.
        target: cosine that was asked for.
    """
    rows = table[table["selection"] == "selected"]
    keep = sorted(set(rows["k"]), reverse=True)
    trivial = table[table["selection"] == "trivial"].iloc[0]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(10, 5.6))
        for line, (metric, title) in zip(
            axes, (("cosine", "cosine to the full model"), ("ppl_ratio", "perplexity / full model's")), strict=True
        ):
            for place, (stage, (colour, label)) in enumerate(RECOVERIES.items()):
                part = rows[rows["recovery"] == stage].set_index("k").loc[keep]
                x = np.arange(len(keep)) + 0.18 * (place - 1)
                spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
                line[0].errorbar(x, part[metric], spread, fmt="o", ms=5, color=colour, label=label)
            line[0].axhline(trivial[metric], color="black", lw=1, ls="--", label="trivial predictor")
            line[0].set_xticks(range(len(keep)), [f"k = {k}" for k in keep])
            line[0].set_ylabel(title)
            for axis, over, unit in ((line[1], "tokens", 1e3), (line[2], "seconds", 1)):
                for k, colour in zip(keep, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
                    part = curve[curve["k"] == k]
                    axis.plot(part[over] / unit, part[metric], marker="o", ms=3, color=colour, label=f"k = {k}")
                axis.set_xlabel("distillation, thousands of tokens" if over == "tokens" else "distillation, seconds")
            if metric == "cosine":
                for axis in line:
                    axis.axhline(target, color=RED, lw=1, ls=":", label="target")
            else:
                for axis in line:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_formatter("{x:g}")
                for axis in line[1:]:  # less than a decade
                    axis.yaxis.set_minor_formatter("{x:g}")
        axes[0, 0].set_title("test text")
        axes[0, 1].set_title("validation text")
        axes[0, 2].set_title("validation text")
        axes[1, 0].legend(loc="best")
        axes[0, 1].legend(loc="best")
    plt.close(figure)
    return figure


OTHER_TEXT = ("nll_nats", "cosine")  # measured on every kind of text; all metrics on the first


def domain(name: str) -> str:
    """A kind of text as it stands in a column: the last part of a folder's path."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def plan(
    keep: Sequence[float], depth: int, blocks: Sequence[int], rates: Sequence[float]
) -> dict[int, tuple[int, float]]:
    """k -> blocks of text and peak learning rate of its distillation; of shares that round to one k, the first.

    Args:
        keep: numbers of layers, or shares of ``depth``.
        depth: of the full model.
        blocks: for each of ``keep``.
        rates: for each of ``keep``.

    Raises:
        InputError: lists of different lengths, or of :func:`models.layer_counts`.
    """
    if not len(keep) == len(blocks) == len(rates):
        lengths = f"{len(keep)}, {len(blocks)} and {len(rates)}"
        raise InputError(f"keep, distil_blocks and learning_rates hold {lengths} values: give one of each for every k")
    counts = [layer_counts([share], depth)[0] for share in keep]
    found = {}
    for k, *settings in zip(counts, blocks, rates, strict=True):
        found.setdefault(k, tuple(settings))
    return found


class Judge:
    """Compares models with the full one on several kinds of text of one split.

    Args:
        full: the full model.
        tokenizer: its tokenizer.
        texts: names for :func:`data.load_text`; all metrics are taken on the first.
        split: ``valid`` or ``test``.
        shape: blocks of each kind, tokens of a block.
        mean: (d,) mean state of calibration text.
        seed: of the windows and the bootstrap.
    """

    def __init__(
        self,
        full: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        split: str,
        shape: tuple[int, int],
        mean: Tensor,
        seed: int,
    ):
        self.references, self.digests, self.seed = {}, {}, seed
        for name in texts:
            text, digest = data.load_text(name, split)
            metrics = OTHER_TEXT if self.references else fidelity.METRICS
            blocks = data.token_blocks(tokenizer, text, *shape, seed)
            self.references[domain(name)] = fidelity.reference(full, blocks, mean, metrics=metrics)
            self.digests[f"{domain(name)} {split}"] = digest
        self.full_nll = {name: self._values(full, name)["nll_nats"] for name in self.references}  # of each block

    @property
    def first(self) -> fidelity.Reference:
        """The reference on the first kind of text."""
        return next(iter(self.references.values()))

    @property
    def nll(self) -> float:
        """The full model's mean loss on the first kind of text, nats/token."""
        return float(next(iter(self.full_nll.values())).mean())

    def row(self, model: PreTrainedModel) -> dict[str, float]:
        """All metrics on the first kind of text with intervals; ``ppl_ratio_<domain>``, ``cosine_<domain>`` on all.

        The interval of ``ppl_ratio`` is of the differences to the full model on the same blocks.
        """
        row = {}
        for name, reference in self.references.items():
            values = self._values(model, name)
            if reference is self.first:
                row |= fidelity.summarize(values, self.seed)
                row |= fidelity.ppl_ratio(values["nll_nats"], self.full_nll[name], self.seed)
            row[f"ppl_ratio_{name}"] = np.exp((values["nll_nats"] - self.full_nll[name]).mean())
            row[f"cosine_{name}"] = values["cosine"].mean()
        ratios = [row[f"ppl_ratio_{name}"] for name in self.references]
        return row | {"ppl_ratio_mean": float(np.exp(np.mean(np.log(ratios))))}

    def ppl_ratio(self, model: PreTrainedModel) -> float:
        """Perplexity over the full model's, geometric mean over the kinds of text."""
        gaps = [(self._values(model, name, ("nll_nats",))["nll_nats"] - self.full_nll[name]).mean()
                for name in self.references]  # fmt: skip
        return float(np.exp(np.mean(gaps)))

    @torch.no_grad()
    def _values(self, model: PreTrainedModel, name: str, metrics: Sequence[str] = ()) -> dict[str, np.ndarray]:
        reference = self.references[name]
        wanted = metrics or (fidelity.METRICS if reference is self.first else OTHER_TEXT)
        return fidelity.compare(model, reference, metrics=wanted)


def refit(
    full: PreTrainedModel,
    kept: Sequence[int],
    blocks: Tensor,
    way: tuple[str, str] = ("down_proj", "gaps"),
    progress: Callable = iter,
) -> recovery.Recovered:
    """:func:`recovery.closed_form` in a ``way`` (form, reach); the cut model where the family has no such refit.

    So is it for the form ``none``: its ``tokens`` are then 0.
    """
    form, reach = way
    if form == "none":
        return recovery.Recovered(compact(full, kept), 0)
    try:
        return recovery.closed_form(full, kept, blocks, form, reach, progress=progress)
    except NotSupported as error:
        warnings.warn(f"not refitted: {error}", stacklevel=2)
        return recovery.Recovered(compact(full, kept), 0)


def candidates(strategies: pd.DataFrame, keep: Sequence[int], count: int) -> pd.DataFrame:
    """Rows k, strategy, kept: the ``count`` best different selections at each k on validation text, unrepaired.

    Raises:
        InputError: t2_strategies has no rows of a k.
    """
    rows = strategies[(strategies["strategy"] != "random") & strategies["k"].isin(keep)]
    if missing := sorted(set(keep) - set(rows["k"])):
        raise InputError(f"k = {missing[0]} was not judged on validation text: add it to search_keep of 02_selection")
    rows = rows.sort_values(["k", "nll_nats"]).drop_duplicates(["k", "kept"])
    return rows.groupby("k").head(count)[["k", "strategy", "score", "kept"]].reset_index(drop=True)


def random_candidates(depth: int, k: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows k, strategy, kept of random selections: the control of those above."""
    kept = [kept_text(draw) for draw in selection.random_draws(depth, k, draws, seed)]
    return pd.DataFrame({"k": k, "strategy": "random", "score": None, "kept": kept})


def after_refit(
    full: PreTrainedModel, table: pd.DataFrame, blocks: Tensor, judge: Judge, progress: Callable = iter
) -> pd.DataFrame:
    """t5_selection: perplexity of every candidate before and after the closed form, and which is best after.

    Args:
        full: the full model.
        table: from :func:`candidates` and :func:`random_candidates`.
        blocks: (N, T) calibration text of the refit.
        judge: on validation text.
        progress: wraps the iterable of rows.
    """
    rows = []
    for row in progress(table.to_dict("records")):
        kept = kept_tuple(row["kept"])
        before = judge.ppl_ratio(compact(full, kept))
        after = judge.ppl_ratio(refit(full, kept, blocks).model)
        rows.append({**row, "ppl_ratio_cut": before, "ppl_ratio_refitted": after})
    frame = pd.DataFrame(rows)
    groups = frame.groupby("k")
    for name in ("cut", "refitted"):
        frame[f"rank_{name}"] = groups[f"ppl_ratio_{name}"].rank(method="first").astype(int)
    return frame.assign(chosen=frame["rank_refitted"] == 1)


def t5_mix(
    full: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[int],
    choices: Mapping[str, Sequence[str]],
    shape: tuple[int, int],
    judge: Judge,
    seed: int,
) -> pd.DataFrame:
    """t5_mix: the closed form calibrated on each mix of texts, judged on every kind of text.

    ``no_domain_worse`` says whether no kind of text has a higher perplexity than before the repair; of those mixes
    the one with the lowest geometric mean of the ratios is ``chosen``; none where nothing is refitted.
    """
    cut = judge.row(compact(full, kept))
    columns = [f"ppl_ratio_{name}" for name in judge.references]
    rows = [{"mix": "none", **cut, "no_domain_worse": True, "refitted": False}]
    for name, texts in choices.items():
        blocks = calibration(tokenizer, texts, *shape, seed)
        found = refit(full, kept, blocks)
        row = judge.row(found.model)
        harmless = all(row[column] <= cut[column] for column in columns)
        rows.append({"mix": name, **row, "no_domain_worse": harmless, "refitted": found.tokens > 0})
    frame = pd.DataFrame(rows)
    possible = frame[frame["no_domain_worse"] & frame["refitted"]]
    best = possible["ppl_ratio_mean"].idxmin() if len(possible) else -1
    wanted = ["mix", *columns, "ppl_ratio_mean", "no_domain_worse"]
    return frame[wanted].assign(tokens=shape[0] * shape[1], chosen=frame.index == best)


def calibration(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, length: int, seed: int) -> Tensor:
    """(count, length) token ids of the calibration split of ``texts``, each as often as it is named."""
    return data.mixed_blocks(tokenizer, [data.load_text(name, "train")[0] for name in texts], count, length, seed)


def t5_forms(
    full: PreTrainedModel,
    kept: Sequence[int],
    blocks: Tensor,
    judge: Judge,
    ways: Sequence[tuple[str, str]],
    progress: Callable = iter,
) -> pd.DataFrame:
    """t5_forms: each published form of the closed form, (form, reach), on the same layers and tokens.

    Of those that add no parameter the one with the lowest geometric mean of perplexity ratios is ``chosen``. Forms
    that the family of the model cannot take are left out; if all are, ``none`` is chosen.
    """
    rows = [{"form": "none", "reach": "", "tokens": 0, "seconds": 0.0, "added": 0, **judge.row(compact(full, kept))}]
    for form, reach in progress(list(ways)):
        start = time.perf_counter()
        try:
            found = recovery.closed_form(full, kept, blocks, form, reach)
        except NotSupported as error:
            print(f"{form}: {error}")
            continue
        seconds = time.perf_counter() - start
        rows.append({"form": form, "reach": reach, "tokens": found.tokens, "seconds": seconds, "added": found.added,
                     **judge.row(found.model)})  # fmt: skip
    frame = pd.DataFrame(rows).assign(k=len(kept), kept=kept_text(kept))
    standard = frame[(frame["added"] == 0) & (frame["form"] != "none")]
    return frame.assign(chosen=frame.index == (standard["ppl_ratio_mean"].idxmin() if len(standard) else 0))


def with_control(table: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Rows of both, and ``p_refitted``: the chance that a random selection is as good after the same refit."""
    draws = control["ppl_ratio_refitted"]
    smallest = table["k"] == control["k"].iloc[0]
    p_values = [control_p_value(value, draws, higher_is_better=False) for value in table["ppl_ratio_refitted"]]
    table = table.assign(p_refitted=pd.Series(p_values, table.index).where(smallest))
    return pd.concat([table, control.assign(chosen=False)], ignore_index=True)


def recover(
    full: PreTrainedModel,
    kept: Sequence[int],
    blocks: Tensor,
    way: tuple[str, str],
    more: Tensor,
    validation: fidelity.Reference,
    folder: Path,
    settings: distillation.Distillation,
) -> tuple[dict[str, tuple[PreTrainedModel, float, int]], list[dict[str, float]]]:
    """Both stages at one k: stage -> (model, seconds, tokens), each with those before, and the distillation's history.

    Args:
        full: the full model.
        kept: kept layers.
        blocks: (N, T) calibration text of the closed form.
        way: its form and reach; see :func:`refit`.
        more: (M, T) calibration text of the distillation.
        validation: decides on the distillation's best state.
        folder: of its checkpoints and outcome; a run that is done is not run again while that is there.
        settings: of the distillation.
    """
    start = time.perf_counter()
    refitted = refit(full, kept, blocks, way, progress_bar(f"closed form, k = {len(kept)}"))
    seconds = time.perf_counter() - start
    trained = distillation.distil(full, refitted.model, more, validation, folder, settings, kept, print)
    history = [{"k": len(kept), "closed_form_s": seconds, **row} for row in trained.history]
    found = {
        "none": (compact(full, kept), 0.0, 0),
        "closed_form": (refitted.model, seconds, refitted.tokens),
        "distilled": (trained.model, seconds + history[-1]["seconds"], refitted.tokens + int(history[-1]["tokens"])),
    }
    return found, history


def t5_curve(histories: Sequence[Sequence[dict[str, float]]], judge: Judge) -> pd.DataFrame:
    """t5_curve: every look of the distillations at validation text, ``ppl_ratio`` to the full model's."""
    frame = pd.DataFrame([row for history in histories for row in history])
    return frame.assign(ppl_ratio=np.exp(frame["nll_nats"] - judge.nll))


def saved(full: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The repaired model of a checkpoint, in the dtype and on the device of ``full``.

    Raises:
        InputError: the checkpoint is not there.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: run ./reproduce.sh --only 05_recovery --force")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=full.dtype).to(full.device).eval()


def stages(
    judge: Judge, models: Mapping[str, tuple[PreTrainedModel, float, int]], kept: Sequence[int], name: str = "selected"
) -> list[dict[str, object]]:
    """Rows of t5_recovery at one k: each stage's metrics, with what it cost.

    Args:
        judge: on test text.
        models: stage -> model, seconds, tokens.
        kept: kept layers.
        name: how they were chosen.
    """
    base = {"k": len(kept), "selection": name, "kept": kept_text(kept)}
    return [
        {**base, "recovery": stage, "tokens": tokens, "seconds": seconds, "parameters_added": 0, **judge.row(model)}
        for stage, (model, seconds, tokens) in models.items()
    ]


def earlier(
    full: PreTrainedModel, kept: Sequence[int], blocks: Tensor, way: tuple[str, str], judge: Judge
) -> list[dict[str, object]]:
    """Rows of t5_recovery for the earlier report's kind of selection: cut, and refitted."""
    start = time.perf_counter()
    refitted = refit(full, kept, blocks, way)
    seconds = time.perf_counter() - start
    found = {"none": (compact(full, kept), 0.0, 0), "closed_form": (refitted.model, seconds, refitted.tokens)}
    return stages(judge, found, kept, "distributed")


def t5_recovery(rows: Sequence[dict[str, object]], full: PreTrainedModel, judge: Judge) -> pd.DataFrame:
    """t5_recovery: the rows between the full model and the trivial predictor, which answers with the mean state."""
    depth = full.config.get_text_config().num_hidden_layers
    base = {"tokens": 0, "seconds": 0.0, "parameters_added": 0}
    constant = fidelity.summarize(fidelity.compare_constant(full, judge.first), judge.seed)
    constant["ppl_ratio"] = float(np.exp(constant["nll_nats"] - judge.nll))
    first = {"k": depth, "selection": "full", "kept": kept_text(range(depth)), "recovery": "none", **base}
    last = {"k": 0, "selection": "trivial", "recovery": "none", **base, **constant}
    return pd.DataFrame([first | judge.row(full), *rows, last]).assign(n_tokens=judge.first.blocks.numel())


def recommended(curve: pd.DataFrame, target: float) -> dict[str, float]:
    """The recommended model: of the models with a cosine of at least ``target`` that of the fewest layers.

    Where none reaches it, the one of highest cosine.

    Args:
        curve: t5_curve; of each k the look of lowest KL counts, whose state was kept.
        target: cosine on validation text.
    """
    best = curve.loc[curve.groupby("k")["kl_nats"].idxmin()]
    enough = best[best["cosine"] >= target]
    row = enough.loc[enough["k"].idxmin()] if len(enough) else best.loc[best["cosine"].idxmax()]
    return {**row.to_dict(), "k": int(row["k"])}
