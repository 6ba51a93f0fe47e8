"""Run one notebook with one profile's parameters; the executed copy appears only if all went well.

Order, skipping and parallel runs are Snakemake's, execution is papermill's. Added here: a wrong parameter is an
error, an error is one line, and so is what is told while it runs. What the notebook prints goes to a log.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from paper_src import InputError
from paper_src.reporting.parameters import parameters_for

# over files and not over TCP ports, which kernels that start together take from one another
LOCAL = Config(KernelManager={"transport": "ipc"})
NOISE = re.compile(r"Ending Cell|(In|Out)put Notebook|Working dir|Executing notebook")
# of tqdm's bars, but not of transformers' own, or in words
STEP = re.compile(r"(?:^|[\r\n])(?!Loading)([^\r\n|:]+): +\d+%\|[^|]*\| (\d+/\d+)|(step|epoch) (\d+) of (\d+)")
DONE = re.compile(r"done in ([\d.]+) s\n?\Z")  # the end of a log
COMMITTED = {"laptop": Path("tables"), "long": Path("tables/long")}  # provenance of profiles that were run before


def execute(notebook: Path, parameters: dict[str, object], output: Path) -> None:
    """Execute ``notebook`` into ``output``; on failure ``<name>.failed.ipynb`` beside it shows where.

    Raises:
        InputError: a cell failed, the kernel died, or the disk is full; one line.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook),
            str(failed),
            parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            log_output=True,
            progress_bar=False,
            config=LOCAL,
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue.splitlines()[0] if error.evalue else ''}"
        raise InputError(f"{notebook.stem} failed. {reason} (cells: {failed})") from error
    except DeadKernelError as error:
        raise InputError(f"{notebook.stem}: the kernel died, most likely out of memory (cells: {failed})") from error
    except OSError as error:
        raise InputError(f"cannot write {failed} ({error.strerror}): free space or choose another folder") from error
    os.replace(failed, output)


def run(notebook: Path, profile: Path, results: Path, given: dict[str, str], verbose: bool = False) -> None:
    """Execute ``notebook`` with the parameters of ``profile`` and those ``given``; one line says how far it is.

    Writes ``results/notebooks/<name>`` and ``results/logs/<name>.log``; the notebook writes tables and figures itself.
    """
    _stop_with_parent()
    overrides = {**given, "results": os.path.relpath(results, "notebooks")}
    parameters = parameters_for(notebook, profile, overrides)
    names = sorted(path.stem for path in notebook.parent.glob("*.ipynb"))
    log = results / "logs" / f"{notebook.stem}.log"
    head = f"[{names.index(notebook.stem) + 1}/{len(names)}] {notebook.stem}"
    expected, start = seconds_before(log, COMMITTED.get(results.name)), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, _output_in(file) as terminal:
        copies = [file, terminal] if verbose else [file]
        with Line(head, expected, terminal, terminal.isatty() and not verbose) as line, _heard(line, copies):
            execute(notebook, parameters, results / "notebooks" / notebook.name)
            line.end(f"done in {clock(time.monotonic() - start)}")
        print(f"done in {time.monotonic() - start:.1f} s", file=file)


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
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Line:
    """How far a notebook is: one line that is rewritten each second in a terminal, one more every 30 s in a log."""

    def __init__(self, head: str, expected: float | None, out: TextIO, rewritten: bool):
        self.head, self.expected, self.out, self.rewritten, self.step = head, expected, out, rewritten, ""
        self._start, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(1 if rewritten else 30,), daemon=True)

    def __enter__(self) -> "Line":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind and not self._over.is_set():
            self.end("failed")
        self._thread.join()

    def text(self, spent: float) -> str:
        """The line after ``spent`` seconds: what is at work, how long it took, how long it takes as last time."""
        left = f", about {clock(self.expected - spent)} left" if self.expected and self.expected > spent else ""
        return f"{self.head}  {f'{self.step}  ' if self.step else ''}{clock(spent)}{left}"

    def end(self, words: str) -> None:
        """The last form of the line."""
        self._over.set()
        self._write(f"{self.head}  {words}", last=True)

    def _watch(self, period: float) -> None:
        while not self._over.wait(period):
            self._write(self.text(time.monotonic() - self._start))

    def _write(self, text: str, last: bool = False) -> None:
        if self.rewritten:
            width = os.get_terminal_size(self.out.fileno()).columns or 80
            print(f"\r\x1b[K{text[: width - 1]}", end="\n" if last else "", file=self.out, flush=True)
        else:
            print(text, file=self.out, flush=True)


class _Heard(logging.Handler):
    """Copies what papermill hears from the kernel, and takes the step from its progress bars."""

    def __init__(self, line: Line, copies: list[TextIO]):
        super().__init__(logging.INFO)
        self.line, self.copies = line, copies

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("Executing Cell"):
            self.line.step = ""
        elif text.strip() and not NOISE.match(text):
            for found in STEP.finditer(text):
                self.line.step = " ".join(found.groups()[:2]) if found[1] else f"{found[3]} {found[4]}/{found[5]}"
            for copy in self.copies:
                print(text.rstrip("\n"), file=copy, flush=True)


@contextmanager
def _heard(line: Line, copies: list[TextIO]) -> Iterator[None]:
    logger, handler = logging.getLogger("papermill"), _Heard(line, copies)
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


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


if __name__ == "__main__":  # the former command line
    import sys

    from paper_src.reporting.__main__ import main

    sys.exit(main(["run", *sys.argv[1:]]))
