"""Every claim of the summary against the committed tables."""

import importlib
import inspect
import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from paper_src.reporting import claims, publish, summary
from paper_src.reporting.findings import EARLIER, LARGER, SECTIONS, load
from paper_src.sections import general

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(read):
    return claims.t9_claims(read)


def test_no_claim_changed_its_verdict(table):
    assert claims.flipped(table) == []
    assert set(table["verdict"]) == set(claims.VERDICTS)


def test_claims_rest_on_findings_that_exist(read):
    known = {folder: load(read, folder) for folder in ("", *LARGER)}
    for claim in claims.read_claims():
        if claim.expected != claims.NOT_TESTABLE:  # what cannot be tested may have nothing to rest on
            assert claim.uses() <= set(known[claim.place(known)]), claim.name


def test_every_verdict_names_its_test_n_and_interval(table):
    """Or is a plain count, which is of so many; what decides nothing or rests on nothing has no test."""
    for row in table.to_dict("records"):
        if row["verdict"] in (claims.REPRODUCED, claims.NOT_REPRODUCED):
            assert re.search(r"\bn = [\d,]+", row["by_test"]), row["name"]
            for part in row["decided_by"].split("; "):
                counted = re.search(r"` \d+/\d+ \(", part) or row["by_test"].startswith("count, ")
                assert counted or re.search(r"\[.+, .+\]", part), (row["name"], part)
            assert EARLIER not in row["by_test"], f"{row['name']} hangs on a percentile bootstrap of few values"


@pytest.mark.parametrize("seed", range(5))
def test_every_verdict_survives_another_seed_of_its_bootstraps(read, seed):
    """Intervals and p-values computed anew from the losses of every window, wherever a section can."""

    def with_seed(name):
        found = re.fullmatch(r"(.*/)?t(\d)_findings", name)
        folder, made = found.group(1) or "", findings_function(int(found.group(2)))
        again = (ROOT / "tables" / f"{name}.csv").is_file() and "seed" in inspect.signature(made).parameters
        again = again and not earlier(name)
        return made(lambda part: read(f"{folder}{part}"), seed=seed) if again else read(name)

    found = claims.t9_claims(with_seed).set_index("name")["verdict"].to_dict()
    assert found == read("t9_claims").set_index("name")["verdict"].to_dict()


def earlier(name):
    """Whether a table is of a run of section 5 that kept no losses of windows: nothing can be computed anew."""
    return name.endswith("t5_findings") and not (ROOT / f"tables/{name.replace('findings', 'windows')}.csv").is_file()


def findings_function(section):
    """tN_findings of a section, from the module that has it."""
    name, paths = f"t{section}_findings", (ROOT / "paper_src/sections").glob("*.py")
    (module,) = [path.stem for path in paths if f"\ndef {name}(" in path.read_text(encoding="utf-8")]
    return getattr(importlib.import_module(f"paper_src.sections.{module}"), name)


def test_the_committed_table_of_claims_is_that_of_the_findings(read, table):
    pd.testing.assert_frame_equal(read("t9_claims").fillna(""), table.fillna(""))


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("folder", ["", "long/"])  # of other folders the findings alone are read
def test_findings_are_those_of_the_tables(read, folder, section):
    name = f"{folder}t{section}_findings"
    if not (ROOT / "tables" / f"{name}.csv").is_file() or earlier(name):
        pytest.skip("not run, or of an earlier protocol")
    made = findings_function(section)(lambda table: read(f"{folder}{table}"))
    words = {column: made[column].replace("", None) for column in ("text", "unit", "test")}
    pd.testing.assert_frame_equal(read(name), made.assign(**words), check_dtype=False)


def test_the_models_that_are_compared_are_committed_and_from_clean_commits(read):
    profile = yaml.safe_load((ROOT / "profiles" / "laptop.yaml").read_text(encoding="utf-8"))
    folders = [ROOT / "notebooks" / folder for folder in profile["09_summary"]["others"]]
    runs = general.runs_of(ROOT / "tables", folders)
    assert read("t9_models")["sha256"].tolist() == [run.sha256 for run in runs]
    for run in runs[1:]:
        records = [json.loads(path.read_text()) for path in sorted(run.tables.glob("0*.json"))]
        assert [record["notebook"][:2] for record in records] == ["01", "02", "03", "04", "05", "07"]
        assert not any(record["git"]["dirty"] for record in records)
        assert {record["model"]["sha256"][:12] for record in records} == {run.sha256}


@pytest.mark.parametrize("language", summary.FILES)
def test_summary_is_rendered_from_the_tables(read, table, language):
    rendered = summary.summary(read, read("t9_claims"), language)
    assert (ROOT / summary.FILES[language]).read_text(encoding="utf-8") == rendered
    said = rendered.replace("provenance", "")
    assert "nan" not in said and "Finding(" not in said


def test_the_chinese_summary_has_the_same_numbers_and_links():
    pair = [(ROOT / name).read_text(encoding="utf-8") for name in ("SUMMARY.md", "SUMMARY.zh-CN.md")]
    assert _numbers(pair[0]) == _numbers(pair[1])
    links = [[link for link in re.findall(r"\]\(([^)]+)\)", text) if "SUMMARY" not in link] for text in pair]
    assert links[0] == links[1]


