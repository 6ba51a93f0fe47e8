"""The house rules that a program can check: where imports point, how long functions and files are."""

import ast
from pathlib import Path

import pytest

from paper_src.reporting.graph import modules_of

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "paper_src").rglob("*.py"))
METHOD = {str(path.relative_to(ROOT)) for path in (ROOT / "paper_src").glob("*.py")}
PARTS = {
    "baselines": ("baselines",),
    "recommendation": ("recommendation",),
    "scale": ("scale",),
    "cutting": ("cutting", "scale", "reporting"),
    "sections": ("baselines", "recommendation", "scale", "sections", "reporting"),
}


def needed(path):
    """Modules that a module imports, itself and directly or through others, without those of packages' beginnings."""
    return {name for name in modules_of(path, ROOT) if not name.endswith("__init__.py")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "paper_src")))
def test_imports_point_one_way(path):
    part = path.relative_to(ROOT / "paper_src").parts[0] if path.parent.name != "paper_src" else ""
    found = needed(path)
    if part == "reporting":
        assert found & METHOD == set()
    allowed = ("support", *PARTS.get(part, ("reporting",) if part == "reporting" else ()))
    known = set() if part in ("support", "reporting") else METHOD
    strangers = [name for name in found - known if not name.startswith(tuple(f"paper_src/{part}/" for part in allowed))]
    assert strangers == []
    assert str(path.relative_to(ROOT)) not in found, "a cycle"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "paper_src")))
def test_functions_fit_a_screen(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 40] == []


def test_the_method_is_thin():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert sum(count for path, count in lines.items() if path.parent.name == "paper_src") <= 3420
    assert sum(lines.values()) <= 14000
    assert max(count for path, count in lines.items() if path.parent.name != "paper_src") <= 300
