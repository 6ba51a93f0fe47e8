"""Section 8: wrong practice beside right practice, each row an experiment."""

from collections.abc import Iterable, Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import fidelity, timing
from paper_src.baselines import earlier_practice
from paper_src.coalitions import Evaluator, leave_one_out
from paper_src.compaction import compact
from paper_src.reporting.findings import SIGN_FLIP, Findings, Read
from paper_src.reporting.style import BLUE, GREY, ORANGE, RED, STYLE
from paper_src.scoring import score_layers, title
from paper_src.sections.fidelity import measure
from paper_src.sections.windows import losses, window_rows
from paper_src.selection import KeptLayers, kept_text, top_k
from paper_src.stats import control_p_value, paired

MADE_UP = "normal"  # the name of scores from np.random.normal


def candidates(importance: pd.DataFrame, scores: Iterable[str], k: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows score, draw, kept: Top-K by each real score, and by ``draws`` made-up ones."""
    rows = [{"score": score, "kept": kept_text(top_k(importance[score], k))} for score in scores]
    drawn = earlier_practice.made_up_scores(len(importance), k, draws, seed)
    rows += [{"score": MADE_UP, "draw": draw, "kept": kept_text(kept)} for draw, kept in enumerate(drawn)]
    return pd.DataFrame(rows).astype({"draw": "Int64"})


def score_tests(table: pd.DataFrame, measured: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """t8_random, what each made-up score leads to, and t8_scores, each real score's p-value against them.

    Args:
        table: from :func:`candidates`.
        measured: kept -> metric -> (N,); the full model first.
    """
    full = float(next(iter(measured.values()))["nll_nats"].mean())
    nll = table["kept"].map(lambda kept: float(measured[kept]["nll_nats"].mean()))
    table = table.assign(nll_nats=nll, ppl_ratio=np.exp(nll - full))
    drawn, real = table[table["score"] == MADE_UP], table[table["score"] != MADE_UP].drop(columns="draw")
    p_values = [control_p_value(value, drawn["nll_nats"], higher_is_better=False) for value in real["nll_nats"]]
    return drawn.reset_index(drop=True), real.assign(p_ppl=p_values, n_draws=len(drawn)).reset_index(drop=True)


def t8_permuted(
    models: Mapping[str, PreTrainedModel], places: Mapping[str, KeptLayers], calibration: Tensor, test: Tensor,
    text: str, model_digest: str,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Three ways to keep the working layers of models that compute the same with their layers in different places.

    ``fixed_list`` is the right answer for the first model, as an index list; ``fisher`` and ``leave_one_out`` are
    taken of the model at hand. Returns t8_permuted, and t8_windows with the losses of each on every test window.

    Args:
        models: name -> a model with working layers among idle ones, of :func:`earlier_practice.with_idle_layers`.
        places: name -> where the working layers stand.
        calibration: (N, T) token ids, for the scores.
        test: (M, T) token ids, for the perplexity.
        text: kind of text.
        model_digest: of the small model, as which all of ``models`` answer.
    """
    rows, windows, listed = [], [], next(iter(places.values()))
    for order, model in models.items():
        asked, k = Evaluator(model, calibration), len(listed)
        ways = {
            "fixed_list": listed,
            "fisher": top_k(score_layers(model, calibration).mean("fisher").tolist(), k),
            "leave_one_out": top_k(leave_one_out([asked])[0].tolist(), k),
        }
        table = pd.DataFrame({"way": ways.keys(), "kept": map(kept_text, ways.values())})
        full = fidelity.reference(model, test, metrics=["nll_nats"])
        measured = measure(model, full, table, ["nll_nats"])
        for way, kept in table.itertuples(index=False):
            ratio = fidelity.ppl_ratio(measured[kept]["nll_nats"], next(iter(measured.values()))["nll_nats"])
            rows.append({"model": order, "chosen_by": way, "kept": kept, "working_layers": kept_text(places[order]),
                         "working_kept": len({*ways[way]} & {*places[order]}), **ratio})  # fmt: skip
            windows.append(window_rows(f"{order} {way}", text, test, model_digest, measured[kept]))
    return pd.DataFrame(rows), pd.concat(windows, ignore_index=True)


SPREADS = ("95% of the median, by order statistics", "90% of single rounds")


def t8_speed(
    model: PreTrainedModel, kept: KeptLayers, tokens: int, requested: int, rounds: int, seed: int
) -> pd.DataFrame:
    """What each way of timing says the speedup of the compact model is; ``spread`` says what the interval is of.

    ``compacted`` and ``masked`` are timed as everywhere in this paper. ``forward`` and ``request`` are the compact
    model again, by a synchronized pass and through loopback HTTP; ``request_no_model`` is the ratio of two series of
    requests behind which there is no model.

    Args:
        tokens: of the workload of ``compacted`` and ``masked``.
        requested: tokens of a request.
        rounds: of each.
    """
    small = compact(model, kept)
    timed = {"compacted": small, "masked": earlier_practice.masked(model, kept)}
    found = timing.compare_speed(model, timed, timing.Workload("prefill_hidden", 1, tokens), rounds, seed)
    columns = ("speedup", "speedup_lo", "speedup_hi", "full_ms", "compact_ms")
    rows = [{"timed": row["k"], **{name: row[name] for name in columns}, "spread": SPREADS[0]} for row in found]
    seconds = earlier_practice.time_requests(model, small, requested, rounds, seed)
    pairs = {"forward": ("full", "compact"), "request": ("request_full", "request_compact"),
             "request_no_model": ("request_a", "request_b")}  # fmt: skip
    for name, (a, b) in pairs.items():
        low, middle, high = np.quantile(seconds[a] / seconds[b], [0.05, 0.5, 0.95])
        medians = (1e3 * np.median(seconds[a]), 1e3 * np.median(seconds[b]))
        rows.append({"timed": name, **dict(zip(columns, (middle, low, high, *medians), strict=True)),
                     "spread": SPREADS[1]})  # fmt: skip
    return pd.DataFrame(rows).assign(k=len(kept), rounds=rounds)


def t8_text(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int,
    full: fidelity.Reference,
) -> pd.DataFrame:  # fmt: skip
    """Similarity of each model's greedy text to that of the first, beside its metrics on test text.

    The last row, ``another prompt``, compares the first model's own texts for different prompts: what
    unrelated text scores.

    Args:
        models: name -> model, the full one first.
        prompts: (B, T) token ids.
        new_tokens: length of the continuations.
        full: reference for the metrics.
    """
    texts = {name: earlier_practice.greedy_texts(model, tokenizer, prompts, new_tokens)
             for name, model in models.items()}  # fmt: skip
    own, rows = next(iter(texts.values())), []
    for name, model in models.items():
        means = {metric: float(values.mean()) for metric, values in fidelity.compare(model, full).items()}
        rows.append({"model": name, "text_similarity": earlier_practice.text_similarity(texts[name], own), **means})
    unrelated = earlier_practice.text_similarity(own, own[1:] + own[:1])
    rows.append({"model": "another prompt", "text_similarity": unrelated})
    return pd.DataFrame(rows).assign(n_prompts=len(prompts))


def t8_controls(
    drawn: pd.DataFrame, scores: pd.DataFrame, moved: pd.DataFrame, speed: pd.DataFrame, text: pd.DataFrame
) -> pd.DataFrame:
    """A row per practice, with the number that shows how wrong it is, from the tables above."""
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
    """Each wrong practice beside the right one. Top left: Top-K by real scores, with their p-value against made-up ones
    (ticks; grey: 90% of them). Top right: layers kept of two equal models, by an index list and by scores. Bottom left:
    speedups, with 95% intervals of the median by order statistics for compacted and masked, and 90% of single rounds
    for the others. Bottom right: similarity of greedy texts, with the divergence of the model that wrote them.

    Args:
        drawn: t8_random.
        scores: t8_scores.
        moved: t8_permuted.
        speed: t8_speed.
        text: t8_text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), height_ratios=[1.3, 1])
        _made_up(axes[0, 0], drawn, scores)
        _moved(axes[0, 1], moved)
        _timed(axes[1, 0], speed)
        _texts(axes[1, 1], text)
    plt.close(figure)
    return figure


def _made_up(axis: Axes, drawn: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Perplexity after Top-K by each real score, the best first, and by made-up ones."""
    rows = scores.sort_values("ppl_ratio")
    axis.axvspan(*drawn["ppl_ratio"].quantile([0.05, 0.95]), color=GREY, alpha=0.25, lw=0)
    axis.plot(rows["ppl_ratio"], range(len(rows)), "o", ms=5, color=BLUE)
    axis.plot(drawn["ppl_ratio"], [len(rows)] * len(drawn), "|", ms=8, color=RED)
    names = [f"{title(score)} (p = {p:.2f})" for score, p in zip(rows["score"], rows["p_ppl"], strict=True)]
    axis.set_yticks(range(len(rows) + 1), [*names, f"{len(drawn)} x np.random.normal"], size=7)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("perplexity / full model's")
    axis.set_title(f"Real scores and made-up ones (k = {len(drawn['kept'].iloc[0].split())})")


def _moved(axis: Axes, moved: pd.DataFrame) -> None:
    """What each way of choosing keeps of two models with the same layers in other places."""
    ways = list(dict.fromkeys(moved["chosen_by"]))
    for shift, (order, part), colour in zip((-0.2, 0.2), moved.groupby("model"), (BLUE, ORANGE), strict=True):
        height = part.set_index("chosen_by").loc[ways, "ppl_ratio"]
        axis.bar(np.arange(len(ways)) + shift, height, width=0.4, color=colour, label=f"{order} model")
        total = len(part["working_layers"].iloc[0].split())
        for place, kept in enumerate(part.set_index("chosen_by").loc[ways, "working_kept"]):
            axis.annotate(f"{kept} of {total}", (place + shift, height.iloc[place]), ha="center", va="bottom", size=7)
    axis.set_xticks(range(len(ways)), [title(way) for way in ways])
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_ylabel("perplexity / full model's")
    axis.set_title("Layers in other places: working ones kept")
    axis.legend()


def _timed(axis: Axes, speed: pd.DataFrame) -> None:
    """The speedup that each way of timing finds; blue is right practice."""
    error = [speed["speedup"] - speed["speedup_lo"], speed["speedup_hi"] - speed["speedup"]]
    colours = [BLUE if timed in ("compacted", "forward") else RED for timed in speed["timed"]]
    axis.barh(speed["timed"].str.replace("_", " "), speed["speedup"], xerr=error, color=colours)
    axis.axvline(1, color="black", lw=1)
    axis.invert_yaxis()
    axis.set_xlabel(f"speedup found (n = {speed['rounds'].iloc[0]} rounds; blue: right practice)")
    axis.set_title(f"Masks, and requests over HTTP (k = {speed['k'].iloc[0]})")


def _texts(axis: Axes, text: pd.DataFrame) -> None:
    """Text similarity, with the KL divergence written beside it."""
    colours = [GREY if np.isnan(kl) else BLUE for kl in text["kl_nats"]]
    bars = axis.barh(text["model"], text["text_similarity"], color=colours)
    axis.bar_label(bars, ["unrelated" if np.isnan(kl) else f"KL {kl:.2f}" for kl in text["kl_nats"]], padding=3, size=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2)
    axis.set_xlabel(f"similarity to the full model's text (n = {text['n_prompts'].iloc[0]} prompts)")
    axis.set_title("Text similarity and KL, nats/token")


def t8_findings(read: Read, seed: int = 0) -> pd.DataFrame:
    """t8_findings: how far off each practice of the earlier report is; the list by a paired test of its two rows."""
    found, controls = Findings(), read("t8_controls")
    names = ("made_up_scores", "fixed_list", "masked", "network_request", "same_text")
    windows = read("t8_windows")
    pair = paired(losses(windows, "second fixed_list"), losses(windows, "second leave_one_out"), seed)
    (_, low, high), test = pair.ratio(), SIGN_FLIP
    tested = {"fixed_list": {"lo": low, "hi": high, "n": pair.n, "test": test, "p": pair.p}}
    for name, wrong, what in zip(names, controls["how_wrong"], controls["measure"], strict=True):
        found.add("t8_controls", f"{name}_wrong_by", wrong, unit=what, **tested.get(name, {}))
    different, drawn = read("t8_scores").drop_duplicates("kept"), read("t8_random")
    found.add("t8_random", "made_up_draws", len(drawn), unit="draws")
    found.add("t8_scores", "real_no_better_than_made_up", (different["p_ppl"] > 1 / 20).sum(), n=len(different),
              unit="different selections by real scores, p > 0.05", test="random selections")  # fmt: skip
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
