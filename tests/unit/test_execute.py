import shutil
from pathlib import Path

import nbformat
import pytest
import yaml

from paper_src import InputError
from paper_src.reporting import parameters, run


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


def test_unknown_profile_lists_the_known(project):
    profile()
    with pytest.raises(InputError, match=r"no profile 'q': there are \['p'\]"):
        parameters.read_profile(Path("profiles/q.yaml"))


def test_executed_notebook_appears_only_on_success(project):
    output = Path("results/notebooks/01_demo.ipynb")
    run.run(Path("notebooks/01_demo.ipynb"), {"count": 4}, output)
    assert [file.name for file in output.parent.iterdir()] == ["01_demo.ipynb"]
    printed = nbformat.read(output, as_version=4).cells[-1].outputs[0].text
    assert printed == "4\n"
    output.unlink()
    with pytest.raises(InputError, match=r"^01_demo failed. AssertionError: count is too large \(cells: .*failed"):
        run.run(Path("notebooks/01_demo.ipynb"), {"count": 5}, output)
    assert [file.name for file in output.parent.iterdir()] == ["01_demo.failed.ipynb"]


def test_publish_copies_tables_and_figures_and_nothing_else(project):
    results = Path("results/laptop")
    for name in ("tables/t1.csv", "tables/.t1.csv-part", "figures/f1.svg", "models/m.bin", "SUMMARY.md"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    run.publish(results, project / "top")
    found = sorted(str(file.relative_to("top")) for file in Path("top").rglob("*") if file.is_file())
    assert found == ["SUMMARY.md", "figures/f1.svg", "tables/t1.csv"]
    shutil.rmtree("top")


def test_of_a_larger_run_only_its_sections_are_published_and_beside_the_others(project):
    results = Path("results/long")
    for name in ("tables/t4_a.csv", "tables/t5_a.csv", "tables/06_b.json", "figures/f7_c.svg", "SUMMARY.md"):
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(name)
    run.publish_larger(results, project / "top")
    found = sorted(str(file.relative_to("top")) for file in Path("top").rglob("*") if file.is_file())
    assert found == ["figures/long/f7_c.svg", "tables/long/06_b.json", "tables/long/t5_a.csv"]
    shutil.rmtree("top")


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
    import os

    os.utime(results / "notebooks/02_old.ipynb", (new - 100, new - 100))
    lines = run.summary(results, new - 50).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["01_demo", "ran"], ["02_old", "kept"], ["03_bad", "failed"], ["04_never", "not"],
    ]  # fmt: skip
    assert "12.3 s" in lines[0]
    assert str(results) in lines[4]
