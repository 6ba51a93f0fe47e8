"""Section 4: fidelity of every selection on test text, beside random selections and the trivial predictor."""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import cycle
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, fidelity
from paper_src.layers import SubsetRunner
from paper_src.reporting import reported
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from paper_src.scoring import title
from paper_src.sections.selection import label
from paper_src.sections.windows import window_rows
from paper_src.selection import kept_text, kept_tuple, of_kind
from paper_src.stats import control_p_value

Measured = dict[str, dict[str, np.ndarray]]
FULL, TRIVIAL = "full", "trivial"  # rows that are no selection
RECOMMENDED = ("distributed", "combined")  # strategy and score of the earlier report's recommendation
KEYS = ["strategy", "score", "k", "kept"]


class Group(NamedTuple):
    """Selections that are measured on the same windows."""

    kept: Iterable[str]
    windows: Sequence[int]  # places in the sequence of all windows
    metrics: Collection[str]


def measure(
    model: PreTrainedModel, full: fidelity.Reference, table: pd.DataFrame,
    metrics: Collection[str] = fidelity.METRICS, progress: Callable[[Iterable], Iterable] = iter,
) -> Measured:  # fmt: skip
    """Fidelity of the full model (first) and of every different selection in ``table``: kept -> metric -> (N,).

    Selections that begin alike share the work, see :class:`paper_src.layers.SubsetRunner`; the values are
    those of the compacted models.
    """
    return _measure(model, full, dict.fromkeys(table["kept"], metrics), metrics, progress)


