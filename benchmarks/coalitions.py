"""Leave-one-out and greedy removal with shared work against one forward pass a candidate: ratios in one run.

    python benchmarks/coalitions.py [--model NAME] [--dtype auto] [--blocks 8] [--length 64] [--keep 15] [--rounds 3]

The plain way builds the compact model of every candidate and calls it with ``labels=``, which is what the
published code does or wishes to do (SLEB runs the layers of the candidate, all of them). Both must find
the same losses and drop the same layers.
"""

import argparse
import statistics
import time

import torch

from paper_src import coalitions, data, models, selection
from paper_src.compaction import compact


class Plain:
    """An evaluator that shares nothing."""

    def __init__(self, model, blocks):
        self.model, self.blocks = model, blocks
        self.depth = len(models.decoder_layers(model))
        self.known = {}

    @torch.no_grad()
    def losses(self, subsets):
        """Mean NLL of every subset, one forward pass each."""
        for kept in subsets:
            if kept not in self.known:
                small = compact(self.model, kept)
                self.known[kept] = float(small(input_ids=self.blocks, labels=self.blocks, use_cache=False).loss)
        return [self.known[kept] for kept in subsets]


def leave_one_out(evaluator):
    """Losses without each layer."""
    layers = range(evaluator.depth)
    return evaluator.losses([tuple(other for other in layers if other != layer) for layer in layers])


def main():
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--keep", type=int, default=15, help="greedy removal stops here; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3, help="of leave-one-out; greedy removal runs once")
    arguments = parser.parse_args()
    loaded = models.load_model(arguments.model, arguments.dtype, "cpu")
    text, _ = data.load_text("wikitext-2", "train")
    blocks = data.token_blocks(loaded.tokenizer, text, arguments.blocks, arguments.length, 0)
    print(f"{loaded.model.dtype}, {blocks.numel()} tokens, {torch.get_num_threads()} threads")

    def timed(work, kind):
        evaluator = kind(loaded.model, blocks)
        start = time.perf_counter()
        found = work(evaluator)
        return found, time.perf_counter() - start

    ratios, error = [], 0.0
    for index in range(arguments.rounds + 1):
        plain, slow = timed(leave_one_out, Plain)
        ours, fast = timed(leave_one_out, coalitions.Evaluator)
        error = max(error, *(abs(a - b) / a for a, b in zip(plain, ours, strict=True)))
        if index:  # the first round warms up
            ratios.append(slow / fast)
    print(f"leave-one-out, plain/ours: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(f"largest relative difference of a loss: {error:.1e}")
    if arguments.keep:
        plain, slow = timed(lambda evaluator: selection.sleb(evaluator, arguments.keep), Plain)
        ours, fast = timed(lambda evaluator: selection.sleb(evaluator, arguments.keep), coalitions.Evaluator)
        print(f"greedy removal to k = {arguments.keep}, plain/ours: {slow / fast:.2f} ({slow:.0f} s, {fast:.0f} s)")
        print(f"the same layers: {plain == ours}, {ours}")


if __name__ == "__main__":
    main()
