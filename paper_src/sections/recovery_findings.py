"""Section 5's findings."""

import pandas as pd

from paper_src.reporting.findings import BOOTSTRAP, SIGN_FLIP, Findings, Read, ends
from paper_src.sections.judge import few_text, with_all_metrics
from paper_src.sections.scaling import scaling_findings
from paper_src.sections.windows import losses
from paper_src.stats import paired

DEAR = ("cosine_centred", "top1_agreement")  # not measured on every window


def t5_findings(read: Read, seed: int = 0) -> pd.DataFrame:
    """t5_findings: what each stage of repair brings at the smallest and largest k, what the selection adds, and how
    the loss falls with the tokens of training.
    """
    table, found = read("t5_recovery"), Findings()
    stages = table[table["selection"] == "selected"].set_index(["k", "recovery"])
    ks = stages.index.get_level_values("k")
    units = {"cosine": "cosine", "cosine_centred": "cosine", "top1_agreement": "share of tokens", "tokens": "tokens",
             "ppl_ratio": "perplexity / full", "ppl_ratio_mean": "perplexity / full, all kinds",
             "seconds": "s"}  # fmt: skip
    found.add("t5_recovery", "recovery_test_tokens", table["n_tokens"].max(), unit="tokens of the first kind of text")
    for role, k in (("smallest", ks.min()), ("largest", ks.max())):
        found.add("t5_recovery", f"recovered_{role}_k", k, unit="layers")
        for name, stage in (("cut", "none"), ("refitted", "closed_form"), ("recovered", "distilled")):
            row = stages.loc[(k, stage)]
            dear = with_all_metrics(row["n_tokens"] // row["n_windows"])
            for column, unit in units.items():
                n = min(row["n_windows"], dear) if column in DEAR else row["n_windows"]
                found.add("t5_recovery", f"{column}_{name}_{role}", *ends(row, column), unit=unit, n=n,
                          test=BOOTSTRAP if f"{column}_lo" in row else "")  # fmt: skip
    constant = table[table["selection"] == "trivial"].iloc[0]
    found.add("t5_recovery", "cosine_constant", *ends(constant, "cosine"), unit="cosine",
              n=constant["n_windows"], test=BOOTSTRAP)  # fmt: skip
    wide, windows = table[table["selection"] == "distributed"].set_index("recovery")["row"], read("t5_windows")
    for name, stage in (("cut", "none"), ("refitted", "closed_form")):
        own = stages.loc[(ks.min(), stage), "row"]
        gap = paired(*(losses(windows, row, few_text(windows)) for row in (wide[stage], own)), seed)
        found.add("t5_windows", f"distributed_over_selected_{name}", *gap.ratio(), n=gap.n, p=gap.p,
                  unit="perplexity ratio", test=SIGN_FLIP)  # fmt: skip
    _selections(found, read("t5_selection"))
    scaling_findings(found, read, seed)
    mixes = read("t5_mix")
    kinds = [name.removeprefix("ppl_ratio_") for name in mixes if name.startswith("ppl_ratio_")][:-1]
    found.add("t5_mix", "kinds_of_text", len(kinds), unit="kinds", text=", ".join(kinds))
    picked = mixes.loc[mixes["chosen"], "mix"]
    found.add("t5_mix", "mix_chosen", len(picked), n=len(mixes), unit="mixes",
              text=picked.iloc[0] if len(picked) else "none")  # fmt: skip
    return found.frame()


def _selections(found: Findings, table: pd.DataFrame) -> None:
    """Adds whether the best selection is another one after a refit, and random ones beside it."""
    real, drawn = table[table["strategy"] != "random"], table[table["strategy"] == "random"]
    moved = [k for k, part in real.groupby("k") if part.loc[part["rank_cut"] == 1, "rank_refitted"].item() != 1]
    found.add("t5_selection", "best_changes_by_refit", len(moved), n=real["k"].nunique(), unit="sizes k",
              text=", ".join(map(str, moved)))  # fmt: skip
    best = real.loc[real["k"] == real["k"].min(), "ppl_ratio_refitted"].min()
    for name, value in (("selected", best), ("random_best", drawn["ppl_ratio_refitted"].min()),
                        ("random_median", drawn["ppl_ratio_refitted"].median())):  # fmt: skip
        found.add("t5_selection", f"small_refit_{name}", value, n=len(drawn), unit="perplexity / full, validation text")
