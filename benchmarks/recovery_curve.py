"""How far distillation goes, for how many tokens, and from which start: a curve and a test row for each.

    python benchmarks/recovery_curve.py FOLDER [--tokens 80e6] [--generated 4194304] [--starts selected]
    python benchmarks/recovery_curve.py FOLDER --tokens 16e6 --starts random_weights,first_layers,distributed,selected

Meant for one large GPU (80 million token passes: 377 s on an H100); a CPU does the same, slowly. The text is the
calibration split of every kind of text of the paper, each block equally often, and text that the full model writes
itself after the first words of these blocks. Starts: the layers that section 5 repaired and those of the earlier
report's kind, the first layers, all three refitted in closed form first, and random weights in the same shape with
the full model's embedding and head. ``tables/gpu`` holds what it found.
"""

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from paper_src import data, distillation, fidelity, models, recovery, stats
from paper_src.compaction import compact
from paper_src.reporting.findings import Findings, ends, spread
from paper_src.selection import kept_tuple

PROMPT = 8  # tokens that are given to the model, which writes the rest of a block
STARTS = ("selected", "distributed", "first_layers", "random_weights")


def windows(tokenizer, kind, split, most, length, seed):
    """(n, length) as many windows as the text holds, at most ``most``."""
    return data.as_many(tokenizer, data.load_text(kind, split)[0], most, length, seed)


@torch.no_grad()
def generated(model, prompts, count, length, at_once, seed):
    """(count, length) token ids that the model samples (temperature 1) after prompts drawn from ``prompts``."""
    torch.manual_seed(seed)
    rows = []
    new = {"max_new_tokens": length - prompts.shape[1], "min_new_tokens": length - prompts.shape[1]}
    while sum(map(len, rows)) < count:
        ids = prompts[torch.randint(len(prompts), (at_once,))].to(model.device)
        rows.append(model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                                   pad_token_id=0, **new).cpu())  # fmt: skip
        print(f"{sum(map(len, rows)) * length:,} tokens written", flush=True)
    return torch.cat(rows)[:count]


def begun(full, start, kept, blocks):
    """The student before its training."""
    if start != "random_weights":
        return recovery.closed_form(full, kept, blocks).model
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_config(copy.deepcopy(compact(full, kept).config), dtype=full.dtype)
    small = small.to(full.device).eval()
    small.get_input_embeddings().weight.data.copy_(full.get_input_embeddings().weight.data)
    return small


def judged(full, small, tests):
    """A row for each kind of test text, and one for the geometric mean over them."""
    rows = []
    for kind, reference in tests.items():
        own = fidelity.compare(small, reference)
        base = fidelity.compare(full, reference, metrics=["nll_nats"])["nll_nats"]
        low, high = stats.interval(own["cosine"])
        means = {name: float(own[name].mean()) for name in ("cosine", "cosine_centred", "kl_nats", "top1_agreement")}
        shape = {"n_windows": len(base), "window_tokens": reference.blocks.shape[1]}
        ratio = fidelity.ppl_ratio(own["nll_nats"], base)
        rows.append({"text": kind, **shape, **ratio, **means, "cosine_lo": low, "cosine_hi": high})
    mean = math.exp(np.mean([math.log(row["ppl_ratio"]) for row in rows]))
    return [*rows, {"text": "mean of all", "ppl_ratio": mean}]


def findings(table):
    """t5_findings of the table of test rows: the first start that was trained, named as section 5 names it."""
    first = table[(table["selection"] == table["selection"][0]) & (table["tokens"] == table["tokens"][0])]
    row, mean, found = first.iloc[0], first.set_index("text").loc["mean of all"], Findings()
    source, end = "t5_recovery", "recovered_smallest"
    found.add(source, "recovered_smallest_k", row["k"], unit="layers")
    found.add(source, f"tokens_{end}", row["tokens"], unit="token passes")
    found.add(source, f"cosine_{end}", *ends(row, "cosine"), unit="cosine", n=row["n_windows"])
    found.add(source, f"ppl_ratio_{end}", *ends(row, "ppl_ratio"), unit="perplexity / full", n=row["n_windows"])
    found.add(source, f"ppl_ratio_mean_{end}", mean["ppl_ratio"], unit="perplexity / full, all kinds")
    others = first["cosine"].iloc[1:].dropna()
    found.add(source, "cosine_other_kinds", *spread(others), unit="cosine: median and range over other kinds of text",
              n=len(others))  # fmt: skip
    found.add(source, "gpu_test_windows", row["n_windows"], unit="windows of n tokens", n=row["window_tokens"])
    found.add(source, "gpu_generated_tokens", row["generated_tokens"], unit="tokens", n=row["distinct_tokens"])
    return found.frame()


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tables", type=Path, default=Path("tables"), help="where t5_recovery.csv is")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--starts", default="selected", help=f"of {', '.join(STARTS)}")
    parser.add_argument("--texts", default=",".join(("wikitext-2", *data.DOMAINS)))
    parser.add_argument("--tokens", type=float, default=80e6, help="token passes of each training")
    parser.add_argument("--generated", type=int, default=4194304, help="tokens that the full model writes")
    parser.add_argument("--at-once", type=int, default=4096, help="blocks written at once")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="blocks a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--looks", type=int, default=24)
    parser.add_argument("--test-windows", type=int, default=64, help="of the first text; 16 of the others")
    return parser.parse_args()


