"""Controls of a model's layers: the compact shape with random weights, and the model without any layer."""

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from paper_src.compaction import compact
from paper_src.models import locate_layers


def random_weights(full: PreTrainedModel, kept: Sequence[int], seed: int) -> PreTrainedModel:
    """A model of the compact one's shape, of layers ``kept``, with all weights drawn as transformers draws them."""
    config = copy.deepcopy(compact(full, kept).config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=full.dtype).to(full.device).eval()


def random_layers(full: PreTrainedModel, kept: Sequence[int], seed: int) -> PreTrainedModel:
    """The same, with the embedding, the last norm and the head of ``full``: only the layers are random."""
    drawn = random_weights(full, kept, seed)
    path, _ = locate_layers(drawn)
    for name, parameter in drawn.named_parameters():
        if not name.startswith(f"{path}."):
            parameter.data = full.get_parameter(name).detach().clone()
    return drawn


def without_layers(full: PreTrainedModel) -> PreTrainedModel:
    """The embedding, last norm and head of ``full`` and nothing between them; they share its weights."""
    bare = compact(full, [0])
    _, layers = locate_layers(bare)
    del layers[:]
    config = bare.config.get_text_config()
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    return bare
