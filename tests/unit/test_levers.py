"""docs/recovery.md and the table of levers that it reads: every number of its table is of that run."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"\| `([\w.-]+)` \| .+? \| ([\d.]+) \| ([\d.]+)(?: \[([\d.]+), ([\d.]+)\])? \|")
TOLD = (ROOT / "docs" / "recovery.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs():
    """Lever x seed: geometric mean over kinds of text of the perplexity over the full model's."""
    table = pd.read_csv(ROOT / "tables" / "levers" / "t5_levers.csv")
    kinds = [name for name in table if name.startswith("ppl_ratio_") and name != "ppl_ratio_mean"]
    np.testing.assert_allclose(np.exp(np.log(table[kinds]).mean(axis=1)), table["ppl_ratio_mean"])
    assert len(kinds) == 5
    assert set(table["tokens"]) == {196608}
    return table.pivot(index="lever", columns="seed", values="ppl_ratio_mean")


def test_every_lever_is_told_with_its_mean_and_interval(runs):
    rows = {name: tuple(map(float, filter(None, rest))) for name, *rest in ROW.findall(TOLD)}
    assert rows.keys() == set(runs.index)
    for name, numbers in rows.items():
        logs = np.log(runs.loc[name] / runs.loc["base"])
        expected = [runs.loc[name].mean(), np.exp(logs.mean())]
        if name != "base":
            low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), logs.std(ddof=1) / len(logs) ** 0.5)
            expected += [np.exp(low), np.exp(high)]
        np.testing.assert_allclose(numbers, expected, atol=0.0051)


def test_the_levers_that_are_decided_are_those_of_holms_correction(runs):
    logs = np.log(runs.div(runs.loc["base"])).drop("base")
    p = pd.Series(stats.ttest_1samp(logs, 0, axis=1).pvalue, logs.index).sort_values()
    corrected = (p * np.arange(len(p), 0, -1)).cummax()
    decided = corrected.index[corrected < 0.05]
    sentence = " ".join(TOLD.split("By Holm's correction")[1].split("|")[0].split())
    assert re.findall(r"`([\w.-]+)`", sentence) == list(decided)
    assert (logs.loc[decided].mean(axis=1) > 0).all()


def test_the_record_names_commit_and_machine():
    record = json.loads((ROOT / "tables" / "levers" / "levers.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", record["git"]["commit"])
    assert record["git"]["dirty"] is False
    assert record["parameters"]["tokens"] == 196608
