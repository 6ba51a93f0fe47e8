"""Importance scores of every layer: ``SCORES`` names them all, and says which pass over calibration text gives each.

A new score is its function and its entry: notebook 01 runs every ``measure`` once, and tables, figures and selections
loop over the entries. With g the gradient of one sequence's loss (mean next-token NLL, nats/token) for a layer's
parameters theta, and h its output, the one pass of :func:`score_layers` gives

- ``fisher`` = E ||g||^2, the trace of the Fisher matrix; ``fisher_per_parameter`` divides by the layer's parameter
  count; ``grad_norm`` = E ||g||; ``taylor`` = E |theta . g|, the first-order change of the loss for theta = 0;
- ``activation_variance``, ``activation_mean_abs``, ``activation_kurtosis`` (E (h - mean)^4 / variance^2) over a
  sequence's tokens and units; ``..._no_sink`` without attention-sink tokens;
- ``block_influence`` = 1 - E cos(input, h) over tokens, the last layer's h before the final norm.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported, coalitions
from paper_src.coalitions import Cost, Store
from paper_src.layers import LayerRunner
from paper_src.models import decoder_layers, last_hidden, logits_of, offloaded
from paper_src.sums import ActivationSums, GradientSums, ParameterSums, frozen, watched
from paper_src.support.weights import first_line

TRIED = 16  # tokens of two sequences on which the sums over a batch are compared with autograd's


@dataclass
class LayerScores:
    """Scores of L layers; ``angular[l, m]`` = E arccos(cos) / pi of the last token's states before layers l and m."""

    per_sequence: dict[str, Tensor]  # name -> (N, L) float64, a row a sequence or a group of them
    angular: Tensor  # (L+1, L+1) float64 in [0, 1]; m = L: before the final norm
    parameters: Tensor  # (L,) int64

    def rows(self, name: str) -> int:
        """N of a score; of a combined score, that of its parts."""
        return len(self.per_sequence[name if name in self.per_sequence else SCORES[name].made_of[0]])

    def mean(self, name: str, rows: Sequence[int] | slice = slice(None)) -> Tensor:
        """(L,) score: mean over the rows, all or those given; a combined score is made of such means."""
        if name not in self.per_sequence:
            entry = SCORES[name]
            return entry.measure({part: self.mean(part, rows) for part in entry.made_of})
        return self.per_sequence[name][rows].mean(dim=0)

    def standard_error(self, name: str) -> Tensor:
        """(L,) standard error of :meth:`mean`; NaN for a single row."""
        values = self.per_sequence[name]
        return values.std(dim=0) / math.sqrt(len(values))

    def half_split_tau(self, name: str) -> float:
        """Kendall's tau between the rankings from even and odd rows: 1 means converged."""
        return float(kendalltau(*(self.mean(name, slice(start, None, 2)) for start in (0, 1))).statistic)


def score_layers(
    model: PreTrainedModel, blocks: Tensor, batch_size: int = 8, labels: str = "text", seed: int = 0,
    progress: Callable = iter,
) -> LayerScores:  # fmt: skip
    """The scores above from one forward and backward pass over ``blocks``.

    Args:
        model: a causal model; its parameters and their ``requires_grad`` are as before on return.
        blocks: (N, T) int64 token ids, T >= 2.
        batch_size: sequences a step. Where layers mix sequences (experts) or share weights, each goes alone: two short
            sequences are tried first, and their sums compared with autograd's.
        labels: ``text``: g is of the text's own next tokens (empirical Fisher). ``model``: of next tokens drawn, by
            ``seed``, from the model's distribution (true Fisher).
        progress: wraps the iterable of batches.

    Raises:
        InputError: blocks too short, unknown labels, weights in float16, non-finite scores, or layers that mix
            sequences in a model whose weights are not in memory.
    """
    _check(model, blocks, batch_size, labels)
    layers = decoder_layers(model)
    generator = torch.Generator(device=model.device).manual_seed(seed) if labels == "model" else None
    rows, states = [], []
    with frozen(model), torch.enable_grad():
        if offloaded(model):
            score = _score_layerwise
        elif _batched(model, layers, blocks[:2, :TRIED]):
            score = _score_batch
        else:
            score, batch_size = _score_alone, 1
        for batch in progress(blocks.split(batch_size)):
            row, ends = score(model, layers, batch, generator)
            rows.append(row)
            states.append(ends)
    per_sequence = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    parameters = torch.tensor([sum(p.numel() for p in layer.parameters()) for layer in layers])
    per_sequence["fisher_per_parameter"] = per_sequence["fisher"] / parameters
    _require_finite(per_sequence)
    unit = functional.normalize(torch.cat(states).double(), dim=-1)  # (N, L+1, d)
    return LayerScores(per_sequence, (unit @ unit.mT).clamp(-1, 1).arccos().mean(dim=0) / math.pi, parameters)


