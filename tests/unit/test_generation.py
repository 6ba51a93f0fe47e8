"""Text that the model writes itself: sampled from its own distribution, and written once."""

import pytest
import torch
from conftest import build_model

from paper_src.support.generation import generated

PROMPTS = torch.tensor([[5, 6], [7, 8]])


def test_it_is_behind_the_prompts_and_of_the_right_size(tmp_path):
    ids = generated(build_model("llama"), PROMPTS, 5, 9, 0, tmp_path, batch_size=2)
    assert ids.shape == (5, 9)
    assert {tuple(row) for row in ids[:, :2].tolist()} <= {(5, 6), (7, 8)}
    assert len({tuple(row) for row in ids.tolist()}) == 5


def test_a_killed_run_goes_on_to_the_same_text(tmp_path, monkeypatch):
    model = build_model("llama")
    whole = generated(model, PROMPTS, 6, 9, 0, tmp_path / "whole", batch_size=2)
    generated(model, PROMPTS, 2, 9, 0, tmp_path / "part", batch_size=2)
    asked = []
    monkeypatch.setattr(model, "generate", lambda *a, real=model.generate, **b: asked.append(1) or real(*a, **b))
    assert torch.equal(generated(model, PROMPTS, 6, 9, 0, tmp_path / "part", batch_size=2), whole)
    assert len(asked) == 2
    assert not torch.equal(generated(model, PROMPTS, 6, 9, 1, tmp_path / "part", batch_size=2), whole)


def test_it_is_sampled_from_the_model(tmp_path):
    model = build_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = 0
        model.get_output_embeddings().weight[42] = 100 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = generated(model, PROMPTS, 64, 4, 0, tmp_path)
    with torch.no_grad():
        p = model(ids[:, :2]).logits[:, -1].softmax(-1)[:, 42].mean()
    assert (ids[:, 2] == 42).float().mean().item() == pytest.approx(p.item(), abs=0.15)


def test_nothing_to_write(tmp_path, refused):
    assert generated(build_model("llama"), PROMPTS, 0, 9, 0, tmp_path).shape == (0, 9)
    with refused("prompts of 2 tokens for blocks of 2: give shorter ones"):
        generated(build_model("llama"), PROMPTS, 1, 2, 0, tmp_path)
