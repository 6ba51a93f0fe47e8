import io
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from paper_src import InputError
from paper_src.reporting import parameters, publish, run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one notebook of two cells and one profile."""
    sources = (
        "results: str = 'out'  # folder\ncount: int = 1  # number",
        "assert count < 5, 'count is too large\\nsecond line'\nprint(count)",
    )
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "profiles").mkdir()
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks/01_demo.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profile(**settings):
    path = Path("profiles/p.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


def test_own_parameters_beat_common_ones_and_overrides_beat_both(project):
    path = profile(common={"count": 2}, **{"01_demo": {"count": 3}})
    notebook = Path("notebooks/01_demo.ipynb")
    assert parameters.parameters_for(notebook, path, {}) == {"count": 3}
    assert parameters.parameters_for(notebook, path, {"count": 4, "model": "x"}) == {"count": 4}


def test_a_kernel_leaves_no_socket_beside_the_notebooks_and_takes_nobodys(project):
    """Kernels that looked for free numbers in one folder took each other's when they started together."""
    source = "import os; from ipykernel.kernelapp import IPKernelApp as App; print(App.instance().ip, os.listdir())"
    path = project / "notebooks/01_demo.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(notebook, path)
    said = []
    for output in (project / "a.ipynb", project / "b.ipynb"):
        run.execute(Path("notebooks/01_demo.ipynb"), {}, output)
        said.append(nbformat.read(output, as_version=4).cells[-1].outputs[0].text.split(maxsplit=1))
    (first, beside), (second, _) = said
    assert first != second
    assert beside.strip() == "['01_demo.ipynb']"
    assert not Path(first).parent.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"01_demo": {"cuont": 3}}, "01_demo has no parameter 'cuont'"),
        ({"common": {"cuont": 3}}, "no notebook has the common parameter 'cuont'"),
        ({"01_dmeo": {"count": 3}}, "no notebook '01_dmeo'"),
        ({"01_demo": {"count": "3"}}, "parameter count = '3': its type is int"),
    ],
)
def test_wrong_profile_is_refused_before_anything_runs(project, settings, message):
    with pytest.raises(InputError, match=message):
        parameters.check_profile(profile(**settings))