def _check(model: PreTrainedModel, blocks: Tensor, batch_size: int, labels: str) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: give at least 1")
    if blocks.ndim != 2 or blocks.shape[1] < 2 or not len(blocks):
        raise InputError(f"blocks have shape {tuple(blocks.shape)}: give (N, T) token ids with T >= 2")
    if model.dtype == torch.float16:
        raise InputError("float16 holds neither the squares of large activations nor small gradients: "
                         "load the model in bfloat16 or float32")  # fmt: skip
    if labels not in ("text", "model"):
        raise InputError(f"labels {labels!r}: use 'text' or 'model'")


def weight_taylor(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """(L,) float64 sum over a layer's weights of |W dL/dW|.

    L is the mean NLL of all ``blocks`` (N, T) together, so that gradients of different texts may cancel before the
    absolute value. (``taylor`` takes each layer as one group, and each sequence for itself.)
    """
    layers = decoder_layers(model)
    total = torch.zeros(len(layers), dtype=torch.float64)

    def add(index: int, parameter: Tensor) -> None:
        total[index] += (parameter.detach().float() * parameter.grad.float()).abs().sum(dtype=torch.float64).cpu()

    with frozen(model), torch.enable_grad(), ExitStack() as watches:
        for index, layer in enumerate(layers):
            for parameter in layer.parameters():
                watches.enter_context(watched(parameter, functools.partial(add, index)))
        hidden = last_hidden(model, blocks)
        hidden.backward(_loss_gradient(model, hidden.detach(), blocks.to(model.device), None) / len(blocks))
    _require_finite({"weight_taylor": total[None]})
    return total


def combined_score(scores: dict[str, Tensor]) -> Tensor:
    """(L,) in [0, 1]: the mean of the given scores (L,), each put on a log scale and min-max scaled.

    The earlier report does not say how it combined them. The log keeps one huge layer from flattening all others.

    Raises:
        InputError: a score that is not positive.
    """
    scaled = []
    for name, values in scores.items():
        if not (values > 0).all():
            raise InputError(f"score {name!r} has values <= 0: its logarithm does not exist, leave it out")
        logs = values.double().log()
        span = logs.max() - logs.min()
        scaled.append((logs - logs.min()) / span if span > 0 else torch.full_like(logs, 0.5))
    return torch.stack(scaled).mean(dim=0)


Scored = tuple[dict[str, Tensor], Tensor]


def _score_batch(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None
) -> Scored:
    """Scores (B, L) of one batch, and the last token's states (B, L+1, d) before each layer and at the end."""
    return _scored(model, layers, batch, generator, GradientSums(layers, *batch.shape))


def _score_alone(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None
) -> Scored:
    """:func:`_score_batch` of a single sequence, whatever the layers do with it."""
    return _scored(model, layers, batch, generator, ParameterSums(layers))


def _scored(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None,
    sums: GradientSums | ParameterSums,
) -> Scored:  # fmt: skip
    batch = batch.to(model.device)
    # a copy, for some families scale it in place
    root = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_().clone())
    with root, sums, ActivationSums(layers) as activations:
        hidden = last_hidden(model, batch)
        hidden.backward(_loss_gradient(model, hidden.detach(), batch, generator))
    return _row(sums.squared, sums.inner, activations)


