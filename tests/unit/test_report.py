import json
import os

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from paper_src import InputError, selection
from paper_src.reporting.section import Section
from paper_src.support import files


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A folder with one notebook that declares two parameters; it is the working directory."""
    cell = nbformat.v4.new_code_cell("count: int = 3  # how many\nrate: float = 0.5  # share")
    cell.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), tmp_path / "01_demo.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def section(notebook):
    return Section("01_demo", "out", {"count": 3, "rate": 1, "other": "x"})


def test_section_records_the_declared_parameters_only(section):
    assert section.parameters == {"count": 3, "rate": 1}


@pytest.mark.parametrize(("name", "value"), [("count", "3"), ("count", 3.5), ("count", True), ("rate", "fast")])
def test_parameter_of_another_type_is_refused(notebook, name, value):
    with pytest.raises(InputError, match=f"parameter {name} = "):
        Section("01_demo", "out", {"count": 3, "rate": 0.5, name: value})


def test_table_reads_back_at_full_precision(section):
    frame = pd.DataFrame({"k": [1, 2], "x": [1 / 3, 1e-17], "kept": ["0 1", "0"]})
    pd.testing.assert_frame_equal(section.table(frame, "t1_demo"), frame, check_exact=True)
    assert "0.3333" in (section.root / "tables/t1_demo.md").read_text()
    assert r"\begin{tabular}" in (section.root / "tables/t1_demo.tex").read_text()


def test_missing_table_names_the_command(section, notebook):
    (notebook / "03_compaction.ipynb").write_text("{}")
    with pytest.raises(InputError, match=r"t3_speed.csv is missing: run ./reproduce.sh --only 03_compaction"):
        section.read("t3_speed")


def test_a_larger_run_is_read_only_if_it_was_on_the_same_model(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    (tmp_path / "notebooks/05_recovery.ipynb").write_text("{}")
    nbformat.write(nbformat.v4.new_notebook(), "01_demo.ipynb")
    section = Section("01_demo", "../results/p", {})
    with pytest.raises(InputError, match="no larger run of long/t5_recovery on this model"):
        section.read("long/t5_recovery")
    for folder, digest in (("results/p/tables", "a"), ("tables/long", "a")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "05_recovery.json").write_text(json.dumps({"model": {"sha256": digest}}))
    (tmp_path / "tables/long/t5_recovery.csv").write_text("k\n8\n")
    assert section.read("long/t5_recovery")["k"].tolist() == [8]
    (tmp_path / "tables/long/05_recovery.json").write_text(json.dumps({"model": {"sha256": "b"}}))
    with pytest.raises(InputError, match="no larger run"):
        section.read("long/t5_recovery")


def test_figure_bytes_are_the_same_each_time(section):
    contents = []
    for _ in range(2):
        figure, axis = plt.subplots()
        axis.plot([1, 2], [3, 4], label="a")
        axis.legend()
        section.figure(figure, "f1_demo")
        plt.close(figure)
        contents.append([(section.root / f"figures/f1_demo.{form}").read_bytes() for form in ("svg", "pdf", "png")])
    assert contents[0] == contents[1]
    assert b"<text" in contents[0][0]  # text, not outlines


def test_provenance_names_versions_and_parameters(section):
    section.finish(texts={"train": "abc"})
    record = json.loads((section.root / "tables/01_demo.json").read_text())
    assert record["parameters"] == {"count": 3, "rate": 1}
    assert record["texts_sha256"] == {"train": "abc"}
    assert record["versions"]["torch"].startswith("2.13.0")
    assert record["peak_memory_bytes"] > 1e7


def test_what_a_killed_run_needs_stays_until_the_record_is_written(section):
    section.unfinished.mkdir(parents=True)
    assert Section("01_demo", "out", {"count": 3, "rate": 0.5}).unfinished.is_dir()
    section.finish()
    assert not section.unfinished.exists()


def test_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["t.csv"]


def test_full_disk_is_one_line(tmp_path):
    expected = pytest.raises(InputError, match=r"cannot write .*t.csv .No space left on device.: free space")
    with expected, files.replacing(tmp_path / "t.csv"), open("/dev/full", "w") as full:
        full.write("x" * 100_000)
        full.flush()
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_be_written_is_refused_at_the_start(notebook):
    (notebook / "out").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot write to out"):
        Section("01_demo", "out", {"count": 3, "rate": 0.5})


def test_what_a_killed_run_left_of_its_own_is_cleared(section):
    mine, other = section.root / "tables/.t1_demo.csv-x.csv", section.root / "tables/.t2_demo.csv-x.csv"
    mine.touch()
    other.touch()
    Section("01_demo", "out", {"count": 3, "rate": 0.5})
    assert (mine.exists(), other.exists()) == (False, True)


def test_kept_text_round_trip():
    assert selection.kept_tuple(selection.kept_text((0, 3, 12))) == (0, 3, 12)
    assert selection.kept_tuple(7) == (7,)  # pandas reads a column of single layers as integers


def test_a_section_writes_under_its_own_number_only(section, refused):
    with refused("01_demo cannot write t2_demo: its names begin with t1_"):
        section.table(pd.DataFrame({"k": [1]}), "t2_demo")
    with refused("01_demo cannot write ../f1_demo"):
        section.figure(plt.figure(), "../f1_demo")
