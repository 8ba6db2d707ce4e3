"""Texts that say nearly the same: MinHash (Broder, 1997) finds candidates, exact Jaccard similarity decides."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEAR_DUPLICATE = 0.7
SHINGLE = 3
BANDS, ROWS = 32, 4
"""A pair of similarity s becomes a candidate with probability 1 − (1 − s⁴)³²: 0.9998 at s = 0.7."""

_NOT_TEXT = re.compile(r"[\W_]+")


def shingles(text: str) -> frozenset[str]:
    """The text's runs of three characters, without punctuation, space and case; short texts whole."""
    plain = _NOT_TEXT.sub("", text.lower()) or text
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared ones as a share of all, 0 to 1."""
    return len(one & other) / len(one | other)


def signatures(sets: Sequence[frozenset[str]]) -> NDArray[Any]:
    """MinHash signatures, (n, BANDS × ROWS) of uint32. The same in every process and on every machine."""
    rng = np.random.default_rng(0)
    # Multiply-shift hashing (Dietzfelbinger et al., 1997): odd factors modulo 2⁶⁴, the upper half kept.
    factors = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
    found = np.empty((len(sets), BANDS * ROWS), dtype=np.uint32)
    for row, members in enumerate(sets):
        hashed = np.array([zlib.crc32(member.encode()) for member in members], dtype=np.uint64)
        found[row] = ((hashed[:, None] * factors + offsets) >> np.uint64(32)).min(0)
    return found


def first_alike(texts: Sequence[str], *, threshold: float = NEAR_DUPLICATE) -> list[int]:
    """For each text, the index of the first one that it nearly repeats, or its own.

    A text is compared with those that repeat nothing themselves, so every group has one member that stays, and
    no two that stay are near-duplicates (but for the rare pair that MinHash misses).

    Args:
        threshold: Jaccard similarity of shingles from which two texts are near-duplicates.
    """
    sets = [shingles(text) for text in texts]
    bands = signatures(sets).reshape(len(sets), BANDS, ROWS)
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    firsts = []
    for index, members in enumerate(sets):
        keys = [(number, band.tobytes()) for number, band in enumerate(bands[index])]
        candidates = sorted({other for key in keys for other in buckets[key]})
        first = next((c for c in candidates if jaccard(members, sets[c]) >= threshold), index)
        if first == index:
            for key in keys:
                buckets[key].append(index)
        firsts.append(first)
    return firsts
