"""Section 3: size and speed of the compact models."""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from paper_src import timing
from paper_src.models import count_parameters
from paper_src.reporting import reported
from paper_src.reporting.findings import Findings, Read, ends, spread
from paper_src.reporting.style import BLUE, GREEN, PURPLE, RED, SKY, STYLE, TASKS
from paper_src.scale import memory


def t3_size(
    full: PreTrainedModel, models: dict[int, PreTrainedModel], folders: dict[int, Path], workload: timing.Workload,
    progress: Callable[[Iterable], Iterable] = iter,
) -> pd.DataFrame:  # fmt: skip
    """Parameters, bytes on disk and peak memory of the full model and the compact ones.

    Args:
        models: k -> compact model.
        folders: k -> checkpoint, of the full model as well.
        workload: what is run once, after loading, where peak memory is measured.
    """
    depth, dtype, rows = max(folders), str(full.dtype).removeprefix("torch."), []
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
    full: PreTrainedModel, models: dict[int, PreTrainedModel], workloads: Iterable[timing.Workload], rounds: int,
    seed: int,
) -> pd.DataFrame:  # fmt: skip
    """A row a workload and k, see :func:`paper_src.timing.compare_speed`."""
    rows = [timing.compare_speed(full, models, workload, rounds, seed) for workload in workloads]
    return pd.DataFrame([row for part in rows for row in part])


def prefill_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of t3_speed of the largest hidden-state prefill, by k."""
    rows = speed[speed["task"] == "prefill_hidden"]
    tokens = rows["batch"] * rows["length"]
    return rows[tokens == tokens.max()].set_index("k")


def prefill_speed(speed: pd.DataFrame) -> pd.Series:
    """k -> measured speedup of the largest hidden-state prefill, the x axis of the trade-off."""
    return prefill_rows(speed)["speedup"]


def f3_speed(table: pd.DataFrame, depth: int) -> Figure:
    """Speedup of the compact models over layer compression, measured with full and compact interleaved in one run.

    A panel for each kind of work. Bars: 95% bootstrap of the median over timed rounds. Dotted: the ratio of the
    floating-point operations, which decoding can exceed, since it waits for weights to be read.

    Args:
        table: t3_speed.
        depth: number of layers of the full model.
    """
    shapes = sorted(set(zip(table["batch"], table["length"], strict=True)))
    colours = dict(zip(shapes, cycle([BLUE, GREEN, PURPLE, SKY]), strict=False))
    keep = sorted(set(table["k"]))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.4), sharey=True)
        for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
            for shape, rows in table[table["task"] == task].groupby(["batch", "length"]):
                x = depth / rows["k"]
                spread = [rows["speedup"] - rows["speedup_lo"], rows["speedup_hi"] - rows["speedup"]]
                axis.errorbar(x, rows["speedup"], spread, color=colours[shape], marker="o", ms=4, lw=1.2,
                              label=f"batch {shape[0]}, {shape[1]} tokens")  # fmt: skip
                axis.plot(x, rows["ideal"], color=colours[shape], ls=":", lw=1)
            axis.plot([], [], color="black", ls=":", lw=1, label="ideal (FLOPs)")
            axis.plot(reported.LAYER_COMPRESSION, reported.SPEEDUP, "*", ms=10, color=RED, label="earlier report")
            axis.set_title(title)
            axis.set_xticks([depth / k for k in keep], [f"{depth / k:.2f}\nk = {k}" for k in keep])
            axis.set_xlabel("layer compression L / k")
            axis.legend(loc="upper left")
        axes[0].set_ylabel(f"speedup, full / compact (n = {table['rounds'].iloc[0]} rounds)")
    plt.close(figure)
    return figure


def t3_findings(read: Read) -> pd.DataFrame:
    """t3_findings: size and speed of the smallest and the largest compact model, and at the reported compressions."""
    size, speed, found = read("t3_size").set_index("k"), read("t3_speed"), Findings()
    depth, smallest = size.index.max(), speed["k"].min()
    dtype = size["dtype"].iloc[0]
    found.add("t3_size", "parameters_full", size.loc[depth, "parameters"], unit="parameters", text=dtype)
    found.add("t3_size", "parameters_smallest", size.loc[smallest, "parameters"], unit="parameters")
    for name in ("layer_compression", "parameter_compression"):
        found.add("t3_size", f"{name}_smallest", size.loc[smallest, name], unit="times")
    for name in ("disk_bytes", "peak_memory_bytes"):
        share = size.loc[smallest, name] / size.loc[depth, name]
        found.add("t3_size", f"{name.removesuffix('_bytes')}_share_smallest", share, unit="bytes / full")
    prefill = prefill_rows(speed)
    for role, k in (("smallest", smallest), ("largest", speed["k"].max())):
        row = prefill.loc[k]
        found.add("t3_speed", f"speedup_{role}", *ends(row, "speedup"), unit="times, prefill of hidden states",
                  n=row["rounds"])  # fmt: skip
        found.add("t3_speed", f"speedup_{role}_k", k, unit="layers")
    found.add("t3_speed", "share_of_ideal_smallest", prefill.loc[smallest, "share_of_ideal"], unit="share of L / k")
    _by_workload(found, speed[speed["k"] == smallest], "smallest")
    low, high = reported.COMPRESSION_RANGE
    inside = speed[(depth / speed["k"]).round(1).between(low, high)]
    if len(inside):
        ks = ", ".join(map(str, sorted(inside["k"].unique())))
        found.add("t3_speed", "reported_compression_k", len(inside["k"].unique()), unit="sizes", text=ks)
        _by_workload(found, inside, "reported_compression")
    return found.frame()


def _by_workload(found: Findings, rows: pd.DataFrame, role: str) -> None:
    """Adds the range of the speedup over workloads: of all, of hidden states, and where the uncut head takes part."""
    hidden = rows["task"] == "prefill_hidden"
    for name, part in (("any", rows), ("hidden", rows[hidden]), ("head", rows[~hidden])):
        found.add("t3_speed", f"speedup_{role}_{name}", *spread(part["speedup"]), n=len(part),
                  unit="times: median and range over workloads")  # fmt: skip
