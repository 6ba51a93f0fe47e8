"""Several processes that share one piece of work: each loads the model and takes every so many-th part of the text.

What they found is put together in the order of the text, so that the result is that of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from paper_src import InputError


@dataclass(frozen=True)
class Processes:
    """One process alone: nothing is sent. ``scale.launch`` has the one of torchrun, ``rank`` among ``world``."""

    rank: int = 0
    world: int = 1

    def mine(self, parts: Sequence | Tensor) -> Sequence | Tensor:
        """This process's share of ``parts``; InputError if there are fewer of them than processes."""
        if len(parts) < self.world:
            raise InputError(
                f"{len(parts)} parts of the text for {self.world} processes: start fewer, or give more text"
            )
        return parts[self.rank :: self.world]

    def gathered(self, own: object) -> list:
        """What every process gives here, in the order of ranks; the same list in each."""
        return [own]

    def woven(self, own: Sequence) -> list:
        """The parts of all processes in the order in which :meth:`mine` dealt them out."""
        shares = self.gathered(list(own))
        return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]


ALONE = Processes()
