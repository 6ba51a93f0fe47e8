"""Program code and technical prose that every environment of this project holds: the sources of pinned packages.

All are under free licences (BSD; matplotlib's is PSF-like), and pinned in one version for all Pythons. They are read,
never run. A file belongs to one split, by a digest of its name: calibration and test text never share one.
"""

import ast
import functools
import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from paper_src import InputError

PACKAGES = ("scikit-learn", "matplotlib", "pandas")
TEXTS = ("package-code", "package-prose")
SPLITS = {"train": range(8), "valid": range(8, 9), "test": range(9, 10)}  # of the digest of a file's name, modulo 10
LONG = 400  # characters of a docstring that is prose: shorter ones say little more than a signature


def package_text(name: str, split: str) -> tuple[str, str]:
    """The text ``name`` of ``TEXTS`` of one split, and its SHA-256: code without docstrings, or long docstrings alone.

    Raises:
        InputError: one of ``PACKAGES`` is not installed.
    """
    return _texts(PACKAGES, split)[name]


@functools.lru_cache(maxsize=len(SPLITS))
def _texts(packages: Sequence[str], split: str) -> dict[str, tuple[str, str]]:
    """Both texts of one split with their digests: the files are read and parsed once for all that ask."""
    code, prose = zip(*(_parted(source) for source in _sources(packages, split)), strict=True)
    texts = "\n\n".join(code), "\n\n".join(filter(None, prose))
    return {name: (text, hashlib.sha256(text.encode()).hexdigest()) for name, text in zip(TEXTS, texts, strict=True)}


def _sources(packages: Sequence[str], split: str) -> Iterator[str]:
    """The Python files of one split, but for tests and what is written by machines (long lines)."""
    for package in packages:
        try:
            files = distribution(package).files or []
        except PackageNotFoundError as error:
            raise InputError(f"{package} is not installed: install this project's requirements, or name another text"
                             ) from error  # fmt: skip
        for path in sorted(files, key=str):
            if path.suffix != ".py" or "tests" in path.parts or path.parts[0] == "..":
                continue
            if int(hashlib.sha256(str(path).encode()).hexdigest(), 16) % 10 in SPLITS[split]:
                source = Path(path.locate()).read_text(encoding="utf-8")
                if source.strip() and max(map(len, source.splitlines())) < 200:
                    yield source


def _parted(source: str) -> tuple[str, str]:
    """A file's code, and its long docstrings."""
    lines, prose = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (text := ast.get_docstring(node)) is not None:
            place = node.body[0]
            lines[place.lineno - 1 : place.end_lineno] = [None] * (place.end_lineno - place.lineno + 1)
            if len(text) >= LONG:
                prose.append(text)
    return "\n".join(line for line in lines if line is not None), "\n\n".join(prose)
