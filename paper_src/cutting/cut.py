"""From a checkpoint to a smaller one in a call: the steps of notebook 10 in their order, each resumable."""

from collections.abc import Callable
from pathlib import Path

from paper_src.compaction import compact
from paper_src.cutting import choice, judging, repair, saving
from paper_src.cutting.progress import Progress
from paper_src.cutting.report import Outcome
from paper_src.cutting.request import Request
from paper_src.cutting.subject import load, read
from paper_src.selection import kept_tuple


def cut(model: str, out: str | Path, keep: float = 0.0, say: Callable[[str], None] = print, **settings: object) -> Path:
    """Cuts a model: loads, chooses layers, cuts, repairs, tests, times and saves; returns the checkpoint's folder.

    Args:
        model: registry name, local folder or ``.gguf`` file, or hub id.
        out: folder of the new checkpoint, with its report.
        keep: layers to keep: their number, or a share below 1. Or give ``speed`` instead.
        say: called with a line of text whenever there is something to tell.
        settings: the other fields of :class:`Request`: speed, layers, minutes, texts, strategy, dtype, device, seed.

    Raises:
        InputError: something that was given cannot be used; one line says what.
    """
    request = Request(str(model), str(out), keep, **settings).checked()
    subject = load(request, Progress(request, say))
    read(subject)
    validation = judging.Validation(subject)
    candidates = choice.ranked(subject, validation)
    kept = kept_tuple(candidates[0]["kept"])
    refitted = repair.refit(subject, kept, validation)
    recovered = repair.distil(subject, refitted, validation)
    smaller = {"cut": compact(subject.full, kept), "refitted": refitted.model, "recovered": recovered.model}
    quality, speed = judging.quality(subject, smaller), judging.speed(subject, recovered.model)
    return saving.save(Outcome(subject, candidates, refitted, recovered, quality, speed))
