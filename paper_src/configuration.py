"""The configuration of a model of which only some layers are left."""

from collections.abc import Sequence
from itertools import pairwise

from transformers import PretrainedConfig

from paper_src import InputError
from paper_src.models import DEPTHS
from paper_src.support.weights import first_line

FROM_FIRST = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers")  # so many layers, from the first on
FROM_LAST = ("num_kv_shared_layers",)
WITHOUT_WEIGHTS = ("num_nextn_predict_layers",)  # of layers that Transformers does not load


def cut_config(
    config: PretrainedConfig, kept: Sequence[int], depth: int, named: str = "layer"
) -> PretrainedConfig:  # fmt: skip
    """``config`` of the layers ``kept`` of ``depth`` alone, built anew as ``from_pretrained`` does.

    Rewritten are the depth, lists with an entry for each layer (only those with ``named`` in their name), lists and
    dictionaries of layer numbers, and counts of layers that are special from the first or the last on.

    Raises:
        InputError: the configuration's class refuses these layers.
    """
    text = config.get_text_config()
    whole = {name: value for name, value in config.to_dict().items() if name != "auto_map"}  # its code is not saved
    part = next((whole[name] for name in config.sub_configs if getattr(config, name, None) is text), whole)
    for name, value in list(part.items()):
        part[name] = _cut(name, value, kept, depth, named)
    for name in DEPTHS:
        if part.get(name) == depth:
            part[name] = len(kept)
    try:
        small = type(config).from_dict(whole)
    except Exception as error:  # of the class's own validation, each its own type
        reason = first_line(error.__cause__ or error)
        raise InputError(f"{type(config).__name__} does not allow the layers {list(kept)} ({reason}): keep others"
                         ) from error  # fmt: skip
    for name in ("_attn_implementation", "_experts_implementation", "_name_or_path"):
        setattr(small, name, getattr(config, name, None))
    return small


def _cut(name: str, value: object, kept: Sequence[int], depth: int, named: str) -> object:
    """A setting of a configuration, as it is where only the layers ``kept`` of ``depth`` are left."""
    place = {old: new for new, old in enumerate(kept)}
    if name in (*FROM_FIRST, *FROM_LAST, *WITHOUT_WEIGHTS) and value:
        special = range(value) if name in FROM_FIRST else range(depth - value, depth) if name in FROM_LAST else ()
        return sum(index in special for index in kept)
    if isinstance(value, dict) and "layer" in name and value and all(str(key).isdigit() for key in value):
        found = {int(key): entry for key, entry in value.items()}
        return {str(place[index]): entry for index, entry in found.items() if index in place}
    if _of_layers(name, value, named):
        if _numbers(value, depth):
            return [place[index] for index in value if index in place]
        if len(value) == depth and "shared" in value:
            _require_sources(name, value, kept)
        return [value[index] for index in kept] if len(value) == depth else value
    return value


def _numbers(value: Sequence, depth: int) -> bool:
    """Whether a list holds layer numbers, and not an entry for each layer."""
    plain = all(isinstance(index, int) and not isinstance(index, bool) for index in value)
    return plain and all(a < b for a, b in pairwise([-1, *value, depth]))


def lists_of_layers(config: PretrainedConfig, depth: int, named: str) -> int:
    """How many lists with ``named`` in their name have an entry for each layer."""
    settings = config.get_text_config().to_dict().items()
    return sum(_of_layers(name, value, named) and len(value) == depth for name, value in settings)


def _of_layers(name: str, value: object, named: str) -> bool:
    """Whether a setting is a list that by its name may be of layers."""
    return isinstance(value, list | tuple) and named in name and "token" not in name


def _require_sources(name: str, value: Sequence[str], kept: Sequence[int]) -> None:
    """Raise where a layer that shares what the last one before it computed that shares nothing would get another's."""
    sources = [next((n for n in reversed(range(layer)) if value[n] != "shared"), None) for layer in range(len(value))]
    for position, layer in enumerate(kept):
        before = next((other for other in reversed(kept[:position]) if value[other] != "shared"), None)
        if value[layer] == "shared" and sources[layer] != before:
            raise InputError(f"layer {layer} shares what layer {sources[layer]} computes (config.{name}): keep both, "
                             "and none between that computes its own")  # fmt: skip
