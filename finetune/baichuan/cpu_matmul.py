"""The library that multiplies float32 matrices on a CPU.

torch takes Intel's MKL, which on AMD's processors leaves half of AVX-512 unused: oneDNN, which torch also
contains, is twice as fast there with the matrices of a real model (benchmarks/matmul.py). It is slower with small
ones, a token at a time too, and takes a millisecond with each new shape, so it is taken for training, its
evaluation, and PPO's scoring, where the model is wide enough. torch asks oneDNN only if bfloat16 would do as well.
Where the processor has no matrix unit for bfloat16 (AMX), oneDNN then computes in float32 all the same, and a
self-test has to show that it does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PROCESSOR = Path("/proc/cpuinfo")
MIN_HIDDEN_SIZE = 512
"""From which oneDNN clearly wins in a training step whose batches differ in length (benchmarks/matmul.py)."""
ALLOWED_ERROR = 1e-5
"""Of a product, relative. float32 makes 3e-7, bfloat16 2e-3."""

_SHAPES = ((1, 512, 512), (16, 2048, 512), (512, 512, 16), (300, 1376, 512))
"""Rows, inner dimension and columns of the self-test: a decoded token, a batch, LoRA's narrow matrices."""
_LOCK = threading.Lock()


@contextlib.contextmanager
def fast_matmul(hidden_size: int, device: torch.device) -> Iterator[None]:
    """Inside, torch multiplies float32 matrices by whichever library is faster on this CPU; a GPU is left alone.

    The choice holds for the whole process. Where the user has chosen a precision for oneDNN
    (`torch.backends.mkldnn.matmul.fp32_precision`, `torch.set_float32_matmul_precision`), it is left as it is.

    Args:
        hidden_size: of the model.
        device: where it computes.
    """
    if device.type != "cpu" or hidden_size < MIN_HIDDEN_SIZE or not onednn_is_better():
        yield
        return
    with _onednn():
        yield


@contextlib.contextmanager
def _onednn() -> Iterator[None]:
    """Have torch ask oneDNN, unless a precision was chosen before."""
    import torch

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if before != "none":
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def onednn_is_better() -> bool:
    """Whether oneDNN is faster on this processor with wide matrices, and as exact."""
    with _LOCK:  # a second thread would take the test's setting for the user's
        return _onednn_passes()


@functools.cache
def _onednn_passes() -> bool:
    import torch

    if not _faster_here() or not torch.backends.mkldnn.is_available():
        return False
    with _onednn():
        error = matmul_error()
    if not error < ALLOWED_ERROR:
        logger.warning("matrices are multiplied by MKL: oneDNN is off by %.0e on this processor", error)
        return False
    return True


def matmul_error(product: Callable | None = None) -> float:
    """The largest relative error of a few products against float64; None is torch's as it multiplies now."""
    import torch

    product = product or torch.matmul
    generator = torch.Generator().manual_seed(0)
    errors = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for rows, inner, columns in _SHAPES:
            sizes = ((rows, inner), (inner, columns))
            a, b = (torch.randn(*size, generator=generator, device="cpu") for size in sizes)
            exact = a.double() @ b.double()
            for found in (product(a, b), product(b.T, a.T).T, product(a[None], b[None])[0]):
                errors.append(float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    return max(errors)


def _faster_here() -> bool:
    """Whether the processor is AMD's, with AVX-512 and without AMX."""
    try:
        text = PROCESSOR.read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    features = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return "AuthenticAMD" in text and "avx512f" in features and "amx_tile" not in features
