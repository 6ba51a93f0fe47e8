"""What a notebook depends on and what it makes, read from its source: modules, tables and figures."""

import ast
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Files(NamedTuple):
    """Names of tables and figures that a notebook makes, and of the tables of other notebooks that it reads."""

    tables: list[str]
    figures: list[str]
    reads: list[str]


def files_of(notebook: Path, root: Path = Path()) -> Files:
    """What ``notebook`` writes by ``paper.table`` and ``paper.figure``, and reads of others.

    Made is what is named in a call outside of any condition: what is made only where its data are is no promise.
    Read is every name of another notebook's table in the notebook, or in its own file of ``sections`` as the argument
    of a function ``read``, unless it is of a larger run (``long/...``).
    """
    source = code_of(notebook)
    tree = ast.parse(source)
    made: dict[str, list[str]] = {"table": [], "figure": []}
    for call in _unconditional_calls(tree):
        if isinstance(call.func, ast.Attribute) and call.func.attr in made and len(call.args) == 2:
            made[call.func.attr] += [arg.value for arg in call.args[1:] if isinstance(arg, ast.Constant)]
    names = set(strings_in(source))
    section = root / "paper_src" / "sections" / f"{notebook.stem[3:]}.py"
    names |= _read_in(section) if section.is_file() else set()
    foreign = re.compile(rf"t(?!{int(notebook.stem[:2])}_)\d+_\w+")
    return Files(made["table"], made["figure"], sorted(name for name in names if foreign.fullmatch(name)))


def strings_in(source: str) -> list[str]:
    """All string constants of a piece of Python, in the order in which they are written."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return [node.value for node in nodes if isinstance(node.value, str)]


def _unconditional_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.If | ast.Try):
            yield from _unconditional_calls(node)
    if isinstance(tree, ast.Call):
        yield tree


def _read_in(module: Path) -> set[str]:
    """Constants that a module hands to functions of the name ``read``."""
    calls = [node for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    reads = [arg for call in calls if getattr(call.func, "id", "") == "read" for arg in call.args]
    return {arg.value for arg in reads if isinstance(arg, ast.Constant)}


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
    source = code_of(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for name in _names(source):
        parts = name.split(".")
        places = [root.joinpath(*parts[:n], "__init__.py") for n in range(1, len(parts) + 1)]
        yield from (place for place in [*places, root.joinpath(*parts).with_suffix(".py")] if place.is_file())


@functools.cache  # most notebooks need most modules
def _names(source: str) -> list[str]:
    """What a piece of Python imports of this package, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.split(".")[0] == "paper_src"]


def code_of(notebook: Path, tag: str | None = None) -> str:
    """Python of all code cells of a notebook, or of those with a tag. (nbformat takes seconds to import.)"""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in code if not tag or tag in cell["metadata"].get("tags", []))
