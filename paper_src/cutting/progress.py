"""What a run has found and the minutes it has used, on disk; and what it tells."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from paper_src import InputError
from paper_src.cutting.request import Request
from paper_src.support.files import replacing


class Progress:
    """The state of a run that may be killed: a run with the same request goes on, another request begins anew.

    Args:
        request: what is asked for.
        say: called with a line of text whenever there is something to tell.
    """

    def __init__(self, request: Request, say: Callable[[str], None] = print):
        words = {name: value for name, value in asdict(request).items() if name != "minutes"}
        self.folder = Path(f"{Path(request.out).expanduser().resolve()}.unfinished")
        self.limit, self._start, self._say = 60 * request.minutes, time.monotonic(), say
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
        self.notes: list[str] = list(self.get("notes") or [])

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

    def finish(self, name: str, value: object) -> object:
        """:meth:`put` what a step came to, with the notes so far: the step, and so its notes, are not made again."""
        self._known["notes"] = list(self.notes)  # later ones belong to steps that are made again
        return self.put(name, value)

    def require_same(self, name: str, value: object, what: str) -> None:
        """Raise InputError where an earlier start of this run knew another ``value``."""
        if self.get(name) not in (None, value):
            raise InputError(f"{self.folder} is of other {what}: delete it, or give another --out")
        self.put(name, value)

    def say(self, line: str) -> None:
        """Tell a line, with the time that is left."""
        minutes, seconds = divmod(round(self.left), 60)
        self._say(f"{line} (about {minutes}:{seconds:02d} left)")

    def end(self, line: str) -> None:
        """Tell the last line."""
        self._say(line)

    def note(self, line: str) -> None:
        """Keep a line for the report, and tell it."""
        if line not in self.notes:
            self.notes.append(line)
            self.say(f"note: {line}")
