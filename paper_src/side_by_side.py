"""The full and the compact model side by side, layer after layer over a text: what each refit needs, and its error."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paper_src import NotSupported
from paper_src.layers import LayerRunner
from paper_src.least_squares import NormalEquations
from paper_src.models import in_by_out
from paper_src.support.checkpoints import tensor_in_file

TOLERANCE = 0.02  # of what comes out of a layer for what is added in it; bfloat16 alone gives 0.005
HELD_OUT = 8  # of so many batches one is held out, to choose the ridge by


class Features(Protocol):
    """What of a module is seen, given it, its input and its output: see :class:`recovery.Form`."""

    def __call__(self, module: nn.Module, into: Tensor, out: Tensor) -> Tensor: ...


@dataclass
class Writer:
    """A linear map of a layer whose output is added to the layer's state, so that the state can be changed by it."""

    module: nn.Module
    factor: float = 1.0  # its output is multiplied by this first
    norm: nn.Module | None = None  # or its output z is added as g * z / rms(z)


@contextmanager
def _watched(module: nn.Module, features: Features, norm: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the features of the latest call of ``module``, and the input of the norm behind it."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        seen["x"] = features(module, inputs[0], output[0] if isinstance(output, tuple | list) else output)

    # a hook's handle is a context
    behind = norm.register_forward_hook(lambda _, inputs, out: seen.update(z=inputs[0])) if norm else nullcontext()
    with module.register_forward_hook(look), behind:
        yield seen


class SideBySide:
    """Both models side by side, layer after layer over all blocks; states (N, T, width) lie in files."""

    def __init__(self, models: tuple[PreTrainedModel, ...], blocks: Tensor, batch_size: int, folder: Path):
        self.teacher, self.student = map(LayerRunner, models)
        if self.teacher.hands_on:
            raise NotSupported(
                f"layers of {type(models[0]).__name__} hand on more than their states: no closed form for them"
            )
        self.blocks, self.folder = blocks, folder
        self.parts = [slice(low, low + batch_size) for low in range(0, len(blocks), batch_size)]
        self.reached = 0
        self.states: dict[str, Tensor] = {}
        for part in self.parts:
            states = self.teacher.embedded(self.blocks[part])
            if states.ndim != 3 or states.shape[:2] != self.blocks[part].shape:
                raise NotSupported(f"states of {type(models[0]).__name__} are not (N, T, d): no closed form for it")
            for name in ("full", "small"):
                self._put(name, part, states)

    def advance_full(self, stop: int) -> None:
        """Move the full model to before its layer ``stop``: the target of the compact one's next layer."""
        for part in self.parts:
            self._put("full", part, self.teacher.run(self.blocks[part], self._get("full", part), self.reached, stop))
        self.reached = stop

    def advance_small(self, position: int, behind: Tensor | None = None) -> None:
        """Move the compact model over its layer ``position`` as it now is, and a matrix ``behind`` it."""
        for part in self.parts:
            own = self._run(part, position)
            self._put("small", part, own if behind is None else own + (own.float() @ behind).to(own.dtype))

    def sums(self, position: int, watched: nn.Module, features: Features, writer: Writer) -> list[NormalEquations]:
        """The normal equations of the batches to fit on and of those held out, for features of the module ``watched``.

        With a norm behind the writer, what it multiplies a token by is taken as given, and what a channel is
        multiplied by as well, but for channels that it all but switches off.
        """
        sums: list[NormalEquations] = []
        norm = writer.norm
        gain = writer.factor if norm is None else _gain(norm, self.blocks.device)
        for number, part in enumerate(self.parts):
            with _watched(watched, features, norm) as seen:
                own, target = self._run(part, position), self._get("full", part)
            x = seen["x"].reshape(*own.shape[:2], -1)  # some families flatten them
            x, y, t = (states.flatten(0, 1).float() for states in (x, target.float() - own, target))
            if norm is not None:
                x = x * _factors(norm, seen["z"]).reshape(-1, 1)
            if not sums:
                sums = [NormalEquations.empty(x.shape[1], y.shape[1], x.device, gain) for _ in range(2)]
            sums[number % HELD_OUT == 1].add(x, y / gain, 1 / t.square().sum(-1))
        return sums

    def error(self, position: int) -> float:
        """E |t - h|^2 / |t|^2 per held-out token, of the states h that the layer at ``position`` gives."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.blocks.device)
        for number, part in enumerate(self.parts):
            if number % HELD_OUT == 1:
                t, own = self._get("full", part).float(), self._run(part, position).float()
                errors = (t - own).square().sum(-1) / t.square().sum(-1)
                sums += torch.stack([errors.double().sum(), torch.tensor(float(errors.numel())).to(sums)])
        return float(sums[0] / sums[1])

    def writer(self, position: int, layer: nn.Module) -> Writer:
        """The last linear map of ``layer`` whose output is added to its state: in most families the MLP's last one.

        That it is, is tried: what is added to its output must come out of the layer, times a constant or through an
        RMS norm.

        Raises:
            NotSupported: there is none.
        """
        plain = self._run(self.parts[0], position).float()  # (B, T, d)
        noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain.device)
        change = noise * plain.square().mean(-1, keepdim=True).sqrt()
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]
        for linear in reversed([each for each in linears if in_by_out(each).shape[1] == plain.shape[-1]]):
            out = self._changed(position, linear, change)
            if out is None:
                continue
            moved = out.float() - plain
            factor = float((moved * change).sum() / change.square().sum())
            if abs(factor) > 1e-3 and (moved - factor * change).norm() <= TOLERANCE * moved.norm():
                return Writer(linear, 1.0 if abs(factor - 1) < TOLERANCE else factor)
            if (norm := self._norm_behind(position, layer, linear)) is not None:
                return Writer(linear, norm=norm)
        raise NotSupported(f"no linear map of layer {position} has its output added to the layer's state (experts? a "
                           "norm over the sum?): distil without the closed form, or use form='linear'")  # fmt: skip

    def _changed(self, position: int, linear: nn.Module, change: Tensor) -> Tensor | None:
        """The layer's state with ``change`` added to the output of ``linear``; None if it sees not each token once."""
        calls = []

        def add(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            calls.append(out.numel() == change.numel())
            return out + change.reshape(out.shape).to(out.dtype) if calls[-1] else None

        with linear.register_forward_hook(add):
            out = self._run(self.parts[0], position)
        return out if calls == [True] else None

    def _norm_behind(self, position: int, layer: nn.Module, linear: nn.Module) -> nn.Module | None:
        """The part of ``layer`` that takes the output of ``linear`` and gives g * z / rms(z); None if there is none."""
        made, found = [], []
        with ExitStack() as hooks:
            hooks.enter_context(linear.register_forward_hook(lambda module, inputs, out: made.append(out)))
            for part in layer.children():
                look = lambda module, inputs, out: found.append((module, inputs[0], out)) if inputs else None  # noqa: E731
                hooks.enter_context(part.register_forward_hook(look))
            self._run(self.parts[0], position)
        for module, into, out in found:
            if into is made[-1] and not torch.equal(into, out):  # dropout, switched off, is no norm
                try:
                    gain = module(torch.ones_like(into[:1, :1])).float()
                except (TypeError, RuntimeError):  # it takes more than the writer's output
                    return None
                expected = into.float() * _factors(module, into)[..., None] * gain
                return module if (out.float() - expected).norm() <= 0.05 * out.float().norm() else None
        return None

    def _run(self, part: slice, position: int) -> Tensor:
        return self.student.run(self.blocks[part], self._get("small", part).clone(), position, position + 1)

    def _get(self, name: str, part: slice) -> Tensor:
        return self.states[name][part].to(self.blocks.device)

    def _put(self, name: str, part: slice, states: Tensor) -> None:
        if name not in self.states:
            shape = (len(self.blocks), *states.shape[1:])
            self.states[name] = tensor_in_file(self.folder / name, shape, states.dtype)
        self.states[name][part] = states.cpu()


def _factors(norm: nn.Module, z: Tensor) -> Tensor:
    """(B, T) 1 / rms of ``z`` (B, T, d), as the norm takes it."""
    epsilon = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 0.0)
    return (z.float().square().mean(-1) + epsilon).rsqrt()


def _gain(norm: nn.Module, device: torch.device) -> Tensor:
    """(d,) what each channel is multiplied by, kept away from zero, by which it is divided."""
    weight = next(norm.parameters())
    gain = norm(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=device)).flatten().float()
    least = 0.1 * gain.abs().median()
    return torch.where(gain.abs() < least, least.copysign(gain), gain)
