"""Every notebook, run once with the tiny profile: structure by pytest-notebook, numbers from the CSVs.

The baselines are made anew, to be read as a diff, by: UPDATE_BASELINE=1 ./reproduce.sh test -- tests/notebooks
"""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from harness import BASELINE, EVERY, NOTEBOOKS, ROOT, prepared
from pytest_notebook.nb_regression import NBRegressionFixture

from paper_src.reporting.graph import files_of, strings_in
from paper_src.reporting.parameters import parameters_for

UPDATE = bool(os.environ.get("UPDATE_BASELINE"))
# Seconds and bytes differ from machine to machine; which table has them is in the baseline's columns all the same.
MACHINE = ("speedup", "share_of_ideal", "_ms", "peak_memory", "seconds", "closed_form_s", "how_wrong", "seen",
           "users_per_s", "calibration_s", "recovery_s", "status", "spread", "others_cores", "quiet", "rounds",
           "above_ideal", "timed_as")  # fmt: skip
ROUNDS = ("t3_rounds", "t7_rounds")  # seconds of rounds, more of them on a busy machine
MEASURED = "speed|seconds|timed|quiet|ideal|memory|wrong|budget"  # findings that follow from them, by their names
# Absolute and relative tolerance where training carries the last bits of another processor far, and where a metric is
# of few users, of whom one that flips counts a hundredth.
TRAINED = {"t6": (0.1, 1e-3), "t7": (0.1, 0.01), "t9": (1e-3, 0.03)}
STRUCTURE = NBRegressionFixture(
    exec_cwd=str(ROOT / "notebooks"),
    exec_timeout=3600,  # no test depends on how fast a machine is; this only ends a kernel that hangs
    diff_ignore=(
        "/metadata",
        "/cells/*/metadata",
        "/cells/*/execution_count",
        "/cells/*/outputs/*/execution_count",
        "/cells/*/outputs/*/data/image/png",
        "/cells/*/outputs/*/data/text/plain",  # the same table as text/html, with column widths
    ),
    diff_replace=(
        ("/cells/*/outputs", r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#"),
        (
            "/cells/*/outputs",
            r"True|False|\*{0,2}(not reproduced|reproduced|undetermined|not testable|NaN)\*{0,2}",
            "verdict",
        ),
    ),  # some verdicts follow from speeds
    diff_use_color=False,
)


def test_notebook_runs_and_keeps_its_structure(notebook, results, tmp_path):
    made = {path.stem for path in (results / "tables").glob("*.*")}
    needed = {*files_of(notebook, ROOT).reads, *(other.stem for other in NOTEBOOKS if notebook.stem == "09_summary")}
    if missing := sorted(needed - made - {notebook.stem}):
        pytest.skip(f"an earlier notebook did not make {missing[0]}")
    path = prepared(notebook, results, tmp_path)
    result = STRUCTURE.check(str(path), raise_errors=not UPDATE)
    errors = [out for cell in result.nb_final.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert errors == []
    if UPDATE:
        _update(notebook.name, result.nb_final, results)


def test_tables_equal_the_baseline(notebook, results):
    _require_run(notebook, results)
    tables = sorted((BASELINE / "tables").glob(f"t{int(notebook.stem[:2])}_*.csv"))
    assert tables, "no baseline: see the first lines of this file"
    for path in (path for path in tables if path.stem not in ROUNDS):
        expected, found = (_comparable(place) for place in (path, results / "tables" / path.name))
        assert list(found) == list(expected)
        absolute, relative = TRAINED.get(path.stem[:2], (1e-6, 1e-3))
        pd.testing.assert_frame_equal(found, expected, rtol=relative, atol=absolute, obj=path.stem)


def test_files_are_those_of_the_graph(notebook, results):
    """What Snakemake expects of a notebook is what it makes; more only where its source names it."""
    _require_run(notebook, results)
    number, files = int(notebook.stem[:2]), files_of(notebook, ROOT)
    made = {path.stem for path in (results / "tables").glob(f"t{number}_*.csv")}
    named = {name for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"
             for name in strings_in(cell.source)}  # fmt: skip
    assert set(files.tables) <= made <= set(files.tables) | named
    assert {path.stem for path in (results / "figures").glob(f"f{number}_*.svg")} == set(files.figures)


def _require_run(notebook, results):
    if not (results / "tables" / f"{notebook.stem}.json").is_file():
        pytest.skip(f"{notebook.stem} did not run to its end")


def _comparable(path):
    """A table without what depends on the machine's speed."""
    table = pd.read_csv(path)
    if path.stem in ("t9_claims", "t9_model_claims"):  # the rest follows from the other tables, and has speeds in it
        return table[[name for name in ("name", "test") if name in table]]
    if path.stem.endswith("_findings"):
        table = table[~table["name"].str.contains(MEASURED)].drop(columns="text").reset_index(drop=True)
    machine = [column for column in table if any(part in column for part in MACHINE)]
    return table.drop(columns=machine + (["epochs"] if path.stem.startswith("t6") and "epochs" in table else []))


def _update(name, book, results):
    (BASELINE / "tables").mkdir(parents=True, exist_ok=True)
    book.cells = [cell for cell in book.cells if cell["id"] != "injected-parameters"]  # holds a path of this machine
    for cell in book.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    nbformat.write(book, BASELINE / name)
    for table in (results / "tables").glob("*.csv"):
        if table.stem not in ROUNDS:
            shutil.copy(table, BASELINE / "tables" / table.name)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
class TestSource:
    """The form of the committed notebooks."""

    def test_no_outputs_and_meaningful_ids(self, path):
        book = nbformat.read(path, as_version=4)
        ids = [cell["id"] for cell in book.cells]
        assert len(set(ids)) == len(ids)
        assert all(not name.isdigit() and len(name) < 30 for name in ids)
        dirty = [cell["id"] for cell in book.cells if cell.get("outputs") or cell.get("execution_count")]
        assert dirty == [], "clear the outputs: jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"

    def test_cells_are_short_and_define_nothing(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                declares = "parameters" in cell.metadata.get("tags", [])  # a list, however long
                assert declares or len(cell.source.splitlines()) <= 25, cell["id"]
                nodes = ast.walk(ast.parse(cell.source))
                defined = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
                assert defined == [], cell["id"]

    def test_parameters_are_typed_commented_literals(self, path):
        book = nbformat.read(path, as_version=4)
        tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1
        lines = tagged[0].source.splitlines()
        for node in ast.parse(tagged[0].source).body:
            line = lines[node.lineno - 1]
            assert isinstance(node, ast.AnnAssign), line
            ast.literal_eval(node.value)
            assert "  # " in line, line

    def test_defaults_are_the_laptop_profile(self, path):
        book = nbformat.read(path, as_version=4)
        cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
        defaults = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
        laptop = parameters_for(path, ROOT / "profiles" / "laptop.yaml", {"results": "../results/laptop"})
        assert laptop.items() <= defaults.items()
        assert laptop.keys() == defaults.keys() or path not in NOTEBOOKS


def test_notebooks_are_linted_like_code():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "notebooks"], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_what_the_notebooks_say_they_write_is_what_they_write():
    for path in NOTEBOOKS:
        text = nbformat.read(path, as_version=4).cells[0].source
        said = set(re.findall(r"`([tf]\d+_\w+)`", text.partition("**Writes**")[2]))
        files = files_of(path, ROOT)
        assert {*files.tables, *files.figures} - {f"t{int(path.stem[:2])}_findings"} <= said, path.stem
