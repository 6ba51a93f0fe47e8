"""The files around the package: lock, environment, entry script."""

import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def test_every_direct_dependency_is_locked_within_its_range():
    locked = {item.name.lower().replace("_", "-"): item for item in requirements("requirements.txt")}
    for item in requirements("requirements.in"):
        pin = next(iter(locked[item.name.lower().replace("_", "-")].specifier)).version
        assert item.specifier.contains(pin), item


def test_lock_pins_every_package_and_serves_cpu_and_gpu():
    for item in requirements("requirements.txt"):
        assert [spec.operator for spec in item.specifier] == ["=="], item
        assert not item.name.startswith(("nvidia-", "cuda-", "triton")), item
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text().splitlines()


def test_conda_takes_only_python_and_pip_and_the_same_lock():
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert packages == ["python=3.11", "pip", {"pip": ["-r requirements.txt", "-e ."]}]


def test_this_environment_is_the_lock():
    for item in requirements("requirements.txt"):
        if item.marker is None or item.marker.evaluate():
            assert item.specifier.contains(version(item.name), prereleases=True), item


def reproduce(*words, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "reproduce.sh"), *words],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "unknown command frobnicate"),
        (["--profil", "tiny"], "unknown option --profil"),
        (["--profile"], "option --profile needs a value"),
        (["--profile", "huge"], "no profile 'huge': there are gpu.yaml laptop.yaml long.yaml models.yaml tiny.yaml"),
        (["--only", "99_none"], "no notebook '99_none'"),
        (["--jobs", "many"], "--jobs 'many': give a number"),
        (["--data-dir", "./none"], "--data-dir: no such folder"),
        (["--model", "./none"], "--model: no such file or folder: ./none"),
        (["--model", "none.gguf"], "--model: no such file or folder: none.gguf"),
        (["check", "--fast"], "check takes no options"),
        (["clean", "--all"], "clean takes no options"),
    ],
)
def test_wrong_option_is_one_line_and_an_exit_code(words, message):
    done = reproduce(*words)
    assert done.returncode != 0
    assert done.stdout == ""
    assert re.fullmatch(rf"error: {re.escape(message)}.*\n", done.stderr)


def test_old_python_is_refused(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.1'\nexit 1\n")
    old.chmod(0o755)
    script = tmp_path / "reproduce.sh"
    script.write_text((ROOT / "reproduce.sh").read_text())
    for name in ("profiles", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "requirements.txt").write_text("no-such-package==1\n")
    done = subprocess.run(
        ["bash", str(script), "--profile", "tiny"],
        check=False, capture_output=True, text=True, timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHON": str(old)},
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: no Python 3.11 or newer (found: Python 3.9.1)" in done.stderr


def test_help_names_every_command_and_option():
    text = reproduce("--help").stdout
    for word in (
        "run",
        "test",
        "check",
        "lab",
        "clean",
        "--profile",
        "--only",
        "--model",
        "--device",
        "--jobs",
        "--force",
        "--verbose",
    ):
        assert word in text


def test_clean_deletes_what_runs_wrote_and_nothing_else(tmp_path):
    (tmp_path / "reproduce.sh").write_text((ROOT / "reproduce.sh").read_text())
    ours = (
        "results/laptop/tables/t1_a.csv",
        "results/laptop/SUMMARY.md",
        "results/tiny/logs/01_a.log",
        "results/.lock",
    )
    theirs = ("results/laptop/notes.txt", "results/mine.csv", "tables/t1_a.csv", "results/sweep/sweep.csv")
    for name in (*ours, *theirs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    done = subprocess.run(["bash", "reproduce.sh", "clean"], check=True, capture_output=True, text=True, cwd=tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(["reproduce.sh", *theirs])
    assert not (tmp_path / "results/tiny").exists()
    assert "kept: results/laptop/ holds other files" in done.stderr


def test_every_direct_dependency_is_explained():
    text = (ROOT / "docs/dependencies.md").read_text()
    cells = [
        cell.strip() for line in text.splitlines() if line.startswith("| ") for cell in line.split("|")[1].split(",")
    ]
    assert sorted(item.name for item in requirements("requirements.in")) == sorted(set(cells) - {"package"})
