"""Which rows are seen how often, and which are held out. Pure functions, deterministic by seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random


def weighted_indices(count: int, weight: float, *, seed: int) -> list[int]:
    """Rows of a source as often as its weight says: weight times in an epoch.

    2 gives every row twice, 0.5 a random half of the rows (the same in every epoch), 2.5 every row twice and
    a random half once more.

    Args:
        count: rows of the source.
        weight: above 0.
        seed: decides which rows the fraction falls on.

    Returns:
        Indices 0 to count - 1, sorted, round(count * weight) of them and at least one if there is a row.
    """
    wanted = max(round(count * weight), min(count, 1))
    whole, rest = divmod(wanted, count) if count else (0, 0)
    return sorted([*range(count)] * whole + Random(seed).sample(range(count), rest))


def shuffled(values: Sequence[int], *, seed: int) -> list[int]:
    """The values in an order that the seed decides."""
    order = list(values)
    Random(seed).shuffle(order)
    return order


def held_out_digests(digests: Sequence[bytes], share: float) -> set[bytes]:
    """Contents to hold out: about `share` of the rows, at least one content, never all.

    Content decides, neither order nor seed: equal rows land on one side, and the same data is always split
    in the same way, so that runs can be compared.

    Args:
        digests: the content of each row; equal rows have equal digests.
        share: above 0, at most 0.5.

    Returns:
        The digests of the held-out rows; empty if all rows are equal.
    """
    # blake2b digests are uniformly distributed, so the smallest are a random sample.
    distinct = sorted(set(digests))
    wanted = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    return set(distinct[: max(wanted, 0)])
