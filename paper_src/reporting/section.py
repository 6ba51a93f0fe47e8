"""Tables, figures and provenance of one section, written whole or not at all.

A section is a notebook. Sections pass nothing to one another but files: a table is a CSV at full
precision (with a Markdown and a LaTeX copy for reading), a figure is SVG, PDF and PNG drawn from tables.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from paper_src import InputError
from paper_src.reporting.parameters import check_types, declared
from paper_src.support.files import replacing
from paper_src.support.machine import peak_resident_bytes

PACKAGES = ("torch", "transformers", "numpy", "scipy", "pandas", "matplotlib")
SAVED = {"svg.hashsalt": "paper", "svg.fonttype": "none", "pdf.fonttype": 42, "savefig.dpi": 150}  # asked when saving


class Section:
    """One notebook's place to read earlier tables from and to write its own results to.

    Args:
        name: the notebook's name, for example ``01_importance``.
        results: folder of the profile's results; ``tables``, ``figures`` and ``models`` are below it.
        scope: the notebook's ``globals()``; the values of its declared parameters are checked and recorded.

    Raises:
        InputError: the folder cannot be written, or a parameter has another type than declared.
    """

    def __init__(self, name: str, results: str, scope: Mapping[str, object]):
        self.name = name
        self.root = Path(results)
        self.parameters = {key: scope[key] for key in check_types(declared(Path(f"{name}.ipynb")), scope)}
        self.started, self._lap = time.time(), time.perf_counter()
        self.unfinished = self.root / "unfinished" / name  # what a killed run leaves to the next one
        try:
            for folder in ("tables", "figures", "models"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.root / folder):
                    pass
                for part in (self.root / folder).glob(f".[tf]{int(name[:2])}_*"):
                    part.unlink()  # a killed run's half-written file
        except OSError as error:
            raise InputError(
                f"cannot write to {self.root} ({error.strerror}): make it writable or set the results parameter"
            ) from error

    def table(self, frame: pd.DataFrame, name: str) -> pd.DataFrame:
        """Write ``frame`` as ``tables/<name>`` .csv, .md and .tex; returns it as it reads back."""
        self._check(name, "t")
        folder = self.root / "tables"
        short = frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
        with replacing(folder / f"{name}.csv") as path:
            frame.to_csv(path, index=False)
        with replacing(folder / f"{name}.md") as path:
            path.write_text(short.to_markdown(index=False, disable_numparse=True) + "\n", encoding="utf-8")
        with replacing(folder / f"{name}.tex") as path:
            path.write_text(short.to_latex(index=False, escape=True), encoding="utf-8")
        return self.read(name)

    def read(self, name: str) -> pd.DataFrame:
        """Table ``name`` of this profile; ``long/<name>``, ``gpu/<name>``: of a larger run on the same model.

        Raises:
            InputError: it was not made yet; the message names the command that makes it.
        """
        if "/" in name:
            return self._larger(name)
        path = self.root / "tables" / f"{name}.csv"
        if not path.is_file():
            raise InputError(f"{path} is missing: run ./reproduce.sh --only {self._maker(name)}")
        return pd.read_csv(path)

    def figure(self, figure: Figure, name: str) -> Figure:
        """Write ``figure`` as ``figures/<name>`` .svg, .pdf and .png, byte for byte the same each time."""
        self._check(name, "f")
        without_date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
        for form, metadata in without_date.items():
            with replacing(self.root / "figures" / f"{name}.{form}") as path, rc_context(SAVED):
                figure.savefig(path, format=form, metadata=metadata)
        return figure

    def lap(self) -> float:
        """Seconds since the last call, at first since the section began."""
        before, self._lap = self._lap, time.perf_counter()
        return self._lap - before

    def finish(self, loaded: Any = None, texts: Mapping[str, str] | None = None) -> None:
        """Write ``tables/<notebook>.json``: where these numbers come from; a later run computes all anew.

        Args:
            loaded: the model used, if any: its ``name``, ``digest`` and ``model``, of which dtype and device are asked.
            texts: split -> SHA-256 of the text used.
        """
        record = {
            "notebook": self.name,
            "parameters": self.parameters,
            "model": loaded and {"name": loaded.name, "sha256": loaded.digest, "dtype": str(loaded.model.dtype)},
            "device": str(loaded.model.device) if loaded else "none",
            "texts_sha256": dict(texts or {}),
            "git": git_state(),
            "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
            "machine": {"cpu": processor(), "threads": threads()},
            "wall_s": round(time.time() - self.started, 1),
            "peak_memory_bytes": peak_resident_bytes(),
        }
        with replacing(self.root / "tables" / f"{self.name}.json") as path:
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _check(self, name: str, kind: str) -> None:
        """A section writes under its own number only, so that it never overwrites another's file or a stranger's."""
        if not re.fullmatch(rf"{kind}{int(self.name[:2])}_\w+", name):
            raise InputError(f"{self.name} cannot write {name}: its names begin with {kind}{int(self.name[:2])}_")

    def _larger(self, name: str) -> pd.DataFrame:
        """Committed table ``name`` of a run with larger budgets, if that was on the model of this profile."""
        folder, table = name.split("/")
        record = f"{self._maker(table)}.json"
        places = [self.root / "tables" / record, Path("../tables") / folder / record]
        models = [json.loads(place.read_text()).get("model") if place.is_file() else None for place in places]
        if not all(models) or models[0]["sha256"] != models[1]["sha256"]:
            raise InputError(f"no larger run of {name} on this model: tables/README.md says what makes it")
        return pd.read_csv(f"../tables/{name}.csv")

    def _maker(self, table: str) -> str:
        """Name of the notebook that writes ``table``: t3_speed is made by 03_..."""
        number = int(re.match(r"t(\d+)_", table).group(1))
        found = sorted(Path().glob(f"{number:02d}_*.ipynb"))
        return found[0].stem if found else "01_importance"


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def threads() -> int:
    """Threads that a tensor operation may use: torch's number where the notebook uses torch."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else os.cpu_count() or 1


def git_state() -> dict[str, object]:
    """Commit of the checkout and whether tracked files differ from it; None outside git."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], check=False, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
