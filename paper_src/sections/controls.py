"""Section 8: wrong practice beside right practice, each row an experiment."""

import math
from collections.abc import Sequence
from random import Random

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import fidelity, timing
from paper_src.baselines.earlier_practice import (
    greedy_texts,
    made_up_scores,
    masked,
    text_similarity,
    time_requests,
    with_idle_layers,
)
from paper_src.coalitions import Evaluator, leave_one_out
from paper_src.compaction import compact
from paper_src.models import decoder_layers
from paper_src.reporting.findings import Findings, Read
from paper_src.reporting.style import BLUE, GREY, ORANGE, RED, STYLE
from paper_src.scoring import score_layers, title
from paper_src.selection import KeptLayers, kept_text, top_k
from paper_src.stats import control_p_value


def t8_text(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    new_tokens: int,
    full: fidelity.Reference,
) -> pd.DataFrame:
    """t8_text: similarity of each model's greedy text to that of the first, beside its metrics on test text.

    The last row, ``another prompt``, compares the first model's own texts for different prompts: what
    unrelated text scores.

    Args:
        models: name -> model, the full one first.
        tokenizer: of all of them.
        prompts: (B, T) token ids.
        new_tokens: length of the continuations.
        full: reference for the metrics.
    """
    texts = {name: greedy_texts(model, tokenizer, prompts, new_tokens) for name, model in models.items()}
    own = next(iter(texts.values()))
    rows = []
    for name, model in models.items():
        means = {metric: float(values.mean()) for metric, values in fidelity.compare(model, full).items()}
        rows.append({"model": name, "text_similarity": text_similarity(texts[name], own), **means})
    rows.append({"model": "another prompt", "text_similarity": text_similarity(own, own[1:] + own[:1])})
    return pd.DataFrame(rows).assign(n_prompts=len(prompts))


