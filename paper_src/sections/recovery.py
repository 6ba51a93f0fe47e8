"""Section 5: how much a repair brings back, for how many tokens and seconds, on which text."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported, distillation, fidelity, recovery, selection
from paper_src.compaction import compact
from paper_src.models import layer_counts
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, STYLE
from paper_src.sections.judge import Judge
from paper_src.selection import kept_text
from paper_src.stats import control_p_value

STAGES = {"none": (GREY, "cut only"), "closed_form": (BLUE, "closed form"), "distilled": (GREEN, "distilled")}


@dataclass
class Stage:
    """A model in its course of repair, and what that has cost up to here.

    Attributes:
        model: as it is after the stage.
        tokens: of calibration and training, each pass counted.
        seconds: of computing.
        form: key of ``recovery.FORMS``, or ``none`` with an empty ``reach``.
        added: parameters that a standard checkpoint does not have.
        training_tokens: those of ``tokens`` that were trained on.
        history: the distillation's looks at validation text.
    """

    model: PreTrainedModel
    tokens: int = 0
    seconds: float = 0.0
    form: str = "none"
    reach: str = ""
    added: int = 0
    training_tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def start_of(form: str) -> str:
    """What a training starts from after a closed form of this name."""
    return "as_it_is" if form == "none" else "closed_form"


def refit(
    full: PreTrainedModel, kept: Sequence[int], blocks: Tensor, form: str = "down_proj", reach: str = "gaps",
    progress: Callable = iter,
) -> Stage:  # fmt: skip
    """The compact model after :func:`recovery.closed_form`.

    It stays cut, with form ``none``, where that is asked for or the family has no such refit; then a warning says so.
    """
    start = time.perf_counter()
    if form != "none":
        try:
            found = recovery.closed_form(full, kept, blocks, form, reach, progress=progress)
            return Stage(found.model, found.tokens, time.perf_counter() - start, form, reach, found.added)
        except NotSupported as error:
            warnings.warn(f"{form}, not refitted: {error}", stacklevel=2)
    return Stage(compact(full, kept))


def distil(
    full: PreTrainedModel, start: Stage, blocks: Tensor, validation: fidelity.Reference, folder: Path,
    settings: distillation.Distillation, progress: Callable | None = None,
) -> Stage:  # fmt: skip
    """The model of ``start`` after :func:`distillation.distil`, with the cost of both."""
    found = distillation.distil(full, start.model, blocks, validation, folder, settings, progress=progress)
    last = found.history[-1]
    tokens = int(last["tokens"])
    return Stage(found.model, start.tokens + tokens, start.seconds + last["seconds"], start.form, start.reach,
                 start.added, tokens, found.history)  # fmt: skip


def plan(
    keep: Sequence[float], depth: int, blocks: Sequence[int], rates: Sequence[float]
) -> dict[int, tuple[int, float]]:
    """k -> blocks of text and peak learning rate of its distillation; of shares that round to one k, the first.

    Raises:
        InputError: lists of different lengths, or of :func:`models.layer_counts`.
    """
    if not len(keep) == len(blocks) == len(rates):
        lengths = f"{len(keep)}, {len(blocks)} and {len(rates)}"
        raise InputError(f"keep, distil_blocks and learning_rates hold {lengths} values: give one of each for every k")
    found: dict[int, tuple[int, float]] = {}
    for share, count, rate in zip(keep, blocks, rates, strict=True):
        found.setdefault(layer_counts([share], depth)[0], (count, rate))
    return found


def candidates(strategies: pd.DataFrame, keep: Sequence[int], count: int) -> pd.DataFrame:
    """Rows k, strategy, score, kept: the ``count`` best different selections at each k on validation text, unrepaired.

    Raises:
        InputError: no rows of a k.
    """
    rows = strategies[(strategies["strategy"] != "random") & strategies["k"].isin(keep)]
    if missing := sorted(set(keep) - set(rows["k"])):
        raise InputError(f"k = {missing[0]} was not judged on validation text: add it to search_keep of 02_selection")
    rows = rows.sort_values(["k", "nll_nats"]).drop_duplicates(["k", "kept"])
    return rows.groupby("k").head(count)[["k", "strategy", "score", "kept"]].reset_index(drop=True)


def random_candidates(depth: int, k: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows like those of :func:`candidates` of random selections: their control."""
    rows = [(k, "random", None, kept_text(draw)) for draw in selection.random_draws(depth, k, draws, seed)]
    return pd.DataFrame(rows, columns=["k", "strategy", "score", "kept"])


