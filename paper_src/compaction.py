"""Kept layers -> a compact model of the same family -> a standard checkpoint."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.configuration import cut_config, lists_of_layers
from paper_src.layers import LayerRunner
from paper_src.models import count_parameters, last_hidden, locate_layers, offloaded, require_finite, same_states
from paper_src.support.files import replacing_folder, writable_folder
from paper_src.support.weights import first_line

# Configuration switches that make a layer's function depend on its number, which compaction changes.
INDEX_DEPENDENT = ("scale_attn_by_inverse_layer_idx", "rescale_every")
TRIED = 4  # tokens on which a cut model is compared with the full one
INDEX = re.compile("layer_(idx|index|id|number)$")  # attributes of modules that hold the number of a layer


def compact(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of ``model``'s class with only the layers ``kept``: increasing indices, each in [0, L).

    The modules are new, the weights are the caller's own tensors: what trains one model trains the other
    (``copy.deepcopy`` the result to part them). Layer numbers, for the KV cache, and every per-layer entry of the
    configuration are rewritten.

    Raises:
        InputError: an index that is no integer, out of range or order, or a family whose layers cannot be renumbered.
    """
    path, layers = locate_layers(model)
    kept = _checked(kept, len(layers))
    for switch in INDEX_DEPENDENT:
        if getattr(model.config, switch, False):
            raise InputError(f"config.{switch} ties a layer's function to its number: layers cannot be removed")
    try:
        return _compact(model, path, kept, "layer")
    except InputError:
        if not lists_of_layers(model.config, len(layers), "") > lists_of_layers(model.config, len(layers), "layer"):
            raise
    return _compact(model, path, kept, "")  # lists of other names are of the layers as well


