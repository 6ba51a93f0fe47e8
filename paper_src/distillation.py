"""Fine-tuning of a compact model against the full one, on top of transformers' Trainer."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from paper_src import InputError, fidelity
from paper_src.checkpoints import FirstLook, OneDevice, run_folder, seconds_before, store_outcome, stored_outcome
from paper_src.models import last_hidden, logits_of


@dataclass
class Distillation:
    """How to distil.

    Attributes:
        batch_size: blocks a step.
        epochs: passes over the blocks. The full model answers each block once, whatever their number.
        learning_rate: peak of AdamW's; linear warm-up over ``warmup`` of the steps, then cosine to zero.
        warmup: share of the steps.
        kl: weight of KL(p || p') of the next-token distributions, nats a token.
        kl_every: every so many tokens enter the KL, each step others; all enter the other terms. The head costs as
            much as many layers, and neighbouring tokens say nearly the same.
        hidden: weight of 1 - cos(h, h') of the last hidden states.
        states: weight of the relative squared error |h - h'|^2 / |h|^2 of the states before each kept layer.
        train_embeddings: whether the embedding (and a head tied to it) is trained as well.
        lora_rank: rank of LoRA adapters on all linear maps, merged afterwards; 0 trains the weights themselves.
        evaluate_every: steps between two looks at validation text, and between two checkpoints; the last is a look.
        patience: looks without progress after which it stops.
        seconds: limit of the training time, checked after each step; 0 is none. The learning rate does not know it.
        seed: of the order of the blocks.
    """

    batch_size: int = 8
    epochs: int = 1
    learning_rate: float = 5e-4
    warmup: float = 0.05
    kl: float = 1.0
    kl_every: int = 4
    hidden: float = 1.0
    states: float = 0.0
    train_embeddings: bool = False
    lora_rank: int = 0
    evaluate_every: int = 20
    patience: int = 5
    seconds: float = 0.0
    seed: int = 0


@dataclass
class Distilled:
    """The trained model in the student's dtype, and what was seen on validation text at each look.

    Attributes:
        model: the state that was best on validation text; the student itself if no step made it better.
        history: rows ``step`` (0 and each look), ``tokens`` (of every pass), ``seconds`` (training only), and the
            metrics of validation text.
    """

    model: PreTrainedModel
    history: list[dict[str, float]]


def distil(
    full: PreTrainedModel,
    student: PreTrainedModel,
    blocks: Tensor,
    validation: fidelity.Reference,
    folder: str | Path,
    settings: Distillation | None = None,
    kept: Sequence[int] = (),
    progress: Callable | None = None,
) -> Distilled:
    """``student`` trained on ``blocks`` so that it answers as ``full`` does.

    The weights that are trained are a float32 copy; where ``full`` is in bfloat16 the products are, too
    (autocast). Checkpoints lie in ``folder``, each run's in a folder of its own: a run that was killed goes on from
    the last one and ends where it would have, one that has ended is read from there.

    Args:
        full: the teacher; it is not changed.
        student: compact, possibly refitted; it is not changed.
        blocks: (N, T) token ids.
        validation: the full model's answers to validation text: decides which state is best and when to stop.
        folder: of the checkpoints, and of the full model's last states of ``blocks`` where there are several passes.
        settings: defaults if None.
        kept: kept layers, needed for ``settings.states``.
        progress: called with a line of text at each look.

    Raises:
        InputError: the loss turns NaN or Inf (the last good checkpoint stays), or less than a batch of blocks.
    """
    settings = settings or Distillation()
    if len(blocks) < settings.batch_size:
        raise InputError(f"{len(blocks)} blocks in batches of {settings.batch_size}: give at least one batch")
    folder = run_folder(Path(folder), [blocks, validation.blocks, *student.parameters()], asdict(settings))
    model, finish = _trainable(student, settings)
    if (history := stored_outcome(folder, model)) is None:
        history = _fit(full, model, blocks, validation, folder, settings, kept, progress)
        store_outcome(folder, model, history)
    if history[0]["kl_nats"] <= min(row["kl_nats"] for row in history[1:]):  # the first look is before any step
        return Distilled(student, history)
    return Distilled(finish(model).to(student.dtype).eval(), history)


def _fit(
    full: PreTrainedModel, model: PreTrainedModel, blocks: Tensor, validation: fidelity.Reference, folder: Path,
    settings: Distillation, kept: Sequence[int], progress: Callable | None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train ``model`` in place, to its best state on validation text; the looks at that."""
    trainer = Distiller(full, validation, settings, kept, progress, model=model, train_dataset=_Blocks(blocks),
                        eval_dataset=_Blocks(validation.blocks),
                        args=_arguments(full, folder, len(blocks), settings))  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off its forward
    columns = (*fidelity.METRICS, "tokens", "seconds")  # the log of a resumed run has another order
    return [{"step": row["step"], **{name: row[f"eval_{name}"] for name in columns}}
            for row in trainer.state.log_history if "eval_kl_nats" in row]  # fmt: skip


def _arguments(full: PreTrainedModel, folder: Path, blocks: int, settings: Distillation) -> OneDevice:
    steps = blocks // settings.batch_size * settings.epochs
    return OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * steps),
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        bf16=full.dtype == torch.bfloat16,
        on=str(full.device),
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        save_strategy="steps",
        save_steps=settings.evaluate_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # that of early stopping
        metric_for_best_model="eval_kl_nats",
        greater_is_better=False,
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        disable_tqdm=True,
        seed=settings.seed,
    )


