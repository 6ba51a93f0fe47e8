"""What the trainings share: one device, and folders that belong to one run, so that a killed one goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from paper_src import InputError
from paper_src.files import replacing


class FirstLook(TrainerCallback):
    """An evaluation before the first step of a run that does not go on from a checkpoint."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **others) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()


def seconds_before(state: TrainerState) -> float:
    """Training seconds at the last evaluation in the log, 0 where there is none."""
    return next((row["eval_seconds"] for row in state.log_history[::-1] if "eval_seconds" in row), 0.0)


@dataclass
class OneDevice(TrainingArguments):
    """Arguments of a Trainer that stays on the device ``on``, where its model is.

    By itself a Trainer takes the first GPU, and all there are for copies of the model.
    """

    on: str = "cpu"

    def __post_init__(self) -> None:
        self.use_cpu = torch.device(self.on).type == "cpu"
        super().__post_init__()

    @cached_property
    def _setup_devices(self) -> torch.device:
        own = os.environ.get("ACCELERATE_TORCH_DEVICE")
        os.environ["ACCELERATE_TORCH_DEVICE"] = self.on  # accelerate asks nothing else
        try:
            super()._setup_devices  # noqa: B018 (a property that sets up accelerate)
        finally:
            os.environ.pop("ACCELERATE_TORCH_DEVICE")
            if own is not None:
                os.environ["ACCELERATE_TORCH_DEVICE"] = own
        self._n_gpu = int(not self.use_cpu)
        device = torch.device(self.on)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


def run_folder(folder: Path, tensors: Iterable[Tensor], settings: Mapping[str, object]) -> Path:
    """The folder inside ``folder`` of the run on ``tensors`` (weights and data) with ``settings``; it is made.

    Another run has another one: a run goes on from its own checkpoints and from no others.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    own = folder / digest.hexdigest()[:16]
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {own} ({error.strerror}): choose another folder") from error
    return own


def store_outcome(folder: Path, model: nn.Module, history: list[dict[str, float]]) -> None:
    """Write a run's outcome, the weights of ``model`` and its ``history``, in place of the checkpoints."""
    with replacing(folder / "trained.safetensors") as part:
        save_model(model, str(part), metadata={"history": json.dumps(history)})
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def stored_outcome(folder: Path, model: nn.Module) -> list[dict[str, float]] | None:
    """Load into ``model`` what :func:`store_outcome` wrote and give its history; None if the run has not ended."""
    path = folder / "trained.safetensors"
    if not path.is_file():
        return None
    load_model(model, path)
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["history"])
