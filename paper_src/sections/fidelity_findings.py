"""What section 4 states, with its tests: the smallest models against a constant, random selections and one another."""

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from paper_src.reporting.findings import BOOTSTRAP, LEVEL, SIGN_FLIP, Findings, Read, ends, spread
from paper_src.scoring import SCORES
from paper_src.sections.fidelity import FULL, RECOMMENDED, TRIVIAL
from paper_src.sections.windows import losses
from paper_src.stats import Paired, holm, interval, paired


def t4_findings(read: Read, seed: int = 0) -> pd.DataFrame:
    """t4_findings: intervals and tests are computed here from t4_windows, with ``seed``."""
    table, headline, windows, found = read("t4_fidelity"), read("t4_headline"), read("t4_windows"), Findings()
    _sizes(found, table, headline)
    smallest = headline.loc[headline["strategy"] == "chosen", "k"].min()
    names = {TRIVIAL: TRIVIAL, "chosen": "chosen", "recommended": RECOMMENDED[0]}
    own = headline[(headline["k"] == smallest) | (headline["strategy"] == TRIVIAL)].set_index("strategy")
    rows = {role: own.loc[name] for role, name in names.items()}
    for role, row in rows.items():
        _quality(found, "t4_headline", role, row, windows, seed)
    _two_rows(found, rows, windows, seed)
    small = table[(table["k"] == smallest) & (table["strategy"] != "random")]
    _quality(found, "t4_fidelity", "best", small.loc[small["cosine"].idxmax()], windows, seed)
    gradient = small[small["strategy"].isin(["top_k", "distributed"]) & _by_gradient(small)]
    found.add("t4_fidelity", "cosine_gradient", *spread(gradient["cosine"]), n=len(gradient),
              unit="cosine: median and range over selections by gradient scores")  # fmt: skip
    wide = gradient.loc[gradient["strategy"] == "distributed", "ppl"].drop_duplicates()
    over = wide / small.loc[small["strategy"] == "chosen", "ppl"].item()
    found.add("t4_fidelity", "distributed_over_chosen", *spread(over), n=len(over),
              unit="times the perplexity: median and range over distributed selections by gradient scores")  # fmt: skip
    draws = read("t4_random")
    _random(found, draws[draws["k"] == smallest], seed)
    _against_random(found, table)
    _spread_against_top_k(found, table, windows, seed)
    return found.frame()


def _sizes(found: Findings, table: pd.DataFrame, headline: pd.DataFrame) -> None:
    """Adds how much text and how many random selections there are, and the full model's perplexity."""
    full = headline[headline["strategy"] == FULL].iloc[0]
    found.add("t4_fidelity", "test_blocks", table["n_blocks"].iloc[0], unit="windows")
    found.add("t4_fidelity", "test_tokens", table["n_tokens"].iloc[0], unit="tokens")
    found.add("t4_headline", "headline_blocks", full["n_blocks"], unit="windows")
    found.add("t4_headline", "headline_tokens", full["n_tokens"], unit="tokens")
    found.add("t4_headline", "full_ppl", *ends(full, "ppl"), unit="perplexity", n=full["n_blocks"], test=BOOTSTRAP)
    random = table[table["strategy"] == "random"]
    draws = random.sort_values("k")["n_draws"].iloc[0]
    found.add("t4_fidelity", "random_draws", draws, unit="selections at the smallest k")
    found.add("t4_fidelity", "random_blocks", random["n_blocks"].iloc[0], unit="windows")
    found.add("t4_fidelity", "smallest_p", 1 / (1 + draws), unit="p")


def _windows_row(row: pd.Series) -> str:
    """What a row of t4_fidelity or t4_headline is called in t4_windows."""
    return row.name if row.name in (FULL, TRIVIAL) else row["kept"]


def _compared(windows: pd.DataFrame, text: str, first: str, second: str, seed: int, metric: str) -> Paired:
    return paired(losses(windows, first, text, metric), losses(windows, second, text, metric), seed)


def _quality(found: Findings, source: str, role: str, row: pd.Series, windows: pd.DataFrame, seed: int) -> None:
    """Adds cosine, centred cosine and perplexity of one row over the full model's, paired."""
    name, text = _windows_row(row), row["text"]
    cosine = losses(windows, name, text, "cosine").values
    same = {"n": len(cosine), "test": BOOTSTRAP}
    found.add(source, f"cosine_{role}", cosine.mean(), *interval(cosine, seed=seed), unit="cosine", **same)
    found.add(source, f"cosine_centred_{role}", *ends(row, "cosine_centred"), unit="cosine", **same)
    ratio = _compared(windows, text, name, FULL, seed, "nll_nats").ratio()
    found.add(source, f"ppl_ratio_{role}", *ratio, unit="perplexity / full", **same)


