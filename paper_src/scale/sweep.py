"""Cells of a sweep over models, scores, k and seeds, each one process: see config/sweep.smk."""

import argparse

import pandas as pd

from paper_src import InputError, data, fidelity, models, selection
from paper_src.compaction import compact
from paper_src.models import Loaded
from paper_src.selection import kept_text

METRICS = ("cosine", "kl_nats", "top1_agreement", "nll_nats")


def chosen(scores: pd.DataFrame, strategy: str, score: str, k: int, seed: int) -> tuple[int, ...]:
    """Kept layers by a column of ``scores``, one row a layer; or a random draw.

    Raises:
        InputError: no such strategy or score.
    """
    if strategy == "random":
        return selection.random_draws(len(scores), k, 1, seed)[0]
    known = selection.of_kind("score", "published", "rule")
    if strategy not in known:
        raise InputError(f"strategy {strategy!r}: use one of {('random', *known)}")
    needs = score if known[strategy].kind == "score" else known[strategy].needs
    given = {"depth": len(scores), **scores}
    if needs not in given:
        raise InputError(f"no score {needs!r}: there are {[name for name in scores if not name.endswith('_se')][1:]}")
    return known[strategy].function(given[needs], k)


def measured(loaded: Loaded, kept: tuple[int, ...], text: str, shape: tuple[int, int]) -> dict[str, float]:
    """Fidelity of the cut model on test text: the metrics and ``ppl_ratio`` with 95% intervals.

    Args:
        loaded: the full model.
        kept: layers.
        text: name for :func:`data.load_text`.
        shape: blocks, tokens of a block; the windows are the same for every cell.
    """
    blocks = data.token_blocks(loaded.tokenizer, data.load_text(text, "test")[0], *shape, 0)
    full = fidelity.reference(loaded.model, blocks, metrics=METRICS)
    values = fidelity.compare(compact(loaded.model, kept), full, metrics=METRICS)
    base = fidelity.compare(loaded.model, full, metrics=["nll_nats"])["nll_nats"]
    return fidelity.summarize(values, 0) | fidelity.ppl_ratio(values["nll_nats"], base)


def cell(use: argparse.Namespace) -> pd.DataFrame:
    """One cell of a sweep: select layers by a table of scores, cut the model, measure it on test text."""
    kept = chosen(pd.read_csv(use.scores), use.strategy, use.score, use.k, use.seed)
    loaded = models.load_model(use.model, use.dtype, use.device)
    row = {"model": loaded.name, "strategy": use.strategy, "score": use.score, "k": use.k, "seed": use.seed,
           "kept": kept_text(kept), **measured(loaded, kept, use.text, (use.blocks, use.length))}  # fmt: skip
    return pd.DataFrame([row])
