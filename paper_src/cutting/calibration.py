"""Calibration text: the reader's, or WikiText-2 and what the model writes itself."""

import torch
from torch import Tensor

from paper_src.cutting.budget import WRITTEN
from paper_src.cutting.subject import Subject, seconds
from paper_src.cutting.texts import LENGTH, shuffled
from paper_src.support.generation import generated


def calibration(subject: Subject, count: int) -> tuple[Tensor, int]:
    """(n, LENGTH) token ids, n at most ``count``, and how many of them the model wrote itself: a quarter at most.

    It writes where the reader gave no text, and where there is time for it.
    """
    blocks = subject.texts.blocks("train", count, subject.request.seed + 1)
    own = blocks[:0] if subject.request.texts else written(subject)[: count // 4]
    if not len(own):
        return blocks, 0
    return shuffled(torch.cat([blocks[: count - len(own)], own]), subject.request.seed), own.numel()


def written(subject: Subject, at_once: int = 16) -> Tensor:
    """(n, LENGTH) token ids that the model writes within their share of the minutes; none where that is too short."""
    progress, seed = subject.progress, subject.request.seed
    prompts, share = subject.texts.blocks("train", 64, seed + 2)[:, :8], WRITTEN * progress.limit

    def write(count: int) -> Tensor:
        return generated(subject.full, prompts, count, LENGTH, seed, progress.folder / "written", at_once)

    if (count := progress.get("written")) is None:
        count = 0
        a_token = seconds(lambda: subject.passed(prompts[:at_once, :1]))
        if progress.limit >= 600 and LENGTH * a_token < 2 * share:
            count = at_once * min(16, max(1, int(share / seconds(lambda: write(at_once)))))
            progress.say(f"the model writes {count * LENGTH:,} tokens of calibration text")
        progress.put("written", count)
    return write(int(count))
