"""Command line: python -m paper_src.reporting {run,check,publish,summary,page} ..."""

import argparse
import sys
from pathlib import Path

from paper_src import InputError


def run(use: argparse.Namespace) -> None:  # each command imports what it needs alone
    """Execute one notebook."""
    from paper_src.reporting import run

    given = {key: getattr(use, key) for key in ("model", "device", "data_dir") if getattr(use, key)}
    run.run(use.notebook, use.profile, use.results, given, use.verbose)


def check(use: argparse.Namespace) -> None:
    """Check every parameter of a profile."""
    from paper_src.reporting import parameters

    parameters.check_profile(use.profile)


def publish(use: argparse.Namespace) -> None:
    """Copy results to tables/, figures/ and SUMMARY.md."""
    from paper_src.reporting import publish

    publish.publish(use.results)


def summary(use: argparse.Namespace) -> None:
    """Print what ran, in how many seconds, and where to look."""
    from paper_src.reporting import publish

    print(publish.summary(use.results, use.since))


def page(use: argparse.Namespace) -> None:
    """Make one page of the tables, figures and summary in a folder, and of the notebooks."""
    from paper_src.reporting import page

    page.build(use.source, use.target)


COMMANDS = {
    run: ["notebook", "--profile", "--results", "--model", "--device", "--data-dir", "--verbose"],
    check: ["profile"],
    publish: ["results"],
    summary: ["results", "--since"],
    page: ["source", "target"],
}
KINDS = {
    "--model": {},
    "--device": {},
    "--data-dir": {},
    "--verbose": {"action": "store_true", "help": "show what the notebook prints"},
    "--since": {"type": float, "default": 0.0, "help": "time before which a notebook counts as kept"},
    "--profile": {"type": Path, "required": True},
    "--results": {"type": Path, "required": True},
}


def main(words: list[str] | None = None) -> int:
    """0 on success, 1 with one line on standard error for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m paper_src.reporting")
    commands = parser.add_subparsers(required=True)
    for command, names in COMMANDS.items():
        part = commands.add_parser(command.__name__, help=command.__doc__)
        part.set_defaults(act=command)
        for name in names:
            part.add_argument(name, **KINDS.get(name, {"type": Path}))
    use = parser.parse_args(words)
    try:
        use.act(use)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
