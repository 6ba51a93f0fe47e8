"""What the paper finds on several models, from the committed results and copies of them."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import hypergeom

from paper_src import InputError
from paper_src.reporting import summary
from paper_src.sections import general

ROOT = Path(__file__).parents[2]


@pytest.fixture
def other(tmp_path):
    """The paper's tables as if they were of another model."""
    folder = tmp_path / "other"
    shutil.copytree(ROOT / "tables", folder, ignore=lambda path, names: [n for n in names if Path(path, n).is_dir()])
    record = folder / "01_importance.json"
    made = json.loads(record.read_text())
    made["model"] |= {"name": "somebody/other-model", "sha256": "f" * 64}
    record.write_text(json.dumps(made))
    return folder


@pytest.fixture
def runs(other):
    return general.runs_of(ROOT / "tables", [other])


def change(folder, table, where, **values):
    frame = pd.read_csv(folder / f"{table}.csv")
    for column, value in values.items():
        frame[column] = frame[column].astype(object)
        frame.loc[where(frame), column] = value
    frame.to_csv(folder / f"{table}.csv", index=False)


def lose_the_pattern(folder):
    """Gradient scores there find one layer of the reported pattern, surely."""
    names = ["pattern_fisher", "pattern_grad_norm"]
    change(folder, "t1_findings", lambda frame: frame["name"].isin(names), value=1, lo=1, hi=1)


def test_runs_of_the_same_weights_are_one_model(other):
    runs = general.runs_of(ROOT / "tables", [ROOT / "tables", other, other])
    assert [run.name for run in runs] == ["smollm2-135m-instruct", "other-model"]


def test_a_run_that_is_not_whole_is_refused(other):
    for name in ("t5_findings.csv", "01_importance.json"):
        (other / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            general.runs_of(ROOT / "tables", [other])
        shutil.copy(ROOT / "tables" / name, other)


def test_overlap_with_the_reported_pattern_and_its_chance(runs):
    row = general.t9_model_scores(runs).set_index(["model", "score"]).loc[("smollm2-135m-instruct", "fisher")]
    assert (row["in_pattern"], row["pattern_layers"]) == (8, 9)
    assert row["by_chance"] == pytest.approx(2.7)
    assert row["p"] == pytest.approx(hypergeom.pmf(8, 30, 9, 9) + hypergeom.pmf(9, 30, 9, 9))


def test_sinks_are_where_the_variance_needs_them(runs, other):
    first, second = general.t9_models(runs).to_dict("records")
    assert (first["sink_from"], first["sink_to"], first["combined_rank_of_sink"]) == (11, 27, 1)
    assert second["sink_from"] == 11
    change(other, "t1_importance", lambda frame: frame["layer"] < 20, activation_variance_no_sink=1e9)
    change(other, "t1_importance", lambda frame: frame["layer"] == 20, combined=0.6)
    (moved,) = general.t9_models([general.Run(other)]).to_dict("records")
    assert moved["sink_from"] == 20
    assert moved["combined_rank_of_sink"] == 4  # behind layers 11 (0.83), 29 and 0
    change(other, "t1_importance", lambda frame: frame["layer"] >= 0, activation_variance_no_sink=1e9)
    (none,) = general.t9_models([general.Run(other)]).to_dict("records")
    assert pd.isna(none["sink_from"])
    assert pd.isna(none["combined_rank_of_sink"])


def test_depths_have_every_stage_of_the_recovery_and_both_speeds(runs):
    depths = general.t9_model_depths(runs)
    assert list(depths["stage"])[:3] == ["cut", "closed form", "distilled"]
    assert depths.groupby("model")["k"].unique().map(list).tolist() == [[22, 15, 8]] * 2
    recovered = pd.read_csv(ROOT / "tables" / "t5_recovery.csv").set_index("row")
    last = depths[(depths["k"] == 8) & (depths["stage"] == "distilled")].iloc[0]
    assert last["ppl_ratio"] == recovered.loc["selected k=8 distilled", "ppl_ratio"]
    assert last["share"] == 8 / 30
    assert last["flop_ratio"] == pytest.approx(30 / 8)
    assert 1 < last["flop_ratio_head"] < last["flop_ratio"]


def test_a_claim_differs_where_verdicts_do(other):
    lose_the_pattern(other)
    run = general.Run(ROOT / "tables")
    table = general.t9_model_claims([run, general.Run(other)]).set_index("name")
    row = table.loc["pattern-by-gradients"]
    assert (row[run.name], row["other-model"], row["differs"]) == ("undetermined", "not reproduced", True)
    same = table.loc["pattern-by-worth"]
    assert same[run.name] == same["other-model"]
    assert not same["differs"]


def test_a_claim_whose_section_was_not_run_does_not_differ(other):
    (other / "t7_findings.csv").unlink()
    table = general.t9_model_claims(general.runs_of(ROOT / "tables", [other])).set_index("name")
    untested = table[(table["other-model"] == "not testable") & (table["smollm2-135m-instruct"] != "not testable")]
    assert len(untested)
    assert not untested["differs"].any()


def test_the_figure_has_a_line_for_each_model_at_each_stage(runs):
    figure = general.f9_models(general.t9_model_depths(runs))
    assert [axis.get_title() for axis in figure.axes] == ["cut", "closed form", "distilled"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["smollm2-135m-instruct", "other-model", "all kinds of text"]


def test_the_summary_compares_models_where_there_are_several(other):
    lose_the_pattern(other)
    names = ("t9_models", "t9_model_scores", "t9_model_depths", "t9_model_claims")

    def made_of(runs):
        return {name: getattr(general, name)(runs) for name in names}

    def text(runs, language):
        made = made_of(runs)
        return summary.summary(lambda name: made[name] if name in made else runs[0].read(name),
                               runs[0].read("t9_claims"), language)  # fmt: skip

    one, two = general.runs_of(ROOT / "tables", []), general.runs_of(ROOT / "tables", [other])
    assert "## 9" not in text(one, "en")
    assert "Your model is another" not in text(one, "en")
    depths = made_of(two)["t9_model_depths"].query("stage == 'distilled' and k == 8")["ppl_ratio"]
    told = next(line for line in text(two, "en").splitlines() if "Your model is another" in line)
    assert "on 2 models, three quarters" in told
    assert f"a quarter {depths.min():.1f} to {depths.max():.1f}; over all kinds of text" in told
    means = made_of(two)["t9_model_depths"].query("stage == 'distilled' and k == 8")["ppl_ratio_mean"]
    assert f"and {means.min():.1f} to {means.max():.1f} (the models' budgets differ). On all of them" in told
    for language, verdict in (("en", "*not reproduced*"), ("zh-CN", "*未复现*")):
        found = text(two, language).split("## 9.")[1]
        assert "| other-model | 30 | 134,515,008 | `block_influence` 0.68 |" in found
        assert "| other-model | 8 | sleb |" in found
        assert found.count("`pattern-by-gradients`") == 1
        assert f"other-model {verdict}" in found
