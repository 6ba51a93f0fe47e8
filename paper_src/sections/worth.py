"""Section 1, second half: what a layer is worth by leaving it out, and how much of that a linear map gives back."""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.stats import kendalltau
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError, fidelity
from paper_src.coalitions import ShapleyValues
from paper_src.layers import LayerRunner
from paper_src.least_squares import NormalEquations
from paper_src.models import decoder_layers
from paper_src.reporting.style import BLUE, RED, STYLE
from paper_src.scoring import SCORES, LayerScores, title

CAUSAL = ("leave_one_out", "shapley")  # what a layer is worth, by leaving it out
WORTH = {"removed": "without the layer", "repaired": "a linear map in its place"}


class LinearMaps(ExitStack):
    """For each layer the map h + h D that comes nearest to it, from the states of the passes inside the ``with``.

    D minimizes E |h' - h - h D|^2 / |h'|^2 with a ridge, h' the layer's output of h: where one layer alone is missing,
    the form ``linear`` of :mod:`paper_src.recovery` in the place of the layer.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.sums: list[NormalEquations] = []
        for index, layer in enumerate(decoder_layers(model)):
            self.enter_context(layer.register_forward_hook(functools.partial(self._hook, index), with_kwargs=True))

    @torch.no_grad()
    def _hook(self, index: int, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).float()  # (B T, d)
        after = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).float()
        if index == len(self.sums):
            self.sums.append(NormalEquations.empty(before.shape[1], after.shape[1], before.device))
        self.sums[index].add(before, after - before, 1 / after.square().sum(-1))

    def solve(self, ridge: float) -> list[Tensor]:
        """(d, d) float64 D of each layer."""
        return [sums.solve(ridge) for sums in self.sums]


@torch.no_grad()
def losses_without(
    model: PreTrainedModel, windows: Tensor, maps: Sequence[Tensor], progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, np.ndarray]:
    """``removed`` and ``repaired``: (N, L) what each window's loss gains without each layer, nats/token.

    Args:
        windows: (N, T) token ids, others than those of the maps.
        maps: (d, d) D of each layer, which stand in its place in ``repaired``.

    Raises:
        InputError: fewer than two windows.
    """
    if len(windows) < 2:
        raise InputError(
            f"{len(windows)} windows judge the linear maps: give more sequences, or a smaller repair_every"
        )
    full, runner, states = fidelity.reference(model, windows, metrics=["nll_nats"]), LayerRunner(model), []
    runner.drive(windows, lambda index, layer, hidden: states.append(hidden) or layer(hidden))
    whole = fidelity.compare_states(model, full, full.hidden, ["nll_nats"])["nll_nats"]
    rows = []
    for missing, change in progress(list(enumerate(maps))):
        hidden = states[missing]  # (N, T, d)
        both = [hidden, hidden + (hidden.float() @ change.float()).to(hidden.dtype)]
        ends = runner.drive(windows[:1], functools.partial(_behind, [torch.cat(both)], missing, len(maps) - 1))
        nll = fidelity.compare_states(model, full, ends, ["nll_nats"])["nll_nats"]
        rows.append(nll.reshape(2, -1) - whole)  # (2, N)
    return dict(zip(WORTH, np.stack(rows, axis=-1), strict=True))


def _behind(held: list[Tensor], missing: int, last: int, index: int, layer: Callable, hidden: Tensor) -> Tensor:
    """What a layer answers when ``held`` are the states that go through the layers behind ``missing``."""
    if index > missing:
        held[0] = layer(held[0])
    return held[0] if index == last else hidden


def t1_repaired(worth: dict[str, np.ndarray], maps: Sequence[Tensor], sums: Sequence[NormalEquations]) -> pd.DataFrame:
    """A row a layer: the loss it saves, ``removed_nats``, and what of that a linear map in its place leaves to save,
    ``repaired_nats``, with standard errors over windows; ``explained``: the share of its update that the map gives,
    on the text of the fit.
    """
    columns = {"layer": range(len(maps))}
    for name, values in worth.items():
        columns[f"{name}_nats"] = values.mean(axis=0)
        columns[f"{name}_nats_se"] = values.std(axis=0, ddof=1) / len(values) ** 0.5
    explained = [1 - each.error(D) / each.error(0 * D) for each, D in zip(sums, maps, strict=True)]
    return pd.DataFrame(columns).assign(explained=explained)


def t1_predicts(scores: LayerScores, worth: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Kendall's tau of each score with the loss without a layer, before and after a linear map takes its place.

    The 95% intervals are percentile bootstraps over the rows of the score and over the windows, of which there are few:
    redrawing adds to the noise, so that the interval of a tau can lie below it.
    """
    rows = []
    for name in SCORES:
        row, drawn = (
            {"score": name, "n": min(scores.rows(name), *map(len, worth.values()))},
            redrawn_score(scores, name, seed=seed),
        )
        for kind, values in worth.items():
            row[f"tau_{kind}"] = float(kendalltau(scores.mean(name), values.mean(axis=0)).statistic)
            interval = np.quantile(taus(drawn, redrawn(values, seed=seed)), [0.025, 0.975])
            row[f"tau_{kind}_lo"], row[f"tau_{kind}_hi"] = interval
        rows.append(row)
    return pd.DataFrame(rows)


