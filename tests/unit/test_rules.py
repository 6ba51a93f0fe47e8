"""claims.yaml, its rules, and verdicts that only intervals decide."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from paper_src import InputError
from paper_src.reporting import claims, summary
from paper_src.reporting.findings import NAN, Finding, load

ROOT = Path(__file__).parents[2]
ALL = claims.read_claims()
PARTS = ("reported", "finding", "rule", "decides")


def finding(name, value, lo=NAN, hi=NAN, n=NAN, test="", p=NAN):
    return Finding(name, value, lo, hi, "", n, "t", "", test, p)


KNOWN = {
    "cosine": finding("cosine", 0.8, 0.75, 0.85, n=64, test="BCa bootstrap over windows", p=0.0001),
    "constant": finding("constant", 0.6, 0.5, 0.76),
    "chance": finding("chance", 2.0, 0.9, 3.0, n=9, test="sign flips", p=0.25),
    "count": finding("count", 3, n=4),
    "all": finding("all", 4, n=4),
    "none": finding("none", NAN),
    "threshold": 0.8,
    "level": 0.05,
}


@pytest.mark.parametrize(
    ("test", "holds", "words"),
    [
        ("cosine > 0.7", True, "`cosine` 0.800 [0.750, 0.850] (> 0.7)"),
        ("cosine > threshold", None, "`cosine` 0.800 [0.750, 0.850] (> 0.8)"),
        ("cosine >= 0.9", False, "`cosine` 0.800 [0.750, 0.850] (≥ 0.9)"),
        ("cosine < 0.9", True, "`cosine` 0.800 [0.750, 0.850] (< 0.9)"),
        ("cosine > constant", None, "`cosine` 0.800 [0.750, 0.850] (> `constant` 0.600 [0.500, 0.760])"),
        ("count.share >= 0.75", True, "`count` 3/4 (≥ 0.75)"),
        ("count.share > 0.75", False, "`count` 3/4 (> 0.75)"),
        ("cosine > 0.7 and count.share > 0.75", False, "`count` 3/4 (> 0.75)"),  # the one that decides is told
        ("cosine > threshold and count.share >= 0.75", None, "`cosine` 0.800 [0.750, 0.850] (> 0.8)"),
        ("cosine > threshold and count.share > 0.75", False, "`count` 3/4 (> 0.75)"),  # whatever the other is
        ("none > 0", None, "`none` - (> 0)"),
        ("between(constant, cosine) > 0.55", None, "`constant` to `cosine` 0.600 [0.500, 0.850] (> 0.55)"),
        ("between(constant, cosine) < 0.82", None, "`constant` to `cosine` 0.600 [0.500, 0.850] (< 0.82)"),
        ("between(count.share, all.share) >= 0.7", True, "`count` to `all` 3/4 to 4/4 (≥ 0.7)"),
        ("between(count.share, all.share) >= 0.8", None, "`count` to `all` 3/4 to 4/4 (≥ 0.8)"),
        ("between(count.share, all.share) < 0.7", False, "`count` to `all` 3/4 to 4/4 (< 0.7)"),
        ("cosine.p <= level", True, "`cosine` p = 0.0001 (≤ 0.05)"),
        ("chance.p <= level", False, "`chance` p = 0.25 (≤ 0.05)"),
        ("constant.p <= level", None, "`constant` p - (≤ 0.05)"),  # no test was made
    ],
)
def test_a_rule_decides_where_the_intervals_do(test, holds, words):
    found = claims.decide(test, KNOWN)
    assert (found.holds, found.words) == (holds, words)


@pytest.mark.parametrize(
    ("test", "tests"),
    [
        ("cosine > 0.7", "BCa bootstrap over windows, n = 64, p = 0.0001"),
        ("cosine.p <= level", "BCa bootstrap over windows, n = 64, p = 0.0001"),
        ("count.share >= 0.75", "count, n = 4"),
        ("cosine > 0.7 and count.share >= 0.75", "BCa bootstrap over windows, n = 64, p = 0.0001; count, n = 4"),
        ("cosine > 0.7 and cosine > 0.6", "BCa bootstrap over windows, n = 64, p = 0.0001"),  # said once
        ("cosine > 0.7 and count.share > 0.75", "count, n = 4"),  # of the one that decides
        ("constant < 0.9", "bootstrap of an earlier commit"),
        ("none > 0", ""),
        ("cosine > chance", "BCa bootstrap over windows, n = 64, p = 0.0001; sign flips, n = 9, p = 0.25"),
    ],
)
def test_a_decision_names_test_n_and_p(test, tests):
    assert claims.decide(test, KNOWN).tests == tests


@pytest.mark.parametrize(
    "test",
    ["cosine", "cosine > missing", "cosine + 1 > 0", "0 < cosine < 1", "cosine == 1", "cosine > 1 or count > 1",
     "cosine.lo > 1", "between(count) > 1", "most(count, all) > 1", "__import__('os') > 1"],
)  # fmt: skip
def test_a_rule_is_nothing_but_comparisons(test):
    with pytest.raises(InputError, match="rule"):
        claims.decide(test, KNOWN)


def test_verdicts_of_one_claim():
    words = {"en": "", "zh": ""}
    claim = claims.Claim("a", "cost", "reproduced", words, words, words, "cosine > threshold", 0.7)
    assert claims.judge(claim, KNOWN)[::2] == ("reproduced", "BCa bootstrap over windows, n = 64, p = 0.0001")
    needs = claims.Claim("a", "cost", "reproduced", words, words, words, "cosine > threshold", 0.7, "count.share >= 1")
    assert claims.judge(needs, KNOWN) == ("undetermined", "`count` 3/4 (≥ 1)", "count, n = 4")
    unsure = claims.Claim(
        "a", "cost", "reproduced", words, words, words, "cosine > threshold", 0.7, "cosine > constant"
    )
    assert claims.judge(unsure, KNOWN)[0] == "undetermined"  # what it needs is itself undecided
    assert claims.judge(claim, {}) == ("not testable", "`cosine` -", "")
    nothing = claims.Claim("a", "cost", "not testable", words, words, words)
    assert claims.judge(nothing, KNOWN) == ("not testable", "", "")


def test_a_difference_that_chance_can_make_decides_nothing():
    words = {"en": "", "zh": ""}
    rules = ("cosine > threshold", 0.7, "chance.p <= level")
    claim = claims.Claim("a", "cost", "reproduced", words, words, words, *rules)
    assert claims.judge(claim, KNOWN) == ("undetermined", "`chance` p = 0.25 (≤ 0.05)", "sign flips, n = 9, p = 0.25")
    assert claim.uses() == {"cosine", "chance"}


@pytest.mark.parametrize(
    ("larger", "place"),
    [
        ({"cosine": KNOWN["cosine"], "count": KNOWN["count"]}, "long/"),
        ({"cosine": KNOWN["cosine"]}, ""),  # it cannot fill the sentence
        ({"cosine": finding("cosine", 0.9, 0.8, 1.0), "count": KNOWN["count"]}, ""),  # of a commit without tests
        ({}, ""),
    ],
    ids=["whole", "a finding is missing", "no test", "none"],
)
def test_the_best_run_decides_where_it_has_all_and_names_its_tests(larger, place):
    words = {"en": "{count:of}", "zh": "{count:of}"}
    claim = claims.Claim("a", "cost", "reproduced", words, words, words, "cosine > 0", folder="best")
    assert claim.place({"": KNOWN, "long/": larger, "gpu/": {}}) == place


def doctored(tmp_path, name, **columns):
    """Function that reads the committed tables, but ``name`` of t1_findings with other columns."""
    frame = pd.read_csv(ROOT / "tables" / "t1_findings.csv")
    for column, value in columns.items():
        frame.loc[frame["name"] == name, column] = value
    frame.to_csv(tmp_path / "t1_findings.csv", index=False)

    def read(table):
        place = tmp_path / f"{table}.csv"
        return pd.read_csv(place if place.is_file() else ROOT / "tables" / f"{table}.csv")

    return read


def test_a_verdict_that_flips_is_named_with_what_was_expected_and_found(tmp_path):
    changed = doctored(tmp_path, "pattern_fisher", value=1, lo=1, hi=1)

    def read(name):  # without the larger run, which would decide this claim
        if name.startswith("long/"):
            raise FileNotFoundError(name)
        return changed(name)

    (said,) = [each for each in claims.flipped(claims.t9_claims(read)) if each.startswith("pattern-by-gradients:")]
    assert (
        said == "pattern-by-gradients: expected undetermined, found not reproduced: `pattern_fisher` 1/9 [1, 1] (≥ 0.8)"
    )


def test_the_threshold_may_be_a_reported_value():
    words = {"en": "", "zh": ""}
    claim = claims.Claim("a", "cost", "reproduced", words, words, words, "cosine > threshold", "COSINE_TARGET")
    assert claim.constants()["threshold"] == 0.9
    assert claims.judge(claim, KNOWN)[0] == "not reproduced"


@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim.name)
class TestSchema:
    """What every entry of claims.yaml keeps."""

    def test_both_languages_say_the_same_numbers(self, claim):
        for part in PARTS:
            assert set(getattr(claim, part)) == {"en", "zh"}, part
        assert claim.fields("en") == claim.fields("zh")
        assert all(claim.reported.values()) and all(claim.finding.values()) and all(claim.rule.values())

    def test_rule_and_sentence_share_the_threshold(self, claim):
        given = claim.threshold == claim.threshold
        assert given == ("threshold" in claim.test)
        assert given == any(field.startswith("threshold") for field in claim.fields())
        assert set(re.findall(r"(?<![\w.])\d[\d.]*", claim.test + claim.needs)) <= {"0", "1"}  # nothing, everything

    def test_verdict_and_what_would_decide(self, claim):
        assert claim.expected in claims.VERDICTS
        assert claim.group in ("layers", "cost", "open")
        assert claim.test or claim.expected == "not testable"
        if claim.expected in ("undetermined", "not testable"):
            assert claim.decides["en"] and claim.decides["zh"]


def test_names_are_unique():
    assert len({claim.name for claim in ALL}) == len(ALL)


def test_templates_print_the_same_findings_in_both_languages():
    folder = Path(summary.__file__).parent
    fields = [sorted(re.findall(r"\b(?:f|long|counts)\.\w+(?: \| n\([^)]*\))?", (folder / name).read_text()))
              for name in summary.TEMPLATES.values()]  # fmt: skip
    assert fields[0] == fields[1]


def test_a_missing_section_is_said_and_nothing_else_breaks():
    def read(name):
        raise InputError(f"{name} is missing")

    assert load(read) == {}
    table = claims.t9_claims(read)
    assert set(table["verdict"]) == {"not testable"}
    for language in summary.TEMPLATES:
        assert summary.summary(read, table, language).startswith("# ")
    names = [said.partition(":")[0] for said in claims.flipped(table)]
    assert names == table.loc[table["expected"] != "not testable", "name"].tolist()


def test_reporting_needs_neither_torch_nor_the_method():
    modules = sorted(f"paper_src.reporting.{path.stem}" for path in (ROOT / "paper_src/reporting").glob("[a-z]*.py"))
    method = sorted(f"paper_src.{path.stem}" for path in (ROOT / "paper_src").glob("[a-z]*.py") if path.stem != "files")
    code = f"import {', '.join(modules)}, sys; print([m for m in ['torch', *{method!r}] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_cells_stay_short(tmp_path):
    found = claims.t9_claims(lambda name: pd.read_csv(ROOT / "tables" / f"{name}.csv"))
    for part in ("reported", "finding", "rule", "decides", "decided_by", "by_test"):
        lengths = found[part].str.split().str.len()
        assert lengths.max() <= 25, found.loc[lengths.idxmax(), "name"]
