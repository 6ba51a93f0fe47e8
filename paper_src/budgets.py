"""What to pick for a given budget: the frontier of a comparison, and the best method that meets a limit."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

LATER = "section 5"  # in the name of a method: repaired before, with a larger budget


def frontier(frame: pd.DataFrame, cost: str, larger_is_better: bool) -> pd.Series:
    """Whether no other row has a lower perplexity at no worse a cost, for the rows of ``frame``."""
    sign = -1 if larger_is_better else 1
    costs, losses = sign * frame[cost].to_numpy(), frame["ppl_ratio"].to_numpy()
    better = (costs[None] <= costs[:, None]) & (losses[None] < losses[:, None])
    return pd.Series(~better.any(1) & np.isfinite(losses), frame.index)


def budgets(frame: pd.DataFrame, speedups: Sequence[float], shares: Sequence[float]) -> pd.DataFrame:
    """t7_budgets: for each budget the method of lowest perplexity that meets it, of all and before any training.

    Args:
        frame: t7_baselines.
        speedups: of the prefill, each met from there up.
        shares: of the full model's float32 bytes, each met up to there.
    """
    rows = []
    limits = {"prefill_hidden_speedup": speedups, "memory_share": shares}
    for cost, limit in [(cost, limit) for cost, values in limits.items() for limit in values]:
        meets = frame[cost] >= limit if cost.endswith("speedup") else frame[cost] <= limit
        untrained = ~frame["recovered"] & ~frame["method"].str.contains(LATER)
        for name, part in (("as it is", frame[meets & untrained]), ("recovered or not", frame[meets])):
            if part["ppl_ratio"].notna().any():
                best = part.loc[part["ppl_ratio"].idxmin()]
                row = best[["method", "k", "recovered", "ppl_ratio", cost]].to_dict()
                rows.append({"budget": cost, "limit": limit, "of": name, **row})
    wanted = ["budget", "limit", "of", "method", "k", "recovered", "ppl_ratio", *limits]
    return pd.DataFrame(rows).reindex(columns=wanted)