def t1_rows(
    scores: LayerScores, values: ShapleyValues, worth: dict[str, np.ndarray], names: Sequence[str]
) -> pd.DataFrame:
    """The rows behind the means of a few scores, of Shapley values without the cap and of ``WORTH``, for tests on them:
    a row is a sequence, or a group of them, and column ``layer_<l>`` its number of layer l.
    """
    found = {name: scores.per_sequence[name].numpy() for name in names}
    found |= {"shapley_uncapped": values.groups[:, :, 1], **worth}
    frames = [pd.DataFrame(rows).add_prefix("layer_").assign(score=name) for name, rows in found.items()]
    frame = pd.concat(frames)
    return frame[["score", *frame.columns.drop("score")]]


def tau_of(table: pd.DataFrame, first: str, second: str, seed: int = 0) -> tuple[float, float, float]:
    """Kendall's tau of two scores of :func:`t1_rows`, with its 95% bootstrap interval."""
    rows = [table.loc[table["score"] == name].drop(columns="score").to_numpy() for name in (first, second)]
    tau = kendalltau(*(values.mean(axis=0) for values in rows)).statistic
    return float(tau), *np.quantile(taus(*(redrawn(values, seed=seed) for values in rows)), [0.025, 0.975])


def redrawn(rows: np.ndarray, draws: int = 200, seed: int = 0) -> np.ndarray:
    """(draws, L) means over bootstrap samples of rows (N, L); rows of the same N are drawn together."""
    picks = np.random.default_rng(seed).integers(len(rows), size=(draws, len(rows)))
    return rows[picks].mean(axis=1)


def redrawn_score(scores: LayerScores, name: str, draws: int = 200, seed: int = 0) -> np.ndarray:
    """:func:`redrawn` of a score's rows; of a combined score, of its parts."""
    if name not in scores.per_sequence:
        parts = {part: torch.tensor(redrawn_score(scores, part, draws, seed)) for part in SCORES[name].made_of}
        each = ({part: values[draw] for part, values in parts.items()} for draw in range(draws))
        return np.stack([SCORES[name].measure(means).numpy() for means in each])
    return redrawn(scores.per_sequence[name].numpy(), draws, seed)


