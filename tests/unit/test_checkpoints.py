"""One device for a training, and a folder for each run."""

import pytest
import torch
from conftest import build_model

from paper_src.models import last_hidden
from paper_src.support.checkpoints import SHORT, OneDevice, plain_attention, run_folder


@pytest.mark.parametrize(("on", "gpus"), [("cpu", 0), ("meta", 1)])
def test_a_training_stays_where_its_model_is(on, gpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = OneDevice(output_dir=str(tmp_path), on=on, eval_strategy="steps")
    assert arguments.device == torch.device(on)
    assert arguments.n_gpu == gpus
    assert arguments.train_batch_size == arguments.per_device_train_batch_size


def test_each_run_has_a_folder_of_its_own(tmp_path):
    ones = [torch.ones(3)]
    first = run_folder(tmp_path, ones, {"rate": 1})
    assert first.is_dir()
    assert first.parent == tmp_path
    assert run_folder(tmp_path, ones, {"rate": 1}) == first
    others = {run_folder(tmp_path, ones, {"rate": 2}), run_folder(tmp_path, [torch.zeros(3)], {"rate": 1})}
    assert len(others | {first}) == 3


def test_attention_without_its_fused_kernel_is_the_same_and_only_where_it_is_short():
    model = build_model("llama")
    blocks = torch.arange(2, 34).view(2, 16)
    found = {}
    for tokens in (SHORT, SHORT + 1):
        with plain_attention(model, tokens):
            used = model.config._attn_implementation
            loss = last_hidden(model, blocks).square().mean()
            found[used] = torch.autograd.grad(loss, list(model.base_model.parameters()))
        assert model.config._attn_implementation == "sdpa"
    assert list(found) == ["eager", "sdpa"]
    torch.testing.assert_close(*found.values())
