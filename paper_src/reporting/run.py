"""Run one notebook with one profile's parameters; the executed copy appears only if all went well.

Order, skipping and parallel runs are Snakemake's, execution is papermill's. Added here: an error is one line, and so
is what is told while a notebook runs; what it prints goes to a log.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from paper_src import InputError
from paper_src.reporting.parameters import parameters_for

NOISE = re.compile(r"Ending Cell|(In|Out)put Notebook|Working dir|Executing notebook")
# of tqdm's bars, but not of transformers' own, or in words
STEP = re.compile(r"(?:^|[\r\n])(?!Loading)([^\r\n|:]+): +\d+%\|[^|]*\| (\d+/\d+)|(step|epoch) (\d+) of (\d+)")
DONE = re.compile(r"done in ([\d.]+) s\n?\Z")  # the end of a log
COMMITTED = {"laptop": Path("tables"), "long": Path("tables/long")}  # records of profiles that were run before


def run(notebook: Path, profile: Path, results: Path, given: dict[str, str], verbose: bool = False) -> None:
    """Execute ``notebook`` with the parameters of ``profile`` and those ``given``; one line says how far it is.

    Writes ``results/notebooks/<name>`` and ``results/logs/<name>.log``; the notebook writes tables and figures itself.
    """
    parameters = parameters_for(notebook, profile, {**given, "results": os.path.relpath(results, "notebooks")})
    names = sorted(path.stem for path in notebook.parent.glob("0*.ipynb"))
    head = f"[{names.index(notebook.stem) + 1}/{len(names)}] {notebook.stem}"
    log = results / "logs" / f"{notebook.stem}.log"
    expected = seconds_before(log, COMMITTED.get(results.name))
    output = results / "notebooks" / notebook.name
    _logged(notebook, parameters, output, log, head, expected, lambda terminal: [terminal] if verbose else [])


def run_with(notebook: Path, parameters: dict[str, object], folder: Path, expected: float | None = None) -> None:
    """Execute ``notebook`` with these parameters; its copy and log in ``folder``, what it says in the terminal."""
    log, output = folder / f"{notebook.stem}.log", folder / notebook.name
    _logged(notebook, parameters, output, log, notebook.stem, expected, lambda terminal: [Said(terminal)])


def _logged(
    notebook: Path, parameters: dict[str, object], output: Path, log: Path, head: str, expected: float | None,
    others: Callable[[TextIO], list[TextIO]],
) -> None:  # fmt: skip
    """Execute ``notebook``; what it says goes to ``log``, and to what ``others`` makes of the terminal."""
    _stop_with_parent()
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, _output_in(file) as terminal:
        with Line(head, expected, [file, *others(terminal)], terminal) as line:
            execute(notebook, parameters, output)
            line.last = f"done in {clock(time.monotonic() - start)}"
        print(f"done in {time.monotonic() - start:.1f} s", file=file)


class Said:
    """A terminal that is told only the lines that say how much time is left."""

    def __init__(self, out: TextIO):
        self._out = out

    def write(self, text: str) -> None:
        """Lines of :meth:`paper_src.cutting.progress.Progress.say`."""
        for line in text.splitlines():
            if line.endswith(" left)"):
                print(f"\r\x1b[K{line}" if self._out.isatty() else line, file=self._out, flush=True)

    def flush(self) -> None:
        """Nothing is held."""


def execute(notebook: Path, parameters: dict[str, object], output: Path) -> None:
    """Execute ``notebook`` into ``output``; on failure ``<name>.failed.ipynb`` beside it shows where.

    Raises:
        InputError: a cell failed, the kernel died, or the disk is full; one line.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    how = {"kernel_name": "python3", "log_output": True, "progress_bar": False, "cwd": str(notebook.parent)}
    try:
        with TemporaryDirectory(prefix="kernel-") as sockets:  # kernels that start together share no port, no socket
            local = Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets, "socket"))})
            papermill.execute_notebook(str(notebook), str(failed), parameters, config=local, **how)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''}"
        raise InputError(f"{notebook.stem} failed. {reason} (cells: {failed})") from error
    except DeadKernelError as error:
        raise InputError(f"{notebook.stem}: the kernel died, most likely out of memory (cells: {failed})") from error
    except OSError as error:
        raise InputError(f"cannot write {failed} ({error.strerror}): free space or choose another folder") from error
    os.replace(failed, output)


def seconds_before(log: Path, committed: Path | None = None) -> float | None:
    """Seconds that a notebook took the last time here, or else in the committed run; None where nobody knows."""
    if log.is_file() and (found := DONE.search(log.read_text(encoding="utf-8", errors="replace"))):
        return float(found.group(1))
    record = committed and committed / f"{log.stem}.json"
    return json.loads(record.read_text(encoding="utf-8"))["wall_s"] if record and record.is_file() else None


def clock(seconds: float) -> str:
    """Seconds as 2:10 or 1:02:10.

    >>> clock(130.4), clock(3730)
    ('2:10', '1:02:10')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Line(logging.Handler):
    """How far a notebook is: one line, rewritten each second in a terminal, in a log a further one every 30 s.

    Hears from papermill what the kernel says, copies it to files and takes the step from its progress bars.

    Args:
        head: number and name of the notebook.
        expected: seconds that it takes, if known.
        copies: where the output goes; if ``out`` is one of them, the line is not rewritten.
        out: where the line goes.
    """

    def __init__(self, head: str, expected: float | None, copies: list[TextIO], out: TextIO):
        super().__init__(logging.INFO)
        self.head, self.expected, self.copies, self.out = head, expected, copies, out
        self.step, self.last, self.rewritten = "", "failed", out.isatty() and out not in copies
        self._start, self._over, self._logger = time.monotonic(), threading.Event(), logging.getLogger("papermill")
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Line":
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._over.set()
        self._thread.join()
        self._write(f"{self.head}  {self.last}", end="\n")

    def emit(self, record: logging.LogRecord) -> None:
        """One message of papermill."""
        text = record.getMessage()
        if text.startswith("Executing Cell"):
            self.step = ""
        elif text.strip() and not NOISE.match(text):
            for found in STEP.finditer(text):
                self.step = f"{found[1]} {found[2]}" if found[1] else f"{found[3]} {found[4]}/{found[5]}"
            for copy in self.copies:
                print(text.rstrip("\n"), file=copy, flush=True)

    def text(self, spent: float) -> str:
        """The line after ``spent`` seconds: the step at work, the time, and what is left if it takes as long again."""
        left = f", about {clock(self.expected - spent)} left" if self.expected and self.expected > spent else ""
        return f"{self.head}  {f'{self.step}  ' if self.step else ''}{clock(spent)}{left}"

    def _watch(self) -> None:
        while not self._over.wait(1 if self.rewritten else 30):
            self._write(self.text(time.monotonic() - self._start), end="" if self.rewritten else "\n")

    def _write(self, text: str, end: str) -> None:
        if self.rewritten:
            width = os.get_terminal_size(self.out.fileno()).columns or 80
            text = f"\r\x1b[K{text[: width - 1]}"
        print(text, end=end, file=self.out, flush=True)


@contextmanager
def _output_in(file: TextIO) -> Iterator[TextIO]:
    """What this process and the kernel it starts write goes to ``file``; gives where standard error went before."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with os.fdopen(os.dup(2), "w", encoding="utf-8") as terminal:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield terminal
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _stop_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps; the kernel then ends by itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
