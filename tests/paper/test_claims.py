"""Every claim of the summary against the committed tables."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from paper_src.reporting import claims, run

ROOT = Path(__file__).parents[2]


def test_no_claim_changed_its_verdict(read):
    assert claims.broken(read) == []


def test_summary_is_rendered_from_the_tables(read):
    rendered = claims.summary(read, claims.table(read))
    assert (ROOT / "SUMMARY.md").read_text(encoding="utf-8") == rendered


def test_the_chinese_summary_has_the_same_numbers_and_links(read):
    rendered = claims.summary(read, claims.table(read, language="zh-CN"), "zh-CN")
    assert (ROOT / "SUMMARY.zh-CN.md").read_text(encoding="utf-8") == rendered
    pair = [(ROOT / name).read_text(encoding="utf-8") for name in ("SUMMARY.md", "SUMMARY.zh-CN.md")]
    assert _numbers(pair[0]) == _numbers(pair[1])
    assert len(pair[0].splitlines()) > 100


def test_both_readmes_have_the_same_numbers_links_and_commands():
    pair = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")]
    assert _numbers(pair[0]) == _numbers(pair[1])
    links = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in pair]
    other = {"README.md": "README.zh-CN.md", "SUMMARY.md": "SUMMARY.zh-CN.md"}
    assert sorted(other.get(link, link) for link in links[0]) == sorted(
        "README.zh-CN.md" if link == "README.md" else link for link in links[1]
    )
    code = [re.findall(r"```python\n.*?```", text, re.DOTALL) for text in pair]
    assert code[0] == code[1]


def _numbers(text):
    return Counter(re.findall(r"\d+(?:[.,]\d+)*%?", text))


def test_every_k_has_a_random_control(read):
    fidelity, draws = read("t4_fidelity"), read("t4_random")
    for k in fidelity.loc[fidelity["strategy"] == "top_k", "k"].unique():
        assert (draws["k"] == k).sum() >= 20
        assert fidelity[(fidelity["strategy"] == "random") & (fidelity["k"] == k)]["n_draws"].item() >= 20


def test_full_model_and_trivial_predictor_frame_the_table(read):
    fidelity = read("t4_fidelity").set_index("strategy")
    assert fidelity.loc["full", "cosine"] == pytest.approx(1, abs=1e-6)
    assert fidelity.loc["full", "kl_nats"] == pytest.approx(0, abs=1e-3)
    assert fidelity.loc["trivial", "cosine_centred"] < 0.1


def test_every_table_has_its_provenance():
    for table in (ROOT / "tables").glob("t*.csv"):
        section = re.match(r"t(\d)_", table.name).group(1)
        assert list((ROOT / "tables").glob(f"0{section}_*.json")), table.name


@pytest.mark.parametrize("language", ["", ".zh-CN"])
def test_readme_shows_the_claims_of_the_summary(language):
    block = run.claims_block((ROOT / f"SUMMARY{language}.md").read_text(encoding="utf-8"))
    assert len(block.splitlines()) > 5
    assert block in (ROOT / f"README{language}.md").read_text(encoding="utf-8")


def test_readme_shows_figures_and_tables_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []


def test_recovery_stands_beside_full_model_trivial_predictor_and_control(read):
    table, selections = read("t5_recovery").set_index("selection"), read("t5_selection")
    assert table.loc["full", "cosine"] == pytest.approx(1, abs=1e-6)
    assert table.loc["full", "ppl_ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert table.loc["trivial", "cosine_centred"] < 0.1
    assert (selections["strategy"] == "random").sum() >= 20
    assert selections.groupby("k")["chosen"].sum().eq(1).all()


def test_every_stage_of_recovery_is_there_and_adds_no_parameters(read):
    rows = read("t5_recovery").query("selection == 'selected'")
    for _, part in rows.groupby("k"):
        assert part["recovery"].tolist() == ["none", "closed_form", "distilled"]
        assert part["kept"].nunique() == 1
        assert (part["parameters_added"] == 0).all()
        assert part["ppl_ratio"].is_monotonic_decreasing


def test_recommenders_stand_beside_popularity_and_the_full_catalogue(read):
    made = [name for name in ("t6_movielens", "t6_amazon") if (ROOT / "tables" / f"{name}.csv").is_file()]
    if not made:
        pytest.skip("section 6 is not among the committed results")
    for name in made:
        rows = read(name).set_index(["method", "model"])
        assert {("most_popular", "none"), ("item_knn", "none"), ("sasrec", "all users")} <= set(rows.index)
        assert {"full", "compact", "recovered", "first_layers"} <= set(rows.loc["trained"].index)
        assert set(rows.loc["trained"].index) | {"compact, all users"} == set(rows.loc["no_layers"].index)
        assert (rows["n_items"] > 3000).all()  # items are never sampled
        assert (rows["ndcg10_lo"] <= rows["ndcg10"]).all()


@pytest.mark.skipif(not (ROOT / "tables" / "t7_baselines.csv").is_file(), reason="section 7 is not committed")
def test_every_baseline_has_numbers_or_says_why_not(read):
    table = read("t7_baselines")
    none = table["ppl_ratio"].isna()
    assert table.loc[none, "status"].str.startswith("not supported: ").all()
    assert table.loc[~none, "status"].isna().all()
    assert table.loc[table["method"] == "full model", "ppl_ratio"].item() == pytest.approx(1, abs=1e-6)
    for name, share in (("Wanda 50%", 0.5), ("Wanda 75%", 0.75), ("Wanda 2:4", 0.5), ("magnitude 50%", 0.5)):
        assert table.loc[table["method"] == name, "zeros"].to_numpy() == pytest.approx(share, abs=0.002)
    sizes = table[table["method"] == "layers cut"].drop_duplicates("k").set_index("k")["parameters"]
    for _, row in table[table["family"].isin(["width", "low rank"])].iterrows():
        assert 0.9 * sizes[row["k"]] < row["parameters"] <= sizes[row["k"]]


def test_small_and_missing_numbers_in_sentences():
    claim = dataclasses.replace(claims.CLAIMS[0], ours="{a:times}, {b:times}, {c:.2f}, {d}")
    assert claim.told({"a": 46023.4, "b": 1.2527, "c": float("nan"), "d": 3}) == "46,023, 1.25, -, 3"