def _batched(model: PreTrainedModel, layers: nn.ModuleList, blocks: Tensor) -> bool:
    """Whether the sums over a batch are those of whole gradients, one sequence at a time."""
    try:
        found, _ = _score_batch(model, layers, blocks, None)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # layers mix sequences, torch cannot map over one of their modules, ...: each its own type
        found = None
    try:
        alone = [_score_alone(model, layers, block[None], None)[0] for block in blocks]
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the family's code, each its own type
        raise NotSupported(f"{type(model).__name__} cannot be scored ({first_line(error)})") from error
    if found is None:
        return False
    squared, inner = (torch.cat([row[name] for row in alone]) for name in ("fisher", "taylor"))  # (B, L)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    weights = torch.tensor(
        [math.sqrt(sum(float(p.detach().float().square().sum()) for p in layer.parameters())) for layer in layers]
    )
    near = (found["taylor"] - inner).abs() <= tolerance * weights * squared.sqrt()  # terms cancel
    return torch.allclose(found["fisher"], squared, rtol=tolerance, atol=0) and bool(near.all())


def _score_layerwise(
    model: PreTrainedModel, layers: nn.ModuleList, batch: Tensor, generator: torch.Generator | None
) -> Scored:
    """:func:`_score_batch` with the weights of one layer in memory: states are held, each layer runs once more."""
    batch, runner = batch.to(model.device), LayerRunner(model)
    states, last = [], len(layers) - 1

    def hold(index: int, layer: Callable, hidden: Tensor) -> Tensor:
        output = layer(hidden)
        states.extend([hidden, output] if index == last else [hidden])
        return output

    with ActivationSums(layers) as activations:
        hidden = runner.drive(batch, hold)
    end = states.pop().requires_grad_()
    normed = runner.drive(batch, lambda index, layer, hidden: end if index == last else hidden, gradients=True)
    normed.backward(_loss_gradient(model, hidden, batch, generator))
    upstream = end.grad
    squared, inner = torch.zeros(2, len(batch), len(layers), dtype=torch.float64, device=batch.device)
    for index in reversed(range(len(layers))):
        with GradientSums(nn.ModuleList([layers[index]]), *batch.shape, device=batch.device) as sums:
            upstream = _through(runner, batch, index, states.pop(), upstream)
        squared[:, index], inner[:, index] = sums.squared[:, 0], sums.inner[:, 0]
    return _row(squared, inner, activations)


def _row(squared: Tensor, inner: Tensor, activations: "ActivationSums") -> tuple[dict[str, Tensor], Tensor]:
    """Scores (B, L) by name of ||g||^2, theta . g and the activations' sums; and the last token's states."""
    row = {"fisher": squared, "grad_norm": squared.sqrt(), "taylor": inner.abs()}
    row |= {name: torch.stack(columns, dim=1) for name, columns in activations.columns.items()}
    return {name: values.cpu() for name, values in row.items()}, torch.stack(activations.ends, dim=1)


def _through(runner: LayerRunner, batch: Tensor, index: int, before: Tensor, upstream: Tensor) -> Tensor:
    """Gradient before layer ``index`` of states ``before`` (B, T, d), from that behind it."""
    leaf = before.requires_grad_()

    def job(other: int, layer: Callable, hidden: Tensor) -> Tensor:
        if other == index:
            with torch.enable_grad():
                layer(leaf).backward(upstream)
        return hidden

    runner.drive(batch, job)
    return leaf.grad