def _compact(model: PreTrainedModel, path: str, kept: Sequence[int], named: str) -> PreTrainedModel:
    depth = len(model.get_submodule(path))
    config = cut_config(model.config, kept, depth, named)
    new = {id(model.config): config, id(model.config.get_text_config()): config.get_text_config()}
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        small = copy.deepcopy(model, new | shared)
    except RuntimeError as error:  # layers that hold on to what they last computed
        raise InputError(f"{type(model).__name__} cannot be copied ({first_line(error)}): load it anew") from error
    layers = nn.ModuleList([small.get_submodule(path)[index] for index in kept])
    small.set_submodule(path, layers)
    for module in layers.modules():
        for name, value in vars(module).items():
            if INDEX.search(name) and not isinstance(value, bool) and value in kept:
                setattr(module, name, kept.index(value))
    rebuilt = _rebuilt(small)
    _cut_tables_(small, rebuilt, path, kept, depth)
    _require_standard(small, rebuilt)
    if not offloaded(model):
        _require_running(model, small)
        _require_same(model, small, kept)
    return small


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path, source: str,
    kept: Sequence[int], depth: int, note: str = "", trained: bool = False, card: str = "",
    files: Mapping[str, str] | None = None,
) -> Path:  # fmt: skip
    """Write ``model`` as a standard checkpoint (safetensors, configuration, tokenizer, model card).

    ``AutoModelForCausalLM.from_pretrained(folder)`` loads it without this package. The folder appears only when it
    is complete. One that exists is replaced only if it is empty or this function wrote all that is in it.

    Args:
        folder: neither the source model's folder, nor one that holds it or lies in it.
        source: name or path of the full model, of ``depth`` layers. This and what follows is for the card.
        note: how the layers were chosen.
        trained: whether the kept layers were changed afterwards.
        card: more for the card, in Markdown.
        files: name -> text of what else is to stand in the folder.

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
        whole = {"README.md": _card(model, source, kept, depth, note, trained, card)} | dict(files or {})
        for name, text in whole.items():
            (part / name).write_text(text, encoding="utf-8")
    return Path(folder)


def _checked(kept: Sequence[int], depth: int) -> list[int]:
    kept = list(kept)
    if strangers := [index for index in kept if not isinstance(index, Integral) or isinstance(index, bool)]:
        raise InputError(f"kept layer {strangers[0]!r}: give whole numbers")
    kept = [int(index) for index in kept]
    if not kept:
        raise InputError("kept layers are empty: keep at least 1")
    if strangers := [index for index in kept if not 0 <= index < depth]:
        raise InputError(f"kept layer {strangers[0]}: the model's layers are 0 to {depth - 1}")
    if any(a >= b for a, b in pairwise(kept)):
        raise InputError(f"kept layers {kept}: give each once, in increasing order")
    return kept


def _rebuilt(small: PreTrainedModel) -> PreTrainedModel:
    """A model without weights, built from the new configuration alone, as ``from_pretrained`` does."""
    with torch.device("meta"):
        try:
            return type(small)(copy.deepcopy(small.config))
        except Exception as error:  # of the class, each its own type
            raise InputError(f"{type(small).__name__} cannot be built of these layers alone ({first_line(error)}): "
                             "keep others") from error  # fmt: skip


def _cut_tables_(small: PreTrainedModel, rebuilt: PreTrainedModel, path: str, kept: list[int], depth: int) -> None:
    """Cut what stands outside the layers and has a part for each of them, one behind another (Gemma 3n, Gemma 4)."""
    own = dict(small.named_parameters(remove_duplicate=False))
    for name, there in rebuilt.named_parameters():
        if (here := own.get(name)) is None:
            continue
        axes = [axis for axis, sizes in enumerate(zip(here.shape, there.shape, strict=True)) if sizes[0] != sizes[1]]
        if name.startswith(f"{path}.") or len(axes) != 1 or here.shape[axes[0]] % depth:
            continue
        parts = here.detach().unflatten(axes[0], (depth, -1))
        cut = parts.index_select(axes[0], torch.tensor(kept, device=here.device)).flatten(axes[0], axes[0] + 1)
        if cut.shape == there.shape:
            module, _, last = name.rpartition(".")
            setattr(small.get_submodule(module), last, nn.Parameter(cut))


def _require_standard(small: PreTrainedModel, rebuilt: PreTrainedModel) -> None:
    """Raise unless the model that is built from the configuration alone has the same layers.

    Some families derive a window, an expert block or a scale from a layer's position, not from a list.
    """
    here, there = dict(_traits(small)), dict(_traits(rebuilt))
    for name in sorted(here.keys() | there.keys(), key=lambda name: (name.count("."), name)):  # the outermost first
        if (was := here.get(name)) != (now := there.get(name)):
            raise InputError(f"{type(small).__name__} sets {name} by a layer's position ({now}, was {was}): "
                             "these layers cannot be made a standard checkpoint, keep others")  # fmt: skip


def _require_running(full: PreTrainedModel, small: PreTrainedModel) -> None:
    """Raise where the family's code needs a layer that is gone: one with attention, with a recurrent state, ..."""
    if (error := _failure(small)) and not _failure(full):
        raise InputError(f"{type(small).__name__} does not run with only these layers ({first_line(error)}): "
                         "keep others") from error  # fmt: skip


@torch.no_grad()
def _require_same(full: PreTrainedModel, small: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise where the full model with the other layers bypassed says something else: some do more between layers."""
    runner, ids = LayerRunner(full), torch.arange(TRIED, device=full.device)[None]
    if runner.hands_on:  # what a bypassed layer would hand on is not defined
        return
    expected = runner.drive(ids, lambda index, layer, hidden: layer(hidden) if index in kept else hidden)
    if not same_states(full, last_hidden(small, ids), expected):
        raise InputError(f"{type(full).__name__} does something between layers: these cannot be cut out exactly")


@torch.no_grad()
def _failure(model: PreTrainedModel) -> Exception | None:
    """What goes wrong when a model reads two tokens and writes two with its cache; None if all is well."""
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    try:
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **how)
    except Exception as error:
        return error
    return None


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


def shown(source: str) -> str:
    """How a model is named in public: a folder of this machine by its last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _card(
    model: PreTrainedModel, source: str, kept: Sequence[int], depth: int, note: str, trained: bool, more: str
) -> str:  # fmt: skip
    more = f"{more}\n\n" if more else ""
    source, state = shown(source), "repaired against the full model" if trained else "unchanged and nothing was trained"
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

{more}A model cut like this has lost abilities: measure it on your own task before you use it.
"""
