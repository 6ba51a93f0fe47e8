"""Plain-text progress bars."""

from collections.abc import Callable, Iterable

from tqdm import tqdm


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """``items`` with a plain-text bar: a line in JupyterLab and in a terminal, one every 10 s in a log."""
    return tqdm(items, desc=what, total=total, mininterval=10, ascii=True, ncols=79)


def progress_bar(what: str) -> Callable[[Iterable], Iterable]:
    """:func:`progress` as a function of the iterable alone."""
    return lambda items: progress(items, what)
