"""Distillation against the machine's matrix products: tokens a second, and the share of the product peak.

    python benchmarks/distillation.py [--model NAME] [--dtype auto] [--keep 8] [--blocks 64] [--length 128]

The first pass asks the full model for its states, the second reads them. Operations are those of weight products in
the forward and backward passes; attention, norms and the optimizer are left out, so that the share is what a step
spends on useful products. The peak is the best of several square products in the same dtype, in the same run.
"""

import argparse
import tempfile
import time

import torch

from paper_src import data, distillation, fidelity, models, selection
from paper_src.compaction import compact

SIZES = (1024, 2048, 4096)  # of the square products


def product_peak(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Most operations a second of a square product."""
    best = 0.0
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        (a @ b).sum().item()  # warms up
        for _ in range(rounds):
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for the device
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def layer_weights(model: torch.nn.Module) -> int:
    """Weights of the layers' products."""
    return sum(weight.numel() for weight in models.decoder_layers(model).parameters() if weight.ndim == 2)


def operations(full: torch.nn.Module, small: torch.nn.Module, every: int) -> tuple[float, float]:
    """A token's operations in a training step, and in the full model's pass.

    The layers: 2 a weight forward, 4 backward. The head, of one token in ``every``: the student's forward and the
    gradient of its input, and the full model's logits from kept states.
    """
    head = full.get_output_embeddings().weight.numel()
    return 6 * layer_weights(small) + (4 + 2) * head / every, 2 * layer_weights(full)


def main() -> None:
    """Print tokens a second and shares of both passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    use = parser.parse_args()
    loaded = models.load_model(use.model, use.dtype, use.device)
    full, tokenizer = loaded.model, loaded.tokenizer
    depth = len(models.decoder_layers(full))
    small = compact(full, selection.evenly_spaced(depth, use.keep))
    text, _ = data.load_text("wikitext-2", "train")
    blocks = data.token_blocks(tokenizer, text, use.blocks, use.length, seed=0)
    mean = fidelity.mean_state(full, blocks[:4])
    seen = fidelity.reference(full, data.token_blocks(tokenizer, text, 4, use.length, seed=1), mean)
    settings = distillation.Distillation(epochs=2).with_looks(2, len(blocks))
    with tempfile.TemporaryDirectory() as folder:
        looks = distillation.distil(full, small, blocks, seen, folder, settings).history
    peak = product_peak(full.dtype, full.device)
    step, asked = operations(full, small, settings.kl_every)
    print(
        f"{use.keep} of {depth} layers, {full.dtype}, {torch.get_num_threads()} threads, peak {peak / 1e9:.0f} GFLOP/s"
    )
    for name, (before, after), cost in (
        ("full model asked", looks[:2], step + asked),
        ("its states known", looks[1:3], step),
    ):
        rate = (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
        print(f"{name}: {rate:.0f} tokens/s, {rate * cost / peak:.0%} of the peak in products of weights", flush=True)


if __name__ == "__main__":
    main()
