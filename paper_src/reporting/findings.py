"""Findings: the numbers that a section states, each with interval, unit, n and the table that it is read off.

A section's ``tN_findings`` collects them, claims and summary print nothing else.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from paper_src import InputError

Read = Callable[[str], pd.DataFrame]
COLUMNS = ("name", "value", "lo", "hi", "unit", "n", "test", "p", "source", "text")
SECTIONS = range(1, 9)
LARGER = ("long/", "gpu/")  # folders of tables of runs with larger budgets
EARLIER = "bootstrap of an earlier commit"  # test of an interval in a table that names none
NAN = math.nan
LEVEL = 0.05  # of p-values
# tests of findings, in words
BOOTSTRAP, SIGN_FLIP = "BCa bootstrap over windows", "sign-flip permutation over windows"
ORDER = "order statistics of rounds"


class Findings:
    """Collects the rows of one ``tN_findings``."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, source: str, name: str, value: float = NAN, lo: float = NAN, hi: float = NAN, *, unit: str = "",
            n: float | None = None, test: str = "", p: float = NAN, text: str = "") -> None:  # fmt: skip
        """Add one finding.

        Args:
            source: the table that it is read off.
            name: stable: a role (``smallest``, ``chosen``), never a number that another model changes.
            value: the number; of a count ``n`` is what it is counted of.
            lo: lower end of its 95% interval, or of the range that the unit names.
            hi: upper end.
            unit: for example ``nats/token``.
            n: how many blocks, users, rounds or things the number rests on.
            test: what gives interval and p, for example ``BCa bootstrap over windows``; words of a claim's verdict.
            p: p-value of that test, corrected for its family.
            text: words where the finding is a name or a list.
        """
        values = (name, float(value), float(lo), float(hi), unit, n, test, float(p), source, text)
        self._rows.append(dict(zip(COLUMNS, values, strict=True)))

    def frame(self) -> pd.DataFrame:
        """The findings in the order in which they were added.

        Raises:
            InputError: two of one name.
        """
        frame = pd.DataFrame(self._rows, columns=COLUMNS).astype({"n": "Int64"})
        if frame["name"].duplicated().any():
            raise InputError(f"two findings are called {frame.loc[frame['name'].duplicated(), 'name'].iloc[0]!r}")
        return frame


def ends(row: Mapping[str, float], column: str) -> tuple[float, float, float]:
    """The value of a column of a table's row and the ends of its interval."""
    return row[column], row.get(f"{column}_lo", NAN), row.get(f"{column}_hi", NAN)


def spread(values: pd.Series) -> tuple[float, float, float]:
    """Median, smallest and largest: a range, not an interval; its unit must say of what."""
    return values.median(), values.min(), values.max()


@dataclass(frozen=True)
class Finding:
    """A finding as it is read back; ``{x:.2f}`` prints the value, ``{x:~.2f}`` with its interval, ``{x:of}`` 8/9."""

    name: str
    value: float
    lo: float
    hi: float
    unit: str
    n: float
    source: str
    text: str
    test: str = ""
    p: float = NAN

    @property
    def share(self) -> "Finding":
        """A count as a share of its ``n``, with its interval; its text is the count."""
        value, lo, hi = (each / self.n if self.n else NAN for each in (self.value, self.lo, self.hi))
        text = f"{self:of}" + (f" [{self.lo:g}, {self.hi:g}]" if self.lo == self.lo else "")
        return Finding(self.name, value, lo, hi, "share", self.n, self.source, text, self.test, self.p)

    @property
    def p_value(self) -> "Finding":
        """Its p-value, which a rule may ask for."""
        text = f"p = {self.p:.2g}" if self.p == self.p else "p -"
        return Finding(self.name, self.p, NAN, NAN, "p", self.n, self.source, text, self.test, self.p)

    @property
    def tested(self) -> str:
        """Test, n and p in words, empty if there was no test."""
        test = self.test or ("count" if self.unit == "share" else EARLIER if self.lo == self.lo else "")
        numbers = {f"n = {self.n:,.0f}": self.n, f"p = {self.p:.2g}": self.p}
        return ", ".join([test, *(text for text, value in numbers.items() if not math.isnan(value))]) if test else ""

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, spec: str) -> str:
        if spec == "of":
            return f"{self.value:.0f}/{self.n:.0f}"
        if not spec:
            return self.text or (f"{self.value:,.0f}" if self.value.is_integer() else number(self.value))
        if not spec.startswith("~"):
            return number(self.value, spec)
        inner = f" [{number(self.lo, spec[1:])}, {number(self.hi, spec[1:])}]" if self.lo == self.lo else ""
        return number(self.value, spec[1:]) + inner


def number(value: float, spec: str = "times") -> str:
    """``value`` as prose writes it: a dash if it was not measured; ``times``: 46,023 or 81.3 or 1.23."""
    if math.isnan(value):
        return "-"
    if spec in ("", "times"):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return f"{round(value):{spec}}" if spec in ("d", ",") else f"{value:{spec}}"


def load(read: Read, folder: str = "") -> dict[str, Finding]:
    """name -> finding of every section that was run, with ``folder`` (one of ``LARGER``) before the tables' names."""
    found = {}
    for section in SECTIONS:
        try:
            frame = read(f"{folder}t{section}_findings")
        except (InputError, FileNotFoundError):  # a section that was not run
            continue
        frame = frame.reindex(columns=COLUMNS).astype({"n": float})  # of an earlier commit: without test and p
        frame = frame.fillna({"text": "", "unit": "", "test": ""})
        found |= {row["name"]: Finding(**row) for row in frame.to_dict("records")}
    return found