def _trainable(student: PreTrainedModel, settings: Distillation) -> tuple[PreTrainedModel, Callable]:
    """A float32 copy of ``student`` whose trained parameters have gradients, and what makes it plain again."""
    model = copy.deepcopy(student).float().requires_grad_(True)
    if not settings.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    if not settings.lora_rank:
        return model, lambda trained: trained
    from peft import LoraConfig, get_peft_model  # slow to import, and few ask for it

    adapters = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    wrapped = get_peft_model(model, adapters)
    return wrapped.get_base_model(), lambda trained: wrapped.merge_and_unload()


class _Blocks(Dataset):
    def __init__(self, blocks: Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "index": torch.tensor(index)}


class _Answers:
    """The full model's last hidden states of blocks, each computed once and kept in a file, also over a kill."""

    def __init__(self, teacher: PreTrainedModel, blocks: Tensor, folder: Path):
        self.teacher = teacher
        shape = (*blocks.shape, teacher.config.get_text_config().hidden_size)
        size = blocks.numel() * shape[-1]
        file = {"shared": True, "size": size, "dtype": teacher.dtype}
        self.states = torch.from_file(str(folder / "answers.bin"), **file).view(shape)
        self.known = torch.from_file(str(folder / "answered.bin"), shared=True, size=len(blocks), dtype=torch.uint8)

    def __call__(self, ids: Tensor, index: Tensor) -> Tensor:
        """(B, T, d) states of the blocks ``index`` (B,), whose tokens are ``ids`` (B, T)."""
        index = index.cpu()
        if not self.known[index].all():
            self.states[index] = last_hidden(self.teacher, ids).cpu()
            self.known[index] = 1
        return self.states[index].to(ids.device)


class Distiller(Trainer):
    """A Trainer whose loss compares the model with a teacher, and whose evaluation is that of :mod:`fidelity`."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        validation: fidelity.Reference,
        settings: Distillation,
        kept: Sequence[int],
        progress: Callable | None,
        **arguments,
    ):
        super().__init__(
            callbacks=[EarlyStoppingCallback(settings.patience), _Clock(self), FirstLook(self)], **arguments
        )
        self.remove_callback(PrinterCallback)
        self.teacher, self.validation, self.settings, self.kept = teacher, validation, settings, kept
        self.progress = progress
        self.spent = 0.0  # seconds of training steps, those before a resumption as well
        repeats = settings.epochs > 1 and not settings.states
        self.answers = _Answers(teacher, self.train_dataset.blocks, Path(self.args.output_dir)) if repeats else None

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored
    ) -> Tensor:
        """The weighted sum of :class:`Distillation`, averaged over tokens."""
        ids, use = inputs["input_ids"], self.settings
        wanted = {"input_ids": ids, "use_cache": False, "output_hidden_states": use.states > 0}
        with torch.no_grad():
            if self.answers:
                h = self.answers(ids, inputs["index"])
            else:
                target = self.teacher.base_model(**wanted)
                h = target.last_hidden_state
        own = model.base_model(**wanted)
        loss = use.hidden * (1 - functional.cosine_similarity(own.last_hidden_state.float(), h.float(), dim=-1)).mean()
        if use.kl:
            part = (slice(None), slice(self.state.global_step % use.kl_every, None, use.kl_every))
            with torch.no_grad():
                log_p = logits_of(self.teacher, h[part]).float().log_softmax(-1)  # (B, T / kl_every, V)
            log_q = logits_of(model, own.last_hidden_state[part]).float().log_softmax(-1)
            kl = functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / log_q[..., 0].numel()
            loss = loss + use.kl * kl
        if use.states:
            pairs = [(target.hidden_states[layer], own.hidden_states[n]) for n, layer in enumerate(self.kept) if n]
            loss = loss + use.states * sum(_relative_error(*pair) for pair in pairs) / len(pairs)
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} at step {self.state.global_step}: lower the learning rate; "
                f"the last good state is in {self.args.output_dir}"
            )
        return loss

    def evaluate(self, *ignored, **also_ignored) -> dict[str, float]:
        """Fidelity on validation text; an evaluation, for callbacks and checkpoints, like any other."""
        self.model.eval()
        with self.compute_loss_context_manager():
            measured = fidelity.compare(self.model, self.validation)
        metrics = {f"eval_{name}": float(values.mean()) for name, values in measured.items()}
        tokens = self.state.global_step * self.settings.batch_size * self.train_dataset.blocks.shape[1]
        self.log(metrics | {"eval_tokens": tokens, "eval_seconds": self.spent})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.progress:
            self.progress(f"step {self.state.global_step} of {self.args.max_steps}, {self.spent:.0f} s: "
                          f"cosine {metrics['eval_cosine']:.3f}, KL {metrics['eval_kl_nats']:.3f} nats")  # fmt: skip
        return metrics


def _relative_error(target: Tensor, own: Tensor) -> Tensor:
    """Mean over tokens of |t - h|^2 / |t|^2."""
    target = target.float()
    return ((target - own).square().sum(-1) / target.square().sum(-1)).mean()


class _Clock(TrainerCallback):
    """Adds up the seconds of training steps, and stops at the limit."""

    def __init__(self, trainer: Distiller):
        self.trainer, self.begun = trainer, 0.0

    def on_train_begin(self, args, state, control, **others) -> None:
        self.trainer.spent = seconds_before(state)

    def on_step_begin(self, args, state, control, **others) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **others) -> None:
        self.trainer.spent += time.perf_counter() - self.begun
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        limit = self.trainer.settings.seconds
        if limit and self.trainer.spent > limit:
            control.should_evaluate = control.should_save = control.should_training_stop = True
