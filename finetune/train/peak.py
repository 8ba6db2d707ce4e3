"""The highest memory of a run, measured: on its GPU, or resident on a CPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """Highest memory since `reset_peak_memory`: allocated on this process's GPU, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _resident_peak()


def reset_peak_memory() -> None:
    """Begin anew, so that each run of a pipeline tells its own peak.

    Where the system does not let a process do that to its resident memory (all but Linux, and some containers),
    the peak stays that of the process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): sets VmHWM to what is resident now


def _resident_peak() -> int:
    # getrusage would do but for two things: it is not reset, and it begins with the peak of the process's parent.
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
