"""The paper as one page, made of files that are committed: notebooks' sources, tables, figures, records, summary.

It reads well offline, on a phone and on paper, and can be made again at any time, without running anything.
"""

import ast
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pandas as pd
from jinja2 import Environment, StrictUndefined
from nbconvert.filters import markdown2html

from paper_src import InputError
from paper_src.reporting.graph import strings_in
from paper_src.support.files import replacing

TEMPLATE = Path(__file__).with_name("page.html.j2")
SECTIONS = Path(__file__).parents[1] / "sections"
ROWS, COLUMNS = 12, 10  # of a table that is shown; all of it is one link away
RAW = 300  # rows of a table that is made for machines, of which a link is enough
SIZES = ("sequences", "blocks", "test_blocks", "valid_blocks", "judged", "length", "random_draws", "draws", "rounds",
         "items")  # fmt: skip
FIGURE = re.compile(r"!\[[^\]]*\]\(figures/(\w+)\.\w+\)(?:\n\n\*([^\n]+)\*)?")


def build(source: Path, target: Path, notebooks: Path = Path("notebooks")) -> Path:
    """Write the page to ``target``; returns it.

    Args:
        source: folder with ``tables``, ``figures`` and ``SUMMARY.md``: the repository, or a profile's results.
        target: the page, one folder below ``source``: its links go to ``../tables``, ``../figures``, ``../notebooks``.
        notebooks: their sources.

    Raises:
        InputError: ``source`` holds no finished run.
    """
    summary = source / "SUMMARY.md"
    books = [path for path in sorted(notebooks.glob("*.ipynb")) if (source / "tables" / f"{path.stem}.json").is_file()]
    if not books or not summary.is_file():
        raise InputError(f"{source} holds no finished run: run ./reproduce.sh first")
    shown = re.split(r"(?m)^## (?=\d)", summary.read_text(encoding="utf-8"))[0]  # numbered parts: the notebooks' own
    first, *rest = re.split(r"(?m)^(?=## )", shown, maxsplit=1)
    page = Page(source, functions(SECTIONS), shown)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=html.escape(first.splitlines()[0].lstrip("# ")),
        lead=page.markdown(FIGURE.sub("", first.partition("\n")[2])),
        lead_figures="\n".join(page.figure(*found) for found in FIGURE.findall(first)),
        summary=page.markdown("".join(rest)),
        sections=[page.section(path) for path in books],
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def functions(folder: Path) -> dict[str, str]:
    """First paragraph of the docstring, without markup, of every function in a folder's modules, by its name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    found = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    told = {node.name: (ast.get_docstring(node) or "").split("\n\n")[0] for node in found}
    return {name: " ".join(re.sub(r"`|\*(?=\w)|(?<=\w)\*", "", text).split()) for name, text in told.items()}


class Page:
    """Parts of the page as HTML.

    Args:
        source: as of :func:`build`.
        told: what a table or figure shows, by its name.
        above: Markdown that stands above the sections: tables and figures that it names are not shown again.
    """

    def __init__(self, source: Path, told: Mapping[str, str], above: str):
        self.source, self.told, self.above = source, told, above

    def markdown(self, text: str) -> str:
        """Markdown of the repository's top: its links lead from one folder below, its tables scroll by themselves."""
        text = re.sub(r"\]\((?!https?:|#|\.\./)", "](../", text)
        return markdown2html(text).replace("<table", '<div class="scroll"><table').replace("</table>", "</table></div>")

    def section(self, path: Path) -> dict[str, str]:
        """Title, body and origin of one notebook: its text, code folded, tables and figures where they are made."""
        record = json.loads((self.source / "tables" / f"{path.stem}.json").read_text(encoding="utf-8"))
        cells = nbformat.read(path, as_version=4).cells
        title, _, cells[0].source = cells[0].source.partition("\n")
        waiting = self._made(int(path.stem[:2]))
        parts = []
        for cell in cells:
            if cell.cell_type == "markdown":
                parts.append(self.markdown(cell.source))
            elif cell.cell_type == "code":
                parts.append(f"<details class=code><summary>code: {html.escape(cell.id)}</summary>"
                             f"<pre>{html.escape(cell.source)}</pre></details>")  # fmt: skip
                parts += [self._shown(waiting.pop(name), record) for name in strings_in(cell.source) if name in waiting]
        parts += [self._shown(file, record) for file in waiting.values()]
        return {
            "name": path.stem,
            "title": html.escape(title.lstrip("# ")),
            "body": "\n".join(parts),
            **_origin(record),
        }

    def _made(self, number: int) -> dict[str, Path]:
        """Tables and figures of one section that are not shown above, by name, the figures first."""
        files = [
            *(self.source / "figures").glob(f"f{number}_*.svg"),
            *(self.source / "tables").glob(f"t{number}_*.csv"),
        ]
        return {file.stem: file for file in sorted(files) if not re.search(rf"\b{file.stem}\b", self.above)}

    def _shown(self, file: Path, record: Mapping) -> str:
        made_on = f"{_model(record)}; " if record["model"] else ""
        seed = f"seed {record['parameters']['seed']}; " if "seed" in record["parameters"] else ""
        sizes = [
            f"{name.replace('_', ' ')} {record['parameters'][name]}" for name in SIZES if name in record["parameters"]
        ]
        origin = f"{made_on}{seed}{', '.join(sizes) or 'from tables'}"
        if file.suffix == ".svg":
            return self.figure(file.stem, f"{self.told.get(file.stem, '')} ({origin})".strip())
        return self.table(file, origin)

    def figure(self, name: str, caption: str) -> str:
        """A figure with its caption; empty where it was not drawn."""
        if not (self.source / "figures" / f"{name}.svg").is_file():
            return ""
        larger = f' <a href="../figures/long/{name}.svg">with a larger budget</a>'
        more = larger if (self.source / "figures" / "long" / f"{name}.svg").is_file() else ""
        link = f"../figures/{name}.svg"
        said = html.escape(caption, quote=True)
        return (f'<figure><a href="{link}"><img src="{link}" alt="{said}"></a>'
                f"<figcaption><b>{name}</b> {said}{more}</figcaption></figure>")  # fmt: skip

    def table(self, file: Path, origin: str) -> str:
        """A table's first rows and columns with a link to all of it; few and wide rows stand upright."""
        frame = pd.read_csv(file)
        size = f"{len(frame)} rows, {len(frame.columns)} columns"
        if len(frame) > RAW:
            return f'<p class="caption"><b>{file.stem}</b> {size}: <a href="../tables/{file.name}">CSV</a></p>'
        if len(frame) < 4 and len(frame.columns) > COLUMNS:
            frame = frame.set_index(frame.columns[0]).T.reset_index(names=frame.columns[0])
        cut = frame.iloc[:ROWS, :COLUMNS]
        cells = cut.map(_cell).to_html(index=False, border=0, na_rep="", escape=True)
        size = f"first of {size}" if cut.shape != frame.shape else size
        words = html.escape(f"{self.told.get(file.stem, '')} ({size}; {origin})".strip())
        said = f'<b>{file.stem}</b> {words} <a href="../tables/{file.name}">CSV</a>'
        return f'<div class="made"><p class="caption">{said}</p><div class="scroll">{cells}</div></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _model(record: Mapping) -> str:
    model = record["model"]
    return f"{Path(model['name']).name}, {model['dtype'].removeprefix('torch.')}" if model else "no model"


def _origin(record: Mapping) -> dict[str, str]:
    git = record["git"]
    return {
        "model": html.escape(_model(record)),
        "commit": f"{(git['commit'] or 'none')[:10]}{' (changed)' if git['dirty'] else ''}",
        "wall": f"{record['wall_s']:.0f} s on {record['device']}, {record['machine']['threads']} threads",
        "parameters": html.escape(
            ", ".join(f"{name} = {json.dumps(value)}" for name, value in record["parameters"].items())
        ),
    }
