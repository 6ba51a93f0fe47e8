"""Plain-text progress bars: a line in JupyterLab; ``run`` reads the step in the line it shows from them."""

from collections.abc import Callable, Iterable

from tqdm import tqdm


def progress(items: Iterable, what: str) -> Iterable:
    """``items`` with a plain-text bar that is drawn anew every 10 s."""
    return tqdm(items, desc=what, mininterval=10, ascii=True, ncols=79)


def progress_bar(what: str) -> Callable[[Iterable], Iterable]:
    """:func:`progress` as a function of the iterable alone."""
    return lambda items: progress(items, what)