def candidates(importance: pd.DataFrame, scores: Sequence[str], k: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows score, draw, kept: Top-K by each real score, and by ``draws`` made-up ones (score ``normal``)."""
    rows = [{"score": score, "kept": kept_text(top_k(importance[score], k))} for score in scores]
    drawn = made_up_scores(len(importance), k, draws, seed)
    rows += [{"score": "normal", "draw": draw, "kept": kept_text(kept)} for draw, kept in enumerate(drawn)]
    return pd.DataFrame(rows).assign(draw=lambda frame: frame["draw"].astype("Int64"))


def score_tests(table: pd.DataFrame, measured: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """t8_random, what each made-up score leads to, and t8_scores, each real score's p-value against them.

    Args:
        table: from :func:`candidates`.
        measured: kept -> metric -> (N,); the full model first.
    """
    full = float(next(iter(measured.values()))["nll_nats"].mean())
    nll = table["kept"].map(lambda kept: float(measured[kept]["nll_nats"].mean()))
    table = table.assign(nll_nats=nll, ppl_ratio=np.exp(nll - full))
    drawn, real = table[table["score"] == "normal"], table[table["score"] != "normal"].drop(columns="draw")
    control = drawn["nll_nats"]
    p_values = [control_p_value(value, control, higher_is_better=False) for value in real["nll_nats"]]
    return drawn.reset_index(drop=True), real.assign(p_ppl=p_values, n_draws=len(drawn)).reset_index(drop=True)


def t8_permuted(model: PreTrainedModel, calibration: Tensor, test: Tensor, seed: int) -> pd.DataFrame:
    """t8_permuted: two models that compute the same with their layers in different places, and three ways to choose.

    Both are ``model`` among as many idle layers (:func:`with_idle_layers`); to keep half the layers, the idle
    ones must go. ``fixed_list`` is the right answer for the first model, as an index list; ``fisher`` and
    ``leave_one_out`` are taken of the model at hand.

    Args:
        model: a small model of L layers.
        calibration: (N, T) token ids, for the scores.
        test: (M, T) token ids, for the perplexity.
        seed: of the places.
    """
    depth = 2 * len(decoder_layers(model))
    generator = Random(seed)
    first, second = (sorted(generator.sample(range(depth), depth // 2)) for _ in range(2))
    rows = []
    for order, places in (("first", first), ("second", second)):
        deep = with_idle_layers(model, places, depth)
        judge, asked = Evaluator(deep, test), Evaluator(deep, calibration)
        fisher = score_layers(deep, calibration).mean("fisher").tolist()
        ways = {
            "fixed_list": tuple(first),
            "fisher": top_k(fisher, depth // 2),
            "leave_one_out": top_k(leave_one_out([asked])[0].tolist(), depth // 2),
        }
        for way, kept in ways.items():
            ratio = math.exp(judge(kept) - judge(range(depth)))
            rows.append({"model": order, "chosen_by": way, "kept": kept_text(kept), "working_layers": kept_text(places),
                         "working_kept": len({*kept} & {*places}), "ppl_ratio": ratio})  # fmt: skip
    return pd.DataFrame(rows)


def t8_speed(
    model: PreTrainedModel, kept: KeptLayers, tokens: int, requested: int, rounds: int, seed: int
) -> pd.DataFrame:
    """t8_speed: what each way of timing says the speedup of the compact model is.

    ``compacted`` and ``masked`` are timed as everywhere in this paper. ``forward`` and ``request`` are the
    compact model again, by a synchronized pass and through loopback HTTP; ``request_no_model`` is the ratio of
    two series of requests behind which there is no model. Intervals are over rounds: 5% to 95% of the single
    ratios.

    Args:
        model: the full model.
        kept: layers of the compact model.
        tokens: of the workload of ``compacted`` and ``masked``.
        requested: tokens of a request.
        rounds: of each.
        seed: of the token ids.
    """
    small, veiled = compact(model, kept), masked(model, kept)
    workload = timing.Workload("prefill_hidden", 1, tokens)
    by_kind = {1: ("compacted", small), 2: ("masked", veiled)}
    timed = timing.compare_speed(model, {key: other for key, (_, other) in by_kind.items()}, workload, rounds, seed)
    rows = [
        {"timed": by_kind[row["k"]][0], "speedup": row["speedup"], "speedup_lo": row["speedup_lo"],
         "speedup_hi": row["speedup_hi"], "full_ms": row["full_ms"], "compact_ms": row["compact_ms"]}
        for row in timed
    ]  # fmt: skip
    seconds = time_requests(model, small, requested, rounds, seed)
    pairs = {"forward": ("full", "compact"), "request": ("request_full", "request_compact"),
             "request_no_model": ("request_a", "request_b")}  # fmt: skip
    for name, (a, b) in pairs.items():
        ratios = seconds[a] / seconds[b]
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        rows.append({"timed": name, "speedup": middle, "speedup_lo": low, "speedup_hi": high,
                     "full_ms": 1e3 * np.median(seconds[a]), "compact_ms": 1e3 * np.median(seconds[b])})  # fmt: skip
    return pd.DataFrame(rows).assign(k=len(kept), rounds=rounds)


def t8_controls(
    drawn: pd.DataFrame, scores: pd.DataFrame, moved: pd.DataFrame, speed: pd.DataFrame, text: pd.DataFrame
) -> pd.DataFrame:
    """t8_controls: a row a practice, with the number that shows how wrong it is.

    Args:
        drawn: t8_random.
        scores: t8_scores.
        moved: t8_permuted.
        speed: t8_speed.
        text: t8_text.
    """
    ratios = drawn["ppl_ratio"]
    by_way = moved.set_index(["model", "chosen_by"])["ppl_ratio"]
    timed = speed.set_index("timed")
    similar = text.set_index("model")
    models = text[text["kl_nats"].notna() & ~text["model"].isin(["full"])]
    sharp, loose = similar.loc["sharpened"], models.loc[models["kl_nats"].idxmin()]
    spread = timed.loc["request_no_model"]
    rows = [
        ("scores from np.random.normal", "scores from the model, tested against random ones",
         "perplexity / full, worst over best draw", ratios.max() / ratios.min(),
         f"{int((scores['p_ppl'] > 0.05).sum())} of {len(scores)} real scores are not better than made-up ones "
         "either (p > 0.05)"),
        ("hard-coded layers", "layers chosen on the model at hand",
         "perplexity / full on a model with the same layers in other places: list over leave-one-out",
         by_way["second", "fixed_list"] / by_way["second", "leave_one_out"],
         f"the list is right on the first model (ratio {by_way['first', 'fixed_list']:.2f})"),
        ("no compact model, layers masked", "layers really removed",
         "speedup of the compact over that of the masked model",
         timed.loc["compacted", "speedup"] / timed.loc["masked", "speedup"],
         f"masked {timed.loc['masked', 'speedup']:.2f}, compacted {timed.loc['compacted', 'speedup']:.2f} times"),
        ("time of a network request", "synchronized time of the forward pass",
         "speedup by forward passes over speedup by requests",
         timed.loc["forward", "speedup"] / timed.loc["request", "speedup"],
         f"requests without any model: single speedups of {spread['speedup_lo']:.2f} to {spread['speedup_hi']:.2f}"),
        ("text similarity of generations", "KL, MSE and cosine on held-out text",
         "KL of a model whose text is identical over KL of the nearest model by KL",
         sharp["kl_nats"] / loose["kl_nats"],
         f"similarity {sharp['text_similarity']:.2f} at KL {sharp['kl_nats']:.2f} nats, and "
         f"{loose['text_similarity']:.2f} at {loose['kl_nats']:.2f} nats; unrelated text has "
         f"{similar.loc['another prompt', 'text_similarity']:.2f}"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["practice", "instead", "measure", "how_wrong", "seen"])


def f8_controls(
    drawn: pd.DataFrame, scores: pd.DataFrame, moved: pd.DataFrame, speed: pd.DataFrame, text: pd.DataFrame
) -> Figure:
    """One panel for each wrong practice beside the right one.

    Args:
        drawn: t8_random.
        scores: t8_scores.
        moved: t8_permuted.
        speed: t8_speed.
        text: t8_text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7))
        _made_up(axes[0, 0], drawn, scores)
        _moved(axes[0, 1], moved)
        _timed(axes[1, 0], speed)
        _texts(axes[1, 1], text)
    plt.close(figure)
    return figure


