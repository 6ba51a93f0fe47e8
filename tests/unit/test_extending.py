"""A score and a strategy of one's own: a function and an entry each, and the notebooks as they are show both."""

import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch

from paper_src import scoring, selection
from paper_src.coalitions import Cost
from paper_src.layers import LayerRunner
from paper_src.reporting.parameters import parameters_for

ROOT = Path(__file__).parents[2]
SMALL = {
    "01_importance": {"sequences": 8, "true_sequences": 4, "taylor_sequences": 4, "loo_windows": 4, "causal_windows": 4,
                      "length": 32, "causal_length": 16, "scored": 8, "repair_every": 4},
    "02_selection": {"random_draws": 4, "random_draws_smallest": 4, "judged_draws": 2, "search_blocks": [1, 1, 2],
                     "generations": 1, "fresh_blocks": [], "stability_seeds": [], "valid_blocks": 2,
                     "valid_length": 32},
    "04_fidelity": {"headline_blocks": 4, "blocks": 2, "random_blocks": 1, "length": 32},
}  # fmt: skip


# what docs/extending.md shows: the function and the entry of a score, and those of a strategy
def update_size(calibration):
    """How far each layer moves the states, before the final norm: E |h' - h| / |h| over tokens."""
    runner, rows = LayerRunner(calibration.model), []

    def moved(index, layer, hidden):  # (1, T, d)
        after = layer(hidden)
        rows[-1].append(float(((after - hidden).norm(dim=-1) / hidden.norm(dim=-1)).mean()))
        return after

    for block in calibration.progress(calibration.blocks, "update size"):
        rows.append([])
        runner.drive(block[None].to(calibration.model.device), moved)
    return {"update_size": torch.tensor(rows, dtype=torch.float64)}, Cost(1, calibration.blocks.numel())  # (N, L)


def every_second(depth, k):
    """Every second layer from the first, then those between."""
    return tuple(sorted([*range(0, depth, 2), *range(1, depth, 2)][:k]))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Tables and figures of notebooks 1, 2 and 4 with both registered; notebook 3 gives its speeds."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "tables").mkdir()
    shutil.copy(ROOT / "tests/notebooks/baseline/tables/t3_speed.csv", folder / "tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setitem(scoring.SCORES, "update_size", scoring.Score("update size", "activation", "a test", update_size))
        patch.setitem(
            selection.STRATEGIES, "every_second",
            selection.Strategy(every_second, "every second", "rule", "depth", "a test"),
        )  # fmt: skip
        patch.chdir(ROOT)
        for name, settings in SMALL.items():
            notebook, profile = Path(f"notebooks/{name}.ipynb"), Path("profiles/tiny.yaml")
            run(notebook, parameters_for(notebook, profile, {"results": str(folder)}) | settings, patch)
    return folder


def run(notebook, parameters, patch):
    """Every code cell in order, in this process."""
    cells = nbformat.read(notebook, as_version=4).cells
    scope = {}
    with patch.context() as here:
        here.chdir(notebook.parent)
        for cell in cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{notebook.stem}:{cell['id']}", "exec"), scope)
            if "parameters" in cell.metadata.get("tags", []):
                scope |= parameters


def table(results, name):
    return pd.read_csv(results / "tables" / f"{name}.csv")


def test_the_score_stands_in_every_table_beside_the_random_control(results):
    importance, agreement = table(results, "t1_importance"), table(results, "t1_agreement")
    assert importance["update_size"].gt(0).all() and importance["update_size_se"].gt(0).all()
    assert "update_size_layer" in table(results, "t1_top10")
    assert {"score_a", "score_b"} <= {column for column in agreement if (agreement[column] == "update_size").any()}
    assert table(results, "t1_cost").set_index("scores").loc["update_size", "forward_tokens"] == 8 * 32
    for name in ("t2_selection", "t4_fidelity"):
        rows = table(results, name)
        own = rows[rows["score"] == "update_size"]
        assert set(own["strategy"]) == set(selection.of_kind("score"))
        assert set(own["k"]) == set(rows.loc[rows["strategy"] == "random", "k"]) == {2, 4, 6}
    assert own["p_ppl"].between(1 / 5, 1).all()  # against 4 random draws


def test_the_strategy_stands_in_every_table_beside_the_random_control(results):
    for name in ("t2_selection", "t2_strategies", "t4_fidelity"):
        rows = table(results, name)
        own = rows[rows["strategy"] == "every_second"].set_index("k")["kept"]
        assert own.to_dict() == {2: "0 2", 4: "0 2 4 6", 6: "0 1 2 3 4 6"}
    strategies = table(results, "t2_strategies").set_index("strategy")
    assert (strategies.loc["every_second", "forward_tokens"] == 0).all()
    assert strategies.loc["random", "n_draws"].tolist() == [2, 2, 2]


def test_a_search_that_builds_on_others_costs_what_they_cost_too(results):
    costs = table(results, "t2_strategies").set_index(["strategy", "k"])[["evaluations", "forward_tokens", "seconds"]]
    for k in (2, 4, 6):
        whole, parts = costs.loc[("swap", k)], costs.loc[[(name, k) for name in ("sleb", "evopress", "staged")]]
        assert (parts.max() <= whole).all()
        assert whole["evaluations"] > parts["evaluations"].max()


@pytest.mark.parametrize(
    ("figure", "texts"),
    [
        ("f1_importance", ["update size"]),
        ("f1_agreement", ["update size"]),
        ("f2_selection", ["every second", "random"]),
        ("f2_strategies", ["every second", "random"]),
        ("f4_tradeoff", ["update size", "every second", "random"]),
    ],
)
def test_both_stand_in_the_figures(results, figure, texts):
    drawn = (results / "figures" / f"{figure}.svg").read_text(encoding="utf-8")
    for text in texts:
        assert text in drawn


def test_the_page_shows_the_same_lines():
    """docs/extending.md cannot fall behind this test."""
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    own = Path(__file__).read_text(encoding="utf-8")
    for start, end in (("def update_size", "\n\n\ndef every"), ("def every_second", "\n\n\n@pytest")):
        lines = own[own.index(start) :]
        assert lines[: lines.index(end)] in page
