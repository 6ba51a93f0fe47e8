"""Command line: scores of a model from one process or many, and the cells and the table of a sweep.

python -m paper_src.scale scores owner/name scores.csv
torchrun --nproc-per-node 8 -m paper_src.scale scores owner/name scores.csv --sequences 4096 --leave-one-out 64
python -m paper_src.scale cell owner/name scores.csv cell.csv --score fisher --strategy top_k --k 8
python -m paper_src.scale table sweep.csv cell.csv ...
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import pandas as pd

from paper_src import InputError
from paper_src.scale import launch, scores, sweep
from paper_src.support.files import replacing

ENDED = "another process of this run has ended: no table was written"


def table(use: argparse.Namespace) -> pd.DataFrame:
    """Put the cells of a sweep in one table."""
    return pd.concat(map(pd.read_csv, use.cells))


COMMANDS = {
    scores.scores: {"model": {"help": "registry name, local folder or .gguf, or hub id"}, "output": {},
                    "--sequences": 64, "--batch-size": 8, "--leave-one-out": 0, "--shapley": 0.0, "--seed": 0},
    sweep.cell: {"model": {}, "scores": {}, "output": {}, "--strategy": "top_k", "--score": "fisher", "--k": 8,
                 "--blocks": 8, "--seed": 0},
    table: {"output": {}, "cells": {"nargs": "+"}},
}  # fmt: skip
OF_A_MODEL = {"--text": "wikitext-2", "--length": 128, "--dtype": "auto", "--device": "auto"}
HELP = {"--leave-one-out": "number of windows; 0: no", "--shapley": "standard error at which to stop; 0: no",
        "--device": "cpu, cuda, disk (weights are read when needed), spread"}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """All commands; an option's type is that of its default."""
    top = argparse.ArgumentParser(prog="python -m paper_src.scale", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True)
    for command, options in COMMANDS.items():
        part = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0])
        part.set_defaults(act=command)
        for name, default in {**options, **(OF_A_MODEL if "model" in options else {})}.items():
            own = {"default": default, "type": type(default), "help": HELP.get(name)}
            part.add_argument(name, **(default if isinstance(default, dict) else own))
    return top


def main(words: list[str] | None = None) -> None:
    """Ends with 1 and one line on standard error for what the user can mend, and when another process has died."""
    use = parser().parse_args(words)
    signal.signal(signal.SIGTERM, lambda *ignored: _stop(ENDED))  # the launcher ends all when one has died
    try:
        with launch.started() as use.processes:
            frame = use.act(use)
            if use.processes.rank == 0:
                with replacing(Path(use.output)) as part:
                    frame.to_csv(part, index=False)
                print(f"{len(frame)} rows: {use.output}", flush=True)
    except (InputError, FileNotFoundError) as error:
        _stop(str(error))
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        _stop(f"{ENDED} ({str(error).splitlines()[0][:120]})")


def _stop(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # other threads may wait for the dead process


if __name__ == "__main__":
    main()
