"""The paper as one page: what is shown, captions, links, and how it looks in a real browser."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from paper_src.reporting import page

DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" width="800" height="300"><rect width="800" height="300"/></svg>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
# Counts, in the page itself, what must not be there; errors are caught from the first line on.
FIRST = (
    "<script>window.wrong = []; addEventListener('error', e => wrong.push(e.message || e.target.src), true);</script>"
)
LAST = """<script>addEventListener('load', () => {
  for (const image of document.images) if (!image.naturalWidth) wrong.push('broken ' + image.alt);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) wrong.push('scrolls sideways by ' + wide);
  document.documentElement.dataset.wrong = JSON.stringify(wrong);
});</script>"""


def seen_in_browser(path: Path, width: int) -> list[str]:
    """What is wrong with a page in a window ``width`` pixels wide: errors, broken images, sideways scrolling."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("<head>", f"<head>{FIRST}", 1).replace("</body>", f"{LAST}</body>", 1)
    with (
        tempfile.TemporaryDirectory() as profile,
        tempfile.NamedTemporaryFile("w", suffix=".html", dir=path.parent) as copy,
    ):
        copy.write(text)  # beside the page, where its links lead to the figures
        copy.flush()
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom",
                   Path(copy.name).as_uri()]  # fmt: skip
        dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'data-wrong="([^"]*)"', dom).group(1)
    return json.loads(found.replace("&quot;", '"'))


