"""The table across models, from the committed results."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import hypergeom

from paper_src import InputError
from paper_src.reporting import across

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(tmp_path):
    return Path(shutil.copytree(ROOT / "tables", tmp_path / "tables"))


def test_overlap_with_the_reported_pattern_and_its_chance(tables):
    row = across.row(tables)
    assert (row["layers"], row["pattern_layers"], row["in_pattern_fisher"]) == (30, 9, 8)
    assert row["by_chance"] == pytest.approx(2.7)
    assert row["p_fisher"] == pytest.approx(hypergeom.pmf(8, 30, 9, 9) + hypergeom.pmf(9, 30, 9, 9))


def test_the_committed_table_is_that_of_the_committed_runs():
    made = pd.DataFrame([across.row(ROOT / folder) for folder in ("tables", "tables/small-neox")])
    pd.testing.assert_frame_equal(pd.read_csv(ROOT / "tables" / "t9_models.csv"), made, check_dtype=False)


def test_one_row_a_run_and_a_run_that_is_not_whole(tables, tmp_path):
    across.write(tmp_path / "t", [tables, tables])
    assert len(pd.read_csv(tmp_path / "t.csv")) == 2
    assert "tau_fisher_leave_one_out" in (tmp_path / "t.md").read_text()
    for name in ("01_importance.json", "t5_findings.csv"):
        (tables / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            across.write(tmp_path / "t", [tables])
        shutil.copy(ROOT / "tables" / name, tables)
