"""Released code of published methods beside ours, on the same weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from paper_src.baselines.methods import METHODS
from paper_src.selection import STRATEGIES


@dataclass(frozen=True)
class Released:
    """Perplexities of models that peers' own code made, by name and k, on the weights of ``model``.

    Each was run once, one seed, and judged on 16 windows of 512 tokens of WikiText-2's test split.
    """

    model: str
    text: str  # its form: raw, or with <unk> for rare words
    ppl_full: float  # the full model's in the same run
    ppl: Mapping[str, Mapping[int, float]]


SELECTIONS = Released("smollm2-135m-instruct", "with <unk>", 29.17, {
    "evopress": {22: 84.3},  # 20 generations of 12, by KL
    "sleb": {22: 90.9, 15: 375, 8: 6533},
    "shortened_llama_taylor_plus": {22: 92.3, 15: 7074, 8: 232262},
    "shortgpt": {22: 92.8, 15: 1076, 8: 43162},
    "shortened_llama_ppl": {22: 137.9, 15: 705, 8: 17437},
    "drop_block": {22: 349.9, 15: 65006, 8: 13183},
})  # fmt: skip
# The peers' own functions (the fit of the map; the two of the factor and of scaling) on states of 64 windows of 128
# tokens of calibration text and the layers of sections 2 and 5. Around them stood our loop over gaps and our collecting
# of states, on a CPU, which their scripts do not know: a check of the formulas, not of the whole scripts.
MODELS = Released("smollm2-135m-instruct", "raw", 29.94, {
    "replace_me_cosine": {22: 399.0, 8: 16072},
    "cut_magnitude": {22: 97.3},  # on 16 of the windows, gap after gap; the head untied from the scaled embedding
})  # fmt: skip
OWN_BUDGET = {"evopress": "evopress_paper"}  # our row that has at least the generations of the released run, if it ran


def t4_peers(fidelity: pd.DataFrame, model: str) -> pd.DataFrame:
    """t4_peers: selections by peers' own code beside ours of the same name, before any repair.

    ``released_ratio`` and ``ppl_ratio`` are perplexities over the full model's in the same run, ``ratio`` is ours over
    theirs. They chose on their own calibration text and ours on ours: a few per cent mean nothing. EvoPress searched by
    the KL divergence there; here it is by the loss that section 2 says.

    Args:
        fidelity: t4_fidelity.
        model: registry name; beside another model than that of the released figures ours are left out.
    """
    there = set(fidelity["strategy"])
    ours = {name: own for name, own in OWN_BUDGET.items() if own in there}
    titles = {name: strategy.title for name, strategy in STRATEGIES.items()}
    return _beside(SELECTIONS, fidelity.rename(columns={"strategy": "name"}), model, titles, ours)


def t7_peers(baselines: pd.DataFrame, model: str) -> pd.DataFrame:
    """t7_peers: models that peers' own code made beside ours of the same method, before any training.

    Columns as in :func:`t4_peers`. Theirs had the same kind of calibration text, though a profile may take more or
    less of it, and the same layers, if sections 2 and 5 chose as they did then.

    Args:
        baselines: t7_baselines.
        model: registry name, as in :func:`t4_peers`.
    """
    titles = {name: method.title for name, method in METHODS.items()}
    return _beside(MODELS, baselines[~baselines["recovered"].astype(bool)], model, titles, {})


def _beside(
    run: Released, table: pd.DataFrame, model: str, titles: Mapping[str, str], ours: Mapping[str, str]
) -> pd.DataFrame:
    columns = ["ppl", "ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi"]
    table = table[table["name"].notna() & (model == run.model)]
    table = table.drop_duplicates(["name", "k"]).set_index(["name", "k"])
    rows = []
    for name, by_k in run.ppl.items():
        for k, ppl in by_k.items():
            own = ours.get(name, name)
            found = table.reindex([(own, k)], columns=columns).iloc[0].to_dict()
            theirs = {"released_ppl": ppl, "released_ratio": ppl / run.ppl_full}
            ratio = found["ppl_ratio"] / theirs["released_ratio"]
            last = {"ratio": ratio, "released_text": run.text}
            rows.append({"method": titles[name], "name": own, "k": k, **theirs, **found, **last})
    return pd.DataFrame(rows)
