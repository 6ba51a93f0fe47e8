"""Section 3: size and speed of the compact models."""

from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from paper_src import timing
from paper_src.models import count_parameters
from paper_src.reporting import reported
from paper_src.reporting.findings import ORDER, Findings, Read, ends, spread
from paper_src.reporting.style import BLUE, GREEN, PURPLE, RED, SKY, STYLE, TASKS
from paper_src.scale import memory

KEY = ["task", "batch", "length", "new_tokens", "k"]


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
            "disk_bytes": memory.checkpoint_bytes(folders[k]),
            "peak_memory_bytes": memory.peak_memory(folders[k], workload, dtype, str(full.device)),
            "dtype": dtype,
        })  # fmt: skip
    return pd.DataFrame(rows)


def timed(
    full: PreTrainedModel, models: dict[int, PreTrainedModel], workloads: Iterable[timing.Workload], rounds: int,
    seed: int,
) -> list[dict[str, object]]:  # fmt: skip
    """A row a workload and k with the seconds of every round, see :func:`paper_src.timing.compare_speed`."""
    return [row for workload in workloads for row in timing.compare_speed(full, models, workload, rounds, seed)]


def t3_speed(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Speedup of each compact model by workload: the median of its rounds, with an interval by order statistics.

    ``quiet`` says that the rounds agree and other processes were idle, ``above_ideal`` that more was measured than the
    arithmetic allows.

    Args:
        rows: :func:`timed`.
    """
    return pd.DataFrame(rows).drop(columns="seconds")


def t3_rounds(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Seconds of every timed round, full and compact: what intervals and verdicts of speed are computed from.

    Args:
        rows: :func:`timed`.
    """
    return pd.DataFrame([
        {**{name: row[name] for name in KEY}, "round": turn, "full_s": full, "compact_s": small}
        for row in rows for turn, (full, small) in enumerate(row["seconds"])
    ])  # fmt: skip


def prefill_rows(speed: pd.DataFrame) -> pd.DataFrame:
    """Rows of t3_speed of the largest hidden-state prefill, by k."""
    rows = speed[speed["task"] == "prefill_hidden"]
    tokens = rows["batch"] * rows["length"]
    return rows[tokens == tokens.max()].set_index("k")


def prefill_speed(speed: pd.DataFrame) -> pd.Series:
    """k -> measured speedup of the largest hidden-state prefill, the x axis of the trade-off."""
    return prefill_rows(speed)["speedup"]


def f3_speed(table: pd.DataFrame, depth: int) -> Figure:
    """Speedup of the compact models over layer compression, measured with full and compact interleaved in one run: a
    panel for each kind of work. n: timed rounds, as the axis says; bars: 95% interval of their median by order
    statistics. Hollow: timed beside other work, or rounds that differ widely. Dotted: the ratio of the floating-point
    operations, which decoding can exceed, since it waits for weights to be read.

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
                _series(axis, depth / rows["k"], rows, colours[shape], f"batch {shape[0]}, {shape[1]} tokens")
            axis.plot([], [], color="black", ls=":", lw=1, label="ideal (FLOPs)")
            axis.plot(reported.LAYER_COMPRESSION, reported.SPEEDUP, "*", ms=10, color=RED, label="earlier report")
            if not table["quiet"].all():
                axis.plot([], [], "o", ms=4, color="black", mfc="white", label="busy, or rounds differ")
            axis.set_title(title)
            axis.set_xticks([depth / k for k in keep], [f"{depth / k:.2f}\nk = {k}" for k in keep])
            axis.set_xlabel("layer compression L / k")
            axis.legend(loc="upper left")
        rounds = " to ".join(map(str, sorted({table["rounds"].min(), table["rounds"].max()})))
        axes[0].set_ylabel(f"speedup, full / compact (n = {rounds} rounds)")
    plt.close(figure)
    return figure


def _series(axis: Axes, x: pd.Series, rows: pd.DataFrame, colour: str, label: str) -> None:
    """One workload: measured speedups with their bars, hollow where the machine was busy, and the ideal."""
    bars = [rows["speedup"] - rows["speedup_lo"], rows["speedup_hi"] - rows["speedup"]]
    axis.errorbar(x, rows["speedup"], bars, color=colour, marker="o", ms=4, lw=1.2, label=label)
    busy = ~rows["quiet"]
    axis.plot(x[busy], rows.loc[busy, "speedup"], "o", ms=4, color=colour, mfc="white", zorder=3)
    axis.plot(x, rows["ideal"], color=colour, ls=":", lw=1)


def t3_findings(read: Read) -> pd.DataFrame:
    """t3_findings: size and speed of the smallest and the largest compact model, and at the reported compressions.

    Intervals of speed are computed here from t3_rounds.
    """
    size, found = read("t3_size").set_index("k"), Findings()
    speed = _from_rounds(read("t3_speed"), read("t3_rounds"))
    depth, smallest = size.index.max(), speed["k"].min()
    dtype = size["dtype"].iloc[0]
    found.add("t3_size", "parameters_full", size.loc[depth, "parameters"], unit="parameters", text=dtype)
    found.add("t3_size", "parameters_smallest", size.loc[smallest, "parameters"], unit="parameters")
    for name, of in (("layer_compression", depth), ("parameter_compression", size.loc[depth, "parameters"])):
        found.add("t3_size", f"{name}_smallest", size.loc[smallest, name], unit="times", n=of, test="count")
    for name in ("disk_bytes", "peak_memory_bytes"):
        share = size.loc[smallest, name] / size.loc[depth, name]
        found.add("t3_size", f"{name.removesuffix('_bytes')}_share_smallest", share, unit="bytes / full")
    prefill = prefill_rows(speed)
    for role, k in (("smallest", smallest), ("largest", speed["k"].max())):
        row = prefill.loc[k]
        found.add("t3_rounds", f"speedup_{role}", *ends(row, "speedup"), unit="times, prefill of hidden states",
                  n=row["rounds"], test=ORDER)  # fmt: skip
        found.add("t3_speed", f"speedup_{role}_k", k, unit="layers")
    found.add("t3_speed", "share_of_ideal_smallest", prefill.loc[smallest, "share_of_ideal"], unit="share of L / k")
    above = speed[(speed["task"] != "decode") & (speed["speedup_lo"] > speed["ideal"])]
    found.add("t3_rounds", "prefill_above_ideal", len(above), n=(speed["task"] != "decode").sum(), test="count",
              unit="prefill speedups whose interval is above the ratio of operations")  # fmt: skip
    _by_workload(found, speed[speed["k"] == smallest], "smallest")
    low, high = reported.COMPRESSION_RANGE
    inside = speed[(depth / speed["k"]).round(1).between(low, high)]
    if len(inside):
        ks = ", ".join(map(str, sorted(inside["k"].unique())))
        found.add("t3_speed", "reported_compression_k", len(inside["k"].unique()), unit="sizes", text=ks)
        _by_workload(found, inside, "reported_compression")
    return found.frame()


def _from_rounds(speed: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """t3_speed with speedup, interval and number of rounds computed anew from t3_rounds."""
    rows = []
    for key, part in rounds.groupby(KEY):
        measured = timing.speed_row(part["full_s"], part["compact_s"])
        taken = {name: measured[name] for name in ("speedup", "speedup_lo", "speedup_hi", "rounds")}
        rows.append({**dict(zip(KEY, key, strict=True)), **taken})
    made = pd.DataFrame(rows)
    return speed.drop(columns=made.columns.difference(KEY)).merge(made, on=KEY, validate="1:1")


def _by_workload(found: Findings, rows: pd.DataFrame, role: str) -> None:
    """Adds the speedup over workloads: its median with the outermost ends of their intervals, and ranges of medians
    of hidden states and where the uncut head takes part; and how many were timed on a quiet machine.
    """
    found.add("t3_rounds", f"speedup_{role}_any", rows["speedup"].median(), rows["speedup_lo"].min(),
              rows["speedup_hi"].max(), n=len(rows), test="outermost ends of the workloads' intervals",
              unit="times: median and outermost ends of the workloads' intervals")  # fmt: skip
    hidden = rows["task"] == "prefill_hidden"
    for name, part in (("hidden", rows[hidden]), ("head", rows[~hidden])):
        found.add("t3_rounds", f"speedup_{role}_{name}", *spread(part["speedup"]), n=len(part),
                  unit="times: median and range over workloads")  # fmt: skip
    found.add("t3_speed", f"timed_quietly_{role}", rows["quiet"].sum(), n=len(rows), test="count",
              unit="speedups timed on a quiet machine")  # fmt: skip
