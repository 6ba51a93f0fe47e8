"""Section 3: size and speed of the compact models."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from paper_src import timing
from paper_src.models import count_parameters
from paper_src.reporting import reported
from paper_src.reporting.style import BLUE, GREEN, PURPLE, RED, SKY, STYLE, TASKS
from paper_src.scale import memory


def f3_speed(table: pd.DataFrame, depth: int) -> Figure:
    """Measured speedup over layer compression, a panel for each task, beside the ideal of the arithmetic.

    Args:
        table: t3_speed.
        depth: number of layers of the full model.
    """
    colours = [BLUE, GREEN, PURPLE, SKY]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.4), sharey=True)
        for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
            part = table[table["task"] == task]
            for colour, ((batch, length), rows) in zip(colours, part.groupby(["batch", "length"]), strict=False):
                x = depth / rows["k"]
                spread = [rows["speedup"] - rows["speedup_lo"], rows["speedup_hi"] - rows["speedup"]]
                label = f"batch {batch}, {length} tokens"
                axis.errorbar(x, rows["speedup"], spread, color=colour, marker="o", ms=4, lw=1.2, label=label)
                axis.plot(x, rows["ideal"], color=colour, ls=":", lw=1)
            axis.plot([], [], color="black", ls=":", lw=1, label="ideal (FLOPs)")
            axis.plot(
                reported.LAYER_COMPRESSION,
                reported.SPEEDUP,
                marker="*",
                ms=10,
                color=RED,
                ls="",
                label="earlier report",
            )
            axis.set_title(title)
            axis.set_xlabel("layer compression L / k")
            axis.legend(loc="upper left")
        axes[0].set_ylabel("speedup, full / compact")
    plt.close(figure)
    return figure


def t3_size(
    full: PreTrainedModel,
    models: dict[int, PreTrainedModel],
    folders: dict[int, Path],
    workload: timing.Workload,
    progress: Callable = iter,
) -> pd.DataFrame:
    """t3_size: parameters, bytes on disk and peak memory of the full (first row) and the compact models."""
    depth = max(folders)
    dtype = str(full.dtype).removeprefix("torch.")
    rows = []
    for k in progress(list(folders)):
        parameters = count_parameters(models.get(k, full))
        rows.append({
            "k": k,
            "layer_compression": depth / k,
            "parameters": parameters,
            "parameter_compression": count_parameters(full) / parameters,
            "disk_bytes": timing.checkpoint_bytes(folders[k]),
            "peak_memory_bytes": memory.peak_memory(folders[k], workload, dtype, str(full.device)),
            "dtype": dtype,
        })  # fmt: skip
    return pd.DataFrame(rows)


def t3_speed(
    full: PreTrainedModel,
    models: dict[int, PreTrainedModel],
    workloads: Sequence[timing.Workload],
    rounds: int,
    seed: int,
    progress: Callable = iter,
) -> pd.DataFrame:
    """t3_speed: a row a workload and k, see :func:`paper_src.timing.compare_speed`."""
    rows = [timing.compare_speed(full, models, workload, rounds, seed) for workload in progress(list(workloads))]
    return pd.DataFrame([row for part in rows for row in part])


def prefill_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of t3_speed of the largest hidden-state prefill, by k."""
    rows = speed[speed["task"] == "prefill_hidden"]
    tokens = rows["batch"] * rows["length"]
    return rows[tokens == tokens.max()].set_index("k")


def prefill_speed(speed: pd.DataFrame) -> pd.Series:
    """k -> measured speedup of the largest hidden-state prefill, the x axis of the trade-off."""
    return prefill_rows(speed)["speedup"]