def t5_selection(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """t5_selection: every candidate with its ``ppl_ratio_cut`` and ``ppl_ratio_refitted``, ranked at each k.

    ``p_refitted``: the chance that a random selection of the same k is as good after the same refit; those are ranked
    among themselves.
    """
    frame = pd.DataFrame(rows)
    random = frame["strategy"] == "random"
    for name in ("cut", "refitted"):
        frame[f"rank_{name}"] = frame.groupby(["k", random])[f"ppl_ratio_{name}"].rank(method="first").astype(int)
    frame["chosen"], frame["p_refitted"] = (frame["rank_refitted"] == 1) & ~random, np.nan
    for k, draws in frame.loc[random, "ppl_ratio_refitted"].groupby(frame["k"]):
        judged = frame.loc[~random & (frame["k"] == k), "ppl_ratio_refitted"]
        chances = [control_p_value(value, draws, higher_is_better=False) for value in judged]
        frame.loc[judged.index, "p_refitted"] = chances
    return frame


def t5_mix(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """t5_mix: the closed form calibrated on each mix of texts, judged on every kind of text; the cut model first.

    ``no_domain_worse`` says whether no kind of text has a higher perplexity than before the repair; of those mixes
    the one with the lowest geometric mean of the ratios is ``chosen``; none where nothing is refitted.
    """
    frame = pd.DataFrame(rows)
    columns = [name for name in frame if name.startswith("ppl_ratio_") and not name.endswith(("_lo", "_hi", "_mean"))]
    frame["no_domain_worse"] = (frame[columns] <= frame.loc[0, columns]).all(axis=1)
    possible = frame[frame["no_domain_worse"] & frame["refitted"]]
    best = possible["ppl_ratio_mean"].idxmin() if len(possible) else -1
    wanted = ["mix", "texts", *columns, "ppl_ratio_mean", "no_domain_worse", "tokens"]
    return frame[wanted].assign(chosen=frame.index == best)


def t5_forms(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """t5_forms: each published form of the closed form on the same layers and tokens; the cut model first.

    Of those that are standard checkpoints the one with the lowest geometric mean of perplexity ratios is ``chosen``;
    ``none`` where the family takes no form.
    """
    frame = pd.DataFrame(rows)
    possible = frame.loc[frame["standard"] & (frame["form"] != "none"), "ppl_ratio_mean"]
    return frame.assign(chosen=frame.index == (possible.idxmin() if len(possible) else 0))


def form_row(found: Stage, kept: Sequence[int], metrics: Mapping[str, float]) -> dict[str, object]:
    """A row of t5_forms, of a form's cost and a judge's ``metrics``."""
    standard = found.form == "none" or recovery.FORMS[found.form].standard
    return {"form": found.form, "reach": found.reach, "tokens": found.tokens, "seconds": found.seconds,
            "added": found.added, "standard": standard, **metrics, "k": len(kept), "kept": kept_text(kept)}  # fmt: skip


def stage_row(
    chosen_by: str, kept: Sequence[int], recovered: str, found: Stage, judge: Judge, metrics: Mapping[str, float]
) -> dict[str, object]:
    """A row of t5_recovery, of a stage's cost and what ``judge`` found; no layers are the trivial predictor's.

    ``n_windows`` are those of the first kind of text, ``n_tokens`` the tokens in them; ``row`` is its name in
    t5_windows.
    """
    name = chosen_by if chosen_by in ("full", "trivial") else f"{chosen_by} k={len(kept)} {recovered}"
    return {"row": name, "k": len(kept), "selection": chosen_by,
            "kept": kept_text(kept), "recovery": recovered, "form": found.form, "reach": found.reach,
            "trained": bool(found.history), "tokens": found.tokens, "training_tokens": found.training_tokens,
            "seconds": found.seconds, "parameters_added": found.added, **metrics,
            "n_windows": metrics.get("n_windows", len(judge.first_blocks)),
            "n_tokens": metrics.get("n_tokens", judge.n_tokens)}  # fmt: skip


def judged(
    chosen_by: str, kept: Sequence[int], recovered: str, found: Stage, judge: Judge
) -> tuple[dict[str, object], pd.DataFrame]:
    """A row of t5_recovery and its part of t5_windows."""
    values = judge.compare(found.model)
    row = stage_row(chosen_by, kept, recovered, found, judge, judge.summary(values))
    return row, judge.windows(row["row"], values)


def looks_at(full: PreTrainedModel, judge: Judge) -> tuple[fidelity.Reference, float]:
    """The full model's answers to the text that a training is watched on, all kinds alike, and its loss there."""
    reference = fidelity.reference(full, torch.cat(list(judge.blocks.values())), judge.first.mean_state)
    return reference, float(fidelity.compare(full, reference, metrics=["nll_nats"])["nll_nats"].mean())


def t5_curve(stages: Mapping[int, Mapping[str, Stage]], nll: float) -> pd.DataFrame:
    """t5_curve: every look of the distillations at validation text of all kinds, where the full model has ``nll``."""
    rows = [{"k": k, "closed_form_s": found["closed_form"].seconds, **look}
            for k, found in stages.items() for look in found["distilled"].history]  # fmt: skip
    return pd.DataFrame(rows).assign(ppl_ratio=lambda frame: np.exp(frame["nll_nats"] - nll))


def recommended(curve: pd.DataFrame, target: float) -> dict[str, float]:
    """The row of t5_curve of the model of fewest layers whose cosine reaches ``target``; else of highest cosine.

    Of each k the look of lowest KL counts, whose state is the distilled model.
    """
    best = curve.loc[curve.groupby("k")["kl_nats"].idxmin()]
    enough = best[best["cosine"] >= target]
    row = enough.loc[enough["k"].idxmin()] if len(enough) else best.loc[best["cosine"].idxmax()]
    return {**row.to_dict(), "k": int(row["k"])}


METRICS = {"cosine": "cosine to the full model", "ppl_ratio": "perplexity / full model's"}


def f5_recovery(table: pd.DataFrame, curve: pd.DataFrame, target: float) -> Figure:
    """What each stage of repair brings back: cosine of the last hidden state and perplexity over the full model's.
    Left: test text (`n_windows` of t5_recovery); bars: 95% bootstrap over windows; dashed: the trivial predictor.
    Right: every look at validation text of all kinds during the distillation, which begins after the closed form;
    seconds are of training alone. Dotted: the cosine that was asked for.
    """
    rows = table[table["selection"] == "selected"]
    keep = sorted(set(rows["k"]), reverse=True)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(8.4, 6), width_ratios=(1, 1.25))
        for (left, right), (metric, title) in zip(axes, METRICS.items(), strict=True):
            _stages(left, rows, keep, metric)
            trivial = table.loc[table["selection"] == "trivial", metric].item()
            left.axhline(trivial, color="black", lw=1, ls="--", label="trivial predictor")
            for k, colour in zip(keep, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
                part = curve[curve["k"] == k]
                label = f"k = {k}: {part['tokens'].max() / 1e3:,.0f}k tokens, {part['seconds'].max():,.0f} s"
                right.plot(part["tokens"] / 1e3, part[metric], marker="o", ms=3, color=colour, label=label)
            for axis, text in ((left, "test text"), (right, "validation text of all kinds")):
                axis.set_title(f"{title}, {text}")
                if metric == "cosine":
                    axis.axhline(target, color=RED, lw=1, ls=":", label=f"target {target:g}")
                else:
                    axis.set_yscale("log")
                    axis.yaxis.set_major_formatter("{x:g}")
                    axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
            right.set_xlabel("distillation, thousands of tokens")
        for place, part in zip(("lower left", "lower right"), axes[0], strict=True):
            figure.legend(*part.get_legend_handles_labels(), loc=f"outside {place}", ncols=2)
    plt.close(figure)
    return figure


def _stages(axis: Axes, rows: pd.DataFrame, keep: Sequence[int], metric: str) -> None:
    """The stages side by side at each k, with their intervals."""
    for place, (stage, (colour, label)) in enumerate(STAGES.items()):
        part = rows[rows["recovery"] == stage].set_index("k").loc[keep]
        spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
        x = np.arange(len(keep)) + 0.18 * (place - 1)
        axis.errorbar(x, part[metric], spread, fmt="o", ms=5, color=colour, label=label)
    axis.set_xticks(range(len(keep)), [f"k = {k}" for k in keep])
    axis.set_xlim(-0.5, len(keep) - 0.5)
