"""Section 7: what else one could do for the same bytes or the same speed."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from paper_src.baselines.methods import METHODS
from paper_src.reporting.findings import BOOTSTRAP, ORDER, SIGN_FLIP, Findings, Read, ends, spread
from paper_src.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE
from paper_src.sections.windows import losses
from paper_src.stats import Losses, Paired, holm, paired

SPEED, SHARE = "prefill_hidden_speedup", "packed_share"
CLASSES = ("untrained", "trained here", "trained in section 5")


def t7_take(frame: pd.DataFrame, speedups: Sequence[float], shares: Sequence[float]) -> pd.DataFrame:
    """t7_take: for each budget and class of training, the row of lowest perplexity on validation text, judged on test.

    Budgets are at least a speedup of the prefill, and at most a share of the full model's float32 bytes, packed.
    Models that were trained with more tokens are not ranked with others.

    Args:
        frame: t7_baselines.
        speedups: times.
        shares: in (0, 1].
    """
    known = frame[frame["ppl_ratio"].notna()]
    of = np.where(~known["trained"], CLASSES[0], np.where(known["recovered"], CLASSES[1], CLASSES[2]))
    rows = []
    for budget, limits in ((SPEED, speedups), (SHARE, shares)):
        for limit in limits:
            meets = known[budget] >= limit if budget == SPEED else known[budget] <= limit
            for name in CLASSES:
                if len(part := known[meets & (of == name)]):
                    best = part.loc[part["valid_ppl_ratio"].idxmin()]
                    rows.append({**best, "budget": budget, "limit": limit, "of": name})
    both = [f"{name}{end}" for name in ("ppl_ratio", SPEED) for end in ("", "_lo", "_hi")]
    wanted = ["budget", "limit", "of", "row", "method", "k", "valid_ppl_ratio", *both, SHARE, "tokens", "name"]
    return pd.DataFrame(rows).reindex(columns=wanted)


FAMILIES = {"full": "black", "quantization": PURPLE, "sparsity": GREY, "width": GREEN, "low rank": SKY, "depth": BLUE,
            "combination": RED, "control": ORANGE}  # fmt: skip
PANELS = {
    "ppl_ratio": "perplexity / full model's",
    SPEED: "prefill speedup",
    "decode_speedup": "decode speedup",
    SHARE: "packed bytes / float32",
}
WORST = 1000  # a perplexity ratio above it is a failure


def f7_pareto(table: pd.DataFrame) -> Figure:
    """Every method, the best perplexity on top, with what it buys: speed beside the full model, bytes of its best
    packed file. Hollow: as it is; filled: trained, by the short training of this section ("trained") or by section 5.
    n: `n_windows` of t7_baselines; bars: 95% intervals, of perplexity by BCa bootstrap over windows, of speed by order
    statistics of timed rounds. The line is the frontier: no method above it is as fast, or as small. Perplexities above
    1,000 times the full model's are left out and counted; of several seeds the first is shown.
    """
    known = table[table["ppl_ratio"].notna() & (table["seed"] == table["seed"].min())]
    rows = known[known["ppl_ratio"] <= WORST].sort_values("ppl_ratio", kind="stable")
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 1.4 + 0.19 * len(rows)), sharey=True)
        for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
            _dots(axis, rows, metric)
            if metric != "ppl_ratio":
                _staircase(axis, rows, metric)
            axis.set_title(title)
            axis.set_xscale("log")
            wide = rows[metric].max() > 50 * rows[metric].min()
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows.itertuples()], size=7.5)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        worse = len(known) - len(rows)
        if worse:
            axes[0].set_xlabel(f"above {WORST:,} and left out: {worse}")
        there = {family: colour for family, colour in FAMILIES.items() if family in set(rows["family"])}
        for family, colour in there.items():
            axes[0].scatter([], [], color=colour, label=family)
        axes[0].plot([], [], "o", ms=5, mec="black", mfc="white", label="not trained")
        axes[0].plot([], [], color="black", lw=0.8, label="frontier")
        figure.legend(loc="outside lower center", ncols=len(there) + 2)
    plt.close(figure)
    return figure


def _label(row: tuple) -> str:
    size = f", k = {row.k}" if row.k and row.family != "full" else ""
    return row.method + size + (", trained" if row.recovered else "")


def _dots(axis: Axes, rows: pd.DataFrame, metric: str) -> None:
    """A dot for each row with its interval, hollow unless it was trained."""
    for place, row in enumerate(rows.to_dict("records")):
        colour, filled = FAMILIES[row["family"]], row["trained"] or row["family"] == "full"
        low, high = (row.get(f"{metric}{end}", row[metric]) for end in ("_lo", "_hi"))
        axis.plot([low, high], [place, place], color=colour, lw=1)
        axis.plot(row[metric], place, "o", ms=5, mec=colour, mfc=colour if filled else "white")


def _staircase(axis: Axes, rows: pd.DataFrame, cost: str) -> None:
    """The frontier of quality and ``cost`` in rows sorted by quality."""
    best = rows[cost].cummax() if cost.endswith("speedup") else rows[cost].cummin()
    axis.step(best.ffill(), np.arange(len(rows)), where="pre", color="black", lw=0.8, zorder=1)


ROUNDS, QUIET = "prefill_hidden_rounds", "prefill_hidden_quiet"
ALIKE = ["start", "tokens", "search_tokens"]
RIVALS = [name for name, method in METHODS.items() if method.sized and method.training != "none"
          and method.family not in ("depth", "control") and not method.control]  # fmt: skip


def t7_findings(read: Read, seed: int = 0) -> pd.DataFrame:
    """t7_findings: cut layers beside what else one could do, at the smallest size and at the largest."""
    table, found = read("t7_baselines"), _Found(read("t7_windows"), seed)
    table = table[table["ppl_ratio"].notna()]
    sizes = table.loc[table["family"].isin(["depth", "width"]), "k"]
    found.add("t7_baselines", "methods_compared", table.loc[table["family"] != "full", "name"].nunique(),
              unit="methods")  # fmt: skip
    as_it_is = table[~table["recovered"]]
    for role, k in (("smallest", sizes.min()), ("largest", sizes.max())):
        found.add("t7_baselines", f"compared_{role}_k", k, unit="layers")
        at = as_it_is[as_it_is["k"] == k].set_index("name", drop=False)
        for name in ("cut", "cut_refit", "width", "width_refit", "replace_me", "cut_repaired", "cut_repaired_int8"):
            found.method(f"{name}_{role}", at[at["name"] == name])
        free = as_it_is[as_it_is["name"] == "int8_weight"]
        found.over(f"cut_repaired_over_int8_{role}", at[at["name"] == "cut_repaired"], free)
    for name in ("int8_weight", "int4_groups", "original_file", "wanda_50"):
        found.method(name, as_it_is[as_it_is["name"] == name])
    for suffix, k in (("", sizes.min()), ("_largest", sizes.max())):
        found.after_the_same_recovery(table[table["recovered"] & (table["k"] == k)], suffix)
    return found.frame()


class _Found(Findings):
    """Findings of section 7, with tests on its windows."""

    def __init__(self, windows: pd.DataFrame, seed: int):
        super().__init__()
        self.windows, self.seed = windows, seed

    def losses(self, rows: pd.DataFrame) -> Losses:
        """Of each window, the mean over ``rows``, the seeds of one method."""
        all_of = [losses(self.windows, row) for row in rows["row"]]
        return Losses(np.mean([each.values for each in all_of], axis=0), all_of[0].of)

    def paired(self, rows: pd.DataFrame, others: pd.DataFrame) -> Paired:
        """The first's losses minus the others' on the same windows."""
        return paired(self.losses(rows), self.losses(others), self.seed)

    def method(self, role: str, rows: pd.DataFrame) -> None:
        """Adds quality, speed, bytes and budget of a method, over its seeds; nothing where it is not supported here."""
        if rows.empty:
            return
        row, unit = rows.iloc[0], "perplexity / full"
        if set(rows["row"]) <= set(self.windows["row"]):
            gap = self.paired(rows, pd.DataFrame({"row": ["full"]}))
            self.add("t7_windows", f"ppl_{role}", *gap.ratio(), n=gap.n, test=BOOTSTRAP, unit=unit, text=row["method"])
        else:
            self.add("t7_baselines", f"ppl_{role}", row["ppl_ratio"], unit=unit, text=row["method"])
        if not np.isnan(row[SPEED]):
            self.add("t7_rounds", f"speed_{role}", *ends(row, SPEED), n=row[ROUNDS], test=ORDER, unit="times, prefill")
            self.add("t7_baselines", f"quiet_{role}", row.get(QUIET, np.nan), n=1, test="count",
                     unit="1 if that was timed on a quiet machine")  # fmt: skip
        self.add("t7_baselines", f"bytes_{role}", row[SHARE], unit="packed bytes / full model in float32")
        self.add("t7_baselines", f"budget_{role}", row["tokens"], unit="tokens of calibration and training")
        if len(rows) > 1:
            self.add("t7_baselines", f"seeds_{role}", *spread(rows["ppl_ratio"]), n=len(rows),
                     unit=f"{unit}, median and range of seeds")  # fmt: skip

    def over(self, name: str, rows: pd.DataFrame, others: pd.DataFrame, family: Sequence[float] = ()) -> None:
        """Adds the ratio of two methods' perplexities on the same windows; nothing where one was not measured.

        Args:
            family: p-values of all tests that this one is of; of none it stands alone.
        """
        if rows.empty or others.empty:
            return
        gap = self.paired(rows, others)
        test, p_value = SIGN_FLIP, gap.p
        if family:
            test, p_value = f"{SIGN_FLIP}, Holm over {len(family)}", holm(family)[list(family).index(gap.p)]
        self.add("t7_windows", name, *gap.ratio(), n=gap.n, unit="times the perplexity", test=test, p=p_value,
                 text=others.iloc[0]["method"])  # fmt: skip

    def after_the_same_recovery(self, after: pd.DataFrame, suffix: str) -> None:
        """Adds what the section's own short recovery makes of each kind of method of one size, cut layers beside each.

        Methods that remove no whole layers are one family of tests, the controls another. The best of the others is
        chosen on validation text.
        """
        of = {name: rows for name, rows in after.groupby("name", sort=False)}
        if "cut" not in of:
            return
        own, by_validation = of["cut"], after.groupby("name")["valid_ppl_ratio"].mean()
        others = [name for name, rows in of.items() if not rows["family"].isin(["depth", "control"]).any()]
        controls = [name for name, rows in of.items() if rows["control"].all() and name not in others]
        for role, name in (("cut", "cut"), ("width", "width"), ("low_rank", "svd_aware"), ("replace_me", "replace_me")):
            self.method(f"recovered_{role}{suffix}", after[after["name"] == name])
        self.method(f"recovered_best{suffix}", of[by_validation.idxmin()])
        for family in (others, controls):
            p_values = [self.paired(own, of[name]).p for name in family]
            for name in family:
                role = {"early_exit": "first_layers"}.get(name, name)
                self.over(f"recovered_cut_over_{role}{suffix}", own, of[name], p_values)
            if family is others and others:
                best = of[by_validation[others].idxmin()]
                self.method(f"recovered_best_other{suffix}", best)
                self.over(f"recovered_cut_over_best_other{suffix}", own, best, p_values)
        fair = after[after["name"].isin(others) & ~after["control"]].drop_duplicates("name")
        if not suffix:
            self.add("t7_baselines", "rivals_compared", len(fair), n=len(RIVALS), test="count",
                     unit="methods without whole layers cut that can be trained")  # fmt: skip
        alike = (fair[ALIKE] == own.iloc[0][ALIKE]).all(axis=1)
        self.add("t7_baselines", f"compared_alike{suffix}", alike.sum(), n=len(fair),
                 unit="methods with the start, tokens and search of cut layers")  # fmt: skip
        self.add("t7_baselines", f"recovery_seconds{suffix}", after["recovery_s"].max(), unit="s")