def test_summary_is_short(read, table):
    text = (ROOT / "SUMMARY.md").read_text(encoding="utf-8")
    first = summary.parts(read, table)
    assert len(first["abstract"].split()) <= 120
    assert len(first["advice"].splitlines()) == 6
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = block.splitlines()[2:]
        assert 1 <= len(rows) <= summary.MOST_ROWS, block[:80]
    body = (text.split("## Verdicts")[1]).split("## How it was measured")[0]
    for row in re.findall(r"^\| (?!the report|statement|---)(.*) \|$", body, re.MULTILINE):
        assert len(row.split(" | ")) == 4, row
        assert all(len(cell.split()) <= 25 for cell in row.split(" | ")), row


def test_figures_of_the_summary_exist():
    text = (ROOT / "SUMMARY.md").read_text(encoding="utf-8")
    figures = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(figures) >= 8
    assert [path for path in figures if not (ROOT / path).is_file()] == []


def test_prose_holds_no_number_of_its_own():
    """A number in a template is a field; what is left are names, levels and headings."""
    for name in summary.TEMPLATES.values():
        text = (ROOT / "paper_src/reporting" / name).read_text(encoding="utf-8")
        prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|`[^`]*`|\([^)]*\)", "", text, flags=re.DOTALL)
        prose = re.sub(r"^## \d\.", "", prose, flags=re.MULTILINE)
        found = set(re.findall(r"(?<![\w.@])\d[\d.,]*\d%?|(?<![\w.@-])\d%?(?![\w-])", prose))
        assert found <= {"95%", "0.05", "4", "8", "1"}, found  # levels; bits; a ratio of one


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
    # measured as a selection beside others: on some processors a bfloat16 product depends on its batch
    assert fidelity.loc["full", "cosine"] == pytest.approx(1, abs=2e-4)
    assert fidelity.loc["full", "kl_nats"] == pytest.approx(0, abs=1e-3)
    assert fidelity.loc["trivial", "cosine_centred"] < 0.1


def test_every_table_has_its_provenance():
    for table in (ROOT / "tables").glob("t*.csv"):
        section = re.match(r"t(\d)_", table.name).group(1)
        assert list((ROOT / "tables").glob(f"0{section}_*.json")), table.name


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
        assert (part["n_windows"] >= [16, 16, 64]).all()


def test_a_compact_model_is_judged_only_where_the_gate_passes(read):
    made = [name for name in ("t6_movielens", "t6_amazon") if (ROOT / "tables" / f"{name}.csv").is_file()]
    if not made:
        pytest.skip("section 6 is not among the committed results")
    gates, titles = read("t6_gate"), read("t6_titles")
    assert (gates["verdict"] == "passes").tolist() == (gates["lo"] > 1).tolist()
    assert (gates.loc[gates["design"] == "trained", "trainings"] >= 3).all()
    for name in made:
        rows = read(name)
        passed = set(gates[(gates["dataset"] == rows["dataset"][0]) & (gates["verdict"] == "passes")]["design"])
        bodies = rows.groupby("method")["body"].agg(set).to_dict()
        bodies["titles"] = set(titles.loc[titles["dataset"] == rows["dataset"][0], "model"])
        for design in ("trained", "frozen", "titles"):
            assert ("recovered" in bodies[design]) == (design in passed), (name, design)
        assert {"most_popular", "item_knn", "sasrec"} <= bodies.keys()
        assert (rows["n_items"] > 3000).all()  # items are never sampled
        assert (rows["ndcg10_lo"] <= rows["ndcg10"]).all()


@pytest.mark.skipif(not (ROOT / "tables" / "t7_baselines.csv").is_file(), reason="section 7 is not committed")
def test_every_baseline_has_numbers_or_says_why_not(read):
    table = read("t7_baselines")
    none = table["ppl_ratio"].isna()
    assert table.loc[none, "status"].astype(str).str.startswith("not supported: ").all()
    assert table.loc[~none, "status"].isna().all()
    assert table.loc[table["method"] == "full model", "ppl_ratio"].item() == pytest.approx(1, abs=1e-6)
    for name, share in (("Wanda 50%", 0.5), ("Wanda 75%", 0.75), ("Wanda 2:4", 0.5), ("magnitude 50%", 0.5)):
        assert table.loc[table["method"] == name, "zeros"].to_numpy() == pytest.approx(share, abs=0.002)
    sizes = table[table["method"] == "layers cut"].drop_duplicates("k").set_index("k")["parameters"]
    for _, row in table[table["family"].isin(["width", "low rank"])].iterrows():
        assert 0.9 * sizes[row["k"]] < row["parameters"] <= sizes[row["k"]]


def test_the_table_of_provenance_is_that_of_the_committed_records():
    assert (ROOT / "tables" / "provenance.md").read_text(encoding="utf-8") == publish.provenance(ROOT / "tables")
