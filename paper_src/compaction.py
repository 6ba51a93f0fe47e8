"""Kept layers -> a compact model of the same family -> a standard checkpoint."""

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.models import count_parameters, locate_layers, require_finite
from paper_src.support.files import replacing_folder, writable_folder

# Configuration switches that make a layer's function depend on its number, which compaction changes.
INDEX_DEPENDENT = ("scale_attn_by_inverse_layer_idx",)


def compact(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of ``model``'s class with only the layers ``kept``: increasing indices, each in [0, L).

    The modules are new, the weights are the caller's own tensors: what trains one model trains the other
    (``copy.deepcopy`` the result to part them). Layer numbers, for the KV cache, and every per-layer entry of the
    configuration are rewritten.

    Raises:
        InputError: an index out of range or order, or a family whose layers cannot be renumbered.
    """
    path, layers = locate_layers(model)
    kept = _checked(kept, len(layers))
    for switch in INDEX_DEPENDENT:
        if getattr(model.config, switch, False):
            raise InputError(f"config.{switch} ties a layer's function to its number: layers cannot be removed")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared)
    old = small.get_submodule(path)
    small.set_submodule(path, nn.ModuleList([old[index] for index in kept]))
    for position, layer in enumerate(small.get_submodule(path)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    cut_config_(small.config, kept)
    _require_standard(small)
    return small


def cut_config_(config: PretrainedConfig, kept: Sequence[int]) -> None:
    """Set the depth of ``config`` to len(kept) and cut its per-layer lists (``layer_types`` and the like)."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, [value[index] for index in kept])
    text.num_hidden_layers = len(kept)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, source: str,
    kept: Sequence[int], depth: int, note: str = "", trained: bool = False,
) -> Path:  # fmt: skip
    """Write ``model`` as a standard checkpoint (safetensors, configuration, tokenizer, model card).

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it without this package. The folder appears only when it
    is complete. One that exists is replaced only if it is empty or this function wrote all that is in it.

    Args:
        folder: neither the source model's folder, nor one that holds it or lies in it.
        source: name or path of the full model, of ``depth`` layers. This and what follows is for the card.
        note: how the layers were chosen.
        trained: whether the kept layers were changed afterwards.

    Raises:
        InputError: the folder may not be replaced or cannot be written, or a weight is NaN or Inf.
    """
    sources = [name for name in (source, model.name_or_path) if name]
    writable_folder(folder, sources)
    require_finite(model, "the compact model")
    with replacing_folder(folder, sources) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        (part / "README.md").write_text(_card(model, source, kept, depth, note, trained), encoding="utf-8")
    return Path(folder)


def _checked(kept: Sequence[int], depth: int) -> list[int]:
    kept = [int(index) for index in kept]
    if not kept:
        raise InputError("kept layers are empty: keep at least 1")
    if strangers := [index for index in kept if not 0 <= index < depth]:
        raise InputError(f"kept layer {strangers[0]}: the model's layers are 0 to {depth - 1}")
    if any(a >= b for a, b in pairwise(kept)):
        raise InputError(f"kept layers {kept}: give each once, in increasing order")
    return kept


def _require_standard(small: PreTrainedModel) -> None:
    """Raise unless a model built from the new configuration alone, as ``from_pretrained`` does, has the same layers.

    Some families derive a window, an expert block or a scale from a layer's position, not from a list.
    """
    with torch.device("meta"):
        rebuilt = type(small)(copy.deepcopy(small.config))
    here, there = dict(_traits(small)), dict(_traits(rebuilt))
    for name in sorted(here.keys() | there.keys()):
        if (was := here.get(name)) != (now := there.get(name)):
            raise InputError(f"{type(small).__name__} sets {name} by a layer's position ({now}, was {was}): "
                             "these layers cannot be made a standard checkpoint, keep others")  # fmt: skip


def _traits(model: PreTrainedModel) -> Iterator[tuple[str, object]]:
    """Shapes of all parameters, and all plain settings of the modules inside the layers."""
    path, layers = locate_layers(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, tuple(parameter.shape)
    for name, module in layers.named_modules(prefix=path):
        yield f"{name}.class", type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and isinstance(value, bool | int | float | str):
                yield f"{name}.{key}", value


def _card(model: PreTrainedModel, source: str, kept: Sequence[int], depth: int, note: str, trained: bool) -> str:
    state = "repaired against the full model" if trained else "unchanged and nothing was trained"
    return f"""---
library_name: transformers
tags: [layer-removal]
---
# {len(kept)} of {depth} layers of {source}

Whole layers were cut out of {source}; the others are {state}.

- kept layers (0-based): {list(kept)}
- removed layers: {sorted(set(range(depth)) - set(kept))}
- chosen by: {note or "not stated"}
- parameters: {count_parameters(model):,} ({str(model.dtype).removeprefix("torch.")})

A model cut like this has lost abilities: measure it on your own task before you use it.
"""
