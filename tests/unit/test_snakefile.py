"""The graph of the paper: what makes a section run again, and that it is what the notebooks say."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from paper_src.reporting.graph import files_of, modules_of

ROOT = Path(__file__).parents[2]


def planned(tmp_path, model):
    """What a dry run of section 1 says."""
    command = [sys.executable, "-m", "snakemake", f"{tmp_path}/tables/01_importance.json", "--cores", "2", "--dry-run",
               "--nolock", "--config", "profile=tiny", f"results={tmp_path}", f"model={model}"]  # fmt: skip
    cache = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=cache).stdout


def test_a_section_has_all_cores_and_depends_on_the_files_of_a_local_model(tmp_path):
    folder = tmp_path / "a [model]"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("x")
    said = planned(tmp_path, folder)
    assert "threads: 2" in said
    inputs = said.split("input: ")[1].splitlines()[0].split(", ")
    assert inputs[:3] == ["notebooks/01_importance.ipynb", "profiles/tiny.yaml", "requirements.txt"]
    assert inputs[3:-2] == modules_of(ROOT / "notebooks" / "01_importance.ipynb", ROOT)
    assert inputs[-2:] == [f"{folder}/config.json", f"{folder}/model.safetensors"]


def test_every_table_that_is_read_is_made_by_an_earlier_notebook():
    made: set[str] = set()
    for notebook in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        files = files_of(notebook, ROOT)
        assert set(files.reads) <= made, notebook.stem
        assert files.tables or files.figures, notebook.stem
        made |= set(files.tables)


@pytest.mark.parametrize(("name", "needs"), [
    ("03_compaction", "t2_selection"), ("04_fidelity", "t3_speed"), ("06_recommendation", "t5_recovery"),
    ("07_baselines", "t5_recovery"), ("08_controls", "t1_importance"),
])  # fmt: skip
def test_known_dependencies(name, needs):
    assert needs in files_of(ROOT / "notebooks" / f"{name}.ipynb", ROOT).reads


def test_modules_are_followed_through_imports():
    found = modules_of(ROOT / "notebooks" / "06_recommendation.ipynb", ROOT)
    assert {"paper_src/data.py", "paper_src/support/files.py", "paper_src/recommendation/encoders.py"} <= set(found)


def test_made_without_condition_and_read_of_others(tmp_path):
    source = """
a, b = (paper.read(name) for name in ("t2_selection", "t1_cost"))
shown = paper.table(rows.t3_size(a), "t3_size").round(3)
paper.figure(rows.f3_speed(paper.read("t3_size")), "f3_speed")
if b.empty:
    paper.table(b, "t3_more")
long = paper.read("long/t5_recovery")
paper.table(rows.t3_findings(paper.read), "t3_findings")
"""
    (tmp_path / "paper_src" / "sections").mkdir(parents=True)
    module = 'def t3_findings(read):\n    return read("t3_size").merge(read("t1_top10"))\n'
    (tmp_path / "paper_src" / "sections" / "compaction.py").write_text(module)
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / "03_compaction.ipynb"
    )
    files = files_of(tmp_path / "03_compaction.ipynb", tmp_path)
    assert files.tables == ["t3_size", "t3_findings"]
    assert files.figures == ["f3_speed"]
    assert files.reads == ["t1_cost", "t1_top10", "t2_selection"]
