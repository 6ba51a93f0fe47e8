"""Scoring against the plain per-sequence loop: seconds and peak memory, as ratios in one run.

    python benchmarks/scoring.py [--model NAME] [--dtype float32] [--sequences 16] [--length 128] [--rounds 5]

Time: both compute E ||g||^2 for every layer; the loop is one backward() a sequence and sums over
``param.grad``, with gradients asked for the layers' parameters alone (so the loop is not made slow by
the embedding). Memory: each variant runs in a process of its own; what is compared is the growth of
the peak resident set over the loaded model.
"""

import argparse
import multiprocessing
import statistics
import time

import psutil
import torch

from paper_src import data, models, scoring
from paper_src.support.machine import peak_resident_bytes


def plain_loop(model, blocks):
    """(N, L) squared gradient norms by one backward() a sequence."""
    layers = models.decoder_layers(model)
    model.requires_grad_(False)
    layers.requires_grad_(True)
    rows = []
    for block in blocks:
        model.zero_grad(set_to_none=True)
        model(input_ids=block[None], labels=block[None], use_cache=False).loss.backward()
        rows.append([sum(p.grad.double().square().sum() for p in layer.parameters()) for layer in layers])
    return torch.tensor(rows)


def forward_kept(model, blocks, batch_size):
    """A forward pass that keeps what a backward pass would need, batch by batch."""
    for batch in blocks.split(batch_size):
        model(input_ids=batch, labels=batch, use_cache=False)


def peak_growth(arguments, variant):
    """Peak resident bytes of one variant over those of the loaded model (run in a fresh process)."""
    model, blocks = prepare(arguments)
    resident = psutil.Process().memory_info().rss
    if variant == "forward":
        forward_kept(model, blocks, arguments.batch_size)
    elif variant == "ours":
        scoring.score_layers(model, blocks, arguments.batch_size)
    else:
        plain_loop(model, blocks)
    return peak_resident_bytes() - resident


def prepare(arguments):
    """The model and the calibration blocks."""
    loaded = models.load_model(arguments.model, arguments.dtype, "cpu")
    text, _ = data.load_text("wikitext-2", "train")
    return loaded.model, data.token_blocks(loaded.tokenizer, text, arguments.sequences, arguments.length, 0)


def main():
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, blocks = prepare(arguments)
    ratios, error = [], 0.0
    for index in range(arguments.rounds + 1):
        start = time.perf_counter()
        reference = plain_loop(model, blocks)
        middle = time.perf_counter()
        ours = scoring.score_layers(model, blocks, arguments.batch_size).per_sequence["fisher"]
        end = time.perf_counter()
        error = max(error, float(((ours - reference) / reference).abs().max()))
        if index:  # the first round warms up
            ratios.append((middle - start) / (end - middle))
            print(f"round {index}: loop {middle - start:.2f} s, ours {end - middle:.2f} s")
    print(f"time ratio loop/ours: median {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(f"largest relative difference of per-sequence Fisher: {error:.1e}")
    spawn = multiprocessing.get_context("spawn")
    growth = {}
    for variant in ("forward", "ours", "loop"):
        with spawn.Pool(1) as pool:
            growth[variant] = pool.apply(peak_growth, (arguments, variant))
        print(f"peak growth, {variant}: {growth[variant] / 2**20:.0f} MiB")
    print(f"memory ratio ours/forward: {growth['ours'] / growth['forward']:.2f}")


if __name__ == "__main__":
    main()
