"""What a cut model's folder says about it: ``report.html``, two tables, and numbers for its card."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel

from paper_src.compaction import shown
from paper_src.models import count_parameters
from paper_src.selection import STRATEGIES

MODELS = ("cut", "refitted", "recovered")


def report_files(
    job: Any, final: PreTrainedModel, tested: Sequence[dict], timed: Sequence[dict]
) -> tuple[dict[str, str], str]:  # fmt: skip
    """File name -> text of what stands beside the weights, and the paragraph of numbers for the card."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    facts = facts_of(job, final, tested, timed)
    files = {
        "report.html": page.from_string(template).render(facts),
        "quality.csv": _csv(tested),
        "speed.csv": _csv(timed),
    }
    return files, _card(facts)


def task_title(row: Mapping[str, Any]) -> str:
    """What a row of speeds is of, in words."""
    return "writing a token" if row["task"] == "decode" else f"reading {row['length']} tokens"


def strategy_title(name: str) -> str:
    """How layers were chosen, in a word."""
    return STRATEGIES[name].title if name in STRATEGIES else "given"


def facts_of(job: Any, final: PreTrainedModel, tested: Sequence[dict], timed: Sequence[dict]) -> dict[str, Any]:
    """What the report's template is filled with."""
    parameters = {"full": count_parameters(job.full), "recovered": count_parameters(final)}
    sizes = {name: {"parameters": count, "bytes": count * final.dtype.itemsize} for name, count in parameters.items()}
    most = max([math.log(max(row["ppl_ratio"], 1)) for row in tested], default=0) or 1.0
    tested = [{**row, "bar": 100 * math.log(max(row["ppl_ratio"], 1)) / most} for row in tested]
    quality = []
    for kind in dict.fromkeys(row["text"] for row in tested):
        rows = {row["model"]: row for row in tested if row["text"] == kind}
        quality.append({"text": Path(kind).name, "own": kind in job.names, "full": rows["full"], **rows})
    candidates = [{**row, "title": strategy_title(row["name"])} for row in job.progress.get("candidates")]
    return {
        "model": shown(job.request.model), "name": Path(job.request.out).name, "kept": list(job.kept),
        "depth": job.depth, "chosen_by": job.chosen_by, "candidates": candidates, "tokens": job.tokens,
        "texts": ", ".join(Path(name).name for name in job.names),
        "own_text": job.own_text,
        "sizes": sizes, "quality": quality, "models": MODELS, "seed": job.request.seed,
        "speed": [{**row, "title": task_title(row)} for row in timed], "warnings": job.warnings,
        "minutes": job.progress.spent / 60, "dtype": str(final.dtype).removeprefix("torch."),
        "device": str(job.full.device), "computing": str(job.full.dtype).removeprefix("torch."),
        "digest": job.loaded.digest[:12],
    }  # fmt: skip


def _csv(rows: Sequence[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _card(facts: dict[str, Any]) -> str:
    """Markdown: quality on each kind of text, and speed."""
    lines = ["| test text | full model's perplexity | times that | 95% interval | cosine |", "|---|---|---|---|---|"]
    for row in facts["quality"]:
        got = row["recovered"]
        lines.append(f"| {row['text']} | {row['full']['ppl']:.2f} | {got['ppl_ratio']:.2f} | "
                     f"{got['ppl_ratio_lo']:.2f} to {got['ppl_ratio_hi']:.2f} | {got['cosine']:.3f} |")  # fmt: skip
    lines += [f"\nSpeed, {row['title']}: {row['speedup']:.2f} times the full model's "
              f"({row['speedup_lo']:.2f} to {row['speedup_hi']:.2f})." for row in facts["speed"]]  # fmt: skip
    lines += [f"\nNote: {line}." for line in facts["warnings"]]
    return "\n".join(lines)
