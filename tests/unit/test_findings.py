"""Findings: how they are collected, read back and printed; some of sections 2 and 3 counted by hand."""

from pathlib import Path

import pandas as pd
import pytest

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.reporting.findings import COLUMNS, NAN, Finding, Findings, ends, load, number, spread
from paper_src.sections import compaction, selection

ROOT = Path(__file__).parents[2]


def test_collected_and_read_back():
    found = Findings()
    found.add("t4_fidelity", "cosine_best", *ends({"cosine": 0.5, "cosine_lo": 0.4, "cosine_hi": 0.6}, "cosine"), n=8)
    found.add("t4_fidelity", "wins", 3, unit="pairs", n=4, text="a, b")
    frame = found.frame()
    assert list(frame) == list(COLUMNS)
    known = load(lambda name: {"t4_findings": frame}[name] if name == "t4_findings" else _missing(name))
    assert f"{known['cosine_best']:~.2f}" == "0.50 [0.40, 0.60]"
    assert known["wins"].share.value == 0.75 and known["wins"].share.text == "3/4"
    assert f"{known['wins']:of}" == "3/4" and str(known["wins"]) == "a, b" and f"{known['wins']:d}" == "3"
    found.add("t4_fidelity", "wins", 1)
    with pytest.raises(InputError, match="wins"):
        found.frame()


def _missing(name):
    raise FileNotFoundError(name)


def test_numbers_in_prose():
    written = [number(value) for value in (46023.4, 100, 81.34, 1.2527, 0.0713, 1, NAN)]
    assert number(-1234.5) == "-1,234"
    assert written == ["46,023", "100", "81.3", "1.25", "0.0713", "1.00", "-"]
    assert number(1234567.0, ",") == "1,234,567" and number(8.0, "d") == "8" and number(0.949, ".0%") == "95%"
    assert str(Finding("k", 8.0, NAN, NAN, "", NAN, "", "")) == "8"
    assert Finding("none", 0.0, NAN, NAN, "", 0.0, "", "").share.value != 0  # of nothing: NaN


def test_a_range_is_median_and_ends():
    assert spread(pd.Series([9.0, 1.0, 2.0])) == (2.0, 1.0, 9.0)


def test_a_share_has_its_interval():
    found = Finding("wins", 4.0, 2.0, 6.0, "", 8, "", "").share
    assert (found.value, found.lo, found.hi) == (0.5, 0.25, 0.75)


def section_3(depth, rows):
    """Function that reads t3_size, t3_speed and t3_rounds of (k, task, ratios of the rounds, quiet)."""
    key = [{"task": task, "batch": 1, "length": 8, "new_tokens": 0, "k": k} for k, task, *_ in rows]
    rounds = pd.DataFrame([
        {**name, "round": turn, "full_s": ratio, "compact_s": 1.0}
        for name, (_, _, ratios, _) in zip(key, rows, strict=True)
        for turn, ratio in enumerate(ratios)
    ])  # fmt: skip
    speed = pd.DataFrame(key).assign(quiet=[row[3] for row in rows], share_of_ideal=1.0, ideal=3.9)
    speed[["speedup", "speedup_lo", "speedup_hi", "rounds"]] = 0.0  # what stands there is not asked
    size = pd.DataFrame({"k": [depth, *sorted({row[0] for row in rows})], "parameters": 10, "layer_compression": 1.0,
                         "parameter_compression": 1.0, "disk_bytes": 1, "peak_memory_bytes": 1,
                         "dtype": "float32"})  # fmt: skip
    return {"t3_speed": speed, "t3_size": size, "t3_rounds": rounds}.__getitem__


def test_intervals_of_speed_are_order_statistics_of_the_rounds():
    nine = [3.0, 9.0, 4.0, 4.1, 4.2, 3.9, 1.0, 4.3, 4.4]  # the second and the last but one: 3 and 4.4
    read = section_3(30, [(8, "prefill_hidden", nine, True), (8, "decode", [2.0, 3.0, 2.5], False),
                          (22, "prefill_hidden", [5.0] * 9, True)])  # fmt: skip
    found = compaction.t3_findings(read).set_index("name")
    smallest = found.loc["speedup_smallest"]
    assert smallest[["value", "lo", "hi", "n"]].tolist() == [4.1, 3.0, 4.4, 9]
    assert smallest["test"] == "order statistics of rounds"
    # over the two workloads: the median of both medians, and the outermost ends; three rounds have their range
    assert found.loc["speedup_smallest_any", ["value", "lo", "hi", "n"]].tolist() == [(4.1 + 2.5) / 2, 2.0, 4.4, 2]
    assert found.loc["timed_quietly_smallest", ["value", "n", "test"]].tolist() == [1, 2, "count"]
    # the arithmetic allows 3.9 everywhere: an interval of 3 to 4.4 holds it, one of 5 does not
    assert found.loc["prefill_above_ideal", ["value", "n"]].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("depth", "ks", "inside"),
    [(30, [12, 11, 8, 4], "8, 11"),  # 2.7 to 4.0 of 30 layers: 8 to 11
     (26, [12, 10, 6], None),
     (32, [12, 20, 4], "12")],  # 32 / 12 is 2.67, which the report gives as 2.7
)  # fmt: skip
def test_the_speed_range_is_of_the_reported_compression_alone(depth, ks, inside):
    rows = [(k, "prefill_hidden", [10.0 / k] * 6, True) for k in ks]
    found = compaction.t3_findings(section_3(depth, rows)).set_index("name")
    assert ("reported_compression_k" in found.index) == (inside is not None)
    if inside:
        assert found.loc["reported_compression_k", "text"] == inside
        assert found.loc["speedup_reported_compression_any", "hi"] == 10.0 / int(inside.split(", ")[0])


@pytest.mark.parametrize(("best", "inside"), [("expected", 7), ("others", 0)])
def test_the_reported_selection_under_every_formula(best, inside):
    """Where all parts of a combined score agree, all formulas do: they find all of the reported layers, or none.

    But for one: carried over to 30 layers, three of them are in the first quarter, of which two layers are kept.
    """

    def read(name):
        table = pd.read_csv(ROOT / f"tables/{name}.csv")
        if name == "t1_importance":
            expected = reported.at_depth(reported.RECOMMENDED, len(table))
            score = pd.Series([1.0 + ((layer in expected) == (best == "expected")) for layer in table.index])
            parts = ["fisher", "grad_norm", "activation_variance", "activation_mean_abs", "activation_kurtosis"]
            table = table.assign(**dict.fromkeys(parts, score + table.index / 100))
        return table

    found = selection.t2_findings(read).set_index("name")
    ends = found.loc[["recommended_combined_least", "recommended_combined_most"]]
    assert ends["value"].tolist() == [inside, inside] and ends["n"].tolist() == [8, 8]
