"""Folders of a Trainer's checkpoints that belong to one run, so that a killed run goes on and no other is mixed in."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

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


def claim(folder: Path, tensors: Iterable[Tensor], settings: Mapping[str, object]) -> None:
    """Mark ``folder`` as that of the run on ``tensors`` (weights and data) with ``settings``.

    Raises:
        InputError: it holds another run.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    mark = folder / "run.txt"
    if mark.is_file() and mark.read_text() != digest.hexdigest():
        raise InputError(f"{folder} holds checkpoints of another model, text or setting: remove it or name another")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest.hexdigest())


def keep(folder: Path, model: nn.Module, history: list[dict[str, float]]) -> None:
    """Write a run's outcome, the weights of ``model`` and its ``history``, beside the checkpoints."""
    with replacing(folder / "trained.safetensors") as part:
        save_file(model.state_dict(), part, metadata={"history": json.dumps(history)})


def kept(folder: Path, model: nn.Module) -> list[dict[str, float]] | None:
    """Load into ``model`` what :func:`keep` wrote and give its history; None if the run has not ended."""
    path = folder / "trained.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
        return json.loads(file.metadata()["history"])
