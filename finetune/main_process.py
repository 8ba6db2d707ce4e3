"""Work that one process of several does, while the others wait for as long as it takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

PATIENCE = timedelta(days=7)
"""The usual barrier gives up after ten minutes on GPUs; answering some hundred attacks takes longer."""


def in_main_process(work: Callable[[], object]) -> None:
    """Have the work done by the main process, or by this one if there are no others.

    Where it raises, the launcher ends the processes that wait.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        work()
        return
    import torch
    from accelerate import PartialState
    from torch import distributed

    state = PartialState(cpu=not torch.cuda.is_available())
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    if state.is_main_process:
        work()
    distributed.barrier(group=group)
    distributed.destroy_process_group(group)
