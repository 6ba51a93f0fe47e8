"""Load a language model and find its decoder layers, by structure and not by family name.

With :mod:`paper_src.layers` this is all that knows how Transformers models are put together.
"""

import atexit
import copy
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from paper_src import InputError
from paper_src.support.devices import pick_device, pick_dtype
from paper_src.support.files import complete, replacing_folder
from paper_src.support.sources import sha256
from paper_src.support.weights import PINNED, first_line, located, require_plain

DEPTHS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_blocks",
)  # settings that say L


@dataclass
class Loaded:
    """A model in eval mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str  # SHA-256 of its weight files
    stored: torch.dtype | None = None  # of the checkpoint's weights, where it says so


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """The causal language model called ``name``, checked to hold only finite weights.

    Args:
        name: a key of ``support.weights.PINNED`` (registry package), a local folder or ``.gguf`` file, or a hub id
            (``owner/name``). Code that ships with a checkpoint is never run.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: see :func:`pick_dtype`.
        device: a torch device; ``auto``: CUDA where there is one; ``spread``: over all devices, main memory and the
            disk, as accelerate finds room; or ``disk``: the matrices of the layers are read when they are needed.

    Raises:
        InputError: nothing is found, weights are pickled, quantized, damaged, incomplete, NaN or Inf, or an adapter.
    """
    where, placed = device, device in ("spread", "disk")
    device = pick_device("auto" if placed else device)
    torch_dtype = pick_dtype(dtype, device)
    folder, gguf = located(name)
    if gguf and placed:
        raise InputError(f"{name} is packed: save it as safetensors to read it from the disk")
    require_plain(folder, name)
    digests = [sha256(file) for file in ([folder / gguf] if gguf else sorted(folder.glob("*.safetensors")))]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if packed := gguf and name in PINNED:
        folder, gguf = _unpacked(name, folder / gguf, digest), None
    try:
        model, tokenizer, missing, stored = _read(folder, gguf, torch_dtype, where if placed else "")
    except Exception as error:  # the libraries raise a dozen types for files that cannot be read
        raise InputError(f"cannot load {name} ({first_line(error)}): fetch the model again, or name another") from error
    if missing := sorted(missing):
        raise InputError(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: fetch the whole checkpoint")
    _forget_quantizer_(model)
    require_finite(model, name)
    return Loaded((model if placed else model.to(device)).eval(), tokenizer, name, digest, None if packed else stored)


def _read(
    folder: Path, gguf: str | None, dtype: torch.dtype, where: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str], torch.dtype | None]:
    """Model, tokenizer, names of weights that are missing, and the dtype that the checkpoint says it is in."""
    transformers_logging.disable_progress_bar()
    arguments = {"trust_remote_code": False} | ({"gguf_file": gguf} if gguf else {})
    auto, stored = (AutoModelForCausalLM, None) if gguf else _kind(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
    # plain weights, also where kernels take packed ones
    arguments |= {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
    arguments |= _placement(folder, where) if where else {}
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **arguments)
    return model, tokenizer, info["missing_keys"], stored


def _unpacked(name: str, gguf: Path, digest: str) -> Path:
    """A pinned GGUF file as a float32 checkpoint beside it, written on first use: its header takes a minute to read."""
    folder = gguf.parent / f"{gguf.stem}-{digest[:8]}"
    if not complete(folder):
        print(f"converting {name}, once ...", file=sys.stderr, flush=True)
        packed = load_model(str(gguf), "float32", "cpu")
        shutil.rmtree(folder, ignore_errors=True)  # half of one
        with replacing_folder(folder) as part:
            packed.model.save_pretrained(part)
            packed.tokenizer.save_pretrained(part)
    return folder


def _kind(folder: Path) -> tuple[type, torch.dtype | None]:
    """The class that loads a checkpoint, and the dtype that it says it is in."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    kind, causal = type(config), type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    with_images = not causal and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # its text decoder is what is cut
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM, config.dtype


def _placement(folder: Path, where: str) -> dict[str, object]:
    """Arguments of ``from_pretrained`` that keep weights elsewhere than in one device's memory."""
    scratch = tempfile.mkdtemp(prefix="paper_offload_")  # weights in another dtype than the checkpoint's
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    if where == "spread":
        return {"device_map": "auto", "offload_folder": scratch}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    path, _ = locate_layers(empty)
    places = {}
    for name, module in empty.named_modules():
        if next(module.parameters(recurse=False), None) is not None or not any(module.children()):
            matrix = name.startswith(f"{path}.") and isinstance(module, nn.Linear | Conv1D)
            places[name] = "disk" if matrix else "cpu"
    return {"device_map": places, "offload_folder": scratch}


def offloaded(model: nn.Module) -> bool:
    """Whether some weights are not in memory but are brought there by hooks when they are needed."""
    return any(parameter.is_meta for parameter in model.parameters())


