"""The whole paper as one page, from the executed notebooks: readable offline and on a phone.

python -m paper_src.page results/laptop report/index.html
"""

import html
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
from jinja2 import Environment, StrictUndefined
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from paper_src import InputError
from paper_src.files import replacing

TEMPLATE = Path(__file__).with_name("page.html.j2")
MADE = re.compile(r"""paper\.(table|figure)\(.*["']([tf]\d_\w+)["']\)""")  # one a line, the last name on it
SIZES = ("sequences", "blocks", "test_blocks", "valid_blocks", "judged", "length", "random_draws", "draws", "rounds",
         "items")  # fmt: skip
NO_ALT = "No description has been provided for this image"


def build(results: Path, target: Path) -> Path:
    """Write the page of a profile's results to ``target``; returns it.

    Args:
        results: folder with ``notebooks`` (executed), ``tables`` and ``SUMMARY.md``.
        target: the page; its links go to ``../tables`` and ``../notebooks``.

    Raises:
        InputError: the profile was not run to the end.
    """
    books = sorted((results / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    books = [path for path in books if not path.stem.endswith(".failed")]
    summary = results / "SUMMARY.md"
    if not books or not summary.is_file():
        raise InputError(f"{results} holds no finished run: run ./reproduce.sh first")
    sections = [_section(path, results / "tables" / f"{path.stem}.json") for path in books]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=_linked(_scrolling(markdown2html(summary.read_text(encoding="utf-8")))), sections=sections
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def _section(path: Path, record: Path) -> dict[str, object]:
    """Title, body and provenance of one executed notebook."""
    provenance = json.loads(record.read_text(encoding="utf-8"))
    book = nbformat.read(path, as_version=4)
    title = next(cell.source for cell in book.cells if cell.cell_type == "markdown").splitlines()[0].lstrip("# ")
    captions: list[str] = []
    cells = [part for cell in book.cells for part in _shown(cell, provenance, captions)]
    cells[0].source = cells[0].source.split("\n", 1)[1]  # the title stands in the page's own heading
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=cells))
    for caption in captions:
        body = body.replace(NO_ALT, html.escape(caption, quote=True), 1)
    parameters = {name: json.dumps(value) for name, value in provenance["parameters"].items()}
    return {"name": path.stem, "title": html.escape(title), "body": _scrolling(body), "parameters": parameters,
            **_origin(provenance)}  # fmt: skip


def _shown(cell: NotebookNode, provenance: Mapping, captions: list[str]) -> list[NotebookNode]:
    """The cell as it is shown: results without progress bars, and a caption behind what was written."""
    if cell.cell_type != "code":
        return [nbformat.v4.new_markdown_cell(cell.source)]
    outputs = [out for out in cell.outputs if not (out.output_type == "stream" and out.name == "stderr")]
    parts = [nbformat.v4.new_code_cell(cell.source, outputs=outputs)] if outputs else []
    for found in MADE.finditer(cell.source):
        caption, link = _caption(cell.source, *found.groups(), provenance)
        captions += [caption] if found.group(1) == "figure" else []
        parts.append(nbformat.v4.new_markdown_cell(f"*{caption}* {link}"))
    return parts


def _caption(source: str, kind: str, name: str, provenance: Mapping) -> tuple[str, str]:
    """What a table or figure shows, of which model, with which seed; and a link to its data and notebook."""
    what = ""
    if kind == "figure" and (drawn := re.search(r"(\w+)_section\.(f\d_\w+)\(", source)):
        section = importlib.import_module(f"paper_src.sections.{drawn.group(1)}")
        what = getattr(section, drawn.group(2)).__doc__.strip().splitlines()[0] + " "
    model = provenance["model"]
    by = f"{model['name']}, {model['dtype'].removeprefix('torch.')}; " if model else ""
    seed = provenance["parameters"].get("seed")
    with_seed = "" if seed is None else f"seed {seed}; "
    data = f"../tables/{name}.csv" if kind == "table" else f"../figures/{name}.svg"
    return (f"{name}. {what}{by}{with_seed}{_size(provenance['parameters'])}",
            f"[data]({data}), [notebook](../notebooks/{provenance['notebook']}.ipynb)")  # fmt: skip


def _size(parameters: Mapping[str, object]) -> str:
    """How much text, how many draws and timed rounds, as far as the notebook says."""
    found = [f"{name.replace('_', ' ')} {parameters[name]}" for name in SIZES if name in parameters]
    return ", ".join(found) or "from tables"


def _origin(provenance: Mapping) -> dict[str, str]:
    model = provenance["model"] or {"name": "none", "dtype": "none"}
    return {
        "model": f"{model['name']}, {model['dtype'].removeprefix('torch.')}",
        "commit": provenance["git"]["commit"][:10] + (" (changed)" if provenance["git"]["dirty"] else ""),
        "wall": f"{provenance['wall_s']:.0f} s on {provenance['device']}, {provenance['machine']['threads']} threads",
    }


def _scrolling(text: str) -> str:
    """Tables in boxes that scroll by themselves, so that the page does not."""
    return text.replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")


def _linked(text: str) -> str:
    """Names of tables and notebooks as links to them."""
    text = re.sub(r"\b(t\d_[a-z0-9_]+)\b(?!\.csv)", r'<a href="../tables/\1.csv">\1</a>', text)
    return re.sub(r"(?<![/\w])(\d\d_[a-z]+)\b(?!\.ipynb)", r'<a href="../notebooks/\1.ipynb">\1</a>', text)


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), Path(sys.argv[2]))
    except (InputError, IndexError) as error:
        sys.exit(f"error: {error}" if isinstance(error, InputError) else __doc__)
