"""Evaluations of layer subsets kept on disk, so that a search that was interrupted goes on where it was."""

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError
from paper_src.coalitions import Evaluation
from paper_src.selection import KeptLayers, kept_text, kept_tuple

CODE = ("models.py", "layers.py", "fidelity.py", "coalitions.py")  # evaluations by older code are not read
TABLE = (
    "CREATE TABLE IF NOT EXISTS evaluation"
    " (known_by TEXT, kept TEXT, metrics TEXT, layer_runs INT, seconds REAL, PRIMARY KEY (known_by, kept))"
)


class Store:
    """An SQLite file of evaluations; those of other weights, texts, metrics or code may stand in it and are not read.

    A file that is damaged or no database is moved aside, with a warning, and a new one begun.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, model: PreTrainedModel):
        path = Path(path)
        code = [Path(__file__).parents[1].joinpath(name).read_bytes() for name in CODE]
        versions = [version(package) for package in ("torch", "transformers")]
        words = [*code, *versions, model.device.type, model.config.to_json_string()]
        self._model = _digest(model.state_dict().values(), *words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _opened(path)
        except (OSError, sqlite3.OperationalError) as error:  # no folder, no right to write, in use elsewhere
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write {path} ({reason}): choose another folder") from error
        except sqlite3.DatabaseError as error:
            aside = path.with_name(f"{path.name}.damaged")
            warnings.warn(f"{path} is damaged ({error}): moved to {aside.name}, computed anew", stacklevel=2)
            path.replace(aside)
            self._file = _opened(path)

    def view(self, tensors: Iterable[Tensor], *words: object) -> "View":
        """The evaluations known by this model, by ``tensors`` (text) and by ``words`` (metrics)."""
        return View(self._file, _digest(tensors, self._model, *words))


class View(dict[KeptLayers, Evaluation]):
    """Kept layers -> evaluation of one model, text and list of metrics; each is on disk once it is set."""

    def __init__(self, file: sqlite3.Connection, known_by: str):
        self._file, self._known_by = file, known_by
        rows = file.execute("SELECT kept, metrics, layer_runs, seconds FROM evaluation WHERE known_by = ?", [known_by])
        for kept, values, *cost in rows:
            super().__setitem__(kept_tuple(kept), Evaluation(tuple(json.loads(values)), *cost))

    def __setitem__(self, kept: KeptLayers, evaluation: Evaluation) -> None:
        values, *cost = evaluation
        row = [self._known_by, kept_text(kept), json.dumps(values), *cost]
        self._file.execute("INSERT OR REPLACE INTO evaluation VALUES (?, ?, ?, ?, ?)", row)
        super().__setitem__(kept, evaluation)


def _opened(path: Path) -> sqlite3.Connection:
    file = sqlite3.connect(path, isolation_level=None)  # each statement is a transaction
    file.execute("PRAGMA synchronous = OFF")  # what is written outlives the process; a power cut may damage it
    problem = file.execute("PRAGMA integrity_check").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(problem.splitlines()[0])
    file.execute(TABLE)
    return file


def _digest(tensors: Iterable[Tensor], *words: object) -> str:
    """SHA-256 of tensors (types, shapes, values) and words."""
    digest = hashlib.sha256(repr(words).encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
