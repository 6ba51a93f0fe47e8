"""Cells of a sweep over models, scores, k and seeds, each one process: see config/sweep.smk.

python -m paper_src.sweep cell owner/name scores.csv cell.csv --score fisher --strategy top_k --k 8
python -m paper_src.sweep table sweep.csv cell.csv ...
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from paper_src import InputError, data, fidelity, models, selection
from paper_src.compaction import compact
from paper_src.files import replacing
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


def main() -> int:
    """Command line; 0 on success, 1 with one line on standard error otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    one = jobs.add_parser("cell")
    for name in ("model", "scores", "output"):
        one.add_argument(name)
    for name, kind, value in (("strategy", str, "top_k"), ("score", str, "fisher"), ("k", int, 8), ("seed", int, 0),
                              ("text", str, "wikitext-2"), ("blocks", int, 8), ("length", int, 128),
                              ("dtype", str, "auto"), ("device", str, "auto")):  # fmt: skip
        one.add_argument(f"--{name}", type=kind, default=value)
    table = jobs.add_parser("table")
    table.add_argument("output")
    table.add_argument("cells", nargs="+")
    arguments = parser.parse_args()
    try:
        frame = _cell(arguments) if arguments.job == "cell" else pd.concat(map(pd.read_csv, arguments.cells))
        with replacing(Path(arguments.output)) as part:
            frame.to_csv(part, index=False)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _cell(use: argparse.Namespace) -> pd.DataFrame:
    kept = chosen(pd.read_csv(use.scores), use.strategy, use.score, use.k, use.seed)
    loaded = models.load_model(use.model, use.dtype, use.device)
    row = {"model": loaded.name, "strategy": use.strategy, "score": use.score, "k": use.k, "seed": use.seed,
           "kept": kept_text(kept), **measured(loaded, kept, use.text, (use.blocks, use.length))}  # fmt: skip
    return pd.DataFrame([row])


if __name__ == "__main__":
    sys.exit(main())
