"""The earlier report's claims, decided by findings: ``claims.yaml`` holds their words and rules, this module judges.

A rule is a few comparisons of findings joined by ``and``. A comparison decides only where the intervals decide: where
they straddle the threshold the verdict is ``undetermined``. Every verdict names the test, n and p of what decides it.
"""

import ast
import math
import operator
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import yaml

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.reporting.findings import LARGER, LEVEL, NAN, Finding, Read, load

SOURCE = Path(__file__).with_name("claims.yaml")
LANGUAGES = ("en", "zh")
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
UNDETERMINED, NOT_TESTABLE = "undetermined", "not testable"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDETERMINED, NOT_TESTABLE)
COMPARE = {ast.Lt: (operator.lt, "<"), ast.LtE: (operator.le, "≤"), ast.Gt: (operator.gt, ">"),
           ast.GtE: (operator.ge, "≥")}  # fmt: skip
BEST = "best"  # folder of a claim that a run with larger budgets decides where there is one
BETWEEN = "between"  # in rules: a value that is only known to lie between two findings
OWN = "own"  # name of the run whose tables stand at the top of a folder
PARTS = {"share": "share", "p": "p_value"}  # in a rule and as the unit of what is compared -> property of a finding
Words = dict[str, str]  # of both languages


@dataclass(frozen=True)
class Claim:
    """One claim of ``claims.yaml``; sentences have fields like ``{cosine_best:~.2f}`` and ``{threshold}``.

    Attributes:
        name: stable identifier.
        group: table of the summary in which it stands.
        expected: the verdict that the paper commits to; ``./reproduce.sh check`` fails when the tables give another.
        reported: what the report says, or asked.
        finding: what we find.
        rule: ``test`` in words.
        test: when the verdict is ``reproduced``: names of findings (``.share``: of their n, ``.p``: their p-value;
            ``between(a, b)``: it is not known which value from the first's to the second's), ``threshold``,
            ``level``, 0 or 1.
        threshold: its number, or the name of a constant of ``reported.py``.
        needs: a test without which nothing is decided.
        decides: what would decide it, where it is undetermined or not testable.
        folder: one of ``LARGER`` where the findings are of a run with larger budgets; ``best``: of ``long/`` where it
            has all that the claim prints and a test for all that the rule asks, else of the run itself.
    """

    name: str
    group: str
    expected: str
    reported: Words
    finding: Words
    rule: Words
    test: str = ""
    threshold: float | str = NAN
    needs: str = ""
    decides: Words = field(default_factory=lambda: dict.fromkeys(LANGUAGES, ""))
    folder: str = ""

    def constants(self) -> dict[str, object]:
        """The values of sentences and rules that are no findings: those of ``reported.py``, and ``threshold``."""
        values = {name: value for name, value in vars(reported).items() if name.isupper()}
        return values | {"threshold": values.get(self.threshold, self.threshold), "level": LEVEL}

    def fields(self, language: str = "en") -> set[str]:
        """The format fields of its sentences with their formats, for example ``cosine_best:~.2f``."""
        sentences = (self.reported[language], self.finding[language], self.rule[language], self.decides[language])
        parts = [part for sentence in sentences for part in string.Formatter().parse(sentence)]
        return {f"{name}:{spec}" for _, name, spec, _ in parts if name}

    def uses(self) -> set[str]:
        """Names of the findings in its sentences and rules."""
        told = {part.split(":")[0].split(".")[0].split("[")[0] for part in self.fields()}
        return (told - set(self.constants())) | self.asks()

    def asks(self) -> set[str]:
        """Names of the findings in its rules."""
        nodes = [node for rule in (self.test, self.needs) if rule for node in ast.walk(ast.parse(rule, mode="eval"))]
        return {node.id for node in nodes if isinstance(node, ast.Name)} - {*self.constants(), BETWEEN}

    def place(self, known: Mapping[str, Mapping[str, Finding]]) -> str:
        """The folder of the findings that decide it, a key of ``known``."""
        if self.folder != BEST:
            return self.folder
        larger = known["long/"]
        tested = all(larger[name].test for name in self.asks() if name in larger)
        return "long/" if tested and self.uses() <= set(larger) else ""