def _loss_gradient(model: PreTrainedModel, hidden: Tensor, batch: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, T, d) gradient of every sequence's mean NLL for its last hidden states.

    One sequence at a time, so that no more than one (T, V) matrix of logits is alive.
    """
    gradient = torch.empty_like(hidden)
    for index in range(len(batch)):
        leaf = hidden[index : index + 1].requires_grad_()  # (1, T, d)
        logits = logits_of(model, leaf)[0, :-1].float()  # (T-1, V)
        labels = batch[index, 1:]
        if generator is not None:
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = functional.cross_entropy(logits, labels)
        gradient[index] = torch.autograd.grad(loss, leaf)[0][0]
    return gradient


def _require_finite(per_sequence: dict[str, Tensor]) -> None:
    for name, values in per_sequence.items():
        if not torch.isfinite(values).all():
            row, layer = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise InputError(f"score {name!r} of layer {layer} is not finite, sequence {row}: check the weights")


@dataclass
class Calibration:
    """What a score may be measured on, and with which budget; no measure changes the model."""

    model: PreTrainedModel
    blocks: Tensor  # (N, T) token ids for scores that need gradients or activations
    windows: Tensor  # (M, T') token ids for those that leave layers out
    batch_size: int = 8  # blocks a step
    true_sequences: int = 24  # blocks for the true Fisher
    taylor_sequences: int = 10  # blocks whose gradient is summed for the Taylor score by weight
    loo_windows: int = 12  # windows for leave-one-out, two a group
    shared: int = 1  # windows on which one group of permutations for Shapley values is walked
    scored: int | None = None  # tokens at the end of a window that enter the Shapley values' loss
    target: float = 0.05  # standard error, as a share of the largest value, at which Shapley sampling stops
    halves: float = 0.0  # and Kendall's tau between the rankings from the halves of its groups is this; 0: any
    seed: int = 0  # of drawn labels and permutations
    progress: Callable[[Iterable, str], Iterable] = lambda items, what: items
    store: Store | None = None  # keeps evaluations on disk

    @functools.cached_property
    def one_pass(self) -> LayerScores:
        """The scores of the one pass, with the angular distances and the layers' sizes."""
        bar = functools.partial(self.progress, what="scores")
        return score_layers(self.model, self.blocks, self.batch_size, progress=bar)

    @functools.cached_property
    def shapley(self) -> tuple[coalitions.ShapleyValues, Cost]:
        """Shapley values with each token's loss capped at log V and without; a group for each ``shared`` windows."""
        cost = Cost()
        groups = self.progress(self.windows.split(self.shared), "Shapley")
        metrics = ["nll_capped_nats", "nll_nats"]
        evaluators = coalitions.on_each(self.model, groups, cost, metrics=metrics, scored=self.scored, store=self.store)
        return coalitions.shapley(evaluators, self.target, seed=self.seed, halves=self.halves), cost


Measured = tuple[dict[str, Tensor], Cost]  # name -> (N, L) float64; seconds of 0 are for the caller to measure


def _passed(blocks: Tensor, count: int = 1) -> Cost:
    return Cost(count, 3 * blocks.numel())  # a backward pass costs two forward passes


def one_pass(calibration: Calibration) -> Measured:
    """All scores of :func:`score_layers`."""
    return calibration.one_pass.per_sequence, _passed(calibration.blocks)


def fisher_true(calibration: Calibration) -> Measured:
    """Fisher information with labels drawn from the model."""
    blocks = calibration.blocks[: calibration.true_sequences]
    bar = functools.partial(calibration.progress, what="true Fisher")
    found = score_layers(calibration.model, blocks, calibration.batch_size, "model", calibration.seed, bar)
    return {"fisher_true": found.per_sequence["fisher"]}, _passed(blocks)


