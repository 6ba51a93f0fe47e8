"""What is asked for, checked before anything is loaded; and the state of a run that may be killed."""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paper_src import InputError
from paper_src.selection import STRATEGIES
from paper_src.support.files import replacing, writable_folder

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


class Progress:
    """What a run has found, in a file of its folder, and the time it has used.

    A run with the same request goes on from there; another request begins anew.
    """

    def __init__(self, request: Request):
        words = {name: value for name, value in asdict(request).items() if name != "minutes"}
        self.folder = Path(f"{Path(request.out).expanduser().resolve()}.unfinished")
        self.limit, self._start = 60 * request.minutes, time.monotonic()
        self._path = self.folder / "progress.json"
        key = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
        self._known: dict[str, object] = {"request": key, "spent": 0.0}
        try:
            before = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none, or cut off
            before = {}
        if before.get("request") == key:
            self._known = before
        self._spent = float(self._known["spent"])

    @property
    def spent(self) -> float:
        """Seconds used so far, those of killed runs with it."""
        return self._spent + time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.limit - self.spent)

    def get(self, name: str) -> object:
        """What is known by this name, or None."""
        return self._known.get(name)

    def put(self, name: str, value: object) -> object:
        """Keep a value of plain types, on disk; returns it."""
        self._known |= {name: value, "spent": self.spent}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.folder} ({error.strerror}): choose another folder") from error
        with replacing(self._path) as part:
            part.write_text(json.dumps(self._known), encoding="utf-8")
        return value