def _measure(
    model: PreTrainedModel, full: fidelity.Reference, wanted: dict[str, Collection[str]], of_full: Collection[str],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Measured:  # fmt: skip
    """:func:`measure` with metrics of each selection's own: ``wanted`` are kept -> metrics."""
    runner = SubsetRunner(model, full.blocks, memory_bytes=2**26)  # smaller batches, for the bar
    everything = tuple(range(runner.depth))
    wanted = wanted | {kept_text(everything): of_full}
    measured = {kept_text(everything): {}}
    for batch in progress(list(runner.batches(map(kept_tuple, wanted)))):
        for kept, hidden in zip(batch, runner.last_hidden(batch), strict=True):
            measured[kept_text(kept)] = fidelity.compare_states(model, full, hidden, wanted[kept_text(kept)])
    return measured


def of_sizes(selection: pd.DataFrame, keep: Collection[int]) -> pd.DataFrame:
    """Rows of t2_selection with these numbers of layers; InputError if there is none of one of them."""
    if missing := sorted(set(keep) - set(selection["k"])):
        raise InputError(f"keep = {missing[0]} layers: give some of those of notebook 2, {sorted(set(selection['k']))}")
    return selection[selection["k"].isin(keep)]


def spread(count: int, wanted: int) -> list[int]:
    """``wanted`` places at equal distances among ``count`` windows: those on which every selection is measured."""
    if not 1 <= wanted <= count:
        raise InputError(f"blocks = {wanted} of {count} headline windows: give 1 to {count}, or more headline_blocks")
    return [index * count // wanted for index in range(wanted)]


def measure_groups(
    model: PreTrainedModel, blocks: Tensor, mean: Tensor, groups: Sequence[Group],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Measured:  # fmt: skip
    """Row -> metric -> (N,) of what ``groups`` ask for on windows ``blocks`` (N, T), NaN elsewhere.

    The rows are kept layers, and :data:`FULL` and :data:`TRIVIAL`, which have every metric on every window. A
    selection of several groups is measured once on a window, as the first of them asks. One window after another:
    all its selections share the work, and one window's next-token distributions are what memory holds.

    Args:
        mean: (d,) the trivial predictor's state.
    """
    measured: Measured = {}
    for index, block in enumerate(progress(list(blocks))):
        full = fidelity.reference(model, block[None], mean)
        wanted = {kept: group.metrics for group in reversed(groups) if index in group.windows for kept in group.kept}
        found = _measure(model, full, wanted, fidelity.METRICS)
        rows = {FULL: next(iter(found.values())), TRIVIAL: fidelity.compare_constant(model, full), **found}
        for row, values in rows.items():
            for metric, value in values.items():
                column = measured.setdefault(row, {}).setdefault(metric, np.full(len(blocks), np.nan))
                column[index] = value.item()
    return measured


def headline(selection: pd.DataFrame) -> pd.DataFrame:
    """Rows of t2_selection that a verdict names: at each k that was searched ``chosen``, and the report's strategy."""
    chosen = selection[selection["strategy"] == "chosen"]
    strategy, score = RECOMMENDED
    own = selection[(selection["strategy"] == strategy) & (selection["score"] == score)]
    return pd.concat([chosen, own[own["k"].isin(chosen["k"])]], ignore_index=True)


def _not_cut(measured: Measured) -> list[dict]:
    """Keys of the full model's row and of the trivial predictor's."""
    everything = next(kept for kept in measured if kept not in (FULL, TRIVIAL))
    size = len(everything.split())
    return [dict(zip(KEYS, row, strict=True)) for row in ((FULL, None, size, everything), (TRIVIAL, None, 0, None))]


def _row_of(keys: dict) -> str:
    """What a row is called in what was measured, and in t4_windows."""
    return keys["strategy"] if keys["strategy"] in (FULL, TRIVIAL) else keys["kept"]


def _summary(measured: Measured, row: str, windows: Sequence[int], length: int, seed: int) -> dict[str, float]:
    """Means with intervals of one row on some windows, ``ppl_ratio`` from the paired differences to the full model."""
    values = {metric: column[windows] for metric, column in measured[row].items()}
    ratio = fidelity.ppl_ratio(values["nll_nats"], measured[FULL]["nll_nats"][windows], seed)
    return {"n_blocks": len(windows), "n_tokens": len(windows) * length, **fidelity.summarize(values, seed), **ratio}


def t4_random(measured: Measured, table: pd.DataFrame, windows: Sequence[int]) -> pd.DataFrame:
    """A row per random draw of ``table``: means over ``windows``, ``ppl`` and ``ppl_ratio`` to the full model."""
    rows = []
    for row in table[table["strategy"] == "random"].itertuples():
        means = {name: float(measured[row.kept][name][windows].mean()) for name in ("cosine", "nll_nats")}
        rows.append({"k": row.k, "draw": row.draw, "kept": row.kept, "n_blocks": len(windows), **means})
    frame, full = pd.DataFrame(rows), measured[FULL]["nll_nats"][windows].mean()
    return frame.assign(ppl=np.exp(frame["nll_nats"]), ppl_ratio=np.exp(frame["nll_nats"] - full))


def t4_headline(measured: Measured, rows: pd.DataFrame, length: int, text: str, seed: int) -> pd.DataFrame:
    """Full model, trivial predictor and the selections of :func:`headline` on all windows, each metric's interval.

    Args:
        rows: from :func:`headline`.
        length: tokens in a window.
        text: what these windows are called in t4_windows.
    """
    (windows,) = np.indices(measured[FULL]["nll_nats"].shape)
    found = _not_cut(measured) + rows[KEYS].to_dict("records")
    found = [{**row, **_summary(measured, _row_of(row), windows, length, seed)} for row in found]
    return pd.DataFrame(found).assign(text=text)


def t4_fidelity(
    measured: Measured, table: pd.DataFrame, draws: pd.DataFrame, windows: Sequence[int], length: int, text: str,
    seed: int,
) -> pd.DataFrame:  # fmt: skip
    """Full model, trivial predictor and every selection of ``table`` on ``windows``; the random draws' mean at each k.

    Intervals are 95% bootstraps: over windows, for ``ppl_ratio`` of the paired differences, and for ``random`` over
    draws. ``p_cosine`` and ``p_ppl`` are the chance that a random draw of the same k does at least as well,
    ``p_ppl_worse`` that it does at least as badly, all on the windows of the draws, the first of ``windows``.

    Args:
        measured: from :func:`measure_groups`.
        table: t2_selection.
        draws: t4_random.
        length: tokens in a window.
        text: what these windows are called in t4_windows.
    """
    rows = [{**row, **_summary(measured, _row_of(row), windows, length, seed)} for row in _not_cut(measured)]
    selected = table[table["strategy"] != "random"]
    by_kept = {kept: _summary(measured, kept, windows, length, seed) for kept in dict.fromkeys(selected["kept"])}
    judged, by_k = list(windows[: draws["n_blocks"].iloc[0]]), dict(iter(draws.groupby("k")))
    for row in selected[KEYS].to_dict("records"):
        own, same = measured[row["kept"]], by_k[row["k"]]
        asked = {"p_cosine": ("cosine", True), "p_ppl": ("nll_nats", False), "p_ppl_worse": ("nll_nats", True)}
        p_values = {name: control_p_value(own[metric][judged].mean(), same[metric], higher_is_better=higher)
                    for name, (metric, higher) in asked.items()}  # fmt: skip
        rows.append({**row, **by_kept[row["kept"]], **p_values})
    for k, same in by_k.items():
        means = {name: same[name].to_numpy() for name in ("cosine", "nll_nats")}
        ratio = fidelity.ppl_ratio(means["nll_nats"], measured[FULL]["nll_nats"][judged].mean(), seed)
        size = {"n_draws": len(same), "n_blocks": len(judged), "n_tokens": len(judged) * length}
        rows.append({"strategy": "random", "k": k, **size, **fidelity.summarize(means, seed), **ratio})
    return pd.DataFrame(rows).astype({"n_draws": "Int64"}).assign(text=text)


def t4_windows(measured: Measured, groups: dict[str, Group], blocks: Tensor, model_digest: str) -> pd.DataFrame:
    """The losses and cosines of every window: of full model, trivial predictor and the different selections of groups.

    Args:
        groups: text, as the windows are called -> what was measured on them.
        blocks: (N, T) all windows.
    """
    parts = []
    for text, group in groups.items():
        windows = list(group.windows)
        for row in dict.fromkeys([FULL, TRIVIAL, *group.kept]):
            values = {metric: column[windows] for metric, column in measured[row].items()}
            parts.append(window_rows(row, text, blocks[windows], model_digest, values))
    return pd.concat(parts, ignore_index=True)


PANELS = {"ppl_ratio": "perplexity / full model's", "cosine": "cosine to the full model's last hidden state"}


def f4_tradeoff(table: pd.DataFrame, draws: pd.DataFrame, speed_by_k: pd.Series) -> Figure:
    """What each selection costs on test text, without any repair: a column per number of kept layers k, with the
    measured speedup of prefill. A row is a score (with a marker per strategy that uses it) or a strategy of its own,
    sorted by the perplexity at the smallest k. Bars: 95% BCa bootstrap over windows, paired with the full model for
    perplexity. Grey: random selections of the same k, on the first of these windows, and the range of 90% of them.
    Dashed: the trivial predictor, which answers every token with the mean state of calibration text.

    Args:
        table: t4_fidelity.
        draws: t4_random.
        speed_by_k: k -> measured prefill speedup.
    """
    rows = table[~table["strategy"].isin(["full", "trivial", "random"])].copy()
    scored = rows["strategy"].isin(of_kind("score"))
    rows["row"] = [title(score) if own else label(name)
                   for own, name, score in zip(scored, rows["strategy"], rows["score"], strict=True)]  # fmt: skip
    keep = sorted(set(rows["k"]))
    order = [*rows.sort_values(["k", "ppl_ratio"])["row"].drop_duplicates(), "random draws"]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(keep), figsize=(10, 1.7 + 0.27 * len(order)), sharex="row", sharey=True, squeeze=False
        )
        for line, (metric, name) in zip(axes, PANELS.items(), strict=True):
            trivial = table.loc[table["strategy"] == "trivial", metric].item()
            for axis, k in zip(line, keep, strict=True):
                _selections(axis, rows[rows["k"] == k], metric, order)
                _random(axis, draws.loc[draws["k"] == k, metric], order)
                axis.axvline(trivial, color="black", lw=1, ls="--", label="trivial predictor")
                axis.set_title(f"k = {k}, speedup {speed_by_k[k]:.2f}")
            size = f"n = {table['n_blocks'].iloc[0]} windows, random draws {draws['n_blocks'].iloc[0]}"
            line[len(keep) // 2].set_xlabel(f"{name} ({size})", loc="left")
        axes[0, 0].set_xscale("log")  # of the whole line
        for axis in axes[1]:
            axis.axvspan(*reported.COSINE_RANGE, color=RED, alpha=0.25, lw=0, label="earlier report")
            axis.axvline(reported.COSINE_TARGET, color=RED, lw=1, ls=":", label="its target")
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    plt.close(figure)
    return figure


def _selections(axis: Axes, rows: pd.DataFrame, metric: str, order: list[str]) -> None:
    """A point with its interval for each selection, on the line of its score or strategy."""
    looks = cycle([(BLUE, "o"), (ORANGE, "s"), (GREY, "D")])
    styles = dict(zip(of_kind("score"), looks, strict=False))
    for name, (colour, marker) in {**styles, "": (GREEN, "^")}.items():
        part = rows[rows["strategy"] == name] if name else rows[~rows["strategy"].isin(styles)]
        spread = [part[metric] - part[f"{metric}_lo"], part[f"{metric}_hi"] - part[metric]]
        legend = f"{label(name)} by this score" if name else "its own score or rule"
        axis.errorbar(part[metric], part["row"].map(order.index), xerr=spread, fmt=marker, ms=4, lw=0.9, color=colour,
                      mec="white", mew=0.4, label=legend)  # fmt: skip


def _random(axis: Axes, values: pd.Series, order: list[str]) -> None:
    """Random draws in a line of their own, and the range of 90% of them behind all others."""
    axis.axvspan(*values.quantile([0.05, 0.95]), color=GREY, alpha=0.2, lw=0, label="90% of random draws")
    axis.plot(values, [len(order) - 1] * len(values), "|", color=GREY, ms=7, mew=0.5, alpha=0.6)
    axis.set_yticks(range(len(order)), order, size=7)
    axis.set_ylim(len(order) - 0.5, -0.5)
