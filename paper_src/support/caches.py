"""What Transformers calls a model's key-value cache, as argument and in the output: it has a new name since 5.24."""

from transformers.utils import ModelOutput

from paper_src import NotSupported

NAMES = ("cache", "past_key_values")


def cache_name(output: ModelOutput) -> str:
    """The name under which a model took and gave the cache that is in ``output``; NotSupported if there is none."""
    for name in NAMES:
        if name in output:
            return name
    raise NotSupported("the model gives no key-value cache: its decoding cannot be timed")
