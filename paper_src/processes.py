"""Several processes that share one piece of work, started by torchrun or accelerate launch.

Every process (rank) loads the model and takes every so many-th part of the text; what they found is put together in
the order of the text, or summed, so that the result is that of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, distributed

from paper_src import InputError


@dataclass(frozen=True)
class Processes:
    """This process's number among ``world``; alone by default, and then nothing is sent."""

    rank: int = 0
    world: int = 1

    def mine(self, parts: Sequence | Tensor) -> Sequence | Tensor:
        """This rank's share of ``parts``.

        Raises:
            InputError: there are fewer parts than ranks.
        """
        if len(parts) < self.world:
            raise InputError(
                f"{len(parts)} parts of the text for {self.world} processes: start fewer, or give more text"
            )
        return parts[self.rank :: self.world]

    def gathered(self, own: object) -> list:
        """What every rank gives here, in the order of ranks; the same list on each."""
        if self.world == 1:
            return [own]
        found = [None] * self.world
        distributed.all_gather_object(found, own)
        return found

    def woven(self, own: Sequence) -> list:
        """The parts of all ranks in the order in which :meth:`mine` dealt them out."""
        shares = self.gathered(list(own))
        return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in ``tensor`` itself."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor


ALONE = Processes()
