"""8, 12, 16 and 24 of 32 layers at the shape of an 8B Llama, random weights, interleaved: speed and parameters.

    python benchmarks/speed_8b.py FOLDER

Meant for a GPU of 40 GB or more. ``tables/gpu/t3_speed.csv`` holds what an H100 gave.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from paper_src.compaction import compact
from paper_src.models import count_parameters
from paper_src.reporting.reported import RECOMMENDED
from paper_src.support.devices import pick_device
from paper_src.timing import Workload, compare_speed

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
WORK = [Workload("prefill_hidden", *shape) for shape in ((1, 512), (4, 2048), (16, 2048))]
WORK += [Workload("prefill_logits", *shape) for shape in ((1, 512), (4, 2048))]
WORK += [Workload("decode", *shape, 16) for shape in ((1, 512), (16, 512))]


def main(folder: Path, shape: dict[str, int] = SHAPE, rounds: int = 11) -> None:
    """Write ``t3_speed.csv`` and ``t3_size.csv``; the weights of a layer do not change its speed."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(pick_device()):
        full = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()
    small = {8: compact(full, RECOMMENDED), **{k: compact(full, range(k)) for k in (12, 16, 24)}}
    rows = []
    for work in WORK:
        rows += compare_speed(full, small, work, rounds)
        pd.DataFrame(rows).to_csv(folder / "t3_speed.csv", index=False)
        print(rows[-len(small)], flush=True)
    sizes = [{"k": k, "parameters": count_parameters(model)} for k, model in {32: full, **small}.items()]
    pd.DataFrame(sizes).to_csv(folder / "t3_size.csv", index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
