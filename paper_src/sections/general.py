"""One row a model: is what the paper finds on its own weights general? From the findings of each run."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import hypergeom

from paper_src import InputError
from paper_src.reporting.findings import load
from paper_src.support.files import replacing

COLUMNS = {  # column -> finding, and what of it
    "tau_fisher_leave_one_out": ("tau_leave_one_out_fisher", "value"),
    "tau_fisher_lo": ("tau_leave_one_out_fisher", "lo"),
    "tau_fisher_hi": ("tau_leave_one_out_fisher", "hi"),
    "nearest_score": ("tau_leave_one_out_nearest", "text"),
    "tau_nearest": ("tau_leave_one_out_nearest", "value"),
    "top_k_selections": ("top_k_better_than_random", "n"),
    "top_k_better_than_random": ("top_k_better_than_random", "value"),
    "distributed_selections": ("distributed_better_than_random", "n"),
    "distributed_better_than_random": ("distributed_better_than_random", "value"),
    "k": ("k_smallest", "value"),
    "speedup": ("speedup_smallest", "value"),
    "ppl_ratio_distributed": ("ppl_ratio_recommended", "value"),
    "ppl_ratio_chosen": ("ppl_ratio_chosen", "value"),
    "ppl_ratio_recovered": ("ppl_ratio_recovered_smallest", "value"),
    "cosine_recovered": ("cosine_recovered_smallest", "value"),
    "cosine_constant": ("cosine_constant", "value"),
}
COUNTS = ("top_k", "distributed", "k")  # columns that begin so hold whole numbers
PATTERNS = ("fisher", "combined", "leave_one_out", "shapley")


def row(tables: Path) -> dict[str, object]:
    """What differs between models, from the folder of tables of one run.

    ``in_pattern_<score>``: how many of the ``pattern_layers`` best layers are in the earlier report's pattern, the
    first 9 and the last of 32, carried over by relative depth; ``by_chance`` of them are expected of a random order,
    which has at least as many with probability ``p_<score>`` (hypergeometric).

    Raises:
        InputError: the folder does not hold a whole run.
    """

    def file(name: str) -> Path:
        if not (tables / name).is_file():
            raise InputError(f"{tables / name} is missing: run ./reproduce.sh --model NAME first")
        return tables / name

    found = load(lambda name: pd.read_csv(file(f"{name}.csv")))
    for section in range(1, 6):
        file(f"t{section}_findings.csv")
    made = json.loads(file("01_importance.json").read_text(encoding="utf-8"))["model"]
    depth, size = int(found["layers"].value), int(found["pattern_fisher"].n)
    columns = {
        "model": Path(made["name"]).name,
        "sha256": made["sha256"][:12],
        "layers": depth,
        "parameters": int(found["parameters_full"].value),
        "pattern_layers": size,
        "by_chance": found["pattern_by_chance"].value,
    }
    for score in PATTERNS:
        inside = int(found[f"pattern_{score}"].value)
        columns |= {f"in_pattern_{score}": inside, f"p_{score}": hypergeom.sf(inside - 1, depth, size, size)}
    return columns | {name: _whole(name, getattr(found[finding], part)) for name, (finding, part) in COLUMNS.items()}


def _whole(column: str, value: object) -> object:
    return int(value) if column.startswith(COUNTS) else value


def write(table: Path, folders: Sequence[Path]) -> str:
    """Write t9_models as ``table`` .csv and .md, a :func:`row` for each folder of tables; returns the latter."""
    frame = pd.DataFrame([row(folder) for folder in folders])
    short = frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))
    text = short.set_index("model").T.to_markdown(disable_numparse=True)
    for form, content in ((".csv", frame.to_csv(index=False)), (".md", text + "\n")):
        with replacing(table.with_suffix(form)) as part:
            part.write_text(content, encoding="utf-8")
    return text
