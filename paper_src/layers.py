"""Run a model's layers one by one, or any subset of them, by the model's own code.

Every layer is called with the masks and positions of its own place, whatever family the model is of.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported
from paper_src.models import StandIn, last_hidden, locate_layers, same_states

TRIED = 16  # tokens of two blocks on which all layers are compared with the model itself
STACKED_TOKENS = 4096  # tokens of different subsets that go through a layer at once
Layer = Callable[[Tensor], Tensor]


class LayerRunner:
    """Runs stretches of a model's L = ``depth`` layers on states that are known; the model is not changed."""

    def __init__(self, model: PreTrainedModel):
        path, layers = locate_layers(model)
        self.depth, self._switches = len(layers), [_Switch(layer) for layer in layers]
        self._model = with_module(model, path, nn.ModuleList(self._switches))
        # each switch sees what its layer returns
        self.drive(torch.zeros(1, 2, dtype=torch.long), lambda index, layer, hidden: layer(hidden))
        # layers that get, beside states, what the layer before computed from its states
        self.hands_on = any(new is old for before, after in pairwise(self._switches)
                            for old in before.given for new in after.taken)  # fmt: skip
        for switch in self._switches:
            switch.given = switch.taken = ()
            switch.records = False

    def drive(self, blocks: Tensor, job: Callable[[int, Layer, Tensor], Tensor], gradients: bool = False) -> Tensor:
        """Last hidden states of ``blocks`` (N, T) where each layer does ``job(index, layer, states)`` instead.

        With ``gradients`` autograd follows what is done to states that ask for it.
        """
        for index, switch in enumerate(self._switches):
            switch.job = functools.partial(job, index)
        with torch.set_grad_enabled(gradients):
            return last_hidden(self._model, blocks)

    def embedded(self, blocks: Tensor) -> Tensor:
        """(N, T, d) states before the first layer."""
        seen = {}
        self.drive(blocks, lambda index, layer, hidden: seen.setdefault(index, hidden))
        return seen[0]

    def run(self, blocks: Tensor, hidden: Tensor, start: int, stop: int) -> Tensor:
        """(N, T, d) states after the layers [start, stop) of ``hidden``, those of ``blocks`` (N, T) before them."""
        states = hidden

        def job(index: int, layer: Layer, passing: Tensor) -> Tensor:
            nonlocal states
            if start <= index < stop:
                states = layer(states)
            return passing

        self.drive(blocks, job)
        return states


