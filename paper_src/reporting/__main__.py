"""Command line: python -m paper_src.reporting {run,check,publish,summary,page,across} ..."""

import argparse
import sys
from pathlib import Path

from paper_src import InputError


def parser() -> argparse.ArgumentParser:
    """Commands and their arguments; ``./reproduce.sh`` and the Snakefile call them."""
    top = argparse.ArgumentParser(prog="python -m paper_src.reporting")
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute one notebook")
    run.add_argument("notebook", type=Path)
    run.add_argument("--profile", type=Path, required=True)
    run.add_argument("--results", type=Path, required=True)
    run.add_argument("--model")
    run.add_argument("--device")
    run.add_argument("--data-dir", dest="data_dir")
    run.add_argument("--verbose", action="store_true", help="show what the notebook prints")

    check = commands.add_parser("check", help="check every parameter of a profile")
    check.add_argument("profile", type=Path)

    publish = commands.add_parser("publish", help="copy results to tables/, figures/ and SUMMARY.md")
    publish.add_argument("results", type=Path)

    summary = commands.add_parser("summary", help="what ran, in how many seconds, and where to look")
    summary.add_argument("results", type=Path)
    summary.add_argument("--since", type=float, default=0.0, help="time before which a notebook counts as kept")

    page = commands.add_parser("page", help="the paper as one page")
    page.add_argument("source", type=Path, help="folder with tables, figures and SUMMARY.md")
    page.add_argument("target", type=Path, help="the page, in a folder beside those")

    across = commands.add_parser("across", help="several models in one table")
    across.add_argument("table", type=Path, help="written as .csv and .md")
    across.add_argument("tables", type=Path, nargs="+", help="folders of tables of whole runs")
    return top


def act(use: argparse.Namespace) -> None:
    """Do what the command line says; each command imports what it needs alone."""
    if use.command == "run":
        from paper_src.reporting.run import run

        given = {key: getattr(use, key) for key in ("model", "device", "data_dir") if getattr(use, key)}
        run(use.notebook, use.profile, use.results, given, use.verbose)
    elif use.command == "check":
        from paper_src.reporting.parameters import check_profile

        check_profile(use.profile)
    elif use.command == "publish":
        from paper_src.reporting.publish import publish

        publish(use.results)
    elif use.command == "summary":
        from paper_src.reporting.publish import summary

        print(summary(use.results, use.since))
    elif use.command == "page":
        from paper_src.reporting.page import build

        build(use.source, use.target)
    elif use.command == "across":
        from paper_src.reporting.across import write

        write(use.table, use.tables)


def main(words: list[str] | None = None) -> int:
    """0 on success, 1 with one line on standard error for what the user can mend."""
    try:
        act(parser().parse_args(words))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
