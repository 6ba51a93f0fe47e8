"""The real weights, at a small size: load, score, compact, save, load again without this package, generate."""

import subprocess
import sys

import pytest
import torch

from paper_src import compaction, data, fidelity, models, scoring, selection

GENERATE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["paper_src"] = None  # an import of it would fail
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer("The history of", return_tensors="pt")
settings = {"max_new_tokens": 8, "do_sample": False}
cached, plain = (model.generate(**prompt, **settings, use_cache=cache)[0].tolist() for cache in (True, False))
assert cached == plain
print(model.config.num_hidden_layers, *cached)
"""


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("smollm2-135m-instruct", "float32", "cpu")


@pytest.fixture(scope="module")
def blocks(loaded):
    text, _ = data.load_text("wikitext-2", "valid")
    return data.token_blocks(loaded.tokenizer, text, 4, 64, seed=0)


def test_full_model_predicts_english(loaded, blocks):
    mean = fidelity.mean_state(loaded.model, blocks)
    full = fidelity.reference(loaded.model, blocks, mean)
    row = fidelity.summarize(fidelity.compare(loaded.model, full))
    assert 10 < row["ppl"] < 100  # 49,152 for a model that knows nothing
    assert row["cosine"] == pytest.approx(1)


def test_score_compact_save_generate(loaded, blocks, tmp_path):
    scores = scoring.score_layers(loaded.model, blocks, batch_size=2)
    fisher = scores.mean("fisher")
    assert fisher.shape == (30,)
    kept = selection.distributed(fisher, 8)
    small = compaction.compact(loaded.model, kept)
    layer = models.count_parameters(models.decoder_layers(loaded.model)[0])
    assert models.count_parameters(small) == models.count_parameters(loaded.model) - 22 * layer
    folder = compaction.save(small, loaded.tokenizer, tmp_path / "small", "SmolLM2", kept, 30, "distributed, fisher")
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, str(folder)], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    depth, *tokens = map(int, done.stdout.split())
    prompt = loaded.tokenizer("The history of", return_tensors="pt")
    with torch.no_grad():
        expected = small.generate(**prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    assert (depth, tokens) == (8, expected)
