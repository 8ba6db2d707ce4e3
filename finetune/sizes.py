"""Sizes as people write them."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
    "G": 2**30,
    "T": 2**40,
}
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_of(text: str) -> int | None:
    """Bytes of a size such as ``5GB``, ``500 MiB``, ``24G`` (GiB) or ``1000000``; None if it is no positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([A-Z]*)", text.upper().replace(" ", ""))
    if not match or match[2] not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2]]) or None


def byte_size(value: float) -> str:
    """Bytes in binary units: 1610612736 → 1.50 GiB."""
    for unit in _BYTE_UNITS:
        if abs(value) < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the last unit takes everything")