def read_claims(path: Path = SOURCE) -> list[Claim]:
    """The claims in the order of the file."""
    return [Claim(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Decision:
    """Whether a comparison or a rule holds, None where the intervals do not decide.

    Attributes:
        words: the comparisons that decide, with numbers and intervals.
        tests: test, n and p of what they compare.
    """

    holds: bool | None
    words: str
    tests: str


def decide(test: str, known: Mapping[str, Finding | float]) -> Decision:
    """Whether ``test`` holds on findings: False if any comparison is false, otherwise None if any is undecided.

    Raises:
        InputError: the test is no conjunction of comparisons of known findings.
    """
    tree = ast.parse(test, mode="eval").body
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    found = [_comparison(part, known, test) for part in parts]
    holds = [part.holds for part in found]
    verdict = False if False in holds else None if None in holds else True
    deciding = [part for part in found if part.holds is verdict]
    return Decision(verdict, *(_joined(getattr(part, name) for part in deciding) for name in ("words", "tests")))


def _joined(parts: Iterable[str]) -> str:
    """The different ones, none twice."""
    return "; ".join(dict.fromkeys(filter(None, parts)))


def _comparison(node: ast.AST, known: Mapping[str, Finding | float], test: str) -> Decision:
    """One comparison of two sides: the ends of the intervals that are nearest to each other decide."""
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE):
        raise InputError(f"rule {test!r}: write comparisons of two findings (<, <=, >, >=), joined by 'and'")
    compare, sign = COMPARE[type(node.ops[0])]
    left, right = (_side(side, known, test) for side in (node.left, node.comparators[0]))
    best, worst = (1, 0) if sign in ">≥" else (0, 1)  # the end of the left side that favours the claim
    ends = [_ends(side) for side in (left, right)]
    words = f"{_told(left)} ({sign} {_told(right, named=isinstance(right, Finding))})"
    tests = _joined(side.tested for side in (left, right) if isinstance(side, Finding))
    if any(math.isnan(value) for pair in ends for value in pair):
        return Decision(None, words, tests)
    surely, perhaps = compare(ends[0][worst], ends[1][best]), compare(ends[0][best], ends[1][worst])
    return Decision(True if surely else None if perhaps else False, words, tests)


def _side(node: ast.AST, known: Mapping[str, Finding | float], test: str) -> Finding | float:
    """A finding, the share of a count, a p-value, what lies between two of these, the threshold, or a number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == BETWEEN and len(node.args) == 2:
        least, most = (_side(side, known, test) for side in node.args)
        return replace(least, name=f"{least.name}` to `{most.name}", lo=_ends(least)[0], hi=_ends(most)[1],
                       text=f"{least.text} to {most.text}")  # fmt: skip
    part = PARTS.get(node.attr) if isinstance(node, ast.Attribute) else None
    name = node.value if part else node
    if isinstance(name, ast.Name) and name.id in known:
        return getattr(known[name.id], part) if part else known[name.id]
    raise InputError(f"rule {test!r}: {ast.unparse(node)} is neither a finding nor the threshold")


def _ends(side: Finding | float) -> tuple[float, float]:
    """Both ends of the interval, or the value twice where it has none."""
    if not isinstance(side, Finding):
        return side, side
    return (side.value, side.value) if math.isnan(side.lo) else (side.lo, side.hi)


def _told(side: Finding | float, named: bool = True) -> str:
    """One side of a comparison with its number and interval."""
    if not isinstance(side, Finding):
        return f"{side:g}"
    number = side.text if side.unit in PARTS else f"{side:~}"
    return f"`{side.name}` {number}" if named else number


def judge(claim: Claim, known: Mapping[str, Finding]) -> tuple[str, str, str]:
    """The verdict, what decides it, and the tests of that."""
    if not claim.test:
        return NOT_TESTABLE, "", ""
    if missing := sorted(claim.uses() - set(known)):
        return NOT_TESTABLE, f"`{missing[0]}` -", ""
    values = {**known, **claim.constants()}
    if claim.needs:
        enough = decide(claim.needs, values)
        if not enough.holds:
            return UNDETERMINED, enough.words, enough.tests
    found = decide(claim.test, values)
    verdict = {True: REPRODUCED, False: NOT_REPRODUCED, None: UNDETERMINED}[found.holds]
    return verdict, found.words, found.tests


def t9_claims(read: Read) -> pd.DataFrame:
    """t9_claims: each claim in both languages, our finding, the verdict, the number that decides it, and its test."""
    known = {folder: load(read, folder) for folder in ("", *LARGER)}
    rows = []
    for claim in read_claims():
        folder = claim.place(known)
        findings = known[folder]
        verdict, decided_by, by_test = judge(claim, findings)
        values = {**{name: Finding(name, NAN, NAN, NAN, "", NAN, "", "") for name in claim.uses()}, **findings,
                  **claim.constants()}  # fmt: skip
        used = [findings[name].source for name in sorted(claim.uses() & set(findings))]
        sources = dict.fromkeys(folder + table for source in used for table in source.split(", "))
        row = {"name": claim.name, "group": claim.group, "verdict": verdict, "expected": claim.expected,
               "decided_by": decided_by, "by_test": by_test, "run": folder.strip("/") or OWN, "test": claim.test,
               "needs": claim.needs, "source": ", ".join(sources)}  # fmt: skip
        for language, suffix in zip(LANGUAGES, ("", "_zh"), strict=True):
            for name in ("reported", "finding", "rule", "decides"):
                row[f"{name}{suffix}"] = _range_of_one(getattr(claim, name)[language].format(**values))
        rows.append(row)
    wanted = ["name", "group", "reported", "finding", "verdict", "decided_by", "by_test", "run", "rule", "decides",
              "expected", "source", "test", "needs",
              *(f"{name}_zh" for name in ("reported", "finding", "rule", "decides"))]  # fmt: skip
    return pd.DataFrame(rows)[wanted]


def _range_of_one(sentence: str) -> str:
    """A range whose ends are the same number, as that number.

    >>> _range_of_one("3.71-3.71 times for reading, 2.53-3.06 for writing; 1.2-1.25, 0.25-25")
    '3.71 times for reading, 2.53-3.06 for writing; 1.2-1.25, 0.25-25'
    """
    return re.sub(r"(?<![\d,.])(\d[\d,.]*)-\1(?![\d,.]*\d)", r"\1", sentence)


def flipped(table: pd.DataFrame) -> list[str]:
    """The claims of t9_claims whose verdict is not the expected one, in words; empty when the paper stands."""
    return [f"{row['name']}: expected {row['expected']}, found {row['verdict']}: {row['decided_by']}"
            for row in table.to_dict("records") if row["verdict"] != row["expected"]]  # fmt: skip
