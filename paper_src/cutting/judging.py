"""How good and how fast: on validation text while choices are made, on test text at the end."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported, fidelity, timing
from paper_src.compaction import shown
from paper_src.cutting import budget
from paper_src.cutting.subject import Subject
from paper_src.cutting.texts import LENGTH

FEW = 8  # test windows that are too few for an interval
ROUNDS = 9  # of a timing


class Validation:
    """The full model's answers to validation text; a gigabyte of probabilities at most."""

    def __init__(self, subject: Subject):
        full, texts, seed = subject.full, subject.texts, subject.request.seed
        count = max(4, min(16, int(1e9 / (4 * LENGTH * full.config.get_text_config().vocab_size))))
        mean = fidelity.mean_state(full, texts.blocks("train", 16, seed + 1))
        self.reference = fidelity.reference(full, texts.blocks("valid", count, seed), mean)
        self._nll = _own_nll(full, self.reference)

    def ratio(self, model: PreTrainedModel) -> float:
        """Perplexity over the full model's."""
        nll = fidelity.compare(model, self.reference, metrics=["nll_nats"])["nll_nats"]
        return fidelity.ppl_ratio(nll, self._nll)["ppl_ratio"]


def _own_nll(full: PreTrainedModel, reference: fidelity.Reference) -> np.ndarray:
    """Loss of the full model itself, nats a token of each window."""
    return fidelity.compare_states(full, reference, reference.hidden, ["nll_nats"])["nll_nats"]


def quality(subject: Subject, compact: Mapping[str, PreTrainedModel]) -> list[dict[str, object]]:
    """A row for each kind of text and model: perplexity, ratio to the full model's with its interval, cosine."""
    progress, rows = subject.progress, []
    for kind in subject.texts.kinds:
        count = budget.windows(subject)[kind not in subject.texts.names]
        try:
            blocks = subject.texts.windows(kind, count, subject.works[0].length, subject.request.seed)
        except InputError as error:
            progress.note(f"not tested on {kind}: {error}")
            continue
        full = fidelity.reference(subject.full, blocks, batch_size=4, metrics=("cosine", "nll_nats"))
        own = _own_nll(subject.full, full)
        here = {"text": kind, "n_windows": len(blocks)}
        rows.append({**here, "model": "full", **_against(own, own), "cosine": 1.0})
        for name, model in compact.items():
            found = fidelity.compare(model, full, 4, ("cosine", "nll_nats"))
            cosine = float(found["cosine"].mean())
            rows.append({**here, "model": name, **_against(found["nll_nats"], own), "cosine": cosine})
        progress.say(f"{kind}: {rows[-1]['model']} {rows[-1]['ppl_ratio']:.2f} times the full model's perplexity")
    note_quality(subject, rows)
    return rows


def _against(nll: np.ndarray, full: np.ndarray) -> dict[str, float]:
    return {"ppl": math.exp(nll.mean()), **fidelity.ppl_ratio(nll, full)}


def note_quality(subject: Subject, rows: Sequence[dict[str, object]]) -> None:
    """Notes on texts where the repair did harm, the full model knows nothing, or windows are few."""
    by = {(row["text"], row["model"]): row for row in rows}
    kinds, guess = dict.fromkeys(kind for kind, _ in by), subject.full.config.get_text_config().vocab_size
    harmed = [shown(kind) for kind in kinds if by[kind, "recovered"]["ppl"] > by[kind, "cut"]["ppl"]]
    unknown = [shown(kind) for kind in kinds if by[kind, "full"]["ppl"] > guess]
    if harmed:
        subject.progress.note(f"on {', '.join(harmed)} the repaired model is worse than the cut one")
    if unknown:
        subject.progress.note(f"on {', '.join(unknown)} the full model itself is worse than a uniform guess")
    if rows and (least := min(row["n_windows"] for row in rows)) < FEW:
        subject.progress.note(f"as few as {least} test windows: intervals are rough, more minutes give more windows")


def speed(subject: Subject, small: PreTrainedModel) -> list[dict[str, object]]:
    """A row for reading a prompt and one for writing: seconds of full over compact, with their interval.

    The cut model before its repair has the recovered one's shapes, and so its speed.
    """
    progress, rows = subject.progress, []
    for work in subject.works:
        try:
            (row,) = timing.compare_speed(subject.full, {subject.k: small}, work, ROUNDS, subject.request.seed)
        except NotSupported as error:
            progress.note(str(error))
            continue
        del row["seconds"]
        if not row["quiet"]:
            progress.note(f"timed while other programs were at work, or rounds differ by much: {task_title(row)}")
        rows.append(row)
        progress.say(f"{task_title(row)}: {row['speedup']:.2f} times as fast as the full model")
    return rows


def task_title(row: Mapping[str, Any]) -> str:
    """What a row of speeds is of, in words."""
    return "writing a token" if row["task"] == "decode" else f"reading {row['length']} tokens"
