"""The losses of every window, kept so that any two rows of a section can be tested against each other."""

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from paper_src import InputError
from paper_src.stats import Losses

COLUMNS = ["row", "text", "window", "nll_nats", "cosine", "windows_sha256", "model_sha256"]
SHORT = 12  # digits of a digest


def digest(blocks: Tensor) -> str:
    """Of token ids (N, T) and their shape."""
    content = f"{tuple(blocks.shape)}".encode() + blocks.cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).hexdigest()[:SHORT]


def window_rows(
    row: str, text: str, blocks: Tensor, model_digest: str, values: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Part of a ``tN_windows``: a line a window of one row of a section.

    Args:
        row: what the section calls the model, for example its kept layers.
        text: kind of text.
        blocks: (N, T) token ids.
        model_digest: of the full model's weight files.
        values: metric -> (N,); ``nll_nats`` and, if it was measured, ``cosine``.
    """
    measured = {name: values[name] for name in ("nll_nats", "cosine") if name in values}
    same = {"row": row, "text": text, "windows_sha256": digest(blocks), "model_sha256": model_digest[:SHORT]}
    return pd.DataFrame({"window": range(len(blocks)), **measured, **same}).reindex(columns=COLUMNS)


def losses(table: pd.DataFrame, row: str, text: str | None = None, metric: str = "nll_nats") -> Losses:
    """The losses of one row of a ``tN_windows`` on one kind of text, the first that the table has if none is named.

    Or its cosines, where that is the ``metric``: two rows are tested against each other alike.

    Raises:
        InputError: there is no such row, or its windows are not whole.
    """
    text = table["text"].iloc[0] if text is None else text
    part = table[(table["row"] == row) & (table["text"] == text)].sort_values("window")
    if part.empty:
        raise InputError(f"no windows of {row!r} on {text!r}: the table has {sorted(set(table['row']))[:8]}")
    if part["window"].tolist() != list(range(len(part))):
        raise InputError(f"the windows of {row!r} on {text!r} are not 0 to {len(part) - 1}: run the section again")
    return Losses(part[metric].to_numpy(), "/".join([text, *part[["windows_sha256", "model_sha256"]].iloc[0]]))
