"""The formulas by which the earlier report may have combined its scores; it does not give its own."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd


def _unit(values: pd.Series) -> pd.Series:
    return (values - values.min()) / (values.max() - values.min())


@dataclass(frozen=True)
class Formula:
    """One way to combine Fisher information, gradient norm and an activation statistic to one score."""

    words: str
    function: Callable[[pd.DataFrame], pd.Series]  # of the three columns, all positive
    statistic: str = "activation_variance"


def _mean_of_logs(parts: pd.DataFrame) -> pd.Series:
    return np.log(parts).apply(_unit).mean(axis=1)


FORMULAS = {
    "log_min_max": Formula("mean of the logarithms, each scaled to [0, 1]; `combined`", _mean_of_logs),
    "min_max": Formula("mean of the values, each scaled to [0, 1]", lambda parts: parts.apply(_unit).mean(axis=1)),
    "z_score": Formula("mean of the values, each less its mean, over its standard deviation",
                       lambda parts: ((parts - parts.mean()) / parts.std()).mean(axis=1)),
    "ranks": Formula("mean of the ranks", lambda parts: parts.rank().mean(axis=1)),
    "product": Formula("product of the values", lambda parts: np.log(parts).sum(axis=1)),
    "largest": Formula("largest of the values, each scaled to [0, 1]", lambda parts: parts.apply(_unit).max(axis=1)),
    "log_min_max_mean_abs": Formula("as the first, with mean size of activation", _mean_of_logs, "activation_mean_abs"),
    "log_min_max_kurtosis": Formula("as the first, with the kurtosis", _mean_of_logs, "activation_kurtosis"),
}  # fmt: skip


def combined(importance: pd.DataFrame, formula: Formula) -> pd.Series:
    """The combined score of each layer by one formula, of the columns of t1_importance."""
    return formula.function(importance[["fisher", "grad_norm", formula.statistic]])
