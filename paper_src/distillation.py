"""Fine-tuning of a compact model against the full one, on top of transformers' Trainer."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import StackDataset
from transformers import PreTrainedModel

from paper_src import InputError, fidelity
from paper_src.models import cast_, last_hidden, logits_of
from paper_src.support.checkpoints import (
    OneDevice,
    WatchedTrainer,
    room_in,
    run_folder,
    store_outcome,
    stored_outcome,
    tensor_in_file,
)
from paper_src.support.devices import rows_at_once


@dataclass
class Distillation:
    """How to distil."""

    batch_size: int = 8  # blocks a step
    epochs: int = 1  # passes over the blocks; the full model answers each block once, whatever their number
    learning_rate: float = 5e-4  # peak of AdamW's: linear warm-up over ``warmup`` of the steps, then cosine to zero
    warmup: float = 0.05
    kl: float = 1.0  # weight of KL(p || p') of the next-token distributions, nats per token
    # every so many tokens enter the KL, each step others; all enter the other terms: the head costs as much as many
    # layers, and neighbouring tokens say nearly the same
    kl_every: int = 4
    hidden: float = 1.0  # weight of 1 - cos(h, h') of the last hidden states
    evaluate_every: int = 20  # steps between looks at validation text, and between checkpoints; the last is a look
    patience: int = 5  # looks without progress after which it stops
    seed: int = 0  # of the order of the blocks
    embeddings: bool = False  # whether embedding and head are trained too: where they are not those of the full model
    more: dict[str, object] = field(default_factory=dict)  # further arguments of transformers' TrainingArguments

    def with_looks(self, count: int, blocks: int) -> "Distillation":
        """The same with ``count`` looks at equal distances in a training on so many blocks."""
        return replace(self, evaluate_every=max(1, blocks // self.batch_size * self.epochs // count))


@dataclass
class Distilled:
    """The state that was best on validation text in the student's dtype; the student itself if no step was better."""

    model: PreTrainedModel
    history: list[dict[str, float]]  # of each look: step, tokens (of every pass), seconds (training only), metrics


def distil(
    full: PreTrainedModel, student: PreTrainedModel, blocks: Tensor, validation: fidelity.Reference,
    folder: str | Path, settings: Distillation | None = None, progress: Callable | None = None,
    answers: str | Path | None = None,
) -> Distilled:  # fmt: skip
    """``student`` trained on ``blocks`` (N, T) so that it answers as ``full`` does; neither is changed.

    A float32 copy is trained, by default without its embedding and head; it computes in bfloat16 where the full model
    does. A run that was killed goes on from its last checkpoint in ``folder`` and ends where it would have; one that
    has ended is read.

    Args:
        student: compact, possibly refitted.
        validation: the full model's answers to validation text: decides which state is best and when to stop.
        folder: of all runs' checkpoints, and of the full model's states of ``blocks`` where there are several passes.
        answers: another folder for these states: the runs that share it ask the full model once for each block.
        progress: called with a line of text at each look.

    Raises:
        InputError: the loss turns NaN or Inf, or the disk is full (the last good checkpoint stays), or less than a
            batch of blocks.
    """
    settings = settings or Distillation()
    if len(blocks) < settings.batch_size:
        raise InputError(f"{len(blocks)} blocks in batches of {settings.batch_size}: give at least one batch")
    known_by = [blocks, validation.blocks, *student.parameters(), *full.parameters()]
    folder = run_folder(Path(folder), known_by, asdict(settings))
    model = copy.deepcopy(student).float().requires_grad_(True)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.requires_grad_(settings.embeddings)
    if (history := stored_outcome(folder, model)) is None:
        known = run_folder(Path(answers), [blocks, *full.parameters()], {}) if answers else None
        trainer = Distiller(full, validation, blocks, settings, progress, known, model=model,
                            args=_arguments(full, folder, len(blocks), settings))  # fmt: skip
        history = trainer.fit("step", *fidelity.METRICS, "tokens", "seconds")
        with room_in(folder):
            store_outcome(folder, model, history)
    if history[0]["kl_nats"] <= min(row["kl_nats"] for row in history[1:]):  # the first look is before any step
        return Distilled(student, history)
    return Distilled(cast_(model, (own.dtype for own in student.parameters())).eval(), history)


