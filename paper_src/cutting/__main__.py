"""Command line: ``cut-layers MODEL --keep 0.75 --out FOLDER``, or ``python -m paper_src.cutting``."""

import argparse
import sys
from collections.abc import Callable

from paper_src import InputError
from paper_src.cutting.request import CHOICES, Request


def number(word: str) -> float:
    """A whole number as such: 1 is a layer, 1.0 is no share."""
    return int(word) if word.isdecimal() else float(word)


def numbers(word: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return tuple(int(part) for part in word.split(","))


def parser() -> argparse.ArgumentParser:
    """Of the words that ``cut-layers`` and ``./reproduce.sh cut`` take."""
    made = argparse.ArgumentParser(
        prog="cut-layers",
        description="Cut whole layers out of a language model, repair what is left, and test it. A run that is killed "
        "goes on when the same command is given again.",
    )
    made.add_argument("model", metavar="MODEL", help="a folder, a .gguf file, a hub id, or a registry name")
    size = made.add_mutually_exclusive_group(required=True)
    size.add_argument("--keep", type=number, default=0, help="layers to keep: a share such as 0.75, or their number")
    size.add_argument("--speed", type=float, default=0.0, help="or how many times as fast, such as 1.5")
    size.add_argument("--layers", type=numbers, default=(), help="or the layers that stay, such as 0,1,2,5,9")
    made.add_argument("--out", required=True, metavar="FOLDER", help="of the new checkpoint and its report.html")
    made.add_argument("--minutes", type=float, default=20.0, help="in all, about (default: 20)")
    made.add_argument("--text", nargs="+", default=[], metavar="TEXT", dest="texts",
                      help="files, folders or names (default: wikitext-2, and what the model writes)")  # fmt: skip
    made.add_argument("--strategy", default="", choices=CHOICES, metavar="NAME",
                      help=f"how layers are chosen: {', '.join(CHOICES)} (default: several, and the best)")  # fmt: skip
    made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    made.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], metavar="NAME",
                      help="float32, bfloat16 (default: what the hardware multiplies in)")  # fmt: skip
    made.add_argument("--seed", type=int, default=0)
    return made


def requested(given: dict[str, object]) -> Request:
    """What the words of :func:`parser` ask for, checked."""
    return Request(**given | {"texts": tuple(given["texts"])}).checked()


def status(act: Callable[[], object]) -> int:
    """0 on success, 1 with one line on standard error for what the user can mend, 130 where it was stopped."""
    try:
        act()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _cut(given: dict[str, object]) -> None:
    request = requested(given)
    from paper_src.cutting.cut import cut  # Transformers takes seconds

    cut(**vars(request))


def main(words: list[str] | None = None) -> int:
    """Cut a model as the words ask for; see :func:`status`."""
    given = vars(parser().parse_args(words))
    return status(lambda: _cut(given))


if __name__ == "__main__":
    sys.exit(main())
