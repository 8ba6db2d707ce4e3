"""What several processes do together: each has the whole base and a share of the responses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rlhf.ppo.rewards import RewardError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """This process among all of them. Response g of a batch is row g // count of process g % count.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        return self._accelerator.reduce(tensor, "sum") if self.count > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self._accelerator.device)) > 0)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A `RewardError` that one process raises within, all raise: none is left waiting for the others."""
        error: RewardError | None = None
        try:
            yield
        except RewardError as found:
            error = found
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise RewardError("a reward failed in another process")

    def minibatches(self, batch_size: int, size: int, epochs: int, *, seed: str) -> Iterator[torch.Tensor]:
        """This process's rows of each minibatch; there may be none.

        The responses of all processes are shuffled together, by a seed that all know: minibatches are the same
        however many processes share them.
        """
        for epoch in range(epochs):
            order = list(range(batch_size))
            random.Random(f"{seed}:{epoch}").shuffle(order)
            for start in range(0, batch_size, size):
                chosen = order[start : start + size]
                mine = [g // self.count for g in chosen if g % self.count == self.rank]
                yield torch.tensor(mine, dtype=torch.long)
