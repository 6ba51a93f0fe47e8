"""What ran and where it is, and copies of it at the top of the repository."""

import json
import re
from pathlib import Path

import pandas as pd

from paper_src.support.files import replacing

OURS = re.compile(r"([tf]\d+|\d\d)_\w+\.\w+")  # tables, figures, provenance: nothing else is copied
LARGER = re.compile(r"([tf]|0)[1-7]_\w+\.\w+")  # what the profile ``long`` gives larger budgets


def summary(results: Path, since: float) -> str:
    """What ran, was kept or is missing, with seconds, and where to look."""
    lines = []
    for notebook in sorted(Path("notebooks").glob("0*.ipynb")):
        record = results / "tables" / f"{notebook.stem}.json"
        done = results / "notebooks" / notebook.name
        if done.is_file():
            wall = json.loads(record.read_text(encoding="utf-8"))["wall_s"]
            state = f"{'ran ' if done.stat().st_mtime >= since else 'kept'} {wall:8.1f} s"
        else:
            state = "failed" if done.with_name(f"{notebook.stem}.failed.ipynb").exists() else "not run"
        lines.append(f"  {notebook.stem:<20} {state}")
    places = ("report/index.html", "SUMMARY.md", "tables", "figures", "models", "notebooks", "logs")
    found = [place for place in places if (results / place).exists()]
    return "\n".join([*lines, f"  see {results}/: {', '.join(found)}"])


def publish(results: Path, target: Path = Path()) -> None:
    """Copy tables, figures and summary of ``results`` to the top of the repository, each file whole.

    Of a run of the profile ``long``, its sections 1 to 7 alone, and to ``tables/long`` and ``figures/long``.
    """
    larger = results.name == "long"
    for file in sorted([*results.glob("tables/*.*"), *results.glob("figures/*.*")]):
        if (LARGER if larger else OURS).fullmatch(file.name):
            _put(file.read_bytes(), target / file.parent.name / ("long" if larger else "") / file.name)
    for file in [] if larger else sorted(results.glob("SUMMARY*.md")):
        _put(file.read_bytes(), target / file.name)
    _put(provenance(target / "tables").encode(), target / "tables" / "provenance.md")


def provenance(tables: Path) -> str:
    """A Markdown table of every record below ``tables``: what made these tables, from which commit, where, how long."""
    rows = []
    for file in sorted(tables.rglob("*.json"), key=lambda file: (file.parent != tables, file)):
        record = json.loads(file.read_text(encoding="utf-8"))
        git, threads = record.get("git") or {}, record.get("machine", {}).get("threads", "")
        minutes = f"{record['wall_s'] / 60:.1f}" if "wall_s" in record else ""
        rows.append({
            "tables": file.parent.relative_to(tables.parent).as_posix(), "section": file.stem.replace("_", " "),
            "made by": record.get("script", "its notebook"), "model": (record.get("model") or {}).get("name", ""),
            "device": record["device"], "threads": threads, "minutes": minutes,
            "commit": git.get("commit", "")[:7], "uncommitted changes": "yes" if git.get("dirty") else "no",
        })  # fmt: skip
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def _put(content: bytes, place: Path) -> None:
    """Write a file, unless it already holds this: what is made from it is then as new as it."""
    if not place.exists() or place.read_bytes() != content:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as part:
            part.write_bytes(content)
