"""Prepares notebooks for regression tests: tiny parameters in, baseline outputs in, cell by cell."""

from pathlib import Path

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from paper_src.reporting.parameters import parameters_for

ROOT = Path(__file__).parents[2]
BASELINE = Path(__file__).with_name("baseline")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))  # of the paper
EVERY = sorted((ROOT / "notebooks").glob("*.ipynb"))


def prepared(notebook: Path, results: Path, folder: Path) -> Path:
    """A copy of ``notebook`` with the tiny profile's parameters and the baseline's outputs, cell by cell."""
    values = parameters_for(notebook, ROOT / "profiles" / "tiny.yaml", {"results": str(results)})
    book = parameterize_notebook(load_notebook_node(str(notebook)), values)
    known = baseline_outputs(notebook.name)
    for index, cell in enumerate(book.cells):
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell["id"] = "injected-parameters"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = known.get(cell["id"], ([], index))
    book.metadata.pop("papermill", None)
    path = folder / notebook.name
    nbformat.write(book, path)
    return path


def baseline_outputs(name: str) -> dict[str, tuple[list, int]]:
    """Cell id -> outputs and execution count of the committed baseline; empty where there is none."""
    path = BASELINE / name
    if not path.is_file():
        return {}
    book = nbformat.read(path, as_version=4)
    return {cell["id"]: (cell.outputs, cell.execution_count) for cell in book.cells if cell.cell_type == "code"}
