"""Section 2, second half: do searches on other calibration text, or by another loss, keep the same layers?"""

from collections.abc import Iterator, Sequence
from itertools import combinations, cycle

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import coalitions
from paper_src.reporting.findings import Findings
from paper_src.scale.store import Store
from paper_src.selection import KeptLayers, Stages, kept_text, kept_tuple, of_kind

SHARE = "layers that both keep / that either keeps, mean over pairs"
VARIES = {"seed": "objective", "objective": "seed"}  # what differs between two searches -> what is the same


def fresh_looks(
    model: PreTrainedModel, pool: Tensor, sizes: Sequence[int], cost: coalitions.Cost, store: Store | None = None
) -> Iterator[Stages]:
    """Endless looks for ``evopress_paper``: each on the next blocks of ``pool`` (N, T), by the KL divergence.

    Args:
        sizes: blocks of a first look, which two candidates survive, and of the last.
        cost: what the looks cost is added to it.
    """
    first, last = sizes[:2]
    parts = [part for part in pool.split(last) if len(part) >= first]
    settings = {"cost": cost, "metrics": ["kl_nats"], "store": store}
    small = coalitions.on_each(model, (part[:first] for part in cycle(parts)), **settings)
    large = coalitions.on_each(model, cycle(parts), **settings)
    for few, many in zip(small, large, strict=True):
        yield [(few, 2), (many, 1)]


def t2_stability(searched: Sequence[dict]) -> pd.DataFrame:
    """A row a search: strategy, k, objective, seed (of its calibration windows and its own draws), kept."""
    frame = pd.DataFrame(searched, columns=["strategy", "k", "objective", "seed", "kept"])
    return frame.assign(kept=frame["kept"].map(kept_text))


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """Layers that both keep over layers that either keeps.

    Example:
        >>> jaccard((0, 1, 2), (1, 2, 3))
        0.5
    """
    return len({*first} & {*second}) / len({*first} | {*second})


def t2_overlap(stability: pd.DataFrame, selected: pd.DataFrame) -> pd.DataFrame:
    """How far searches that differ in one thing keep the same layers, for each strategy and k, and random draws by
    chance: ``jaccard``, the mean over ``pairs`` of searches, and how many of the pairs are ``identical``.

    Args:
        stability: t2_stability.
        selected: t2_selection.
    """
    rows = []
    for differs, same in VARIES.items():
        for (strategy, k), runs in stability.groupby(["strategy", "k"], sort=False):
            pairs = [pair for _, group in runs.groupby(same) for pair in combinations(group["kept"].map(kept_tuple), 2)]
            rows.append({"strategy": strategy, "k": k, "differs": differs, **overlap_of(pairs)})
    for k, draws in selected[selected["strategy"] == "random"].groupby("k"):
        pairs = list(combinations(draws["kept"].head(50).map(kept_tuple), 2))
        rows.append({"strategy": "random", "k": k, "differs": "draw", **overlap_of(pairs)})
    return pd.DataFrame(rows)


def overlap_of(pairs: Sequence[tuple[KeptLayers, KeptLayers]]) -> dict[str, float]:
    """``pairs``, mean ``jaccard`` and how many are ``identical``, of pairs of kept layers."""
    shares = [jaccard(*pair) for pair in pairs]
    return {"pairs": len(pairs), "jaccard": np.mean(shares) if shares else np.nan, "identical": shares.count(1.0)}


def stability(found: Findings, overlap: pd.DataFrame) -> None:
    """Adds, at the smallest k, how far each search keeps the same layers on other text and by another loss."""
    rows = overlap[overlap["k"] == overlap["k"].min()].set_index(["strategy", "differs"])
    rows = rows[rows.index.get_level_values("strategy").isin(["random", *of_kind("search")])]
    for (strategy, differs), row in rows.iterrows():
        name = "same_layers_by_chance" if strategy == "random" else f"same_layers_{differs}_{strategy}"
        found.add("t2_overlap", name, row["jaccard"], unit=SHARE,
                  n=row["pairs"], test="count", text=f"{row['identical']:.0f} of {row['pairs']:.0f}")  # fmt: skip
