"""What the model is worth with any subset of its layers, and what each layer is worth by that.

``Evaluator`` is a function: kept layers -> metric on a fixed batch of text. Leave-one-out and Shapley values stand on
it, and so do the searches of :mod:`paper_src.selection`.
"""

import math
import time
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import NamedTuple, Protocol

import numpy as np
import torch
from captum.attr import ShapleyValueSampling
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, fidelity
from paper_src.layers import SubsetRunner
from paper_src.selection import KeptLayers
from paper_src.support.processes import ALONE, Processes

SHIFTS = 3  # cyclic shifts of a permutation in one group of Shapley values
HIGHER_IS_BETTER = ("cosine", "cosine_centred", "top1_agreement")


class Evaluation(NamedTuple):
    """Metrics of one subset, the layers that were run to compute them, and the seconds it took."""

    values: tuple[float, ...]
    layer_runs: int
    seconds: float


class Store(Protocol):
    """Keeps the evaluations that are known by a text and metrics, as :class:`paper_src.scale.store.Store` does."""

    def view(self, tensors: Iterable[Tensor], *words: object) -> MutableMapping[KeptLayers, Evaluation]: ...


@dataclass
class Cost:
    """What was asked of evaluators, each subset counted once, whether it was computed now or before."""

    evaluations: int = 0  # different subsets
    forward_tokens: int = 0  # tokens that the full model's layers could have processed instead
    seconds: float = 0.0  # that computing them took, now or when they were kept on disk


