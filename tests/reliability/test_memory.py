"""A model whose weights exceed the memory limit is scored all the same, one layer at a time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from paper_src import models, scoring

ROOT = Path(__file__).parents[2]
LIMIT = 1000 * 2**20  # of everything: libraries take about 400 MiB of it
GROUP = Path("/sys/fs/cgroup/memory/paper-test")  # version 1
UNIFIED = Path("/sys/fs/cgroup/paper-test")  # version 2
SCRIPT = """
import json, os, sys, torch
open(sys.argv[3], "w").write(str(os.getpid()))
from paper_src import models, scoring
torch.set_num_threads(1)
blocks = torch.arange(3, 3 + 2 * 32).view(2, 32)
loaded = models.load_model(sys.argv[1], "float32", sys.argv[2])
scores = scoring.score_layers(loaded.model, blocks, batch_size=1)
print(json.dumps({name: values.tolist() for name, values in scores.per_sequence.items()}))
"""


@pytest.fixture
def members():
    """File that puts a process under ``LIMIT`` bytes of memory when its number is written to it."""
    group, names = (GROUP, ("memory.limit_in_bytes",)) if GROUP.parent.is_dir() else (UNIFIED, ("memory.max",))
    try:
        group.mkdir()
        for name in names:
            (group / name).write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no memory limit can be set here: {error.strerror}")
    yield group / "cgroup.procs"
    group.rmdir()


@pytest.mark.slow
def test_a_model_larger_than_the_memory_limit_is_scored_from_the_disk(tmp_path, members):
    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=22,
                         num_attention_heads=16, num_key_value_heads=8)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()  # of another dtype than asked for: float32 cannot stay in the file
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    size = 4 * models.count_parameters(model)
    AutoTokenizer.from_pretrained(ROOT / "tests/data/tiny-llama").save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), "float32", "cpu").model
    expected = scoring.score_layers(model, torch.arange(3, 3 + 2 * 32).view(2, 32), batch_size=1)
    del model

    def run(device: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), device, str(members)]
        return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=600)

    in_memory, from_disk = run("cpu"), run("disk")
    assert in_memory.returncode == -signal.SIGKILL  # the limit acts
    assert from_disk.returncode == 0, from_disk.stderr[-2000:]
    assert size > 1.3 * LIMIT
    found = json.loads(from_disk.stdout.splitlines()[-1])
    for name, values in expected.per_sequence.items():
        torch.testing.assert_close(torch.tensor(found[name], dtype=torch.float64), values, rtol=1e-4, atol=1e-9)
