"""A (compact) language model as encoder of item sequences, trained to put the next item first.

In the manner of SLMRec (arXiv:2405.17890): item vectors through a small adapter into the kept layers, the last state
against all item vectors, cross-entropy over the whole catalogue. Ours is a residual path around the layers, so that
training starts from the recommender that is not trained. The training loop is transformers' Trainer.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2Model, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from paper_src import InputError
from paper_src.recommendation.interactions import Sequences
from paper_src.recommendation.ranking import Scorer, metrics_of, target_ranks
from paper_src.support.checkpoints import OneDevice, WatchedTrainer, run_folder, store_outcome, stored_outcome

IGNORED = -100
SCALE = 0.02  # of the numbers of a usual embedding


def item_vectors(states: Tensor, width: int) -> Tensor:
    """(I, width) start of the item vectors: the largest principal components of the texts' states, in equal measure.

    With whitening no component drowns the others; the scale is that of a usual embedding.
    """
    centred = (states - states.mean(0)).double()
    if min(states.shape) < width:
        raise InputError(f"{width} components of {tuple(states.shape)} states: ask for at most {min(states.shape)}")
    values, axes = torch.linalg.eigh(centred.T @ centred / len(states))
    return (SCALE * centred @ axes[:, -width:] / values[-width:].clamp(min=1e-12).sqrt()).float()


def random_vectors(items: int, width: int, seed: int = 0) -> Tensor:
    """(I, width) item vectors without texts, as SASRec starts with."""
    return SCALE * torch.randn(items, width, generator=torch.Generator().manual_seed(seed))


def sasrec_body(width: int = 64, layers: int = 2, heads: int = 2, length: int = 50, dropout: float = 0.2) -> GPT2Model:
    """A causal Transformer of SASRec's size (arXiv:1808.09781), which is what transformers' GPT-2 is at that size."""
    config = GPT2Config(vocab_size=1, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
                        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    return GPT2Model(config)


class NoLayers(nn.Module):
    """A body that gives back what it takes: what is learned with it owes nothing to a model's layers."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class SequenceModel(nn.Module):
    """Scores of all items as the next one: item vectors -> adapter -> body -> head -> products with the item vectors.

    Args:
        body: takes ``inputs_embeds`` (N, T, d), gives ``last_hidden_state``; trained together with the rest.
        vectors: (I, m) start of the item vectors, which are trained.
        residual: weight of an item over that of the one after it in the mean of the history's item vectors, which
            is added to the head's output; the head then starts from zero. With 0 nothing is added.
        products: dtype of matrix products outside training, where the Trainer decides.
    """

    def __init__(self, body: nn.Module, vectors: Tensor, residual: float = 0.0, products: torch.dtype = torch.float32):
        super().__init__()
        self.residual, self.products = residual, products
        width = body.config.get_text_config().hidden_size
        self.body = body
        self.items = nn.Embedding.from_pretrained(vectors.clone(), freeze=False)
        self.adapter = nn.Linear(vectors.shape[1], width)
        self.head = nn.Linear(width, vectors.shape[1])
        if residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """``loss``: cross-entropy over the catalogue at every place with a label; ``states`` (N, T, m).

        Args:
            input_ids: (N, T) items, padding (any item) behind.
            labels: (N, T) next items, ``IGNORED`` at padding.
        """
        items = self.items(input_ids) / SCALE  # (N, T, m)
        states = self.head(self.body(inputs_embeds=self.adapter(items), use_cache=False).last_hidden_state)
        if self.residual:
            states = states + self._mean(items)
        if labels is None:
            return {"states": states}
        known = labels != IGNORED
        return {"loss": functional.cross_entropy(self.logits(states[known]), labels[known]), "states": states}

    def _mean(self, items: Tensor) -> Tensor:
        """(N, T, m) weighted mean of each item and those before it, scaled to the norm of an item vector."""
        place = torch.arange(items.shape[1], device=items.device)
        age = place[:, None] - place
        weights = torch.where(age < 0, 0.0, self.residual ** age.clamp(min=0)).to(items.dtype)  # (T, T)
        return functional.normalize(weights @ items, dim=-1) * items.shape[-1] ** 0.5

    def logits(self, states: Tensor) -> Tensor:
        """(n, I) scores of states (n, m)."""
        return (self.scale * states @ (self.items.weight.T / SCALE)).float() / self.items.weight.shape[1] ** 0.5


def as_scorer(model: SequenceModel, length: int) -> Scorer:
    """Scores by ``model`` from the last ``length`` items of a history."""

    @torch.no_grad()
    def score(histories: Sequences) -> Tensor:
        model.eval()
        device = model.items.weight.device
        items = [torch.as_tensor(history[-length:]) for history in histories]
        ends = torch.tensor([len(row) - 1 for row in items], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=model.products == torch.bfloat16):
            states = model(pad_sequence(items, batch_first=True).to(device))["states"]
            return model.logits(states[torch.arange(len(items), device=device), ends])

    return score