SUMMARY = """# Which layers matter

We test statements.

- **You want 3 times the speed:** keep a quarter.

![Quality against speed](figures/f9_overview.png)

*Perplexity against speed.*

## Verdicts

| claim | verdict |
|---|---|
| it, [all](tables/t9_claims.csv) | no |

## 1. What is a layer worth?

Not on the page: the notebook says it.
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of one notebook with a wide, a long and a small table and a figure, and of the summary."""
    for folder in ("notebooks", "run/tables", "run/figures"):
        (tmp_path / folder).mkdir(parents=True)
    cells = [
        nbformat.v4.new_markdown_cell("# 4. What is left\n\nThe question.", id="title"),
        nbformat.v4.new_code_cell('paper.table(x < 1, "t4_fidelity")', id="measure"),
        nbformat.v4.new_code_cell('paper.figure(rows.f4_tradeoff(a), "f4_tradeoff")', id="figure"),
        nbformat.v4.new_markdown_cell("## Reading\n\nLittle is left.", id="reading"),
        nbformat.v4.new_code_cell("paper.finish()", id="finish"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "04_fidelity.ipynb")
    tables = tmp_path / "run" / "tables"
    pd.DataFrame({f"wide_{i}": [0.123456, float("nan")] * 20 for i in range(60)}).to_csv(
        tables / "t4_fidelity.csv", index=False
    )
    pd.DataFrame({"text": ["<i>"], "k": [8]}).to_csv(tables / "t4_small.csv", index=False)
    pd.DataFrame({"nll_nats": range(1000)}).to_csv(tables / "t4_windows.csv", index=False)
    for name in ("f4_tradeoff", "f9_overview"):
        (tmp_path / "run" / "figures" / f"{name}.svg").write_text(DRAWING)
    record = {
        "notebook": "04_fidelity", "parameters": {"blocks": 8, "seed": 3, "text": "<b>"}, "wall_s": 1.5,
        "model": {"name": "some/tiny", "dtype": "torch.float32"}, "git": {"commit": "abcdef1234567", "dirty": False},
        "device": "cpu", "machine": {"threads": 2},
    }  # fmt: skip
    (tables / "04_fidelity.json").write_text(json.dumps(record))
    (tmp_path / "run" / "SUMMARY.md").write_text(SUMMARY)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def made(results):
    """The page of these results."""
    return page.build(results, results / "report" / "index.html")


def test_first_the_advice_and_its_figure_then_verdicts_then_sections(made):
    text = made.read_text(encoding="utf-8")
    order = [
        "<h1>Which layers matter</h1>",
        "We test statements",
        "../figures/f9_overview.svg",
        "Perplexity against speed.",
        'id="verdicts"',
        "The question.",
        "Little is left.",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "Not on the page" not in text
    assert 'href="../tables/t9_claims.csv"' in text


def test_figures_and_tables_with_captions_code_folded(made):
    text = made.read_text(encoding="utf-8")
    caption = page.functions(page.SECTIONS)["f4_tradeoff"]
    assert len(caption) > 20
    assert f"<b>f4_tradeoff</b> {html.escape(caption, quote=True)} (tiny, float32; seed 3; blocks 8)" in text
    assert "<summary>code: measure</summary><pre>paper.table(x &lt; 1, &quot;t4_fidelity&quot;)</pre>" in text
    assert text.index("code: measure") < text.index("<b>t4_fidelity</b>") < text.index("code: figure")
    assert "commit abcdef1234" in text
    assert "&lt;b&gt;" in text
    assert "&lt;i&gt;" in text


def test_tables_are_cut_to_a_dozen_rows_and_linked(made):
    text = made.read_text(encoding="utf-8")
    shown = text[text.index("<b>t4_fidelity</b>") :]
    shown = shown[: shown.index("</table>")]
    assert "first of 40 rows, 60 columns" in shown
    assert shown.count("<tr") == 1 + page.ROWS
    assert shown.count("<th>") == page.COLUMNS
    assert "0.1235" in shown
    assert re.search(r'<b>t4_windows</b> 1000 rows, 1 columns: <a href="../tables/t4_windows.csv">', text)


def test_nothing_is_asked_of_the_network(made):
    text = made.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert "<script" not in text


def test_an_unfinished_run_is_refused(tmp_path, refused):
    with refused("holds no finished run"):
        page.build(tmp_path, tmp_path / "index.html")


def test_first_paragraphs_of_docstrings(tmp_path):
    (tmp_path / "a.py").write_text(
        'def f1_a():\n    """What ``x`` is,\n    on two lines.\n\n    More.\n    """\n\ndef f1_b():\n    pass\n'
    )
    assert page.functions(tmp_path) == {"f1_a": "What x is, on two lines.", "f1_b": ""}


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(made, width):
    assert seen_in_browser(made, width) == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<html><head></head><body><img src='gone.png' alt='x'><div style='width: 3000px'>wide</div>"
        "<script>undefined_function()</script></body></html>"
    )
    found = " ".join(seen_in_browser(tmp_path / "bad.html", 800))
    assert "broken x" in found
    assert "scrolls sideways" in found
    assert "undefined_function" in found


COMMITTED = Path(__file__).parents[2] / "report" / "index.html"


@pytest.mark.skipif(not COMMITTED.is_file(), reason="no report/index.html: run ./reproduce.sh")
def test_links_of_the_committed_page_lead_somewhere():
    links = re.findall(r'href="(\.\./[^"#]+)"', COMMITTED.read_text(encoding="utf-8"))
    assert links
    assert [link for link in set(links) if not (COMMITTED.parent / link).exists()] == []


@pytest.mark.skipif(not CHROMIUM or not COMMITTED.is_file(), reason="no Chromium, or no report/index.html")
@pytest.mark.parametrize("width", [1200, 400])
def test_the_committed_page_in_a_browser(width):
    assert seen_in_browser(COMMITTED, width) == []


@pytest.mark.skipif(not CHROMIUM or not COMMITTED.is_file(), reason="no Chromium, or no report/index.html")
def test_the_committed_page_is_at_most_19_sheets_of_paper(tmp_path):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer",
               f"--print-to-pdf={tmp_path / 'page.pdf'}", COMMITTED.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    sheets = re.findall(rb"/Type\s*/Page\b(?!s)", (tmp_path / "page.pdf").read_bytes())
    assert 0 < len(sheets) <= 19


def test_the_committed_page_is_made_of_the_committed_files(tmp_path, monkeypatch):
    monkeypatch.chdir(COMMITTED.parents[1])
    assert page.build(Path(), tmp_path / "index.html").read_text() == COMMITTED.read_text(encoding="utf-8")
