"""What the trainings share: one device, looks at validation text, and a folder for each run, so that it can go on."""

import gc
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from paper_src import InputError
from paper_src.support.files import replacing

SHORT = 128  # tokens, up to which attention goes back faster without its fused kernel, on a CPU
LEAST = 2**22  # free bytes of a disk that is not full


@dataclass
class OneDevice(TrainingArguments):
    """Arguments of a quiet Trainer that ends at its best state, and stays on the device ``on``, where its model is.

    By itself a Trainer takes the first GPU, and all there are for copies of the model.
    """

    on: str = "cpu"
    load_best_model_at_end: bool = True
    restore_callback_states_from_checkpoint: bool = True  # that of early stopping
    remove_unused_columns: bool = False
    logging_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True

    def __post_init__(self) -> None:
        self.use_cpu = torch.device(self.on).type == "cpu"
        super().__post_init__()
        if super().device.type == "cuda":  # which sets the first GPU, and accelerate takes the one that is set
            torch.cuda.set_device(self.on)

    @property
    def device(self) -> torch.device:
        return torch.device(self.on)

    @property
    def n_gpu(self) -> int:
        return int(not self.use_cpu)


class WatchedTrainer(Trainer):
    """A Trainer whose evaluation is :meth:`measure`, done before the first step and after the last as well.

    It stops after ``patience`` looks without progress. ``spent`` are the seconds of all steps, over resumptions.
    """

    def __init__(self, patience: int, **arguments):
        super().__init__(callbacks=[EarlyStoppingCallback(patience), _Watch(self)], **arguments)
        self.remove_callback(PrinterCallback)
        self.spent = 0.0

    def measure(self) -> dict[str, float]:
        """Name -> value on validation data, the one to choose the best state by among them."""
        raise NotImplementedError

    def fit(self, *columns: str) -> list[dict[str, float]]:
        """Train, from the last checkpoint if there is one; ``columns`` of each look."""
        gc.freeze()  # what is there already need not be searched for garbage after every training
        try:
            with room_in(self.args.output_dir):
                self.train(resume_from_checkpoint=whole_checkpoint(self.args.output_dir))
        finally:
            gc.unfreeze()
        # accelerate's forward stood around the class's own, which is back now
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(self.model).pop(name, None)
        looks = [row for row in self.state.log_history if "eval_seconds" in row]
        # the log of a resumed run has another order
        return [{name: row[name if name in row else f"eval_{name}"] for name in columns} for row in looks]

    def evaluate(self, *ignored, **also_ignored) -> dict[str, float]:
        """What :meth:`measure` gives; an evaluation, for callbacks and checkpoints, like any other."""
        self.model.eval()
        metrics = {f"eval_{name}": value for name, value in self.measure().items()}
        self.log(metrics | {"eval_seconds": self.spent})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: Mapping[str, Tensor], *more: object) -> Tensor:
        with plain_attention(model, inputs["input_ids"].shape[-1]):
            return super().training_step(model, inputs, *more)

    def finite(self, loss: Tensor) -> Tensor:
        """``loss``; InputError if it is NaN or Inf."""
        if torch.isfinite(loss):
            return loss
        raise InputError(
            f"the loss is {loss.item()} at step {self.state.global_step}: lower the learning rate; "
            f"the last good state is in {self.args.output_dir}"
        )


class _Watch(TrainerCallback):
    def __init__(self, trainer: WatchedTrainer):
        self.trainer, self.begun = trainer, 0.0

    def on_train_begin(self, args, state, control, **others) -> None:
        looks = [row["eval_seconds"] for row in state.log_history if "eval_seconds" in row]
        self.trainer.spent = looks[-1] if looks else 0.0
        if state.global_step == 0:
            self.trainer.evaluate()

    def on_step_begin(self, args, state, control, **others) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **others) -> None:
        self.trainer.spent += time.perf_counter() - self.begun
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":  # an epoch's end is a look anyway
            control.should_evaluate = True


@contextmanager
def plain_attention(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, attention over few tokens is plain matrix products on a CPU: the fused kernel takes several times as long
    there to go back. Of a model with towers each part is switched by itself.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)
             and part.device.type == "cpu" and part.config._attn_implementation == "sdpa"
             and not part.config.sub_configs]  # fmt: skip
    parts = parts if tokens <= SHORT else []
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part in parts:
            part.set_attn_implementation("sdpa")


def whole_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint in ``folder`` that was written to its end; those that were not are removed."""
    for checkpoint in Path(folder).glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # written last
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(folder))


@contextmanager
def room_in(folder: str | Path) -> Iterator[None]:
    """Nothing, but that what fails inside because the disk is full ends with one line.

    Raises:
        InputError: less than ``LEAST`` bytes are free, whatever the library said that was writing.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free >= LEAST:
            raise
        raise InputError(f"the disk of {folder} is full: free space and run again; the last good state is there"
                         ) from error  # fmt: skip


def tensor_in_file(path: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that lives in a file, which has its whole size from the start: what was there stays.

    Raises:
        InputError: the disk has no room for it. (Written to page by page, it would kill the process there.)
    """
    count = math.prod(shape)
    if hasattr(os, "posix_fallocate"):
        try:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, count * dtype.itemsize))
        except OSError as error:
            raise InputError(f"{path} takes {count * dtype.itemsize / 1e9:.1f} GB ({error.strerror}): free space, or "
                             "give fewer blocks") from error  # fmt: skip
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


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
