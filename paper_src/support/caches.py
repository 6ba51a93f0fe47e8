"""What Transformers calls a model's key-value cache, as argument and in the output: it has a new name since 5.24."""

from transformers.utils import ModelOutput

NAMES = ("cache", "past_key_values")


def cache_name(output: ModelOutput) -> str:
    """The name under which a model took and gave the cache that is in ``output``."""
    return next(name for name in NAMES if name in output)