@pytest.mark.parametrize("text", ["a: [1\n", "- 01_demo\n", "01_demo: 3\n", "words\n", "\xff"])
def test_a_profile_that_is_no_yaml_of_parameters_is_refused_in_one_line(project, text):
    Path("profiles/p.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"^profiles/p.yaml is no YAML of notebooks and their parameters: [^\n]+$"):
        parameters.read_profile(Path("profiles/p.yaml"))


def test_unknown_profile_lists_the_known(project):
    profile()
    with pytest.raises(InputError, match=r"no profile 'q': there are \['p'\]"):
        parameters.read_profile(Path("profiles/q.yaml"))


def test_executed_notebook_appears_only_on_success(project):
    output = Path("results/notebooks/01_demo.ipynb")
    run.execute(Path("notebooks/01_demo.ipynb"), {"count": 4}, output)
    assert [file.name for file in output.parent.iterdir()] == ["01_demo.ipynb"]
    printed = nbformat.read(output, as_version=4).cells[-1].outputs[0].text
    assert printed == "4\n"
    output.unlink()
    with pytest.raises(InputError, match=r"^01_demo failed. AssertionError: count is too large \(cells: .*failed"):
        run.execute(Path("notebooks/01_demo.ipynb"), {"count": 5}, output)
    assert [file.name for file in output.parent.iterdir()] == ["01_demo.failed.ipynb"]


def told(*words):
    """Exit code and standard error of one command line."""
    command = [sys.executable, "-m", "paper_src.reporting", *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_run_says_one_line_and_logs_what_the_notebook_prints(project):
    settings = str(profile(**{"01_demo": {"count": 4}}))
    code, said = told("run", "notebooks/01_demo.ipynb", "--profile", settings, "--results", "results/p", "--verbose")
    assert code == 0
    assert re.fullmatch(r"4\n\[1/1\] 01_demo  done in 0:\d\d\n", said)
    # a kernel that is idle when it is stopped may say so
    logged = re.sub(
        r"\[IPKernelApp\] ERROR \| KeyboardInterrupt.*\n", "", Path("results/p/logs/01_demo.log").read_text()
    )
    assert re.fullmatch(r"4\ndone in [\d.]+ s\n", logged)
    assert run.seconds_before(Path("results/p/logs/01_demo.log")) > 0


def test_a_failing_run_says_two_lines_and_nothing_of_the_notebook(project):
    settings = str(profile(**{"01_demo": {"count": 5}}))
    code, said = told("run", "notebooks/01_demo.ipynb", "--profile", settings, "--results", "r")
    assert code == 1
    assert re.fullmatch(r"\[1/1\] 01_demo  failed\nerror: 01_demo failed. AssertionError: .*\n", said)


def test_the_line_says_the_step_the_time_and_what_is_left():
    line = run.Line("[3/9] 03_compaction", 211.0, [], io.StringIO())
    for text in (
        "speed:  67%|####  | 4/6 [00:10<00:05,  2.5s/it]",
        "Loading weights: 100%|######| 74/74 [00:00<00:00]",
    ):
        line.emit(logging.LogRecord("papermill", logging.WARNING, "", 0, text, (), None))
    assert line.text(130) == "[3/9] 03_compaction  speed 4/6  2:10, about 1:21 left"
    assert line.text(300) == "[3/9] 03_compaction  speed 4/6  5:00"  # longer than last time: nobody knows
    line.emit(logging.LogRecord("papermill", logging.INFO, "", 0, "step 20 of 300, 5 s: KL 0.1", (), None))
    assert line.step == "step 20/300"
    line.emit(logging.LogRecord("papermill", logging.INFO, "", 0, "Executing Cell 7---", (), None))
    assert line.text(3) == "[3/9] 03_compaction  0:03, about 3:28 left"


def test_what_is_left_is_known_from_the_last_run_or_the_committed_one(tmp_path):
    (tmp_path / "03_a.json").write_text('{"wall_s": 7.5}')
    assert run.seconds_before(tmp_path / "03_a.log") is None
    assert run.seconds_before(tmp_path / "03_a.log", tmp_path) == 7.5
    (tmp_path / "03_a.log").write_text("4\ndone in 12.5 s\n")
    assert run.seconds_before(tmp_path / "03_a.log", tmp_path) == 12.5


def test_publish_copies_tables_figures_and_summary_and_nothing_else(project):
    results = Path("results/laptop")
    for name in ("tables/t1_a.csv", "tables/.t1_a.csv-part", "tables/mine.csv", "tables/01_a.json", "figures/f1_a.svg",
                 "models/m.bin", "SUMMARY.md"):  # fmt: skip
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text('{"device": "cpu"}')
    publish.publish(results, project / "top")
    found = sorted(str(file.relative_to("top")) for file in Path("top").rglob("*") if file.is_file())
    copied = ["SUMMARY.md", "figures/f1_a.svg", "tables/01_a.json", "tables/t1_a.csv"]
    assert found == sorted([*copied, "tables/provenance.md"])


def test_publishing_again_writes_only_what_changed(project):
    results = Path("results/laptop")
    for name in ("tables/t1_a.csv", "tables/01_a.json", "SUMMARY.md"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text('{"device": "cpu"}')
    publish.publish(results, project / "top")
    files = [file for file in Path("top").rglob("*") if file.is_file()]
    for file in files:
        os.utime(file, (1, 1))
    (results / "tables/t1_a.csv").write_text("new")
    publish.publish(results, project / "top")
    assert [str(file) for file in files if file.stat().st_mtime > 1] == ["top/tables/t1_a.csv"]


def test_of_a_larger_run_only_its_sections_are_published_and_beside_the_others(project):
    results = Path("results/long")
    for name in ("tables/t8_a.csv", "tables/t1_a.csv", "tables/06_b.json", "figures/f7_c.svg", "SUMMARY.md"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text('{"device": "cpu"}')
    publish.publish(results, project / "top")
    found = sorted(str(file.relative_to("top")) for file in Path("top").rglob("*") if file.is_file())
    copied = ["figures/long/f7_c.svg", "tables/long/06_b.json", "tables/long/t1_a.csv"]
    assert found == [*copied, "tables/provenance.md"]


def test_provenance_names_every_record_those_of_this_paper_first(project):
    (project / "tables" / "long").mkdir(parents=True)
    (project / "tables" / "long" / "01_a.json").write_text(
        '{"script": "benchmarks/a.py", "device": "GPU", "git": {"commit": "0123456789", "dirty": true}}'
    )
    (project / "tables" / "02_b_c.json").write_text(
        '{"model": {"name": "own"}, "device": "cpu", "machine": {"threads": 2}, "wall_s": 90, "git": null}'
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in
            publish.provenance(project / "tables").splitlines()[2:]]  # fmt: skip
    assert rows == [["tables", "02 b c", "its notebook", "own", "cpu", "2", "1.5", "", "no"],
                    ["tables/long", "01 a", "benchmarks/a.py", "", "GPU", "", "", "0123456", "yes"]]  # fmt: skip


def test_summary_tells_ran_kept_failed_and_missing(project):
    results = Path("results/p")
    for name in ("02_old", "03_bad", "04_never"):
        shutil.copy("notebooks/01_demo.ipynb", f"notebooks/{name}.ipynb")
    for name in ("01_demo", "02_old"):
        for folder, suffix, text in (("notebooks", "ipynb", ""), ("tables", "json", '{"wall_s": 12.3}')):
            (results / folder).mkdir(parents=True, exist_ok=True)
            (results / folder / f"{name}.{suffix}").write_text(text)
    (results / "notebooks/03_bad.failed.ipynb").write_text("")
    new = (results / "notebooks/01_demo.ipynb").stat().st_mtime
    os.utime(results / "notebooks/02_old.ipynb", (new - 100, new - 100))
    lines = publish.summary(results, new - 50).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["01_demo", "ran"], ["02_old", "kept"], ["03_bad", "failed"], ["04_never", "not"],
    ]  # fmt: skip
    assert "12.3 s" in lines[0]
    assert lines[4] == "  see results/p/: tables, notebooks"