class Evaluator:
    """``evaluator(kept)`` is a metric of ``model`` compacted to the layers ``kept``; ``model`` is not changed.

    Subsets that are asked for together share the work of their common first layers, and each is evaluated once.

    Args:
        blocks: (N, T) token ids; they go through a layer as one batch.
        metrics: names of :func:`fidelity.compare_states`; the first is the one that searches ask for.
        mean: (d,) mean state, for ``cosine_centred``: see :func:`fidelity.mean_state`.
        scored: only the last ``scored`` tokens of each block enter the metrics; those before are context.
        memory_bytes: bound on the held states.
        store: keeps the evaluations on disk.

    Raises:
        InputError: unknown metric, or a metric that is NaN or Inf.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Tensor, metrics: Sequence[str] = ("nll_nats",),
        mean: Tensor | None = None, scored: int | None = None, memory_bytes: int = 2**28, store: Store | None = None,
    ):  # fmt: skip
        self.metrics = tuple(metrics)
        self._runner = SubsetRunner(model, blocks, memory_bytes)
        self.depth = self._runner.depth
        self.tokens = blocks.numel()
        self._model = model
        self._full = fidelity.reference(model, blocks, mean, len(blocks), metrics, scored)
        self._known: MutableMapping[KeptLayers, Evaluation] = {}
        if store:
            self._known = store.view([blocks, self._full.mean_state], metrics, scored)
        self._asked: set[KeptLayers] = set()

    def __call__(self, kept: Sequence[int]) -> float:
        """First metric of the kept layers (increasing indices; none is allowed): mean over the batch."""
        return float(self.evaluate([kept])[0, 0])

    def losses(self, subsets: Iterable[Sequence[int]]) -> list[float]:
        """First metric of every subset, its sign turned where higher is better: the lower, the better."""
        sign = -1 if self.metrics[0] in HIGHER_IS_BETTER else 1
        return (sign * self.evaluate(subsets)[:, 0]).tolist()

    def evaluate(self, subsets: Iterable[Sequence[int]]) -> np.ndarray:
        """(n, M) all M metrics of n subsets."""
        subsets = [self._runner.checked(kept) for kept in subsets]
        self._asked.update(subsets)
        for batch in self._runner.batches(kept for kept in subsets if kept not in self._known):
            self._evaluate(batch)
        return np.array([self._known[kept].values for kept in subsets]).reshape(len(subsets), len(self.metrics))

    @contextmanager
    def counting(self, cost: Cost) -> Iterator[None]:
        """Add to ``cost`` what is asked of this evaluator inside the ``with``, when that ends."""
        outer, self._asked = self._asked, set()
        try:
            yield
        finally:
            known = [self._known[kept] for kept in self._asked if kept in self._known]
            cost.evaluations += len(known)
            cost.forward_tokens += round(sum(each.layer_runs for each in known) * self.tokens / self.depth)
            cost.seconds += sum(each.seconds for each in known)
            self._asked |= outer  # one count inside another: each subset is in both, once

    def _evaluate(self, subsets: Sequence[KeptLayers]) -> None:
        """Evaluate subsets that are in lexicographic order."""
        start = time.perf_counter()
        scored = self._full.blocks.shape[1]
        hidden = self._runner.last_hidden(subsets)[:, :, -scored:]  # (S, N, T, d)
        measured = fidelity.compare_states(self._model, self._full, hidden.flatten(0, 1), self.metrics)
        means = np.stack([measured[name].reshape(len(subsets), -1).mean(axis=1) for name in self.metrics], axis=1)
        seconds = (time.perf_counter() - start) / len(subsets)
        for before, kept, values in zip([(), *subsets[:-1]], subsets, means.tolist(), strict=True):
            for name, value in zip(self.metrics, values, strict=True):
                if not math.isfinite(value):
                    raise InputError(f"{name} of kept layers {kept} is {value}: check the weights of these layers")
            pairs = zip(before, kept, strict=False)
            shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(before))
            self._known[kept] = Evaluation(tuple(values), len(kept) - shared, seconds)


@contextmanager
def cost_of(evaluators: Iterable[Evaluator]) -> Iterator[Cost]:
    """What is asked of evaluators inside the ``with``; the numbers are there when it ends."""
    cost = Cost()
    with ExitStack() as stack:
        for evaluator in evaluators:
            stack.enter_context(evaluator.counting(cost))
        yield cost


def on_each(
    model: PreTrainedModel, batches: Iterable[Tensor], cost: Cost | None = None, **settings
) -> Iterator[Evaluator]:
    """An :class:`Evaluator` for each batch of token ids (N, T), one at a time; what they cost is added to ``cost``."""
    cost = Cost() if cost is None else cost
    for blocks in batches:
        evaluator = Evaluator(model, blocks, **settings)
        with evaluator.counting(cost):  # ends also when no further one is asked for
            yield evaluator


def leave_one_out(evaluators: Iterable[Evaluator]) -> np.ndarray:
    """(G, L) first metric of the model without each layer minus that of the full model, for G evaluators."""
    rows = []
    for evaluator in evaluators:
        layers = range(evaluator.depth)
        values = evaluator.evaluate([layers, *combinations(layers, len(layers) - 1)])[:, 0]
        rows.append(values[:0:-1] - values[0])  # the first of the combinations lacks the last layer
    return np.stack(rows)


Group = tuple[np.ndarray, np.ndarray, np.ndarray]  # see _shapley_group


@dataclass
class ShapleyValues:
    """Shapley values of L layers for M metrics, from G groups of permutations."""

    groups: np.ndarray  # (G, L, M) one unbiased estimate a group
    gap: np.ndarray  # (M,) largest difference, over groups, between the sum of the values and v(all) - v(none)
    coalitions: np.ndarray  # (n, 1 + M) number of layers and metrics of every subset that was evaluated

    @property
    def mean(self) -> np.ndarray:
        """(L, M) Shapley values."""
        return self.groups.mean(axis=0)

    @property
    def standard_error(self) -> np.ndarray:
        """(L, M) standard error over groups."""
        return self.groups.std(axis=0, ddof=1) / math.sqrt(len(self.groups))

    def relative_error(self) -> float:
        """Largest standard error over the layers as a share of the largest value, first metric."""
        return float(self.standard_error[:, 0].max() / np.abs(self.mean[:, 0]).max())

    def half_split_tau(self) -> float:
        """Kendall's tau between the rankings from even and odd groups, first metric."""
        return float(kendalltau(*(self.groups[start::2, :, 0].mean(axis=0) for start in (0, 1))).statistic)


