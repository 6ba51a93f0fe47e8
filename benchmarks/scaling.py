"""How time grows with tokens, layers and candidates: python benchmarks/scaling.py (about three minutes on 2 cores).

Prints, for each step, seconds at several sizes and the exponent of the best power law through them, beside the
exponent that docs/scaling.md expects. Sizes are interleaved; the median of the rounds counts.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from paper_src import coalitions, data, models, recovery, scoring, timing
from paper_src.compaction import compact


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measured(sizes: list[int], run: Callable[[int], object], rounds: int) -> list[float]:
    """Median seconds of ``run(size)`` for each size."""

    def timed(size: int) -> float:
        start = time.perf_counter()
        run(size)
        return time.perf_counter() - start

    timed(sizes[0])  # warms up
    return [float(np.median(seconds)) for seconds in timing.interleaved(sizes, timed, rounds).values()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    loaded = models.load_model(arguments.model)
    full, depth = loaded.model, len(models.decoder_layers(loaded.model))
    text, _ = data.load_text("wikitext-2", "train")
    blocks = data.token_blocks(loaded.tokenizer, text, 64, 128, 0)
    cut = {k: compact(full, range(k)) for k in (depth // 4, depth // 2, depth)}
    subsets = [tuple(layer for layer in range(depth) if layer != left) for left in range(depth)]

    def evaluate(count: int) -> None:
        chosen = [subsets[round(place * (depth - 1) / (count - 1))] for place in range(count)]  # over the whole depth
        coalitions.Evaluator(full, blocks[:4]).evaluate(chosen)

    steps = [
        ("scores over tokens", 1, [8, 16, 32], lambda n: scoring.score_layers(full, blocks[:n], 8)),
        ("scores over layers", 1, list(cut), lambda k: scoring.score_layers(cut[k], blocks[:8], 8)),
        ("leave-one-out over layers", 2, list(cut),
         lambda k: coalitions.leave_one_out([coalitions.Evaluator(cut[k], blocks[:4])])),
        ("evaluator over candidates", 1, [8, 15, 30], evaluate),
        ("closed form over tokens", 1, [16, 32, 64],
         lambda n: recovery.closed_form(full, (0, 1, depth - 1), blocks[:n])),
    ]  # fmt: skip
    print("| step | sizes | seconds | exponent | expected |\n|---|---|---|---|---|")
    for name, expected, sizes, run in steps:
        seconds = measured(sizes, run, arguments.rounds)
        listed = ", ".join(f"{value:.2f}" for value in seconds)
        found = exponent(sizes, seconds)
        print(f"| {name} | {', '.join(map(str, sizes))} | {listed} | {found:.2f} | {expected} |", flush=True)


if __name__ == "__main__":
    main()
