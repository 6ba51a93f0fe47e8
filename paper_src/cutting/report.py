"""What a cut model's folder says about it: ``report.html``, two tables, and numbers for its card."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel

from paper_src.compaction import shown
from paper_src.cutting.choice import strategy_title
from paper_src.cutting.judging import task_title
from paper_src.cutting.repair import Repaired
from paper_src.cutting.subject import Subject
from paper_src.models import count_parameters
from paper_src.selection import STRATEGIES, KeptLayers, kept_tuple

MODELS = ("cut", "refitted", "recovered")


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    subject: Subject
    candidates: Sequence[dict]  # rows, best first
    refitted: Repaired
    recovered: Repaired
    tested: Sequence[dict]
    timed: Sequence[dict]

    @property
    def kept(self) -> KeptLayers:
        """Layers of the best candidate."""
        return kept_tuple(self.candidates[0]["kept"])

    @property
    def chosen_by(self) -> str:
        """The strategy whose layers are kept, and its source."""
        name = self.candidates[0]["name"]
        return f"{STRATEGIES[name].title} ({STRATEGIES[name].source})" if name in STRATEGIES else "the reader"


def report_files(outcome: Outcome, final: PreTrainedModel) -> tuple[dict[str, str], str]:
    """File name -> text of what stands beside the weights, and the paragraph of numbers for the card."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    facts = facts_of(outcome, final)
    files = {
        "report.html": page.from_string(template).render(facts),
        "quality.csv": _csv(outcome.tested),
        "speed.csv": _csv(outcome.timed),
    }
    return files, _card(facts)


def facts_of(outcome: Outcome, final: PreTrainedModel) -> dict[str, Any]:
    """What the report's template is filled with."""
    subject, repaired = outcome.subject, (outcome.refitted, outcome.recovered)
    full, request, texts = subject.full, subject.request, subject.texts
    parameters = {"full": count_parameters(full), "recovered": count_parameters(final)}
    sizes = {name: {"parameters": count, "bytes": count * final.dtype.itemsize} for name, count in parameters.items()}
    return {
        "model": shown(request.model), "name": Path(request.out).name, "kept": list(outcome.kept),
        "depth": subject.depth, "chosen_by": outcome.chosen_by,
        "candidates": [{**row, "title": strategy_title(row["name"])} for row in outcome.candidates],
        "tokens": {"refit": repaired[0].tokens, "distilled": repaired[1].tokens},
        "texts": ", ".join(Path(name).name for name in texts.names),
        "own_text": max(one.own_text for one in repaired),
        "sizes": sizes, "quality": _quality(outcome.tested, texts.names), "models": MODELS, "seed": request.seed,
        "speed": [{**row, "title": task_title(row)} for row in outcome.timed], "notes": subject.progress.notes,
        "minutes": subject.progress.spent / 60, "dtype": str(final.dtype).removeprefix("torch."),
        "device": str(full.device), "computing": str(full.dtype).removeprefix("torch."),
        "digest": subject.loaded.digest[:12],
    }  # fmt: skip


def _quality(tested: Sequence[dict], own: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each kind of text: model -> row, with the length of its bar in per cent of the longest."""
    most = max([math.log(max(row["ppl_ratio"], 1)) for row in tested], default=0) or 1.0
    tested = [{**row, "bar": 100 * math.log(max(row["ppl_ratio"], 1)) / most} for row in tested]
    quality = []
    for kind in dict.fromkeys(row["text"] for row in tested):
        rows = {row["model"]: row for row in tested if row["text"] == kind}
        quality.append({"text": Path(kind).name, "own": kind in own, **rows})
    return quality


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
    lines += [f"\nNote: {line}." for line in facts["notes"]]
    return "\n".join(lines)
