"""The checkpoint: written in the dtype it came in, with its card and report, loaded once and compared."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paper_src import InputError, compaction, models
from paper_src.cutting.repair import changed_names, with_weights_
from paper_src.cutting.report import Outcome, report_files
from paper_src.cutting.subject import Subject


def save(outcome: Outcome) -> Path:
    """Writes the checkpoint, its card and its report, loads it once, and compares; returns its folder.

    Raises:
        InputError: it does not load as the model that was saved; then there is no folder.
    """
    subject = outcome.subject
    request, progress, out = subject.request, subject.progress, Path(subject.request.out).expanduser()
    if subject.k < subject.depth / 2:
        progress.note("below half of the layers, multiple-choice tasks are near chance: test yours")
    if request.texts:
        progress.note("calibrated on the given text only: other kinds are what the table says")
    if (spent := progress.spent / 60) > 1.25 * request.minutes:
        progress.note(f"it took {spent:.1f} minutes, not {request.minutes:g}: loading, testing and timing take theirs")
    final = as_stored(subject, outcome.kept, outcome.recovered.model)
    files, card = report_files(outcome, final)
    new = bool(changed_names(outcome.recovered.model, subject.full))
    how = outcome.chosen_by
    compaction.save(final, subject.tokenizer, out, request.model, outcome.kept, subject.depth, how, new, card, files)
    _require_reload(subject, out, final)
    shutil.rmtree(progress.folder, ignore_errors=True)
    progress.end(f"saved: {out} (open {out / 'report.html'})")
    return out


def as_stored(subject: Subject, kept: tuple[int, ...], recovered: PreTrainedModel) -> PreTrainedModel:
    """The recovered model in the checkpoint's own dtype: what no repair has changed, bit for bit."""
    request, stored = subject.request, subject.loaded.stored
    if stored in (None, recovered.dtype) or stored not in (torch.float32, torch.float16, torch.bfloat16):
        return recovered
    original = models.load_model(request.model, str(stored).removeprefix("torch."), request.device)
    final = compaction.compact(original.model, kept)
    repaired = dict(recovered.named_parameters())
    changed = {name: repaired[name].detach().to(stored) for name, parameter in final.named_parameters()
               if not torch.equal(parameter.to(repaired[name].dtype), repaired[name])}  # fmt: skip
    return with_weights_(final, changed)


def _require_reload(subject: Subject, out: Path, final: PreTrainedModel) -> None:
    again = models.load_model(str(out.resolve()), str(final.dtype).removeprefix("torch."), subject.request.device).model
    blocks = subject.texts.blocks("valid", 2, 0).to(final.device)
    with torch.no_grad():
        own, other = (model(input_ids=blocks, use_cache=False).logits.float() for model in (final, again))
    if not (own - other).norm() <= 0.01 * own.norm():
        shutil.rmtree(out, ignore_errors=True)
        raise InputError(f"{type(final).__name__} loads as another model than was saved: nothing is kept")
