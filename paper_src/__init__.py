"""Which layers of a Transformer matter: scoring, selection and compaction, measured.

Each module holds one idea: import the one you need, for example ``from paper_src import models, scoring``; or cut a
model in one call, ``paper_src.cut(model, out, keep=0.75)``.
"""

import importlib
import logging
import warnings

# tqdm.auto, which transformers imports, asks for ipywidgets in a notebook; our bars are plain text
warnings.filterwarnings("ignore", message="IProgress not found")
# transformers imports torchao, which reports each kernel of other hardware that it cannot load
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    """``cut``, which brings torch with it, is imported when it is asked for."""
    if name != "cut":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("paper_src.cutting.cut").cut


class InputError(ValueError):
    """Something the user gave cannot be used; one line with the value, the limit and the remedy."""


class NotSupported(InputError):
    """This family of models, machine or library build cannot run the method; the message says why."""