def _two_rows(found: Findings, rows: dict[str, pd.Series], windows: pd.DataFrame, seed: int) -> None:
    """Adds the selection by the report's strategy against the chosen one, and its cosine against a constant's."""
    text, names = rows["chosen"]["text"], {role: _windows_row(row) for role, row in rows.items()}
    loss = _compared(windows, text, names["recommended"], names["chosen"], seed, "nll_nats")
    found.add("t4_windows", "ppl_recommended_over_chosen", *loss.ratio(), unit="times the perplexity", n=loss.n,
              test=SIGN_FLIP, p=loss.p)  # fmt: skip
    cosine = _compared(windows, text, names["recommended"], names[TRIVIAL], seed, "cosine")
    found.add("t4_windows", "cosine_recommended_over_trivial", *cosine[:3], unit="difference of cosines", n=cosine.n,
              test=SIGN_FLIP, p=cosine.p)  # fmt: skip


def _random(found: Findings, draws: pd.DataFrame, seed: int) -> None:
    """Adds what random selections of the smallest k reach on average."""
    gap = np.log(draws["ppl_ratio"])
    low, high = interval(gap, seed=seed)
    same = {"n": len(draws), "test": "BCa bootstrap over random selections"}
    found.add("t4_random", "ppl_ratio_random", np.exp(gap.mean()), np.exp(low), np.exp(high),
              unit="perplexity / full", **same)  # fmt: skip
    cosine = draws["cosine"]
    found.add("t4_random", "cosine_random", cosine.mean(), *interval(cosine, seed=seed), unit="cosine", **same)


def _by_gradient(rows: pd.DataFrame) -> pd.Series:
    """Which rows are of a score by gradients, the combined one included."""
    return rows["score"].map({name: score.kind for name, score in SCORES.items()}).isin(["gradient", "combined"])


def _against_random(found: Findings, table: pd.DataFrame) -> None:
    """Adds how many different selections by gradient scores are better or worse than random ones, by one rule.

    Of all of them the p-values are corrected so that 5% of those counted on a side are expected to be there by chance
    (Benjamini & Hochberg 1995). Holm's correction could count none: the smallest p-value is 1 / (1 + draws).
    """
    rows = table[_by_gradient(table)].drop_duplicates(["strategy", "kept"])
    test = f"random selections, false discovery rate over {len(rows)}"
    for side, column in (("better", "p_ppl"), ("worse", "p_ppl_worse")):
        p_values = pd.Series(false_discovery_control(rows[column]), index=rows.index)
        for strategy, part in rows.groupby("strategy"):
            found.add("t4_fidelity", f"{strategy}_{side}_than_random", (p_values[part.index] <= LEVEL).sum(),
                      n=len(part), unit=f"selections, p <= {LEVEL}", test=test)  # fmt: skip


def _spread_against_top_k(found: Findings, table: pd.DataFrame, windows: pd.DataFrame, seed: int) -> None:
    """Adds in how many different pairs (score, k) ``distributed`` has a lower or a higher loss than Top-K, by kind."""
    kinds = {name: score.kind.replace("combined", "gradient") for name, score in SCORES.items()}
    wide, top = (table[table["strategy"] == name] for name in ("distributed", "top_k"))
    pairs = wide.merge(top, on=["score", "k"], suffixes=("", "_top"))
    pairs = pairs[pairs["kept"] != pairs["kept_top"]]
    pairs = pairs.assign(kind=pairs["score"].map(kinds)).drop_duplicates(["kind", "kept", "kept_top"])
    for kind in dict.fromkeys(kinds.values()):
        part = pairs[pairs["kind"] == kind]
        tests = [_compared(windows, row.text, row.kept, row.kept_top, seed, "nll_nats") for row in part.itertuples()]
        different = np.array(holm([test.p for test in tests])) <= LEVEL if tests else np.zeros(0, dtype=bool)
        gaps = np.array([test.difference for test in tests])
        same = {"n": len(part), "test": f"{SIGN_FLIP}, Holm over {len(part)}"}
        for side, count in (("wins", (different & (gaps < 0)).sum()), ("losses", (different & (gaps > 0)).sum())):
            found.add(
                "t4_windows", f"distributed_{side}_{kind}", count, unit=f"pairs of selections, p <= {LEVEL}", **same
            )
