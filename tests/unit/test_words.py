"""Counts in sentences."""

from __future__ import annotations

import pytest

from finetune.words import are, plural


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2, ("row",), "2 rows"),
        (1234, ("held-out prompt",), "1,234 held-out prompts"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_plural(count: int, nouns: tuple[str, ...], text: str) -> None:
    assert plural(count, *nouns) == text
    assert are(count) == ("is" if count == 1 else "are")
