"""What several processes do together: each has the whole base and a share of the responses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from rlhf.ppo.errors import RunStopped

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
        """The sum of a tensor over all processes, on the device of the tensor.

        It is summed on this process's own device: GPUs' processes cannot sum what lies on the CPU, as scores do.
        """
        if self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor.to(self._accelerator.device), "sum").to(tensor.device)

    def any(self, flag: bool) -> bool:
        """Whether it is set in any process."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self._accelerator.device)) > 0)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Where one process is stopped within, all are: none is left waiting for the others."""
        error: RunStopped | None = None
        try:
            yield
        except RunStopped as found:
            error = found
        stopped = self.any(error is not None)
        if error is not None:
            raise error
        if stopped:
            raise RunStopped("training stopped, since another process cannot go on")

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
