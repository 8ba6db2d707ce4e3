"""Sizes as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "G": 2**30}


def bytes_of(text: str) -> int | None:
    """Bytes of a size such as ``5GB``, ``500 MiB``, ``24G`` (GiB) or ``1000000``; None if it is no positive size."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([A-Z]*)", text.upper().replace(" ", ""))
    if not match or match[2] not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2]]) or None
