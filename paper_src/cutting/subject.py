"""The model that is cut: loaded, looked at, and how many of its layers stay."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, compaction, models, timing
from paper_src.cutting.progress import Progress
from paper_src.cutting.request import Request
from paper_src.cutting.texts import LENGTH, Texts
from paper_src.selection import evenly_spaced

# tokens of test windows, too; shorter where the model reads no more
READ, WRITE = timing.Workload("prefill_hidden", 1, 512), timing.Workload("decode", 1, 128, 16)


@dataclass(frozen=True)
class Subject:
    """What every step of a run needs to know."""

    request: Request
    progress: Progress
    loaded: models.Loaded
    texts: Texts
    works: tuple[timing.Workload, timing.Workload]  # reading a prompt, and writing
    k: int  # layers that stay

    @property
    def full(self) -> PreTrainedModel:
        """The full model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the full model."""
        return self.loaded.tokenizer

    @cached_property
    def depth(self) -> int:
        """Layers of the full model."""
        return len(models.decoder_layers(self.full))

    @cached_property
    def a_token(self) -> float:
        """Seconds of the full model for a token that is read, its logits with it."""
        blocks = self.texts.blocks("valid", 4, 0)
        self.passed(blocks[:1])  # warms up
        return seconds(lambda: self.passed(blocks)) / blocks.numel()

    @torch.no_grad()
    def passed(self, blocks: Tensor) -> None:
        """One pass of the full model, for its time."""
        self.full(input_ids=blocks.to(self.full.device), use_cache=False)


def load(request: Request, progress: Progress) -> Subject:
    """The model that is asked for; InputError where it cannot be cut as it is asked for."""
    loaded = models.load_model(request.model, request.dtype, request.device)
    progress.require_same("digest", loaded.digest, "weights")
    _require_causal(loaded.model)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or READ.length
    if longest < LENGTH + WRITE.new_tokens:
        raise InputError(f"{request.model} reads {longest} tokens at most: {LENGTH + WRITE.new_tokens} are needed")
    read = replace(READ, length=min(READ.length, longest))
    write = replace(WRITE, length=min(WRITE.length, longest - WRITE.new_tokens))
    k, texts = _number_of_layers(request, loaded.model, read), Texts(loaded.tokenizer, request.texts)
    subject = Subject(request, progress, loaded, texts, (read, write), k)
    parameters = models.count_parameters(loaded.model)
    progress.say(f"{request.model}: {parameters:,} parameters, {k} of {subject.depth} layers are to be kept")
    if (Path(request.out).expanduser() / "report.html").is_file():
        progress.say(f"{request.out} is there already: it is made anew, and replaced at the end")
    return subject


def read(subject: Subject) -> dict[str, int]:
    """Text -> characters to calibrate on; InputError where one is missing or too short, or not the one of before."""
    characters, digests = subject.texts.read()
    subject.progress.require_same("texts", digests, "texts")
    return characters


def _number_of_layers(request: Request, full: PreTrainedModel, work: timing.Workload) -> int:
    """k: from the layers, the share, the number or the speed that is asked for."""
    depth = len(models.decoder_layers(full))
    if request.layers:
        return len(request.layers)
    if request.keep:
        return models.layer_counts([request.keep if request.keep < 1 else int(request.keep)], depth)[0]
    prompt = timing.random_prompt(full, work, 0)
    flops = {k: timing.count_flops(compaction.compact(full, evenly_spaced(depth, k)), work, prompt)
             for k in (depth, depth // 2)}  # fmt: skip
    layer = (flops[depth] - flops[depth // 2]) / (depth - depth // 2)
    fixed = flops[depth] - depth * layer
    k = int((flops[depth] / request.speed - fixed) / layer)
    if k < 1:
        most = flops[depth] / (fixed + layer)
        raise InputError(f"speed {request.speed}: with a single layer this model is {most:.2f} times as fast, by its "
                         "operations")  # fmt: skip
    return min(k, depth - 1)


@torch.no_grad()
def _require_causal(model: PreTrainedModel) -> None:
    """Raise where a token's state depends on the tokens behind it: such a model writes no text."""
    ids = torch.arange(4, device=model.device)[None]
    before, after = (models.last_hidden(model, text)[:, :-1] for text in (ids, ids.where(ids < 3, 4)))
    if not models.same_states(model, after, before):
        raise InputError(f"{type(model).__name__} reads tokens that come later (an encoder?): give a model that writes")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = perf_counter()
    work()
    return perf_counter() - start
