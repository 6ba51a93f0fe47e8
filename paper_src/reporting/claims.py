"""The earlier report's claims, decided by findings: ``claims.yaml`` holds their words and rules, this module judges.

A rule is a few comparisons of findings joined by ``and``. A comparison decides only where the intervals decide: where
they straddle the threshold the verdict is ``undetermined``.
"""

import ast
import math
import operator
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.reporting.findings import LARGER, NAN, Finding, Read, load

SOURCE = Path(__file__).with_name("claims.yaml")
LANGUAGES = ("en", "zh")
REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
UNDETERMINED, NOT_TESTABLE = "undetermined", "not testable"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDETERMINED, NOT_TESTABLE)
COMPARE = {ast.Lt: (operator.lt, "<"), ast.LtE: (operator.le, "≤"), ast.Gt: (operator.gt, ">"),
           ast.GtE: (operator.ge, "≥")}  # fmt: skip
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
        test: when the verdict is ``reproduced``: names of findings (``.share``: of their n), ``threshold``, 0 or 1.
        threshold: its number, or the name of a constant of ``reported.py``.
        needs: a test without which nothing is decided.
        decides: what would decide it, where it is undetermined or not testable.
        folder: one of ``LARGER`` where the findings are of a run with larger budgets.
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
        return values | {"threshold": values.get(self.threshold, self.threshold)}

    def fields(self, language: str = "en") -> set[str]:
        """The format fields of its sentences with their formats, for example ``cosine_best:~.2f``."""
        sentences = (self.reported[language], self.finding[language], self.rule[language], self.decides[language])
        parts = [part for sentence in sentences for part in string.Formatter().parse(sentence)]
        return {f"{name}:{spec}" for _, name, spec, _ in parts if name}

    def uses(self) -> set[str]:
        """Names of the findings in its sentences and rules."""
        told = {part.split(":")[0].split(".")[0].split("[")[0] for part in self.fields()}
        nodes = [node for rule in (self.test, self.needs) if rule for node in ast.walk(ast.parse(rule, mode="eval"))]
        asked = {node.id for node in nodes if isinstance(node, ast.Name)}
        return (told | asked) - set(self.constants())


def read_claims(path: Path = SOURCE) -> list[Claim]:
    """The claims in the order of the file."""
    return [Claim(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True)
class Comparison:
    """One comparison: True, False, or None where the intervals do not decide; and both sides in words."""

    holds: bool | None
    words: str


def decide(test: str, known: Mapping[str, Finding | float]) -> tuple[bool | None, str]:
    """Whether ``test`` holds on findings, and the comparisons that say so with their numbers and intervals.

    False if any comparison is false, otherwise None if any is undecided.

    Raises:
        InputError: the test is no conjunction of comparisons of known findings.
    """
    tree = ast.parse(test, mode="eval").body
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    found = [_comparison(part, known, test) for part in parts]
    holds = [part.holds for part in found]
    verdict = False if False in holds else None if None in holds else True
    return verdict, "; ".join(part.words for part in found if part.holds is verdict)


def _comparison(node: ast.AST, known: Mapping[str, Finding | float], test: str) -> Comparison:
    """One comparison of two sides: the ends of the intervals that are nearest to each other decide."""
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE):
        raise InputError(f"rule {test!r}: write comparisons of two findings (<, <=, >, >=), joined by 'and'")
    compare, sign = COMPARE[type(node.ops[0])]
    left, right = (_side(side, known, test) for side in (node.left, node.comparators[0]))
    best, worst = (1, 0) if sign in ">≥" else (0, 1)  # the end of the left side that favours the claim
    ends = [_ends(side) for side in (left, right)]
    if any(math.isnan(value) for pair in ends for value in pair):
        return Comparison(None, f"{_told(left)} ({sign} {_told(right, named=False)})")
    surely, perhaps = compare(ends[0][worst], ends[1][best]), compare(ends[0][best], ends[1][worst])
    holds = True if surely else None if perhaps else False
    return Comparison(holds, f"{_told(left)} ({sign} {_told(right, named=isinstance(right, Finding))})")


def _side(node: ast.AST, known: Mapping[str, Finding | float], test: str) -> Finding | float:
    """A finding, the share of a count, the threshold, or a number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return float(node.value)
    share = isinstance(node, ast.Attribute) and node.attr == "share"
    name = node.value if share else node
    if isinstance(name, ast.Name) and name.id in known:
        return known[name.id].share if share else known[name.id]
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
    number = side.text if side.unit == "share" else f"{side:~}"
    return f"`{side.name}` {number}" if named else number


def judge(claim: Claim, known: Mapping[str, Finding]) -> tuple[str, str]:
    """The verdict and what decides it."""
    if not claim.test:
        return NOT_TESTABLE, ""
    if missing := sorted(claim.uses() - set(known)):
        return NOT_TESTABLE, f"`{missing[0]}` -"
    values = {**known, **claim.constants()}
    if claim.needs:
        enough, words = decide(claim.needs, values)
        if not enough:
            return UNDETERMINED, words
    holds, words = decide(claim.test, values)
    return {True: REPRODUCED, False: NOT_REPRODUCED, None: UNDETERMINED}[holds], words


def t9_claims(read: Read) -> pd.DataFrame:
    """t9_claims: each claim in both languages, our finding, the verdict, and the number that decides it."""
    known = {folder: load(read, folder) for folder in ("", *LARGER)}
    rows = []
    for claim in read_claims():
        findings = known[claim.folder]
        verdict, decided_by = judge(claim, findings)
        values = {**{name: Finding(name, NAN, NAN, NAN, "", NAN, "", "") for name in claim.uses()}, **findings,
                  **claim.constants()}  # fmt: skip
        used = [findings[name].source for name in sorted(claim.uses() & set(findings))]
        sources = dict.fromkeys(claim.folder + table for source in used for table in source.split(", "))
        row = {"name": claim.name, "group": claim.group, "verdict": verdict, "expected": claim.expected,
               "decided_by": decided_by, "test": claim.test, "source": ", ".join(sources)}  # fmt: skip
        for language, suffix in zip(LANGUAGES, ("", "_zh"), strict=True):
            for name in ("reported", "finding", "rule", "decides"):
                row[f"{name}{suffix}"] = getattr(claim, name)[language].format(**values)
        rows.append(row)
    wanted = ["name", "group", "reported", "finding", "verdict", "decided_by", "rule", "decides", "expected", "source",
              "test", *(f"{name}_zh" for name in ("reported", "finding", "rule", "decides"))]  # fmt: skip
    return pd.DataFrame(rows)[wanted]


def flipped(table: pd.DataFrame) -> list[str]:
    """Names of the claims of t9_claims whose verdict is not the expected one; empty when the paper stands."""
    return table.loc[table["verdict"] != table["expected"], "name"].tolist()