@dataclass(frozen=True)
class Training:
    """How a :class:`SequenceModel` is trained: warm-up over a tenth of the steps, then linear to zero."""

    length: int = 20  # last items of a sequence that count
    batch_size: int = 32  # sequences a step
    learning_rate: float = 1e-3  # peak for the item vectors, adapter and head
    body_rate: float = 2e-4  # peak for the body, which starts from what it knows
    epochs: int = 4  # most passes over the training sequences
    patience: int = 1  # epochs without a better NDCG@10 on validation users, after which it stops
    residual: float = 0.8  # of SequenceModel
    bfloat16: bool = False  # whether products are in bfloat16
    device: str = "cpu"
    seed: int = 0  # of the order of sequences, of new weights and of dropout

    @property
    def products(self) -> torch.dtype:
        """Of matrix products."""
        return torch.bfloat16 if self.bfloat16 else torch.float32


def train(
    body: nn.Module, vectors: Tensor, sequences: Sequences, validation: tuple[Sequences, np.ndarray], folder: Path,
    training: Training,
) -> tuple[SequenceModel, list[dict[str, float]]]:  # fmt: skip
    """The model that was best on validation, and rows ``epoch``, ``seconds`` (training only), ``ndcg10``.

    Epoch 0 is before any step: a model that training makes worse is given back as it was. A run that was killed goes
    on from its last epoch in ``folder`` and ends where it would have; one that has ended is read from there.

    Args:
        body: of :class:`SequenceModel`, float32; it is trained in place.
        vectors: (I, m) start of the item vectors.
        sequences: training items of each user; those of one item say nothing and are left out.
        validation: histories and next items of users, for early stopping.
        folder: of checkpoints, and of the outcome.

    Raises:
        InputError: no sequence has two items, or the loss is NaN.
    """
    rows = [items[-training.length - 1 :] for items in sequences if len(items) > 1]
    torch.manual_seed(training.seed)
    model = SequenceModel(body, vectors, training.residual, training.products)
    examples = [{"input_ids": torch.as_tensor(items[:-1]), "labels": torch.as_tensor(items[1:])} for items in rows]
    history = trained(model, examples, _collate, lambda model: as_scorer(model, training.length), validation, folder,
                      training)  # fmt: skip
    return model, history


def trained(
    model: nn.Module, examples: Sequence[dict[str, Tensor]], collate: Callable, scorer: Callable[[nn.Module], Scorer],
    validation: tuple[Sequences, np.ndarray], folder: Path, training: Training,
) -> list[dict[str, float]]:  # fmt: skip
    """Train ``model`` in place, as :func:`train` does, to its best state on validation; the looks at that.

    Args:
        model: its part ``body`` has a learning rate of its own.
        examples: what ``collate`` makes batches of, the arguments of its ``forward``.
        scorer: what recommends with it.
    """
    if not examples:
        raise InputError("no training sequence has two items: give longer ones")
    model.to(training.device)
    data = [torch.cat([torch.atleast_1d(example[name]) for example in examples]) for name in examples[0]]
    data += [torch.as_tensor(part) for part in (np.concatenate(validation[0]), validation[1])]
    folder = run_folder(folder, [*data, *model.parameters()], asdict(training))
    history = stored_outcome(folder, model)
    if history is None:
        history = _fit(model, examples, collate, scorer, validation, folder, training)
        store_outcome(folder, model, history)
    model.eval()
    return history


def _fit(
    model: nn.Module, examples: Sequence[dict[str, Tensor]], collate: Callable, scorer: Callable, validation: tuple,
    folder: Path, training: Training,
) -> list[dict[str, float]]:  # fmt: skip
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("body.")]
    groups = [{"params": list(model.body.parameters()), "lr": training.body_rate},
              {"params": others, "lr": training.learning_rate}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    history = _Trainer(
        validation, training, scorer, model=model, args=_arguments(folder, training), train_dataset=examples,
        eval_dataset=examples[:1], data_collator=collate, optimizers=(optimizer, None),
    ).fit("epoch", "seconds", "ndcg10")  # fmt: skip
    if history[0]["ndcg10"] >= max(row["ndcg10"] for row in history[1:]):
        model.load_state_dict(start)
    return history


def _arguments(folder: Path, training: Training) -> OneDevice:
    return OneDevice(
        output_dir=str(folder),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        warmup_steps=0.1,
        bf16=training.bfloat16,
        on=training.device,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        metric_for_best_model="eval_ndcg10",
        greater_is_better=True,
        train_sampling_strategy="group_by_length",
        seed=training.seed,
    )


def _collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    pads = {"input_ids": 0, "labels": IGNORED}
    return {name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=pad)
            for name, pad in pads.items()}  # fmt: skip


class _Trainer(WatchedTrainer):
    """It measures NDCG@10 over the whole catalogue."""

    def __init__(self, validation: tuple, training: Training, scorer: Callable[[nn.Module], Scorer], **arguments):
        super().__init__(training.patience, **arguments)
        self.validation, self.scorer = validation, scorer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored
    ) -> Tensor:
        return self.finite(model(**inputs)["loss"])

    def measure(self) -> dict[str, float]:
        found = metrics_of(target_ranks(self.scorer(self.model), *self.validation))
        return {name: float(values.mean()) for name, values in found.items()}
