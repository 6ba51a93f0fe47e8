"""The processes of a run that torchrun or accelerate launch started."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from paper_src.support.processes import ALONE, Processes


class Launched(Processes):
    """One of several processes: what they share is sent with torch.distributed."""

    def gathered(self, own: object) -> list:
        found = [None] * self.world
        distributed.all_gather_object(found, own)
        return found


@contextmanager
def started(minutes: float = 30) -> Iterator[Processes]:
    """The processes of this run: those of the launcher that started it, or this one alone.

    Args:
        minutes: a process that says nothing for so long is taken for dead.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    try:
        yield Launched(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