class SubsetRunner:
    """Last hidden states of a model with any subsets of its L = ``depth`` layers, on a fixed batch of text (N, T).

    Subsets that begin with the same kept layers share the work up to there, and states that go through the same layer
    go through it together. The states are those of the compacted models. ``memory_bytes`` bounds what is held at a
    time, where one subset's states take N T d numbers.
    """

    def __init__(self, model: PreTrainedModel, blocks: Tensor, memory_bytes: int = 2**28):
        self._layers = LayerRunner(model)
        self.depth = self._layers.depth
        self._blocks = blocks.to(model.device)
        self._first = self._layers.embedded(self._blocks)  # (N, T, d)
        self._at_once = max(1, memory_bytes // self._first.nbytes)
        if self._layers.hands_on:
            raise NotSupported(f"layers of {type(model).__name__} hand on more than their states: subsets of them "
                               "cannot be evaluated")  # fmt: skip
        self._require_exact(model)

    def _require_exact(self, model: PreTrainedModel) -> None:
        """Raise where all layers, run here on two blocks together with another subset, miss the model's own states."""
        rest, self._blocks, self._first = (self._blocks, self._first), self._blocks[:2, :TRIED], self._first[:2, :TRIED]
        try:
            with torch.no_grad():
                expected = last_hidden(model, self._blocks)
            found = self.last_hidden([tuple(range(self.depth)), tuple(range(self.depth > 1, self.depth))])
            exact = same_states(model, found[0], expected)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of any type: states not (N, T, d), inputs of their own for each block
            exact = False
        self._blocks, self._first = rest
        if not exact:
            raise NotSupported(f"{type(model).__name__} does more than run its layers one after another on states "
                               "(N, T, d): subsets of its layers cannot be evaluated")  # fmt: skip

    def batches(self, subsets: Iterable[Sequence[int]]) -> Iterator[list[tuple[int, ...]]]:
        """The different subsets in the order that shares most work, as many at a time as the memory bound allows."""
        checked = sorted({self.checked(kept) for kept in subsets})
        for start in range(0, len(checked), self._at_once):
            yield checked[start : start + self._at_once]

    def checked(self, kept: Sequence[int]) -> tuple[int, ...]:
        """``kept`` as a tuple of layer indices; InputError if they do not increase, or are no layers."""
        kept = tuple(int(index) for index in kept)
        if any(a >= b for a, b in pairwise(kept)) or not set(kept) <= set(range(self.depth)):
            raise InputError(f"kept layers {kept}: give increasing indices in 0 to {self.depth - 1}")
        return kept

    def last_hidden(self, subsets: Sequence[tuple[int, ...]]) -> Tensor:
        """(S, N, T, d) states after the final norm with only the layers of each of S subsets; none is allowed."""
        held = {(): self._first}  # states after each prefix of kept layers that is still needed
        last_use = {kept: self.depth for kept in subsets}
        for kept in subsets:
            for n, layer in enumerate(kept):
                last_use[kept[:n]] = max(last_use.get(kept[:n], -1), layer)

        def job(index: int, layer: Layer, hidden: Tensor) -> Tensor:
            nodes = [prefix for prefix in held if (*prefix, index) in last_use]
            for start in range(0, len(nodes), step := max(1, STACKED_TOKENS // self._blocks.numel())):
                part = nodes[start : start + step]
                states = layer(torch.cat([held[prefix] for prefix in part]))
                held.update(zip([(*prefix, index) for prefix in part], states.chunk(len(part)), strict=True))
            for prefix in [prefix for prefix in held if last_use[prefix] <= index]:
                del held[prefix]
            return torch.cat([held[kept] for kept in subsets]) if index == self.depth - 1 else hidden

        # one block is enough to make masks and positions, which all blocks share
        return self._layers.drive(self._blocks[:1], job).unflatten(0, (len(subsets), -1))


def with_module(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy of ``module`` with the submodule at the dotted ``path`` replaced; everything else is shared."""
    name, _, rest = path.partition(".")
    part = copy.copy(module)
    inner = with_module(module.get_submodule(name), rest, new) if rest else new
    part._modules = {**module._modules, name: inner}
    return part


class _Switch(StandIn):
    """Answers what its ``job`` makes of the layer (a function of states) and of its input."""

    job: Callable[[Layer, Tensor], Tensor]

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.records = True  # what the layer returns and gets beside its states
        self.given: tuple[Tensor, ...] = ()
        self.taken: tuple[Tensor, ...] = ()
        self._rest: tuple | None = None  # what the layer returns beside its states, where it returns a tuple
        self._stacks = True  # it takes more sequences than its masks were made for

    def forward(self, *args, **kwargs) -> Tensor | tuple:
        if not args and "hidden_states" not in kwargs:
            raise NotSupported(f"{type(self.layer).__name__} takes no hidden states: its layers cannot be run alone")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.records:
            self.taken = tuple(value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor))

        def run(states: Tensor) -> object:
            return self.layer(states, *args[1:], **kwargs) if args else self.layer(hidden_states=states, **kwargs)

        def layer(states: Tensor) -> Tensor:
            if self._stacks:
                try:
                    return self._states(run(states))
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, IndexError):
                    self._stacks = False  # masks with an entry for each sequence
            return torch.cat([self._states(run(state[None])) for state in states])

        state = self.job(layer, hidden)
        return state if self._rest is None else (state, *self._rest)

    def _states(self, output: Tensor | tuple) -> Tensor:
        if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
            self._rest = tuple(output[1:])
            if self.records:
                self.given = tuple(value for value in self._rest if isinstance(value, Tensor))
            return output[0]
        if not isinstance(output, Tensor):
            raise NotSupported(f"{type(self.layer).__name__} returns no hidden states alone: it cannot be run alone")
        return output
