"""How near a compact model's outputs are to the full model's, on held-out tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.models import last_hidden, logits_of

METRICS = ("cosine", "cosine_centred", "mse", "kl_nats", "top1_agreement", "nll_nats")


@dataclass
class Reference:
    """What the full model says about N blocks of T tokens; the compact model is compared with it.

    Attributes:
        blocks: (N, T) token ids.
        hidden: (N, T, d) last hidden states after the final norm.
        probabilities: (N, T, V) float32 next-token distribution p: 4 * N * T * V bytes, the largest part.
        negative_entropy: (N, T) sum of p log p, nats.
        top1: (N, T) most probable token.
        mean_state: (d,) float32, mean last hidden state on calibration text.
    """

    blocks: Tensor
    hidden: Tensor
    probabilities: Tensor
    negative_entropy: Tensor
    top1: Tensor
    mean_state: Tensor


@torch.no_grad()
def mean_state(model: PreTrainedModel, blocks: Tensor, batch_size: int = 8) -> Tensor:
    """(d,) float32 mean last hidden state over all tokens of ``blocks``: the trivial predictor."""
    total = sum(last_hidden(model, batch).double().sum(dim=(0, 1)) for batch in blocks.split(batch_size))
    return (total / blocks.numel()).float()


@torch.no_grad()
def reference(model: PreTrainedModel, blocks: Tensor, mean: Tensor, batch_size: int = 8) -> Reference:
    """The full model's states and logits on ``blocks`` (N, T); ``mean`` is from :func:`mean_state`."""
    if blocks.shape[1] < 2:
        raise InputError(f"blocks of {blocks.shape[1]} token: give at least 2, the next token is predicted")
    hidden = torch.cat([last_hidden(model, batch) for batch in blocks.split(batch_size)])
    probabilities = torch.cat([logits_of(model, state[None]).float().softmax(-1) for state in hidden])
    # subnormal numbers weigh nothing in a sum and slow it tenfold
    probabilities[probabilities < torch.finfo(torch.float32).tiny] = 0
    return Reference(
        blocks=blocks.to(model.device),
        hidden=hidden,
        probabilities=probabilities,
        negative_entropy=-torch.stack([torch.special.entr(row).sum(-1) for row in probabilities]),
        top1=probabilities.argmax(-1),
        mean_state=mean,
    )


@torch.no_grad()
def compare(model: PreTrainedModel, full: Reference, batch_size: int = 8) -> dict[str, np.ndarray]:
    """Fidelity of ``model`` to the full one: name -> (N,) float64, one value a block.

    With h, h' the last hidden states after the final norm and p, p' the next-token distributions:

    - ``cosine`` = mean over tokens of cos(h, h'); ``cosine_centred`` the same with ``mean_state``
      subtracted from both (hidden states share a large mean, which any model reproduces);
    - ``mse`` = mean over tokens and units of (h - h')^2;
    - ``kl_nats`` = mean over tokens of KL(p || p'), nats;
    - ``top1_agreement`` = share of tokens where both models put the same token first, in [0, 1];
    - ``nll_nats`` = mean of -log p'(next token), nats/token over T - 1 tokens: its exponential is the
      perplexity.
    """
    rows = []
    for start in range(0, len(full.blocks), batch_size):
        batch = full.blocks[start : start + batch_size]
        for offset, state in enumerate(last_hidden(model, batch)):
            rows.append(_compare_block(full, start + offset, state, logits_of(model, state[None])[0]))
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


@torch.no_grad()
def compare_constant(model: PreTrainedModel, full: Reference) -> dict[str, np.ndarray]:
    """Fidelity of the trivial predictor: every hidden state is ``mean_state``, whatever the text."""
    state = full.mean_state.to(full.hidden.dtype).expand_as(full.hidden[0])  # (T, d)
    logits = logits_of(model, state[None])[0]
    rows = [_compare_block(full, index, state, logits) for index in range(len(full.blocks))]
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


def _compare_block(full: Reference, index: int, state: Tensor, logits: Tensor) -> dict[str, float]:
    """All metrics of one block, from states (T, d) and logits (T, V)."""
    h, other, mean = full.hidden[index].float(), state.float(), full.mean_state.to(state.dtype).float()
    labels = full.blocks[index, 1:]
    kl, agree, nll = [], [], []
    for low in range(0, len(h), 64):  # a few rows at a time stay in the processor's cache
        part = slice(low, low + 64)
        log_q = functional.log_softmax(logits[part].float(), dim=-1)  # (<=64, V)
        cross = torch.einsum("tv,tv->t", full.probabilities[index, part], log_q)  # sum of p log p'
        kl.append((full.negative_entropy[index, part] - cross).clamp(min=0))  # rounding
        agree.append(log_q.argmax(-1) == full.top1[index, part])
        next_tokens = labels[part]
        known = len(next_tokens)  # the last token of a block has no next one
        nll.append(-log_q[:known].gather(1, next_tokens[:, None])[:, 0])
    return {
        "cosine": _mean(functional.cosine_similarity(h, other, dim=-1)),
        "cosine_centred": _mean(functional.cosine_similarity(h - mean, other - mean, dim=-1)),
        "mse": _mean((h - other).square()),
        "kl_nats": _mean(torch.cat(kl)),
        "top1_agreement": _mean(torch.cat(agree)),
        "nll_nats": _mean(torch.cat(nll)),
    }


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def summarize(values: dict[str, np.ndarray], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """Means over blocks with 95% bootstrap intervals (``_lo``, ``_hi``); adds ``ppl`` = exp(mean NLL)."""
    row = {}
    for name, column in values.items():
        low, high = bootstrap_interval(column, seed, draws)
        row |= {name: float(column.mean()), f"{name}_lo": low, f"{name}_hi": high}
    for suffix in ("", "_lo", "_hi"):
        row[f"ppl{suffix}"] = math.exp(row[f"nll_nats{suffix}"])
    return row


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of ``values``."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def control_p_value(value: float, controls: Sequence[float], higher_is_better: bool) -> float:
    """P that a random selection does at least as well: (1 + #controls as good or better) / (1 + #controls).

    Example:
        >>> control_p_value(0.5, [0.1, 0.2, 0.6], higher_is_better=True)
        0.5
    """
    controls = np.asarray(controls, dtype=float)
    as_good = controls >= value if higher_is_better else controls <= value
    return float((1 + as_good.sum()) / (1 + len(controls)))