def taus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(D,) Kendall's tau-b of each row of a (D, L) with that of b, all at once; a test holds it equal to scipy's."""
    first, second = np.triu_indices(a.shape[1], 1)
    orders = [np.sign(values[:, first] - values[:, second]) for values in (a, b)]  # (D, L (L - 1) / 2)
    untied = [np.square(order).sum(axis=1) for order in orders]
    return (orders[0] * orders[1]).sum(axis=1) / np.sqrt(untied[0] * untied[1])


def t1_causal(scores: LayerScores, values: ShapleyValues) -> pd.DataFrame:
    """Leave-one-out and Shapley values of each layer, the latter with and without the cap of the loss."""
    leave_one_out = scores.per_sequence["leave_one_out"].numpy().mean(axis=0)
    columns = {"layer": range(len(leave_one_out)), "leave_one_out": leave_one_out}
    for index, name in enumerate(("shapley", "shapley_uncapped")):
        columns[name] = values.mean[:, index]
        columns[f"{name}_se"] = values.standard_error[:, index]
    return pd.DataFrame(columns)


def t1_saturation(values: ShapleyValues) -> pd.DataFrame:
    """Loss of the coalitions of each size that the Shapley values rest on, with and without the cap."""
    frame = pd.DataFrame(values.coalitions, columns=["layers", "nll_capped_nats", "nll_nats"]).astype({"layers": int})
    rows = []
    for layers, part in frame.groupby("layers"):
        low, middle, high = np.quantile(part["nll_nats"], [0.1, 0.5, 0.9])
        rows.append({
            "layers": layers, "n": len(part), "nll_nats_p10": low, "nll_nats_median": middle, "nll_nats_p90": high,
            "nll_capped_nats_median": part["nll_capped_nats"].median(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def f1_repaired(repaired: pd.DataFrame, predicts: pd.DataFrame) -> Figure:
    """Does any score predict what is lost *after* a repair? Left: the loss without each layer, before and after the
    best linear map takes its place (log axis; bars: standard error over the calibration windows that the maps have not
    seen, n: one in `repair_every` of notebook 1's sequences). Right: Kendall's tau of each score with both, with 95%
    bootstrap intervals over sequences and windows.

    Args:
        repaired: t1_repaired.
        predicts: t1_predicts.
    """
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=[3, 2])
        order = predicts.sort_values("tau_repaired", ignore_index=True)
        for (name, text), colour, shift in zip(WORTH.items(), (RED, BLUE), (0.15, -0.15), strict=True):
            loss = repaired[f"{name}_nats"]
            style = {"ls": "", "marker": "o", "ms": 4, "color": colour, "elinewidth": 0.8, "label": text}
            left.errorbar(repaired["layer"] + shift, loss, repaired[f"{name}_nats_se"], **style)
            tau = order[f"tau_{name}"]
            ends = np.abs(np.stack([order[f"tau_{name}_{end}"] - tau for end in ("lo", "hi")]))
            right.errorbar(tau, order.index + shift, xerr=ends, **style)
        left.set_yscale("symlog", linthresh=0.01)
        left.set_xlabel("layer")
        left.set_ylabel("loss without it - full model's, nats/token")
        left.set_title("What is left after a repair")
        left.legend()
        right.set_yticks(order.index, [title(name) for name in order["score"]], size=7.5)
        right.axvline(0, color="black", lw=0.8)
        right.set_xlabel("Kendall's tau with the loss")
        right.set_title("What predicts it")
    plt.close(figure)
    return figure


def f1_causal(importance: pd.DataFrame, agreement: pd.DataFrame, scores: Sequence[str]) -> Figure:
    """Do cheap scores say what a layer is worth? A dot a layer, the four that are worth most numbered; bars: standard
    errors; tau: Kendall's, with its 95% bootstrap interval over sequences.

    Args:
        importance: t1_importance.
        agreement: t1_agreement.
        scores: the columns.
    """
    taus = agreement.set_index(["score_a", "score_b"])
    with matplotlib.rc_context(STYLE):
        size = (2.5 * len(scores), 2.6 * len(CAUSAL))
        figure, axes = plt.subplots(len(CAUSAL), len(scores), figsize=size, sharex="col", sharey="row", squeeze=False)
        for row, causal in zip(axes, CAUSAL, strict=True):
            for axis, score in zip(row, scores, strict=True):
                _against(axis, importance, score, causal)
                tau = taus.loc[(score, causal)]
                low, high = tau["kendall_tau_lo"], tau["kendall_tau_hi"]
                axis.set_title(f"tau {tau['kendall_tau']:.2f} [{low:.2f}, {high:.2f}]", weight="normal")
            row[0].set_ylabel(f"{title(causal)}, nats/token")
        for axis, score in zip(axes[-1], scores, strict=True):
            axis.set_xlabel(title(score))
    plt.close(figure)
    return figure


def _against(axis: Axes, importance: pd.DataFrame, score: str, causal: str) -> None:
    """One panel of :func:`f1_causal`; all share one kind of axes."""
    error = {"xerr": importance[f"{score}_se"], "yerr": importance[f"{causal}_se"]}
    style = {"ls": "", "marker": "o", "ms": 3, "color": BLUE, "elinewidth": 0.6}
    axis.errorbar(importance[score], importance[causal], **error, **style)
    best = importance.nlargest(4, causal).sort_values(score)
    for place, row in enumerate(best.to_dict("records")):  # the first number on the other side: neighbours do not meet
        side = {"xytext": (4, 3), "ha": "left"} if place else {"xytext": (-4, 3), "ha": "right"}
        axis.annotate(f"{row['layer']:.0f}", (row[score], row[causal]), textcoords="offset points", size=7, **side)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yscale("symlog", linthresh=0.1)


def f1_saturation(coalitions: pd.DataFrame, causal: pd.DataFrame, cap: float) -> Figure:
    """Why the loss is capped. Left: what random coalitions of each size lose (median; band: 10% to 90% of them).
    Right: Shapley values with and without the cap, as a share of the largest (bars: standard error over groups of
    permutations, each on a text window of its own).

    Args:
        coalitions: t1_saturation.
        causal: t1_causal.
        cap: log V, nats.
    """
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
        rows = coalitions[coalitions["layers"] > 0]
        left.fill_between(rows["layers"], rows["nll_nats_p10"], rows["nll_nats_p90"], color=RED, alpha=0.2, lw=0)
        left.plot(rows["layers"], rows["nll_nats_median"], color=RED, label="uncapped")
        left.plot(rows["layers"], rows["nll_capped_nats_median"], color=BLUE, label="each token capped")
        left.axhline(cap, color="black", ls="--", lw=1, label="uniform guess, log V")
        left.set_xlabel("layers in the coalition")
        left.set_ylabel("nats/token")
        none = coalitions.loc[coalitions["layers"] == 0, "nll_nats_median"].item()
        left.set_title(f"Loss of {coalitions['n'].sum():,} coalitions (without any layer: {none:.0f} nats)")
        left.legend()
        bars = (("shapley", BLUE, -0.2, "capped"), ("shapley_uncapped", RED, 0.2, "uncapped"))
        for name, colour, shift, label in bars:
            scale = causal[name].abs().max()
            right.bar(causal["layer"] + shift, causal[name] / scale, yerr=causal[f"{name}_se"] / scale, width=0.4,
                      color=colour, error_kw={"elinewidth": 0.7}, label=label)  # fmt: skip
        right.set_xlabel("layer")
        right.set_ylabel("Shapley value / largest")
        right.set_title("Shapley values")
        right.legend()
    plt.close(figure)
    return figure
