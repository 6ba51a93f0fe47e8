"""Committed tables against regenerated ones (results/laptop): numbers within the tolerances of tolerances.yaml, and
every verdict of the claims.
"""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from paper_src.reporting import claims

ROOT = Path(__file__).parents[2]
# from tables that are compared; what to take hangs on a limit; a busy machine takes more rounds
DERIVED = re.compile(r"t7_take|t\d_findings|t\d_rounds|t9_model")
LAPTOP = ROOT / "results" / "laptop" / "tables"
TABLES = sorted(path.name for path in (ROOT / "tables").glob("*.csv") if not DERIVED.match(path.name))
RULES = yaml.safe_load((ROOT / "tests/paper/tolerances.yaml").read_text())


def committed(name):
    """The file of tables/ as committed, open; a run replaces it, so git is asked first."""
    done = subprocess.run(["git", "show", f"HEAD:tables/{name}"], check=False, capture_output=True, text=True, cwd=ROOT)
    return io.StringIO(done.stdout if done.returncode == 0 else (ROOT / "tables" / name).read_text(encoding="utf-8"))


def differences(old, new):
    """Columns of ``new`` that are out of tolerance, with the largest difference."""
    found = []
    for column in old:
        rule = next(rule for rule in RULES if re.fullmatch(rule["columns"], column))
        a, b = old[column], new[column]
        if rule.get("ignore"):
            continue
        if pd.api.types.is_bool_dtype(a) or not pd.api.types.is_numeric_dtype(a) or "share_equal" in rule:
            share = ((a == b) | (a.isna() & b.isna())).mean()
            if share < rule.get("share_equal", 1):
                found.append(f"{column}: {share:.0%} of rows equal")
        else:
            bound = rule.get("relative", 0) * a.abs() + rule.get("absolute", 0)
            agree = ((a - b).abs() <= bound) | (a.isna() & b.isna())
            if rule.get("or_overlap") and f"{column}_lo" in old:
                (low, high), (other_low, other_high) = ((f[f"{column}_lo"], f[f"{column}_hi"]) for f in (old, new))
                agree |= (low <= other_high) & (other_low <= high)
            if not agree.all():
                found.append(f"{column}: off by up to {(a - b).abs().max():.3g}")
    return found


def with_data_of(old, new):
    """Rows of ``old`` on the data sets of ``new``: a reader may not have Amazon's files."""
    if "dataset" not in old or not len(new):
        return old
    return old[old["dataset"].isin(new["dataset"])].reset_index(drop=True)


def test_a_run_without_a_data_set_is_compared_on_the_others():
    old = pd.DataFrame({"dataset": ["a", "b"], "ndcg10": [0.3, 0.4]})
    assert len(with_data_of(old, old[:1])) == 1
    assert differences(with_data_of(old, old[:1]), old[:1].assign(ndcg10=0.9)) == ["ndcg10: off by up to 0.6"]
    assert len(with_data_of(old, old[:0])) == 2


@pytest.mark.parametrize("name", TABLES)
def test_regenerated_table_agrees(name):
    path = LAPTOP / name
    if not path.exists():
        pytest.skip("results/laptop is not there: run ./reproduce.sh")
    old, new = pd.read_csv(committed(name)), pd.read_csv(path)
    old = with_data_of(old, new)
    assert list(new) == list(old)
    assert len(new) == len(old)
    keys = [column for column in ("k", "strategy", "score") if column in old and "chosen" in old]
    if keys:  # sorted by a measured value
        old, new = (frame.sort_values(keys, ignore_index=True) for frame in (old, new))
    assert differences(old, new) == []


def own(folder):
    """Function that reads tables of one folder, and no larger run: None is what is committed."""

    def read(name):
        if "/" in name:
            raise FileNotFoundError(name)
        return pd.read_csv(committed(f"{name}.csv") if folder is None else folder / f"{name}.csv")

    return read


def flips(old, new):
    """Claims whose verdict by the tables that ``new`` reads is not the one by those that ``old`` reads, in words."""
    before, after = claims.t9_claims(old), claims.t9_claims(new)
    return claims.flipped(after.assign(expected=before["verdict"]))


@pytest.mark.skipif(not (LAPTOP / "09_summary.json").is_file(), reason="results/laptop is not there")
def test_no_verdict_flips_in_the_regenerated_tables():
    """Also of a claim that a larger run decides: what this run says of it alone."""
    assert flips(own(None), own(LAPTOP)) == []
    assert claims.flipped(claims.t9_claims(lambda name: pd.read_csv(_place(name)))) == []


def _place(name):
    """File of a regenerated table; larger runs are committed alone."""
    return (ROOT / "tables" if "/" in name else LAPTOP) / f"{name}.csv"


def test_a_flipped_verdict_is_found_and_told(tmp_path):
    for path in (ROOT / "tables").glob("t*_findings.csv"):
        shutil.copy(path, tmp_path)
    assert flips(own(ROOT / "tables"), own(tmp_path)) == []
    table = pd.read_csv(tmp_path / "t1_findings.csv")
    table.loc[table["name"] == "pattern_fisher", ["value", "lo", "hi"]] = 2
    table.to_csv(tmp_path / "t1_findings.csv", index=False)
    assert flips(own(ROOT / "tables"), own(tmp_path)) == [
        "pattern-by-gradients: expected undetermined, found not reproduced: `pattern_fisher` 2/9 [2, 2] (≥ 0.8)"
    ]


def test_a_changed_number_is_found():
    old = pd.DataFrame({"cosine": [0.5, 0.6], "kept": ["0 1", "0 2"], "full_ms": [1.0, 2.0]})
    assert differences(old, old.assign(full_ms=np.nan)) == []
    assert differences(old, old.assign(cosine=[0.5, 0.7])) == ["cosine: off by up to 0.1"]
    assert differences(old, old.assign(kept=["0 1", "0 3"])) == ["kept: 50% of rows equal"]


def test_noisy_ratios_agree_where_their_intervals_meet():
    old = pd.DataFrame({"speedup": [1.0], "speedup_lo": [0.6], "speedup_hi": [1.5]})
    new = pd.DataFrame({"speedup": [1.4], "speedup_lo": [1.1], "speedup_hi": [1.6]})
    assert differences(old, new) == []
    assert differences(old.assign(speedup_hi=1.05), new.assign(speedup_hi=1.8)) == ["speedup: off by up to 0.4"]
    assert differences(pd.DataFrame({"recovered": [True]}), pd.DataFrame({"recovered": [False]})) != []


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", r"about (\d+) minutes on 2 cores"), ("README.zh-CN.md", r"时约 (\d+) 分钟")]
)
def test_the_promised_time_is_that_of_the_committed_run(name, words):
    records = [path.name for path in (ROOT / "tables").glob("0*.json")]
    seconds = sum(json.load(committed(record))["wall_s"] for record in records)
    promised = int(re.search(words, (ROOT / name).read_text(encoding="utf-8")).group(1))
    assert promised == pytest.approx(seconds / 60, rel=0.1)
