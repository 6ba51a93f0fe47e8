"""What ran and where it is, and copies of it at the top of the repository."""

import json
import re
from collections.abc import Iterable
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
    for folder in ("tables", "figures"):
        place = target / folder / ("long" if larger else "")
        _copy(
            (file for file in (results / folder).glob("*.*") if (LARGER if larger else OURS).fullmatch(file.name)),
            place,
        )
    if not larger:
        _copy(results.glob("SUMMARY*.md"), target)
    with replacing(target / "tables" / "provenance.md") as part:
        part.write_text(provenance(target / "tables"), encoding="utf-8")


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


def _copy(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(files):
        place = folder / file.name
        if not place.exists() or place.read_bytes() != file.read_bytes():
            with replacing(place) as part:
                part.write_bytes(file.read_bytes())
