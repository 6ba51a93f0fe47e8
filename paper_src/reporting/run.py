"""Run one notebook with one profile's parameters; the executed copy appears only if all went well.

    python -m paper_src.execute notebooks/01_importance.ipynb --profile profiles/tiny.yaml --results results/tiny

Called by the rules of the Snakefile. Order, skipping and parallel runs are Snakemake's, execution is
papermill's; what is added here is that a wrong parameter is an error and that an error is one line.
"""

import argparse
import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from paper_src import InputError
from paper_src.files import replacing
from paper_src.reporting.parameters import check_profile, parameters_for

# over files and not over TCP ports, which kernels that start together take from one another
LOCAL = Config(KernelManager={"transport": "ipc"})
NOISE = re.compile(r"(Executing|Ending) Cell|(In|Out)put Notebook|Working dir|Executing notebook")


def run(notebook: Path, parameters: dict[str, object], output: Path) -> None:
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


def summary(results: Path, since: float) -> str:
    """What ran, was kept or is missing, with seconds, and where to look."""
    lines = []
    for notebook in sorted(Path("notebooks").glob("*.ipynb")):
        record = results / "tables" / f"{notebook.stem}.json"
        done = results / "notebooks" / notebook.name
        if not done.is_file():
            state = "failed" if done.with_name(f"{notebook.stem}.failed.ipynb").exists() else "not run"
        else:
            wall = json.loads(record.read_text())["wall_s"]
            state = f"{'ran ' if done.stat().st_mtime >= since else 'kept'} {wall:8.1f} s"
        lines.append(f"  {notebook.stem:<20} {state}")
    where = f"  {results}/: tables, figures, models, executed notebooks; SUMMARY.md is in {results}/"
    return "\n".join([*lines, where])


def publish(results: Path, target: Path = Path()) -> None:
    """Copy tables, figures, page and summary of ``results`` to the top of the repository, each file whole."""
    files = [file for folder in ("tables", "figures", "report") for file in sorted((results / folder).glob("[!.]*"))]
    for file in [*files, *results.glob("SUMMARY*.md")]:
        _copy(file, target / file.relative_to(results))
    for language in ("", ".zh-CN"):
        readme, summary = target / f"README{language}.md", target / f"SUMMARY{language}.md"
        if readme.exists() and summary.exists():
            fill_readme(readme, summary.read_text(encoding="utf-8"))


def publish_larger(results: Path, target: Path = Path()) -> None:
    """Copy tables and figures of sections 5 to 7 of ``results``, those whose budgets are larger, to ``<...>/long``."""
    for folder in ("tables", "figures"):
        for file in sorted((results / folder).glob("[tf0][567]_*.*")):
            _copy(file, target / folder / "long" / file.name)


def _copy(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists() or place.read_bytes() != file.read_bytes():
        with replacing(place) as part:
            part.write_bytes(file.read_bytes())


def claims_block(summary: str) -> str:
    """The first table of a summary, that of the claims: claim, finding, verdict, rule, notebook and command."""
    first = next(part for part in summary.split("\n\n") if part.startswith("| "))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    head, _, *body = rows
    lines = [[*head, "`./reproduce.sh --only`"], ["---"] * 6]
    for *said, source in body:
        notebooks = re.findall(r"\d\d_[a-z]+", source)
        links = ", ".join(f"[{name[:2]}](notebooks/{name}.ipynb)" for name in notebooks)
        larger = " --profile long" if source.startswith("long/") else ""
        lines.append([*said, links, f"`{notebooks[0]}{larger}`"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill_readme(readme: Path, summary: str) -> None:
    """Put the table of claims between the two marks of a README, so that its numbers are the tables'."""
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(" kept equal by ./reproduce.sh -->", 1)
    tail = rest.split("<!-- /claims -->", 1)[1]
    new = f"{head} kept equal by ./reproduce.sh -->\n{claims_block(summary)}\n<!-- /claims -->{tail}"
    if new != text:
        with replacing(readme) as part:
            part.write_text(new, encoding="utf-8")


def main() -> int:
    """Command line; 0 on success, 1 with one line on standard error otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path, nargs="?")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--data-dir", dest="data_dir")
    parser.add_argument("--check", action="store_true", help="only check the profile")
    parser.add_argument("--publish", action="store_true", help="only copy results to tables/ and figures/")
    parser.add_argument("--summary", type=float, metavar="SINCE", help="only print what ran since then")
    arguments = parser.parse_args()
    try:
        if arguments.summary is not None:
            print(summary(arguments.results, arguments.summary))
        elif arguments.publish:
            (publish_larger if arguments.results.name == "long" else publish)(arguments.results)
        elif arguments.check:
            check_profile(arguments.profile)
        else:
            _run_with(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_output(record: logging.LogRecord) -> bool:
    """Keep what cells print; papermill's own account of cells and files is not shown."""
    text = record.getMessage()
    return bool(text.strip()) and not NOISE.match(text)


def _stop_with_parent() -> None:
    """End this process when the one that started it is gone, killed perhaps; the kernel then ends by itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_with(arguments: argparse.Namespace) -> None:
    _stop_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_output)
    given = {key: getattr(arguments, key) for key in ("model", "device", "data_dir") if getattr(arguments, key)}
    overrides = {**given, "results": os.path.relpath(arguments.results, "notebooks")}
    output = arguments.results / "notebooks" / arguments.notebook.name
    start = time.time()
    print(f"{arguments.notebook.stem}: running", file=sys.stderr, flush=True)
    run(arguments.notebook, parameters_for(arguments.notebook, arguments.profile, overrides), output)
    print(f"{arguments.notebook.stem}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
