"""What ``./reproduce.sh cut`` does: notebook 10, by papermill, with the words that ``cut-layers`` takes."""

import sys
from pathlib import Path

from paper_src.cutting.__main__ import parser, requested, status
from paper_src.reporting import run

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "10_your_model.ipynb"


def main(words: list[str] | None = None) -> int:
    """Cut a model as the words ask for; see :func:`paper_src.cutting.__main__.status`."""
    command = parser()
    command.prog = "./reproduce.sh cut"
    given = vars(command.parse_args(words))
    given |= {"model": _absolute(given["model"]), "texts": [_absolute(name) for name in given["texts"]]}
    given |= {"out": str(Path(given["out"]).expanduser().resolve()), "layers": list(given["layers"])}
    return status(lambda: _run(given))


def _run(given: dict[str, object]) -> None:
    requested(given)
    run.run_with(NOTEBOOK, given, Path(f"{given['out']}.run"))
    print(f"saved: {given['out']} (open {given['out']}/report.html)")


def _absolute(name: str) -> str:
    """A path that exists, from wherever the notebook is run; another name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


if __name__ == "__main__":
    sys.exit(main())
