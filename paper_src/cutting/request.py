"""What is asked for, checked before anything is loaded."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from paper_src import InputError
from paper_src.selection import STRATEGIES
from paper_src.support.files import writable_folder

CHOICES = [name for name, strategy in STRATEGIES.items() if strategy.needs not in ("score", "fresh")]


@dataclass(frozen=True)
class Request:
    """A model to cut: by how much, in how many minutes, for which text."""

    model: str  # registry name, local folder or .gguf file, or hub id
    out: str  # folder of the checkpoint and its report
    keep: float = 0.0  # layers to keep: their number, or a share below 1
    speed: float = 0.0  # or how many times as fast, by floating-point operations of reading 512 tokens
    layers: tuple[int, ...] = ()  # or these layers, chosen by the reader
    minutes: float = 20.0
    texts: tuple[str, ...] = ()  # files, folders or names; none: WikiText-2, and what the model writes itself
    strategy: str = ""  # how the layers are chosen, one of ``CHOICES``; empty: several, and the best of them
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def checked(self) -> "Request":
        """The same; InputError if it asks for nothing that can be done."""
        if sum(map(bool, (self.keep, self.speed, self.layers))) != 1:
            raise InputError("give either keep, a number of layers or a share such as 0.75, or speed, such as 1.5, "
                             "or the layers that stay")  # fmt: skip
        if isinstance(self.keep, float) and self.keep == 1:
            raise InputError("keep 1.0: a share is below 1; give 1 for a single layer")
        if not (0 <= self.keep < math.inf) or (self.keep > 1 and self.keep != int(self.keep)):
            raise InputError(f"keep {self.keep}: give a number of layers, or a share such as 0.75")
        if self.speed and not 1 < self.speed < math.inf:
            raise InputError(f"speed {self.speed}: give more than 1, such as 1.5 for half as fast again")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed {self.seed}: give a number from 0 to 4294967295")
        if not self.minutes > 0:
            raise InputError(f"minutes {self.minutes}: give more than 0")
        if self.strategy and self.strategy not in CHOICES:
            raise InputError(f"strategy {self.strategy!r}: use one of {', '.join(CHOICES)}")
        if self.strategy and self.layers:
            raise InputError(f"strategy {self.strategy!r} beside given layers: give one of the two")
        texts = (self.texts,) if isinstance(self.texts, str) else self.texts
        local = [name for name in (self.model, *texts) if Path(name).expanduser().exists()]
        writable_folder(self.out, local)
        return replace(self, texts=tuple(texts))
