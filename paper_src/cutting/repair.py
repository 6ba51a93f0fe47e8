"""What is left of the model, repaired: in closed form, then by a distillation in the time that is left."""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import NotSupported, compaction, distillation, fidelity, models, recovery
from paper_src.cutting import budget
from paper_src.cutting.calibration import calibration
from paper_src.cutting.judging import Validation
from paper_src.cutting.subject import Subject, seconds
from paper_src.cutting.texts import LENGTH
from paper_src.support.files import replacing

RATES = {0.7: 3e-4, 0.4: 4e-4, 0.0: 6e-4}  # learning rate from this share of the layers on
LOOKS = 0.1  # of a training's time: for its looks at validation text, two to six of them
PASSES = 3  # over the blocks of the distillation: the full model answers each once


@dataclass(frozen=True)
class Repaired:
    """A model after a repair, and on what it was made."""

    model: PreTrainedModel
    tokens: int  # that were passed; 0: nothing has changed
    own_text: int  # tokens of calibration text that the model wrote itself
    history: list[dict[str, float]] = field(default_factory=list)  # looks at validation text


def closed_form(subject: Subject, kept: Sequence[int], blocks: Tensor, note: bool = False) -> PreTrainedModel:
    """The compact model after the closed form, or as it was cut where this family has none."""
    try:
        return recovery.closed_form(subject.full, kept, blocks, batch_size=min(8, len(blocks) // 2)).model
    except NotSupported as error:
        if note:
            subject.progress.note(f"no closed form: {error}")
        return compaction.compact(subject.full, kept)


def refit(subject: Subject, kept: Sequence[int], validation: Validation) -> Repaired:
    """:func:`closed_form` within its share of the minutes, kept on disk."""
    progress, path = subject.progress, subject.progress.folder / "refitted.safetensors"
    done = progress.get("refit_blocks")
    count = int(done or budget.refit_blocks(subject))
    blocks, own = calibration(subject, count)
    if done:
        small = with_weights_(compaction.compact(subject.full, kept), load_file(path))
    else:
        small = closed_form(subject, kept, blocks, note=True)
        weights = {name: small.get_parameter(name) for name in changed_names(small, subject.full)}
        with replacing(path) as part:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, part)
        progress.finish("refit_blocks", count)
    tokens = blocks.numel() if changed_names(small, subject.full) else 0
    what = f"refitted on {tokens:,} tokens" if tokens else "cut"
    progress.say(f"{what}: perplexity {validation.ratio(small):.2f} times the full model's")
    return Repaired(small, tokens, own)


def distil(subject: Subject, refitted: Repaired, validation: Validation) -> Repaired:
    """The refitted model after a training with what is left of the minutes; itself where there is no time for one."""
    progress, settings = subject.progress, _settings(subject, refitted.model, validation)
    if settings is None:
        return Repaired(refitted.model, 0, 0)

    def look(line: str) -> None:
        progress.put("looked", line)  # and with it the time that a killed run has used
        progress.say(line)

    blocks, own = calibration(subject, int(progress.get("distil_blocks")))
    settings = settings.with_looks(int(progress.get("looks")), len(blocks))
    folder = progress.folder / "distillation"
    found = distillation.distil(
        subject.full, refitted.model, blocks, validation.reference, folder, settings, progress=look
    )
    if found.model is refitted.model:
        progress.note("the distillation did not help: the refitted model is kept")
    return Repaired(found.model, int(found.history[-1]["tokens"]), own, found.history)


def _settings(subject: Subject, small: PreTrainedModel, validation: Validation) -> distillation.Distillation | None:
    """How to distil in the time that is left; None, and a note, where that is too little, or memory is."""
    progress, share = subject.progress, subject.k / subject.depth
    rate = next(rate for least, rate in RATES.items() if share >= least)
    settings = distillation.Distillation(epochs=PASSES, learning_rate=rate, seed=subject.request.seed)
    if (count := progress.get("distil_blocks")) is None:
        if (needed := _training_bytes(small)) > (free := _free_bytes(small.device)):
            progress.note(f"no distillation: it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
            return None
        count = progress.put("distil_blocks", _affordable(subject, small, validation, settings))
    if not count:
        progress.note("no distillation: too few minutes are left")
        return None
    progress.say(f"distils on {count * LENGTH:,} tokens, {PASSES} times")
    return settings


def _affordable(
    subject: Subject, small: PreTrainedModel, validation: Validation, settings: distillation.Distillation
) -> int:
    """Blocks on which there is time to distil; 0 if that is not worth the while."""
    steps, folder = 4, subject.progress.folder / "trial"
    trial = distillation.Distillation(batch_size=settings.batch_size, learning_rate=1e-12, evaluate_every=steps)
    blocks = subject.texts.blocks("train", steps * trial.batch_size, subject.request.seed + 4)
    if not budget.for_training(subject) or len(blocks) < trial.batch_size:
        return 0
    last = distillation.distil(subject.full, small, blocks, validation.reference.head(1), folder, trial).history[-1]
    shutil.rmtree(folder, ignore_errors=True)
    rest = budget.for_training(subject)
    a_look = seconds(lambda: fidelity.compare(small, validation.reference))
    looks = subject.progress.put("looks", max(2, min(6, int(LOOKS * rest / a_look))))
    # where answers are known, steps are shorter
    a_block = last["seconds"] / last["step"] / settings.batch_size * PASSES / 1.15
    count = int((rest - (looks + 2) * a_look) / a_block)
    return count if count >= 4 * settings.batch_size else 0


def _training_bytes(small: PreTrainedModel) -> int:
    trained = models.count_parameters(small)
    parts = {small.get_input_embeddings(), small.get_output_embeddings()} - {None}
    frozen = models.count_parameters(nn.ModuleList(parts))
    return 4 * trained + 12 * (trained - frozen)


def _free_bytes(device: torch.device) -> int:
    """Memory that is free where the model is."""
    gc.collect()
    torch.cuda.empty_cache()  # what the allocator keeps for later is free as well
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def changed_names(small: PreTrainedModel, full: PreTrainedModel) -> list[str]:
    """Weights that a repair has changed: a compact model shares all others with the full one."""
    own = {parameter.data_ptr() for parameter in full.parameters()}
    return [name for name, parameter in small.named_parameters() if parameter.data_ptr() not in own]


def with_weights_(small: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """``small`` with new weights; the old ones are left alone, for they are another model's as well."""
    for name, weight in weights.items():
        path, _, last = name.rpartition(".")
        setattr(small.get_submodule(path), last, nn.Parameter(weight.to(small.get_parameter(name))))
    return small
