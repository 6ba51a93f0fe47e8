"""One device for a training, and a folder for each run."""

import pytest
import torch

from paper_src.support.checkpoints import OneDevice, run_folder


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