def _arguments(full: PreTrainedModel, folder: Path, blocks: int, settings: Distillation) -> OneDevice:
    steps = blocks // settings.batch_size * settings.epochs
    own = {"lr_scheduler_type": "cosine", "weight_decay": 0.0} | settings.more
    return OneDevice(
        output_dir=str(folder), on=str(full.device), bf16=full.dtype == torch.bfloat16, seed=settings.seed,
        max_steps=steps, per_device_train_batch_size=settings.batch_size, dataloader_drop_last=True,
        learning_rate=settings.learning_rate, warmup_steps=round(settings.warmup * steps),
        eval_strategy="steps", eval_steps=settings.evaluate_every,
        save_strategy="steps", save_steps=settings.evaluate_every, save_total_limit=2,
        metric_for_best_model="eval_kl_nats", greater_is_better=False, **own,
    )  # fmt: skip


class _Answers:
    """The full model's last hidden states of blocks, each computed once and kept in a file, also over a kill."""

    def __init__(self, teacher: PreTrainedModel, blocks: Tensor, width: int, folder: Path):
        self.teacher = teacher
        self.states = tensor_in_file(folder / "answers.bin", (*blocks.shape, width), teacher.dtype)
        self.known = tensor_in_file(folder / "answered.bin", (len(blocks),), torch.uint8)

    def __call__(self, ids: Tensor, index: Tensor) -> Tensor:
        """(B, T, d) states of the blocks ``index`` (B,), whose tokens are ``ids`` (B, T)."""
        index = index.cpu()
        if not self.known[index].all():
            self.states[index] = last_hidden(self.teacher, ids).cpu()
            self.known[index] = 1
        return self.states[index].to(ids.device)


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(p || q), nats, of logits (..., V) of p and q; it goes back to q's, once.

    Forward makes the gradient, q - p, as well: beside it nothing else of the logits' size is ever alive.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        ctx.gradient, ctx.tokens = torch.empty_like(q_logits), q_logits[..., 0].numel()
        total, step = q_logits.new_zeros((), dtype=torch.float64), rows_at_once(q_logits.device)
        rows = (tensor.flatten(0, -2).split(step) for tensor in (p_logits, q_logits, ctx.gradient))
        for p_row, q_row, gradient in zip(*rows, strict=True):
            log_p, log_q = p_row.float().log_softmax(-1), q_row.float().log_softmax(-1)
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p - log_q).sum()
            gradient.copy_(log_q.exp_().sub_(p))
        return (total / ctx.tokens).float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[None, Tensor]:
        return None, ctx.gradient.mul_(upstream / ctx.tokens)


class Distiller(WatchedTrainer):
    """Its loss compares the model with a teacher, and what it measures is that of :mod:`fidelity`."""

    def __init__(
        self, teacher: PreTrainedModel, validation: fidelity.Reference, blocks: Tensor, settings: Distillation,
        progress: Callable | None, known: Path | None = None, **arguments,
    ):  # fmt: skip
        arguments["train_dataset"] = StackDataset(input_ids=blocks, index=torch.arange(len(blocks)))
        super().__init__(settings.patience, eval_dataset=StackDataset(input_ids=validation.blocks), **arguments)
        self.teacher, self.validation, self.settings = teacher, validation, settings
        self.progress, self.tokens_a_step = progress, settings.batch_size * blocks.shape[1]
        repeats = settings.epochs > 1 or known
        width, folder = validation.hidden.shape[-1], known or Path(self.args.output_dir)
        self.answers = _Answers(teacher, blocks, width, folder) if repeats else None

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored
    ) -> Tensor:
        """The weighted sum of :class:`Distillation`, averaged over tokens."""
        with self._precision():
            return self.finite(self._loss(model, inputs))

    def _precision(self) -> torch.autocast:
        """bfloat16 where it is asked for: Trainer's own wraps the model's forward, which is not what is called here."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def _loss(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        ids, use = inputs["input_ids"], self.settings
        with torch.no_grad():
            h = self.answers(ids, inputs["index"]) if self.answers else last_hidden(self.teacher, ids)
        own = last_hidden(model, ids)
        loss = use.hidden * (1 - functional.cosine_similarity(own.float(), h.float(), dim=-1)).mean()
        if use.kl:
            part = (slice(None), slice(self.state.global_step % use.kl_every, None, use.kl_every))
            with torch.no_grad():
                answer = logits_of(self.teacher, h[part])  # (B, T / kl_every, V)
            loss = loss + use.kl * _Divergence.apply(answer, logits_of(model, own[part]))
        return loss

    def measure(self) -> dict[str, float]:
        """Fidelity on validation text, and the tokens so far."""
        with self._precision():
            found = fidelity.compare(self.model, self.validation)
        means = {name: float(values.mean()) for name, values in found.items()}
        if self.progress:
            self.progress(f"step {self.state.global_step} of {self.args.max_steps}, {self.spent:.0f} s: "
                          f"cosine {means['cosine']:.3f}, KL {means['kl_nats']:.3f} nats")  # fmt: skip
        return means | {"tokens": self.state.global_step * self.tokens_a_step}
