"""What a device offers: memory, and arithmetic per second; named cards, a size such as 24GiB, or the one here."""

from __future__ import annotations

import difflib
import re
import time
from dataclasses import dataclass, replace

from finetune.errors import UserError
from finetune.sizes import bytes_of

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A device to train on.

    Attributes:
        name: as people call it.
        memory: bytes in all, as CUDA reports them.
        flops: dense 16-bit matrix FLOP/s with float32 accumulation (float32 on a CPU); None if not known.
        kind: ``cuda`` or ``cpu``.
        capability: CUDA's compute capability; None if not known.
    """

    name: str
    memory: int
    flops: float | None
    kind: str = "cuda"
    capability: tuple[int, int] | None = None


def _card(name: str, gib: float, teraflops: float, capability: tuple[int, int]) -> Device:
    return Device(name, int(gib * GIB), teraflops * 1e12, capability=capability)


CARDS = (
    (_card("RTX 3090", 23.6, 71, (8, 6)), 24),
    (_card("RTX 4090", 23.6, 165, (8, 9)), 24),
    (_card("RTX 5090", 31.4, 210, (12, 0)), 32),
    (_card("RTX A6000", 47.4, 155, (8, 6)), 48),
    (_card("T4", 14.6, 65, (7, 5)), 16),
    (_card("V100", 31.7, 125, (7, 0)), 32),
    (_card("V100-16", 15.8, 125, (7, 0)), 16),
    (_card("A10", 22.0, 125, (8, 6)), 24),
    (_card("L4", 22.0, 121, (8, 9)), 24),
    (_card("L20", 44.4, 119, (8, 9)), 48),
    (_card("L40S", 44.4, 362, (8, 9)), 48),
    (_card("A100", 79.2, 312, (8, 0)), 80),
    (_card("A100-40", 39.4, 312, (8, 0)), 40),
    (_card("A800", 79.2, 312, (8, 0)), 80),
    (_card("H20", 95.0, 148, (9, 0)), 96),
    (_card("H100", 79.1, 989, (9, 0)), 80),
    (_card("H800", 79.1, 989, (9, 0)), 80),
    (_card("H200", 139.8, 989, (9, 0)), 141),
)
"""Cards, and the GB that they are sold by. Memory is in GiB, as CUDA reports it, ECC and driver off; dense tensor
TFLOP/s in 16 bits are from their makers' data sheets; then CUDA's compute capability."""

DECORATION = r"nvidia|tesla|geforce|rtx|sxm\d?|pcie|hbm\d?e?|[\s_-]"
"""What nvidia-smi and people write around a card's number, and what does not tell two of the table apart."""

THIS_MACHINE = ("cpu", "gpu", "cuda")


def _names() -> dict[str, Device]:
    """Cards by what is left of their names without `DECORATION`: ``a100``, ``a10040``, ``a10040gb``."""
    names: dict[str, Device] = {}
    for card, sold_as in CARDS:
        bare = re.sub(DECORATION, "", card.name.lower())
        model = bare.removesuffix(str(sold_as))
        names |= dict.fromkeys((bare, f"{model}{sold_as}", f"{model}{sold_as}gb"), card)
    return names


def parse_device(text: str) -> Device:
    """A card by its name (``RTX 4090``, or as nvidia-smi prints it), or any card by its memory (``24GiB``).

    Raises:
        UserError: if it is neither.
    """
    lower = text.lower().replace(" ", "")
    names, bare = _names(), re.sub(DECORATION, "", text.lower()).replace("gib", "gb")
    if bare in names:
        return names[bare]
    if lower and lower[-1].isalpha() and (size := bytes_of(lower)):
        return Device(text.strip(), size, None)
    if lower in THIS_MACHINE:
        raise UserError(
            f"--device: found {text!r}, which names no card: it plans for one that is not here",
            hint="leave --device out to plan for this machine",
        )
    near = difflib.get_close_matches(bare, names, n=1)
    guess = f"did you mean {names[near[0]].name}? " if near else ""
    if re.fullmatch(r"[1-9]\d{0,2}(\.\d+)?", lower):
        guess = f"did you mean {lower}GiB? "
    raise UserError(
        f"--device: found {text!r}, expected a size such as 24GiB or the name of a card",
        hint=f"{guess}known are {', '.join(card.name for card, _ in CARDS)}",
    )


def present_device(*, measured_for: int | None = None) -> Device:
    """The device that a run here would use.

    Args:
        measured_for: hidden size of a model, to know the FLOP/s of its products: one is timed, a second's work on a
            CPU. None leaves them unknown.
    """
    import torch

    from finetune.baichuan.cpu_matmul import fast_matmul

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        device = Device(properties.name, properties.total_memory, None, capability=capability)
    else:
        import psutil

        device = Device("this machine's CPU", psutil.virtual_memory().total, None, "cpu")
    if measured_for is None:
        return device
    with fast_matmul(measured_for, torch.device(device.kind)):
        return replace(device, flops=_measured_flops(device.kind))


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