def _made_up(axis: Axes, drawn: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Outcomes of made-up scores, and below them those of real ones."""
    axis.hist(np.log10(drawn["ppl_ratio"]), bins=20, color="#b5b5b5", label=f"{len(drawn)} made-up scores")
    tops, unit = scores.sort_values("ppl_ratio"), axis.get_ylim()[1] / 20
    for index, row in enumerate(tops.itertuples()):
        axis.plot(np.log10(row.ppl_ratio), unit * (-1.4 - 1.2 * index), "o", ms=3.5, color=BLUE)
        label = f"{title(row.score)} (p = {row.p_ppl:.2f})"
        axis.annotate(label, (np.log10(row.ppl_ratio), unit * (-1.4 - 1.2 * index)), textcoords="offset points",
                      xytext=(5, -2), size=5.5)  # fmt: skip
    axis.margins(x=0.05)
    axis.set_xlim(right=axis.get_xlim()[1] + 0.45 * np.diff(axis.get_xlim()).item())  # room for the names
    axis.set_yticks([tick for tick in axis.get_yticks() if tick >= 0])
    axis.set_xlabel("log10 of perplexity / full model's")
    axis.set_ylabel("draws")
    axis.set_title("Scores from np.random.normal, and real ones (dots)")
    axis.legend(loc="upper right")


def _moved(axis: Axes, moved: pd.DataFrame) -> None:
    """What each way of choosing keeps of two models with the same layers in other places."""
    ways = list(dict.fromkeys(moved["chosen_by"]))
    for shift, (order, part), colour in zip((-0.2, 0.2), moved.groupby("model"), (BLUE, ORANGE), strict=True):
        height = part.set_index("chosen_by").loc[ways, "ppl_ratio"]
        axis.bar(np.arange(len(ways)) + shift, height, width=0.4, color=colour, label=f"{order} model")
        for place, kept in enumerate(part.set_index("chosen_by").loc[ways, "working_kept"]):
            axis.annotate(f"{kept} kept", (place + shift, height.iloc[place]), ha="center", va="bottom", size=7)
    axis.set_xticks(range(len(ways)), [way.replace("_", " ") for way in ways])
    axis.set_yscale("log")
    axis.set_ylabel("perplexity / full model's")
    axis.set_title("The same layers in other places (working layers kept)")
    axis.legend()


def _timed(axis: Axes, speed: pd.DataFrame) -> None:
    """The speedup that each way of timing finds."""
    error = [speed["speedup"] - speed["speedup_lo"], speed["speedup_hi"] - speed["speedup"]]
    colours = [BLUE, RED, BLUE, RED, RED]
    axis.barh(speed["timed"].str.replace("_", " "), speed["speedup"], xerr=error, color=colours)
    axis.axvline(1, color="black", lw=1)
    axis.invert_yaxis()
    axis.set_xlabel("speedup found (blue: right practice)")
    axis.set_title(f"Masks, and requests over HTTP (k = {speed['k'].iloc[0]})")


def _texts(axis: Axes, text: pd.DataFrame) -> None:
    """Text similarity against KL."""
    models = text[text["kl_nats"].notna()]
    axis.plot(models["kl_nats"], models["text_similarity"], "o", color=BLUE)
    for row in models.itertuples():
        axis.annotate(row.model, (row.kl_nats, row.text_similarity), textcoords="offset points", xytext=(4, 3), size=7)
    unrelated = text.loc[text["kl_nats"].isna(), "text_similarity"].item()
    axis.axhline(unrelated, color=GREY, ls="--", lw=1, label="texts of different prompts")
    axis.set_xscale("symlog", linthresh=0.1)
    axis.set_xlabel("KL(full || model), nats/token")
    axis.set_ylabel("similarity to the full model's text")
    axis.set_title("Text similarity against KL")
    axis.set_ylim(0, 1.08)
    axis.margins(x=0.18)
    axis.legend(loc="lower left")


def t8_findings(read: Read) -> pd.DataFrame:
    """t8_findings: how far off each practice of the earlier report is."""
    found, controls = Findings(), read("t8_controls")["how_wrong"]
    names = ("made_up_scores", "fixed_list", "masked", "network_request", "same_text")
    for name, wrong, what in zip(names, controls, read("t8_controls")["measure"], strict=True):
        found.add("t8_controls", f"{name}_wrong_by", wrong, unit=what)
    scores, drawn = read("t8_scores"), read("t8_random")
    found.add("t8_random", "made_up_draws", len(drawn), unit="draws")
    found.add("t8_scores", "real_no_better_than_made_up", (scores["p_ppl"] > 1 / 20).sum(), n=len(scores),
              unit="scores, p > 0.05")  # fmt: skip
    moved = read("t8_permuted").set_index(["model", "chosen_by"])["ppl_ratio"]
    for order in ("first", "second"):
        found.add("t8_permuted", f"fixed_list_{order}_model", moved[order, "fixed_list"], unit="perplexity / full")
    for row in read("t8_speed").itertuples():
        found.add("t8_speed", f"timed_{row.timed}", row.speedup, row.speedup_lo, row.speedup_hi, unit="times",
                  n=row.rounds)  # fmt: skip
    text = read("t8_text").set_index("model")
    nearest = text.drop(index="full")["kl_nats"].idxmin()
    for role, model in (("same_text", "sharpened"), ("nearest", nearest), ("other_prompt", "another prompt")):
        found.add("t8_text", f"text_similarity_{role}", text.loc[model, "text_similarity"], unit="similarity")
        if role != "other_prompt":
            found.add("t8_text", f"kl_{role}", text.loc[model, "kl_nats"], unit="nats/token")
    return found.frame()
