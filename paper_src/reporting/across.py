"""One row a model: is what the paper finds on its own weights general?

python -m paper_src.across tables/t9_models tables results/laptop-mine/tables
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import hypergeom

from paper_src import InputError
from paper_src.files import replacing
from paper_src.reporting import facts

PATTERNS = {"fisher": "fisher", "combined": "overlap", "leave_one_out": "leave_one_out", "shapley": "shapley"}


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

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(file(f"{name}.csv"))

    found, causal, worth = facts.pattern(read), facts.causal_pattern(read), facts.worth(read)
    selected, repaired, random = facts.recommended_or_chosen(read), facts.repaired(read), facts.against_random(read)
    size, depth = found["of"], found["depth"]
    made = json.loads(file("01_importance.json").read_text(encoding="utf-8"))["model"]
    columns = {
        "model": Path(made["name"]).name,
        "sha256": made["sha256"][:12],
        "layers": depth,
        "parameters": int(read("t3_size")["parameters"].max()),
        "pattern_layers": size,
        "by_chance": size * size / depth,
    }
    for score, name in PATTERNS.items():
        inside = (found | causal)[name]
        columns |= {f"in_pattern_{score}": inside, f"p_{score}": hypergeom.sf(inside - 1, depth, size, size)}
    return columns | {
        "tau_fisher_leave_one_out": worth["loo"],
        "tau_fisher_lo": worth["loo_lo"],
        "tau_fisher_hi": worth["loo_hi"],
        "nearest_score": worth["best"],
        "tau_nearest": worth["best_tau"],
        "top_k_selections": random["top_k"],
        "top_k_better_than_random": random["top_k_better"],
        "distributed_selections": random["distributed"],
        "distributed_better_than_random": random["distributed_better"],
        "k": selected["k"],
        "speedup": facts.largest_speedup(read)["speedup"],
        "ppl_ratio_distributed": selected["own"],
        "ppl_ratio_chosen": selected["chosen"],
        "ppl_ratio_recovered": repaired["ppl"],
        "cosine_recovered": repaired["cosine"],
        "cosine_constant": repaired["trivial"],
    }


def main() -> int:
    """Command line; 0 on success, 1 with one line on standard error otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="written as .csv and .md")
    parser.add_argument("tables", type=Path, nargs="+", help="folders of tables of whole runs")
    use = parser.parse_args()
    try:
        frame = pd.DataFrame([row(tables) for tables in use.tables])
        with replacing(use.table.with_suffix(".csv")) as part:
            frame.to_csv(part, index=False)
        short = frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))
        text = short.set_index("model").T.to_markdown(disable_numparse=True)
        with replacing(use.table.with_suffix(".md")) as part:
            part.write_text(text + "\n", encoding="utf-8")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
