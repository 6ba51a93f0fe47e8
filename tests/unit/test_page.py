"""The paper as one page: what is shown, captions, links, and how it looks in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from paper_src.reporting import page

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
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


def seen_in_browser(path: Path, width: int, folder: Path) -> list[str]:
    """What is wrong with a page in a window ``width`` pixels wide: errors, broken images, sideways scrolling."""
    copy = folder / "page.html"
    text = path.read_text(encoding="utf-8")
    copy.write_text(
        text.replace("<head>", f"<head>{FIRST}", 1).replace("</body>", f"{LAST}</body>", 1), encoding="utf-8"
    )
    size = f"--window-size={width},900"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", size, "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'data-wrong="([^"]*)"', dom).group(1)
    return json.loads(found.replace("&quot;", '"'))


@pytest.fixture
def results(tmp_path):
    """A finished run of one notebook with a wide table and a figure."""
    for folder in ("notebooks", "tables"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    cells = [
        nbformat.v4.new_markdown_cell("# 4. What is left\n\nThe question.", id="title"),
        nbformat.v4.new_code_cell('paper.table(x, "t4_fidelity")\npaper.table(x, "t4_random")', id="t", outputs=[
            nbformat.v4.new_output("stream", name="stderr", text="progress 10%"),
            nbformat.v4.new_output("display_data", {"text/html": f"<table><tr>{'<td>wide</td>' * 60}</tr></table>"}),
        ]),
        nbformat.v4.new_code_cell('paper.figure(fidelity_section.f4_tradeoff(a), "f4_tradeoff")', id="figure", outputs=[
            nbformat.v4.new_output("display_data", {"image/png": PIXEL}),
        ]),
        nbformat.v4.new_code_cell("paper.finish()", id="finish"),
    ]  # fmt: skip
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "run" / "notebooks" / "04_fidelity.ipynb")
    record = {
        "notebook": "04_fidelity", "parameters": {"blocks": 8, "seed": 3, "text": "<b>"}, "wall_s": 1.5,
        "model": {"name": "tiny", "dtype": "torch.float32"}, "git": {"commit": "abcdef1234567", "dirty": False},
        "device": "cpu", "machine": {"threads": 2},
    }  # fmt: skip
    (tmp_path / "run" / "tables" / "04_fidelity.json").write_text(json.dumps(record))
    (tmp_path / "run" / "SUMMARY.md").write_text(
        "# All\n\n| claim | source |\n|---|---|\n| it | t4_fidelity (04_fidelity) |\n"
    )
    return tmp_path / "run"


def test_results_captions_and_links_but_no_code_and_no_progress(results):
    text = page.build(results, results / "report" / "index.html").read_text(encoding="utf-8")
    assert "<h2>4. What is left</h2>" in text
    assert "paper.table(" not in text
    assert "progress 10%" not in text
    assert "f4_tradeoff. Cosine and perplexity ratio against measured speedup" in text
    assert "tiny, float32; seed 3; blocks 8" in text
    assert text.count('<a href="../tables/t4_fidelity.csv">') == 2  # of the claim, and of the caption
    assert '<a href="../notebooks/04_fidelity.ipynb">' in text
    assert text.count('<a href="../tables/t4_random.csv">') == 1
    assert "commit abcdef1234" in text
    assert "&lt;b&gt;" in text
    assert page.NO_ALT not in text


def test_nothing_is_asked_of_the_network(results):
    text = page.build(results, results / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert "<script" not in text


def test_an_unfinished_run_is_refused(tmp_path, refused):
    with refused("holds no finished run"):
        page.build(tmp_path, tmp_path / "index.html")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 500])
def test_in_a_browser(results, tmp_path, width):
    path = page.build(results, results / "report" / "index.html")
    assert seen_in_browser(path, width, tmp_path) == []


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: apt-get install chromium")
def test_the_browser_test_sees_what_is_wrong(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<html><head></head><body><img src='gone.png' alt='x'><div style='width: 3000px'>wide</div>"
        "<script>undefined_function()</script></body></html>"
    )
    found = " ".join(seen_in_browser(tmp_path / "bad.html", 800, tmp_path))
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
@pytest.mark.parametrize("width", [1100, 500])
def test_the_committed_page_in_a_browser(tmp_path, width):
    assert seen_in_browser(COMMITTED, width, tmp_path) == []
