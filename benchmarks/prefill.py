"""Prefill of a compact model against the full one: the paper's speed claim, as ratios in one run.

python benchmarks/prefill.py [--model NAME] [--dtype auto] [--keep 8] [--rounds 15]
"""

import argparse

from paper_src import compaction, models, selection, timing


def main():
    """Print speedup, interval and share of the ideal for a few shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    loaded = models.load_model(arguments.model, arguments.dtype, arguments.device)
    depth = len(models.decoder_layers(loaded.model))
    small = compaction.compact(loaded.model, selection.evenly_spaced(depth, arguments.keep))
    for batch, length in ((1, 512), (4, 512), (1, 1024)):
        work = timing.Workload("prefill_hidden", batch, length)
        row = timing.compare_speed(loaded.model, {arguments.keep: small}, work, arguments.rounds)[0]
        print(
            f"{arguments.keep} of {depth} layers, batch {batch}, {length} tokens, {loaded.model.dtype}: "
            f"{row['speedup']:.2f} times [{row['speedup_lo']:.2f}, {row['speedup_hi']:.2f}], "
            f"{row['share_of_ideal']:.0%} of the ideal {row['ideal']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