def taylor_by_weight(calibration: Calibration) -> Measured:
    """:func:`weight_taylor` of up to four batches, which give it a standard error."""
    size = min(calibration.taylor_sequences, len(calibration.blocks))
    blocks = calibration.blocks[: size * min(4, len(calibration.blocks) // size)]
    batches = blocks.split(size)
    rows = [weight_taylor(calibration.model, batch) for batch in calibration.progress(batches, "Taylor")]
    return {"weight_taylor": torch.stack(rows)}, _passed(blocks, len(batches))


def leave_one_out(calibration: Calibration) -> Measured:
    """What the model loses without each layer, nats/token."""
    cost = Cost()
    groups = calibration.progress(calibration.windows[: calibration.loo_windows].split(2), "leave-one-out")
    evaluators = coalitions.on_each(calibration.model, groups, cost, store=calibration.store)
    return {"leave_one_out": torch.tensor(coalitions.leave_one_out(evaluators), dtype=torch.float64)}, cost


def shapley(calibration: Calibration) -> Measured:
    """How much a layer lowers the capped loss on average, as layers are added in random order, nats/token."""
    values, cost = calibration.shapley
    return {"shapley": torch.tensor(values.groups[:, :, 0], dtype=torch.float64)}, cost


@dataclass(frozen=True)
class Score:
    """One way to say how much a layer matters."""

    title: str  # in figures
    kind: str  # gradient, activation, removal (layers are left out for real) or combined
    source: str
    measure: Callable  # Calibration -> Measured; of a combined score: the mean scores made_of names -> (L,)
    made_of: tuple[str, ...] = ()


REPORT = "the earlier report"
NO_SINK = "ours: without attention sinks (Xiao et al. 2024, arXiv:2309.17453)"
SHORTENED_LLAMA = "Kim et al. 2024, arXiv:2402.02834"
FISHER = "Kunstner et al. 2019, arXiv:1905.12558"
SCORES = {
    "fisher": Score("Fisher (empirical)", "gradient", FISHER, one_pass),
    "fisher_true": Score("Fisher (true)", "gradient", FISHER, fisher_true),
    "fisher_per_parameter": Score("Fisher / parameter", "gradient", "ours", one_pass),
    "grad_norm": Score("gradient norm", "gradient", REPORT, one_pass),
    "taylor": Score("Taylor", "gradient", "Molchanov et al. 2019, arXiv:1906.10771; a layer is one group", one_pass),
    "weight_taylor": Score("Taylor, by weight", "gradient", f"{SHORTENED_LLAMA}, eq. 1", taylor_by_weight),
    "block_influence": Score("block influence", "activation", "Men et al. 2024, arXiv:2403.03853, eq. 1", one_pass),
    "activation_variance": Score("activation variance", "activation", REPORT, one_pass),
    "activation_variance_no_sink": Score("variance, no sinks", "activation", NO_SINK, one_pass),
    "activation_mean_abs": Score("mean |activation|", "activation", REPORT, one_pass),
    "activation_mean_abs_no_sink": Score("mean |act.|, no sinks", "activation", NO_SINK, one_pass),
    "activation_kurtosis": Score("kurtosis", "activation", REPORT, one_pass),
    "activation_kurtosis_no_sink": Score("kurtosis, no sinks", "activation", NO_SINK, one_pass),
    "leave_one_out": Score("leave-one-out", "removal", f"{SHORTENED_LLAMA}, section 3.1", leave_one_out),
    "shapley": Score("Shapley", "removal", "Castro et al. 2009, doi:10.1016/j.cor.2008.04.004; of layers: "
                     "Zhang et al. 2024, arXiv:2409.14381", shapley),
    "combined": Score(
        "combined", "combined", "ours: the earlier report gives no formula", combined_score,
        made_of=("fisher", "grad_norm", "activation_variance"),
    ),
}  # fmt: skip


def title(score: str) -> str:
    """A score's name in figures."""
    return SCORES[score].title if score in SCORES else score.replace("_", " ")


def pass_name(measure: Callable) -> str:
    """How t1_cost names a pass: by its score, or, where several scores come from it, by itself."""
    names = [name for name, score in SCORES.items() if score.measure is measure]
    return names[0] if len(names) == 1 else measure.__name__.replace("_", " ")


def passes(name: str) -> list[str]:
    """The passes that a score, or what else comes with the one pass, is read from, as t1_cost names them."""
    if name not in SCORES:
        return [pass_name(one_pass)]
    found = [part for other in SCORES[name].made_of for part in passes(other)] or [pass_name(SCORES[name].measure)]
    return list(dict.fromkeys(found))
