"""The graph of the paper: what makes a section run again."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def planned(tmp_path, model):
    """What a dry run of section 1 says."""
    command = [sys.executable, "-m", "snakemake", f"{tmp_path}/tables/01_importance.json", "--cores", "2", "--dry-run",
               "--nolock", "--config", "profile=tiny", f"results={tmp_path}", f"model={model}"]  # fmt: skip
    cache = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=cache).stdout


def test_a_section_depends_on_the_files_of_a_local_model(tmp_path):
    folder = tmp_path / "a [model]"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("x")
    said = planned(tmp_path, folder)
    assert f"{folder}/config.json, {folder}/model.safetensors" in said
    assert f"{folder}/model.safetensors" in planned(tmp_path, folder / "model.safetensors")
    inputs = planned(tmp_path, "owner/name").split("input: ")[1].splitlines()[0]
    assert inputs.endswith("paper_src/timing.py")


def test_a_notebook_has_all_cores(tmp_path):
    assert "threads: 2" in planned(tmp_path, "owner/name")
