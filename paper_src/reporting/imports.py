"""Which modules of this package a notebook or module imports, directly or through others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat


def modules_of(path: Path, root: Path = Path()) -> list[str]:
    """Paths, relative to ``root``, of all modules of ``paper_src`` that ``path`` (.ipynb or .py) needs."""
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        for module in _imported(waiting.pop(), root):
            if module not in found:
                found[module] = None
                waiting.append(module)
    return sorted(str(module.relative_to(root)) for module in found)


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """The modules that one file imports, with the packages around them."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] != "paper_src":
                continue
            places = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
            yield from (place for place in [*places, root.joinpath(*parts).with_suffix(".py")] if place.is_file())