def training_text(use, full, own):
    """(n, length) token ids of all passes, of the calibration text ``own`` and of generated text; distinct tokens."""
    distinct = torch.cat(own)
    if use.generated:
        file = use.folder / "generated.pt"
        if not file.is_file():
            prompts = torch.cat([part[:150, :PROMPT] for part in own])
            torch.save(generated(full, prompts, use.generated // use.length, use.length, use.at_once, 5), file)
        distinct = torch.cat([distinct, torch.load(file)])
    generator, count = torch.Generator().manual_seed(7), int(use.tokens) // use.length
    passes = [torch.randperm(len(distinct), generator=generator) for _ in range(-(-count // len(distinct)))]
    return distinct[torch.cat(passes)[:count]], distinct.numel()


def main():
    """Train from each start; write ``t5_scaling``, ``t5_recovery`` and ``t5_findings`` into the folder."""
    use = arguments()
    use.folder.mkdir(parents=True, exist_ok=True)
    loaded = models.load_model(use.model, "auto", use.device)
    full, tokenizer, texts = loaded.model, loaded.tokenizer, use.texts.split(",")
    own = [windows(tokenizer, kind, "train", 6561 if kind == texts[0] else 150, use.length, 3) for kind in texts]
    refit = torch.cat([part[: 384 // len(texts), :128] for part in own])
    blocks, distinct = training_text(use, full, own)
    mean = fidelity.mean_state(full, refit)
    valid = fidelity.reference(full, windows(tokenizer, texts[0], "valid", 16, 256, 0), mean)
    base = float(fidelity.compare(full, valid, metrics=["nll_nats"])["nll_nats"].mean())
    many = {kind: use.test_windows if kind == texts[0] else 16 for kind in texts}
    tests = {
        kind: fidelity.reference(full, windows(tokenizer, kind, "test", many[kind], 512, 0), mean) for kind in texts
    }
    found = pd.read_csv(use.tables / "t5_recovery.csv").query(f"k == {use.k}").drop_duplicates("selection")
    kept = {name: kept_tuple(layers) for name, layers in zip(found["selection"], found["kept"], strict=True)}
    kept |= {"first_layers": tuple(range(use.k)), "random_weights": kept["selected"]}
    curves, rows = [], []
    for start in use.starts.split(","):
        every = max(1, len(blocks) // use.batch // use.looks)
        settings = distillation.Distillation(
            batch_size=use.batch, learning_rate=use.rate, warmup=0.02, evaluate_every=every, patience=10**6
        )
        student, work = begun(full, start, kept[start], refit), use.folder / "runs"
        trained = distillation.distil(full, student, blocks, valid, work, settings, print)
        looks = pd.DataFrame(trained.history)
        spent = {"tokens": int(looks["tokens"].max()), "distinct_tokens": distinct, "generated_tokens": use.generated}
        spent |= {"rate": use.rate, "train_s": float(looks["seconds"].max())}
        about = {"selection": start, "kept": " ".join(map(str, kept[start])), "k": use.k, **spent}
        looks = looks.assign(ppl_ratio=np.exp(looks["nll_nats"] - base))
        curves.append(looks.assign(selection=start, run_tokens=spent["tokens"], rate=use.rate))
        rows += [{**about, **row} for row in judged(full, trained.model, tests)]
        pd.concat(curves).to_csv(use.folder / "t5_scaling.csv", index=False)
        pd.DataFrame(rows).to_csv(use.folder / "t5_recovery.csv", index=False)
        findings(pd.DataFrame(rows)).to_csv(use.folder / "t5_findings.csv", index=False)
        print(pd.DataFrame(rows)[["selection", "tokens", "text", "ppl_ratio", "cosine"]].to_string(), flush=True)


if __name__ == "__main__":
    main()
