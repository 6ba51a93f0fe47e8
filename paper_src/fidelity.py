"""How near a compact model's outputs are to the full model's, on held-out tokens."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.models import last_hidden, logits_of
from paper_src.stats import interval
from paper_src.support.devices import rows_at_once
from paper_src.support.files import replacing

METRICS = ("cosine", "cosine_centred", "mse", "kl_nats", "top1_agreement", "nll_nats")
CAPPED = "nll_capped_nats"
OF_LOGITS = ("kl_nats", "top1_agreement", "nll_nats", CAPPED)
HEAD_ROWS = 256  # hidden states that go through the head at once


@dataclass
class Reference:
    """What the full model says about N blocks of T tokens; the compact model is compared with it."""

    blocks: Tensor  # (N, T) token ids
    hidden: Tensor  # (N, T, d) last hidden states after the final norm
    mean_state: Tensor  # (d,) mean last hidden state on calibration text; zeros where nothing asks for it
    context: Tensor  # (N, C) token ids before the blocks, which are read and not scored
    probabilities: Tensor | None = None  # (N, T, V) float32 next-token distribution p: the largest part by far
    negative_entropy: Tensor | None = None  # (N, T) sum of p log p, nats
    top1: Tensor | None = None  # (N, T) most probable token

    def head(self, count: int) -> "Reference":
        """The same of the first ``count`` blocks."""
        own = {name: value if value is None or name == "mean_state" else value[:count]
               for name, value in vars(self).items()}  # fmt: skip
        return Reference(**own)


@torch.no_grad()
def mean_state(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> Tensor:
    """(d,) float32 mean last hidden state over all tokens of ``blocks``: the trivial predictor."""
    total = sum(last_hidden(model, batch).double().sum(dim=(0, 1)) for batch in blocks.split(batch_size))
    return (total / blocks.numel()).float()


def save_mean(path: Path, mean: Tensor, model_digest: str) -> None:
    """Write a mean state with the digest of the model that it belongs to."""
    with replacing(path) as part:
        save_file({"mean": mean.cpu().contiguous()}, part, metadata={"model_sha256": model_digest})


def load_mean(path: Path, model_digest: str) -> Tensor:
    """(d,) the mean state that :func:`save_mean` wrote; InputError if there is none, or it is of another model."""
    command = "run ./reproduce.sh --only 01_importance"
    if not path.is_file():
        raise InputError(f"no mean state {path}: {command}")
    with safe_open(path, framework="pt") as file:
        if (found := file.metadata()["model_sha256"]) != model_digest:
            raise InputError(f"{path} is of another model ({found[:12]}, not {model_digest[:12]}): {command}")
        return file.get_tensor("mean")


@torch.no_grad()
def reference(
    model: PreTrainedModel, blocks: Tensor, mean: Tensor | None = None, batch_size: int = 8,
    metrics: Collection[str] = METRICS, scored: int | None = None,
) -> Reference:  # fmt: skip
    """The full model's states, and logits where ``metrics`` need them, on ``blocks`` (N, T).

    Args:
        mean: from :func:`mean_state` on calibration text; only ``cosine_centred`` and the trivial predictor need it.
        scored: only the last ``scored`` tokens of each block; those before them are context.
    """
    if min(blocks.shape[1], scored or 2) < 2:
        raise InputError(f"blocks of {blocks.shape[1]} tokens, {scored} scored: give at least 2 to predict the next")
    if unknown := sorted(set(metrics) - {*METRICS, CAPPED}):
        raise InputError(f"metric {unknown[0]!r}: use one of {(*METRICS, CAPPED)}")
    if "cosine_centred" in metrics and mean is None:
        raise InputError("metric 'cosine_centred' needs the mean state: see fidelity.mean_state")
    tail = slice(-(scored or blocks.shape[1]), None)
    hidden = torch.cat([last_hidden(model, batch)[:, tail] for batch in blocks.split(batch_size)])
    mean = hidden.new_zeros(hidden.shape[-1]) if mean is None else mean.to(model.device)
    blocks = blocks.to(model.device)
    full = Reference(blocks[:, tail], hidden, mean, context=blocks[:, : -hidden.shape[1]])
    if {"kl_nats", "top1_agreement"}.isdisjoint(metrics):
        return full
    parts = []
    for states in hidden.flatten(0, 1).split(64):
        p = logits_of(model, states[None])[0].float().softmax(-1)  # (<=64, V)
        p = p.where(p >= torch.finfo(p.dtype).tiny, 0)  # subnormal numbers weigh nothing and slow sums tenfold
        parts.append((p, -torch.special.entr(p).sum(-1), p.argmax(-1)))
    whole = (torch.cat(part).unflatten(0, hidden.shape[:2]) for part in zip(*parts, strict=True))
    full.probabilities, full.negative_entropy, full.top1 = whole
    return full


@torch.no_grad()
def compare(
    model: PreTrainedModel, full: Reference, batch_size: int = 8, metrics: Collection[str] = METRICS
) -> dict[str, np.ndarray]:
    """Fidelity of ``model`` to the full one: metric -> (N,) float64, one value per block.

    With h, h' the last hidden states after the final norm and p, p' the next-token distributions:

    - ``cosine`` = mean over tokens of cos(h, h'); ``cosine_centred`` the same with ``mean_state`` subtracted from
      both (hidden states share a large mean, which any model reproduces);
    - ``mse`` = mean over tokens and units of (h - h')^2;
    - ``kl_nats`` = mean over tokens of KL(p || p'), nats;
    - ``top1_agreement`` = share of tokens where both models put the same token first, in [0, 1];
    - ``nll_nats`` = mean of -log p'(next token), nats/token over T - 1 tokens: its exponential is the perplexity;
    - ``nll_capped_nats``, only if asked for: a token counts at most log V, the cost of a uniform guess.
    """
    blocks, start = torch.cat([full.context, full.blocks], dim=1), full.context.shape[1]
    hidden = torch.cat([last_hidden(model, batch)[:, start:] for batch in blocks.split(batch_size)])
    return compare_states(model, full, hidden, metrics)


@torch.no_grad()
def compare_states(
    model: PreTrainedModel, full: Reference, hidden: Tensor, metrics: Collection[str] = METRICS
) -> dict[str, np.ndarray]:
    """:func:`compare` for last hidden states (C N, T, d) of C models, block after block, with ``model``'s head."""
    rows = [_compare_states(full, index, state, metrics) for index, state in enumerate(hidden)]
    if not set(metrics).isdisjoint(OF_LOGITS):
        for start in range(0, len(hidden), step := max(1, HEAD_ROWS // hidden.shape[1])):
            logits = logits_of(model, hidden[start : start + step])  # (<=step, T, V)
            for index, block in enumerate(logits, start=start):
                rows[index] |= _compare_logits(full, index, block, metrics)
    return {name: np.array([row[name] for row in rows]) for name in metrics}


@torch.no_grad()
def compare_constant(model: PreTrainedModel, full: Reference) -> dict[str, np.ndarray]:
    """Fidelity of the trivial predictor: every hidden state is ``mean_state``, whatever the text."""
    return compare_states(model, full, full.mean_state.to(full.hidden.dtype).expand_as(full.hidden))


def _compare_states(full: Reference, index: int, state: Tensor, metrics: Collection[str]) -> dict[str, float]:
    """Metrics of one block's states (T, d)."""
    index %= len(full.blocks)
    h, other, mean = full.hidden[index].float(), state.float(), full.mean_state.to(state.dtype).float()
    row = {}
    if "cosine" in metrics:
        row["cosine"] = _mean(functional.cosine_similarity(h, other, dim=-1))
    if "cosine_centred" in metrics:
        row["cosine_centred"] = _mean(functional.cosine_similarity(h - mean, other - mean, dim=-1))
    if "mse" in metrics:
        row["mse"] = _mean((h - other).square())
    return row


def _compare_logits(full: Reference, index: int, logits: Tensor, metrics: Collection[str]) -> dict[str, float]:
    """Metrics of one block's logits (T, V)."""
    index %= len(full.blocks)
    labels = full.blocks[index, 1:]
    kl, agree, nll = [], [], []
    for low in range(0, len(logits), step := rows_at_once(logits.device)):
        part = slice(low, low + step)
        log_q = functional.log_softmax(logits[part].float(), dim=-1)  # (<=step, V)
        if "kl_nats" in metrics:
            cross = torch.einsum("tv,tv->t", full.probabilities[index, part], log_q)  # sum of p log p'
            kl.append((full.negative_entropy[index, part] - cross).clamp(min=0))  # rounding
        if "top1_agreement" in metrics:
            agree.append(log_q.argmax(-1) == full.top1[index, part])
        next_tokens = labels[part, None]  # the last token of a block has no next one
        nll.append(-log_q[: len(next_tokens)].gather(1, next_tokens)[:, 0])
    capped = [part.clamp(max=math.log(logits.shape[-1])) for part in nll]
    row = {"kl_nats": kl, "top1_agreement": agree, "nll_nats": nll, CAPPED: capped}
    return {name: _mean(torch.cat(parts)) for name, parts in row.items() if parts}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def summarize(values: dict[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    """Means over blocks with 95% bootstrap intervals (``_lo``, ``_hi``); adds ``ppl`` = exp(mean NLL)."""
    row = {}
    for name, column in values.items():
        low, high = interval(column, seed=seed)
        row |= {name: float(column.mean()), f"{name}_lo": low, f"{name}_hi": high}
    return row | {f"ppl{end}": math.exp(row[f"nll_nats{end}"]) for end in ("", "_lo", "_hi")}


def ppl_ratio(nll: np.ndarray, full: np.ndarray | float, seed: int = 0) -> dict[str, float]:
    """Perplexity over the full model's, ``ppl_ratio``, with the 95% interval of the paired differences.

    ``nll`` are (N,) nats/token of each block and ``full`` the full model's of the same, so that what is hard in a
    block cancels; or its mean, where ``nll`` are means of several models.
    """
    gap = np.asarray(nll) - np.asarray(full)
    low, high = interval(gap, seed=seed)
    return {"ppl_ratio": math.exp(gap.mean()), "ppl_ratio_lo": math.exp(low), "ppl_ratio_hi": math.exp(high)}
