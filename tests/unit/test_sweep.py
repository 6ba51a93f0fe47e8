"""The sweep: cells by hand, and the whole graph on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from paper_src import models
from paper_src.scale import sweep

ROOT = Path(__file__).parents[2]
MODEL, TEXT = ROOT / "tests/data/tiny-llama", ROOT / "tests/data/tiny-text"


def test_a_cell_takes_the_layers_of_its_strategy(refused):
    scores = pd.DataFrame({"layer": range(6), "fisher": [5.0, 1.0, 4.0, 3.0, 2.0, 6.0], "fisher_se": 0.1})
    assert sweep.chosen(scores, "top_k", "fisher", 3, 0) == (0, 2, 5)
    assert sweep.chosen(scores, "evenly_spaced", "", 3, 0) == (0, 2, 5)
    draws = {sweep.chosen(scores, "random", "random", 3, seed) for seed in range(8)}
    assert len(draws) > 3
    assert sweep.chosen(scores, "random", "random", 3, 1) == sweep.chosen(scores, "random", "random", 3, 1)
    with refused("no score 'shap': there are .'fisher'."):
        sweep.chosen(scores, "top_k", "shap", 3, 0)
    with refused("no score 'block_influence'"):
        sweep.chosen(scores, "shortgpt", "", 3, 0)
    with refused("strategy 'best'"):
        sweep.chosen(scores, "best", "fisher", 3, 0)


def test_all_layers_change_nothing():
    loaded = models.load_model(str(MODEL), "float32", "cpu")
    row = sweep.measured(loaded, tuple(range(8)), str(TEXT), (3, 24))
    assert row["ppl_ratio"] == pytest.approx(1, abs=1e-6)
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    cut = sweep.measured(loaded, (0, 3, 7), str(TEXT), (3, 24))
    assert cut["ppl_ratio_lo"] <= cut["ppl_ratio"] <= cut["ppl_ratio_hi"]
    assert cut["ppl_ratio"] > 1.5


def snakemake(*arguments: str) -> str:
    """What the sweep's graph prints; it must end well."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        "config/sweep.smk",
        "--cores",
        "1",
        "--nolock",
        *arguments,
    ]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_graph_makes_one_table(tmp_path):
    config = {
        "out": str(tmp_path / "out"), "models": [str(MODEL)], "scores": ["fisher", "random"],
        "strategies": ["top_k"], "keep": [4], "seeds": [1], "text": str(TEXT), "sequences": 4,
        "length": 24, "blocks": 2, "dtype": "float32", "device": "cpu", "processes": 1,
    }  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    snakemake("--configfile", str(path))
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert sorted(table["strategy"]) == ["random", "top_k"]
    assert (table["k"] == 4).all()
    assert table["kept"].str.split().str.len().eq(4).all()
    assert "Nothing to be done" in snakemake("--configfile", str(path), "--dry-run")


def test_the_committed_sweep_is_a_graph(tmp_path):
    planned = snakemake("--configfile", "config/sweep.yaml", "--dry-run", "--config", f"out={tmp_path}")
    assert " 67\n" in planned  # 3 scorings, 2 x 3 x 3 x 3 cells, 9 random ones, the table and the end