def _forget_quantizer_(model: PreTrainedModel) -> None:
    """Let a dequantized GGUF model be saved: its weights are plain tensors from here on."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False


def require_finite(model: nn.Module, name: str = "the model") -> None:
    """Raise InputError with the first parameter that holds NaN or Inf."""
    for parameter_name, parameter in model.named_parameters():
        # of weights on the disk, what they make of text is checked
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise InputError(f"{name} has NaN or Inf in {parameter_name}: fetch or convert the weights again")


def locate_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Dotted path and list of the L decoder (or encoder) layers.

    The list is the ModuleList of L modules in the model's text decoder that holds most parameters; what is built from
    another configuration than the text's (a vision tower) is not looked at.

    Raises:
        InputError: there is none, or the model is an encoder-decoder with two stacks.
    """
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} has two stacks of layers: use a decoder-only model")
    own = (type(model.config), type(config))
    towers = tuple(f"{path}." for path, part in model.named_modules()
                   if isinstance(part, PreTrainedModel) and type(part.config) not in own)  # fmt: skip
    lists = [(path, part) for path, part in model.named_modules()
             if isinstance(part, nn.ModuleList) and not path.startswith(towers)]  # fmt: skip
    depths = dict.fromkeys(getattr(config, name) for name in DEPTHS if hasattr(config, name))
    for depth in depths:
        if found := [(path, part) for path, part in lists if len(part) == depth and count_parameters(part)]:
            return max(found, key=lambda item: count_parameters(item[1]))
    wanted = " or ".join(map(str, depths)) or "its"
    raise InputError(f"{type(model).__name__} has no list of {wanted} layers: use a Transformer decoder")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's L layers: see :func:`locate_layers`."""
    return locate_layers(model)[1]


def layer_counts(keep: Sequence[float], depth: int) -> list[int]:
    """Numbers of layers to keep, each once: those below 1 are shares of ``depth``, rounded (halves to even); 0 stays.

    Raises:
        InputError: negative, not a whole number, or more than ``depth``.

    Example:
        >>> layer_counts([0.25, 0.4, 0.5, 0.75], 30)
        [8, 12, 15, 22]
    """
    for value in keep:
        if not isinstance(value, int | float) or not 0 <= value <= depth or (value > 1 and value != int(value)):
            raise InputError(f"keep {value}: the model has {depth} layers; give 1 to {depth}, or a share such as 0.25")
    return list(dict.fromkeys(max(1, round(value * depth)) if 0 < value < 1 else int(value) for value in keep))


def in_by_out(linear: nn.Module) -> Tensor:
    """(F, d) weight of a linear map x -> x W of F features."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T


def add_to_weight_(linear: nn.Module, change: Tensor) -> Tensor:
    """Give ``linear`` a new weight, ``change`` (F, d) more than the old; returns the change as rounded to its dtype.

    The old tensor is left alone: another model may share it.
    """
    old = in_by_out(linear).detach()
    new = (old.double() + change).to(old.dtype)
    linear.weight = nn.Parameter((new if isinstance(linear, Conv1D) else new.T).contiguous())
    return new.float() - old.float()


def cast_(model: nn.Module, dtypes: Iterable[torch.dtype]) -> nn.Module:
    """``model`` with its parameters in ``dtypes``, one for each.

    Buffers stay as they are, which ``model.to`` would round as well: loading a checkpoint keeps rotary frequencies
    in float32.
    """
    for parameter, dtype in zip(model.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)
    return model


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; tied ones are counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def last_hidden(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Hidden states after the final norm, (B, T, d), of token ids (B, T).

    Raises:
        InputError: a token id that the embedding does not have, on the CPU; CUDA has an error of its own.
    """
    try:
        return _stack(model)(input_ids=blocks.to(model.device), use_cache=False).last_hidden_state
    except IndexError as error:
        rows, largest = model.get_input_embeddings().num_embeddings, int(blocks.max())
        if largest < rows:
            raise
        problem = f"token id {largest}, but the embedding has {rows} rows"
        raise InputError(f"{problem}: is the tokenizer another model's?") from error


def same_states(model: PreTrainedModel, found: Tensor, expected: Tensor) -> bool:
    """Whether states of ``model`` are those expected, but for the rounding of its dtype."""
    tolerance, expected = 1e-4 if model.dtype == torch.float32 else 0.02, expected.float()
    return bool((found.float() - expected).norm() <= tolerance * expected.norm())


def _stack(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; in some families (Llama 4) it has another name than it should."""
    if model.base_model is not model:
        return model.base_model
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)


class _Known(BaseModelOutputWithPast):
    """An output whose every other field (router logits, cross attentions, ...) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class StandIn(nn.Module):
    """Stands for one module in a shallow copy of a model, and has that module's other attributes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.layer = module

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # the model's code may ask for attention_type


class _Fixed(StandIn):
    """Stands for the stack of layers and returns a hidden state that is already known."""

    def __init__(self, stack: nn.Module, hidden: Tensor):
        super().__init__(stack)
        self.hidden = hidden

    decoder = property(lambda self: self)  # some heads (OPT) call the decoder inside their base model

    def forward(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return _Known(last_hidden_state=self.hidden)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (B, T, V) of last hidden states (B, T, d), exactly as the model's own forward makes them.

    That forward runs in a shallow copy with its stack replaced, so that whatever a family adds is its own code.
    """
    head = copy.copy(model)
    head.__dict__.pop("forward", None)  # accelerate binds one to the instance, which a copy would share
    stack = _stack(model)
    head._modules = {name: _Fixed(part, hidden) if part is stack else part for name, part in model._modules.items()}
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return head(input_ids=ids, use_cache=False).logits
