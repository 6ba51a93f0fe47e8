"""The full and the compact model side by side, layer after layer over a text: what each refit needs, and its error."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import NotSupported
from paper_src.layers import LayerRunner
from paper_src.least_squares import NormalEquations
from paper_src.models import mlp_writer
from paper_src.support.checkpoints import tensor_in_file
from paper_src.support.processes import Processes

HELD_OUT = 8  # of so many batches one is held out, to choose the ridge by


class Watch(Protocol):
    """What of a layer is seen: see :class:`recovery.Form`."""

    module: Callable[[nn.Module], nn.Module]
    features: Callable[[nn.Module, Tensor, Tensor], Tensor]


@contextmanager
def _watched(layer: nn.Module, form: Watch, norm: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """A dict that gets the features of the latest call of ``layer``, and the input of the norm behind its MLP."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        seen["x"] = form.features(module, inputs[0], output[0] if isinstance(output, tuple) else output)

    # a hook's handle is a context
    behind = norm.register_forward_hook(lambda _, inputs, out: seen.update(z=inputs[0])) if norm else nullcontext()
    with form.module(layer).register_forward_hook(look), behind:
        yield seen


class SideBySide:
    """Both models side by side, layer after layer over all blocks; states (N, T, width) lie in files."""

    def __init__(
        self, models: tuple[PreTrainedModel, ...], blocks: Tensor, batch_size: int, folder: Path, processes: Processes
    ):
        self.teacher, self.student = map(LayerRunner, models)
        batches = blocks.split(batch_size)
        self.numbers = processes.mine(range(len(batches)))  # of this process's batches among all
        self.blocks, self.folder, self.processes = torch.cat(processes.mine(batches)), folder, processes
        self.parts = [slice(low, low + batch_size) for low in range(0, len(self.blocks), batch_size)]
        self.reached = 0
        self.states: dict[str, Tensor] = {}
        for part in self.parts:
            for name in ("full", "small"):
                self._put(name, part, self.teacher.embedded(self.blocks[part]))

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

    def sums(
        self, position: int, layer: nn.Module, form: Watch, norm: nn.Module | None = None
    ) -> list[NormalEquations]:
        """The normal equations of the batches to fit on and of those held out.

        With a ``norm`` behind the MLP, what it multiplies a token by is taken as given, and what a channel is
        multiplied by as well, but for channels that it all but switches off.
        """
        sums: list[NormalEquations] = []
        gain = 1.0 if norm is None else _gain(norm, self.blocks.device)
        for number, part in zip(self.numbers, self.parts, strict=True):
            with _watched(layer, form, norm) as seen:
                own, target = self._run(part, position), self._get("full", part)
            features = seen["x"].reshape(*own.shape[:2], -1)  # some families flatten them
            x, y, t = (states.flatten(0, 1).float() for states in (features, target.float() - own, target))
            if part is self.parts[0]:
                self.check = own.float(), features.float()
            if norm is not None:
                x, y = x * _factors(norm, seen["z"]).reshape(-1, 1), y / gain
            if not sums:
                sums = [NormalEquations.empty(x.shape[1], y.shape[1], x.device, gain) for _ in range(2)]
            sums[number % HELD_OUT == 1].add(x, y, 1 / t.square().sum(-1))
        return [each.over(self.processes) for each in sums]

    def error(self, position: int) -> float:
        """E |t - h|^2 / |t|^2 per held-out token, of the states h that the layer at ``position`` gives."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.blocks.device)
        for number, part in zip(self.numbers, self.parts, strict=True):
            if number % HELD_OUT == 1:
                t, own = self._get("full", part).float(), self._run(part, position).float()
                errors = (t - own).square().sum(-1) / t.square().sum(-1)
                sums += torch.stack([errors.double().sum(), torch.tensor(float(errors.numel())).to(sums)])
        total, tokens = self.processes.summed(sums).tolist()
        return total / tokens

    def norm_behind(self, position: int, layer: nn.Module) -> nn.Module | None:
        """The part of ``layer`` that takes the output of its MLP and gives g * z / rms(z); None if there is none.

        Raises:
            NotSupported: a part that takes it and does something else.
        """
        made, found = [], []
        writer = mlp_writer(layer)
        with ExitStack() as hooks:
            hooks.enter_context(writer.register_forward_hook(lambda module, inputs, out: made.append(out)))
            for part in layer.children():
                look = lambda module, inputs, out: found.append((module, inputs[0], out)) if inputs else None  # noqa: E731
                hooks.enter_context(part.register_forward_hook(look))
            self._run(self.parts[0], position)
        for module, into, out in found:
            if made and into is made[-1] and not torch.equal(into, out):  # dropout, switched off, is no norm
                expected = (
                    into.float() * _factors(module, into)[..., None] * module(torch.ones_like(into[:1, :1])).float()
                )
                if (out.float() - expected).norm() <= 0.05 * out.float().norm():
                    return module
                raise NotSupported(f"{type(module).__name__} stands behind the MLP of layer {position} and is no RMS "
                                   "norm: distil without the closed form, or use form='linear'")  # fmt: skip
        return None

    def require_additive(self, position: int, matrix: Tensor) -> None:
        """Raise unless the corrected layer really gives what the algebra says."""
        own, features = self.check
        given, expected = self._run(self.parts[0], position).float(), own + features @ matrix
        if not (given - expected).norm() <= 0.05 * expected.norm():
            raise NotSupported(f"layer {position} does not add its MLP's output to its state as it is (experts?): "
                               "distil without the closed form, or use form='linear'")  # fmt: skip

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
