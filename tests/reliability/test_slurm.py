"""The sweep on a real single-node Slurm, started here: apt-get install slurm-wlm munge, and the executor plugin."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SYSTEM = Path("/etc/slurm/slurm.conf")  # jobs find it here only: the executor clears SLURM_* for them
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _missing() -> str:
    """Why Slurm cannot be started here; empty if it can."""
    programs = [name for name in ("slurmctld", "slurmd", "sbatch", "munge") if not shutil.which(name)]
    if programs:
        return f"no {programs[0]} on this machine: apt-get install slurm-wlm munge"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "no executor plugin: pip install snakemake-executor-plugin-slurm"
    if os.geteuid() != 0:
        return "slurmctld and slurmd are started by root only"
    return f"{SYSTEM} is there: this machine has a Slurm of its own" if SYSTEM.exists() else ""


@pytest.fixture
def slurm(tmp_path):
    """slurmctld and slurmd of one node, until the test ends."""
    if reason := _missing():
        pytest.skip(reason)
    subprocess.run(["service", "munge", "start"], check=False, capture_output=True)
    if subprocess.run("munge -n | unmunge", shell=True, check=False, capture_output=True).returncode:
        pytest.skip("munged does not answer")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=socket.gethostname(), folder=folder, cpus=os.cpu_count())
    )
    SYSTEM.symlink_to(folder / "slurm.conf")
    daemons = [subprocess.Popen([name, "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for name in ("slurmctld", "slurmd")]  # fmt: skip
    try:
        for _ in range(30):
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], check=False, capture_output=True, text=True).stdout
            if state.strip() == "idle":
                break
            time.sleep(1)
        else:
            pytest.skip(f"the node did not come up: {state.strip()}")
        yield folder
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait(timeout=20)
        SYSTEM.unlink()


@pytest.mark.slow
def test_the_sweep_runs_on_slurm(slurm, tmp_path):
    config = {
        "out": str(tmp_path / "out"), "models": [str(ROOT / "tests/data/tiny-llama")], "scores": ["fisher", "random"],
        "strategies": ["top_k"], "keep": [4], "seeds": [0], "text": str(ROOT / "tests/data/tiny-text"),
        "sequences": 4, "length": 24, "blocks": 2, "dtype": "float32", "device": "cpu", "processes": 1,
    }  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", "config/sweep.smk", "--configfile", str(path), "--nolock",
        "--executor", "slurm", "--jobs", "2", "--slurm-no-account", "--slurm-status-command", "squeue",
        "--slurm-logdir", str(slurm / "jobs"), "--slurm-init-seconds-before-status-checks", "2",
        "--default-resources", "mem_mb=1500", "runtime=10", "slurm_partition=main",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "submitted with SLURM jobid" in done.stdout + done.stderr
    assert sorted(pd.read_csv(tmp_path / "out" / "sweep.csv")["strategy"]) == ["random", "top_k"]
