"""The same tables from two processes as from one, and what a process that dies leaves behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil

from paper_src.scale import __main__ as command_line
from paper_src.support import processes
from paper_src.support.processes import Processes

ROOT = Path(__file__).parents[2]
MODEL, TEXT = ROOT / "tests/data/tiny-llama", ROOT / "tests/data/tiny-text"
SETTINGS = ["--text", str(TEXT), "--length", "32", "--dtype", "float32", "--device", "cpu", "--batch-size", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launched(processes: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    return [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=ROOT, timeout=240, capture_output=True)


def test_two_processes_give_the_table_of_one(tmp_path):
    more = [*SETTINGS, "--sequences", "7", "--leave-one-out", "5", "--shapley", "0.2"]
    run(launched(2, "-m", "paper_src.scale", "scores", str(MODEL), str(tmp_path / "2.csv"), *more))
    command_line.main(["scores", str(MODEL), str(tmp_path / "1.csv"), *more])
    one, two = (pd.read_csv(tmp_path / f"{count}.csv") for count in (1, 2))
    assert len(one) == 8
    assert {"fisher", "fisher_se", "leave_one_out_se", "shapley"} <= set(one)
    pd.testing.assert_frame_equal(two, one, rtol=1e-6, atol=1e-9)


def test_a_killed_process_ends_the_run_without_a_table(tmp_path):
    table = tmp_path / "scores.csv"
    much = ["--sequences", "700", "--batch-size", "1"]
    command = launched(2, "-m", "paper_src.scale", "scores", str(MODEL), str(table), *SETTINGS, *much)
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert any("2 processes: scoring" in line for line in iter(process.stderr.readline, ""))
    workers = [child for child in psutil.Process(process.pid).children(recursive=True)
               if "paper_src.scale" in child.cmdline()]  # fmt: skip
    workers[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: another process of this run has ended: no table was written" in errors
    assert list(tmp_path.iterdir()) == []
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def test_parts_are_dealt_out_and_woven_back():
    shares = [Processes(rank, 3).mine(list(range(7))) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    alone = processes.ALONE
    assert alone.woven(alone.mine([3, 1, 2])) == [3, 1, 2]
    assert alone.gathered("x") == ["x"]


def test_weaving_puts_every_share_in_its_place(monkeypatch):
    shares = [[0, 3, 6], [1, 4], [2, 5]]
    monkeypatch.setattr(Processes, "gathered", lambda self, own: shares)
    assert Processes(0, 3).woven([]) == list(range(7))


def test_more_processes_than_parts_are_refused(refused):
    with refused("2 parts of the text for 3 processes"):
        Processes(0, 3).mine([1, 2])
