"""Counts in sentences."""

from __future__ import annotations


def plural(count: int, noun: str, nouns: str = "") -> str:
    """A count and what is counted: ``1 row``, ``1,234 rows``; ``nouns`` where it is not the noun and an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def are(count: int) -> str:
    """``is`` or ``are``."""
    return "is" if count == 1 else "are"