def shapley(
    evaluators: Iterable[Evaluator], target: float = 0.05, seed: int = 0, least: int = 4, processes: Processes = ALONE,
    halves: float = 0.0,
) -> ShapleyValues:  # fmt: skip
    """Shapley values of the layers in the game v(S) = -metric(S), by sampled permutations.

    Each evaluator gives one group: a random permutation, cyclic shifts of it that spread every layer evenly over the
    positions, and the reverse of each (antithetic pairs). Captum's ``ShapleyValueSampling`` walks them (Castro et al.
    2009). Evaluators with different texts put the spread over texts into the standard error.

    Args:
        evaluators: one a group, all of one depth and one list of metrics.
        target: stop once the largest standard error is below this share of the largest value, after ``least`` groups.
        processes: who shares the groups; each gives its own evaluators, and all get the values of one process.
        halves: do not stop before :meth:`ShapleyValues.half_split_tau` is at least this; 0 asks for nothing.

    Raises:
        InputError: fewer than two evaluators, or values that do not sum to v(all) - v(none).
    """
    groups: list[Group] = []
    evaluators = (each for each in evaluators) if not hasattr(evaluators, "close") else evaluators
    with closing(evaluators):  # the last one's cost is added then
        for group in _shapley_groups(evaluators, Random(seed), processes):
            groups.append(group)
            values, gaps, coalitions = zip(*groups, strict=True)
            result = ShapleyValues(np.stack(values), np.max(gaps, axis=0), np.concatenate(coalitions))
            enough = len(groups) >= max(least, 2) and result.relative_error() < target
            if enough and (not halves or result.half_split_tau() >= halves):
                break
    if len(groups) < 2:
        raise InputError("Shapley values from fewer than 2 groups have no standard error: give more evaluators")
    return result


def _shapley_groups(evaluators: Iterable[Evaluator], generator: Random, processes: Processes) -> Iterator[Group]:
    """Groups in the order of their permutations, whichever process worked one out."""
    evaluators = iter(evaluators)
    while True:
        own = None
        if (evaluator := next(evaluators, None)) is not None:
            depth = evaluator.depth
            orders = [generator.sample(range(depth), depth) for _ in range(processes.world)]
            own = _shapley_group(evaluator, orders[processes.rank])
        found = [group for group in processes.gathered(own) if group is not None]
        if not found:
            return
        yield from found


def _shapley_group(evaluator: Evaluator, order: list[int]) -> Group:
    """(L, M) values of one group, (M,) their gap to v(all) - v(none), (n, 1 + M) the subsets' sizes and metrics."""
    depth = evaluator.depth
    shifted = [order[start:] + order[:start] for start in (round(i * depth / SHIFTS) for i in range(SHIFTS))]
    permutations = [walk for one in shifted for walk in (one, one[::-1])]
    walked = sorted({tuple(sorted(walk[:n])) for walk in permutations for n in range(depth + 1)})
    metrics = evaluator.evaluate(walked)  # all at once shares most work; Captum then finds them known

    def value(masks: Tensor) -> Tensor:  # (n, L) 0 or 1 -> (n, M)
        return torch.from_numpy(-evaluator.evaluate([mask.nonzero()[:, 0].tolist() for mask in masks]))

    sampling = ShapleyValueSampling(value)
    sampling.permutation_generator = lambda features, samples: iter(permutations)
    everything = torch.ones(1, depth, dtype=torch.float64)
    found = sampling.attribute(everything, n_samples=len(permutations), perturbations_per_eval=depth)  # (1, M, L)
    values = found[0].numpy().T
    whole = value(torch.stack([everything[0], 0 * everything[0]])).numpy()
    gap = np.abs(values.sum(axis=0) - (whole[0] - whole[1]))
    if (gap > 1e-4 * np.abs(metrics).max(axis=0)).any():
        raise InputError(f"Shapley values miss v(all) - v(none) by {gap.max():.2g}: the sampling is broken")
    return values, gap, np.column_stack([[len(kept) for kept in walked], metrics])
