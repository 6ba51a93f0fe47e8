"""What ``./reproduce.sh cut`` does: notebook 10, by papermill, with the words that ``cut-layers`` takes."""

import sys
from pathlib import Path

from paper_src import InputError
from paper_src.cutting.__main__ import parser
from paper_src.cutting.request import Request
from paper_src.reporting import run

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "10_your_model.ipynb"


def main(words: list[str] | None = None) -> int:
    """0 on success, 1 with one line on standard error for what the user can mend, 130 where it was stopped."""
    command = parser()
    command.prog = "./reproduce.sh cut"
    given = vars(command.parse_args(words))
    given |= {"model": _absolute(given["model"]), "texts": [_absolute(name) for name in given["texts"]]}
    given["out"] = str(Path(given["out"]).expanduser().absolute())
    try:
        Request(**given | {"texts": tuple(given["texts"])}).checked()
        run.run_with(NOTEBOOK, given, Path(f"{given['out']}.run"), 60 * given["minutes"])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    print(f"saved: {given['out']} (open {given['out']}/report.html)")
    return 0


def _absolute(name: str) -> str:
    """A path that exists, from wherever the notebook is run; another name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


if __name__ == "__main__":
    sys.exit(main())
