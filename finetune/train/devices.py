"""What a device offers: memory, and arithmetic per second; named cards, a size such as 24GiB, or the one here."""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass

from finetune.errors import UserError
from finetune.sizes import bytes_of

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device to train on.

    Attributes:
        name: as people call it.
        memory: bytes.
        flops: dense 16-bit matrix FLOP/s with float32 accumulation (float32 on a CPU); None if not known.
        kind: ``cuda`` or ``cpu``.
    """

    name: str
    memory: int
    flops: float | None
    kind: str = "cuda"


def _card(name: str, gib: int, teraflops: float) -> Device:
    return Device(name, gib * GIB, teraflops * 1e12)


CARDS = {
    card.name.lower().replace(" ", ""): card
    for card in (
        _card("RTX 3090", 24, 71),
        _card("RTX 4090", 24, 165),
        _card("RTX 5090", 32, 210),
        _card("RTX A6000", 48, 155),
        _card("T4", 16, 65),
        _card("V100", 32, 125),
        _card("A10", 24, 125),
        _card("L4", 24, 121),
        _card("L20", 48, 119),
        _card("L40S", 48, 362),
        _card("A100", 80, 312),
        _card("A100-40", 40, 312),
        _card("A800", 80, 312),
        _card("H20", 96, 148),
        _card("H100", 80, 989),
        _card("H800", 80, 989),
        _card("H200", 141, 989),
    )
}
"""Cards by name, from their makers' data sheets: memory in GiB, dense tensor TFLOP/s in 16 bits."""


def parse_device(text: str) -> Device:
    """A card by its name (``RTX 4090``), or any card by its memory (``24GiB``).

    Raises:
        UserError: if it is neither.
    """
    compact = text.lower().replace(" ", "").replace("nvidia", "").replace("geforce", "")
    if compact in CARDS:
        return CARDS[compact]
    if compact and compact[-1].isalpha() and (size := bytes_of(compact)):
        return Device(text.strip(), size, None)
    names = [card.name for card in CARDS.values()]
    near = difflib.get_close_matches(compact, CARDS, n=1)
    guess = f"did you mean {CARDS[near[0]].name}? " if near else ""
    if re.fullmatch(r"[1-9]\d*(\.\d+)?", compact):
        guess = f"did you mean {compact}GiB? "
    raise UserError(
        f"--device: found {text!r}, expected a size such as 24GiB or the name of a card",
        hint=f"{guess}known are {', '.join(names)}",
    )


def present_device(*, measure: bool = False) -> Device:
    """The device that a run here would use.

    Args:
        measure: time a matrix product, a second's work on a CPU, to know its FLOP/s.
    """
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = Device(properties.name, properties.total_memory, None)
    else:
        import psutil

        device = Device("this machine's CPU", psutil.virtual_memory().total, None, "cpu")
    return (
        Device(device.name, device.memory, _measured_flops(device.kind), device.kind) if measure else device
    )


def _measured_flops(kind: str) -> float:
    """FLOP/s of a large matrix product, in bfloat16 on a GPU and in float32 on a CPU."""
    import torch

    side, dtype = (8192, torch.bfloat16) if kind == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(side, side, device=kind, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
