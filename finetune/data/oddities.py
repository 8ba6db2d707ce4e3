"""Rows that can be learned from, and that someone should look at first: they are kept, and told by line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from finetune.data.records import BadRow, Record

_OPENING_MARK = re.compile(r"[，。、；：！？,.;:!?)）】》」』]")
_USUAL_OPENING = re.compile(r"\.\w|\.{3}|:\w+:|!\[")  # .NET, an ellipsis, the name of an emoji, a picture
_RULER = " .-_=*#~|\n\t…。—─"
_TAGS = "p|br|hr|div|span|b|i|u|em|strong|font|a|img|ul|ol|li|table|tr|td|th|h[1-6]|sub|sup|script|style"
_MARKUP = re.compile(
    r"&(?:#\d{2,6}|#x[0-9a-fA-F]{2,6}|amp|lt|gt|nbsp|quot|apos|ldquo|rdquo|hellip|middot);"
    rf"|</?(?:{_TAGS})(?:\s+[a-zA-Z-]+=[^<>]*)?\s*/?>"
)
_DAMAGE = re.compile("[\ufffd\ue000-\uf8ff\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LOOP = re.compile(r"(.{4,60}?)\1{3,}", re.DOTALL)
_CODE = re.compile(r"```|\bdef |\breturn\b|</\w+>.*<\w+", re.DOTALL)
LEAST_QUESTION = 8
"""A question of fewer characters may well be an answer's first words."""


def oddities(records: Iterable[Record]) -> list[BadRow]:
    """What looks wrong in rows that pass every check, a row and reason each, in the order of the rows."""
    return [
        BadRow(record.location, "; ".join(found)) for record in records if (found := list(_look_at(record)))
    ]


def _look_at(record: Record) -> Iterator[str]:
    messages = record.messages or []
    for text in [message["content"] for message in messages] or [record.text or ""]:
        if damage := _DAMAGE.search(text):
            yield f"damaged character U+{ord(damage[0]):04X}"
        if (markup := _MARKUP.search(text)) and not _CODE.search(text):
            yield f"left-over markup {markup[0]!r}"
    for question, answer in pairwise(messages):
        if answer["role"] == "assistant":
            yield from _look_at_answer(question["content"].strip(), answer["content"].strip())


def _look_at_answer(question: str, answer: str) -> Iterator[str]:
    if (mark := _OPENING_MARK.match(answer)) and not _USUAL_OPENING.match(answer):
        yield f"an answer begins with {mark[0]!r}"
    if answer == question:
        yield "an answer is its question"
    elif len(question) >= LEAST_QUESTION and answer.startswith(question):
        yield "an answer begins with the whole question"
    if _repetitive(answer) and (loop := _LOOP.search(answer)) and loop[1].strip(_RULER):
        yield f"an answer repeats {loop[1][:20]!r} over and over"


def _repetitive(text: str) -> bool:
    """Whether a fifth of the text has been there before: a glance, before the search that takes milliseconds."""
    grams = len(text) - 3
    return grams - len({text[i : i + 4] for i in range(grams)}) >= max(9, grams // 5)
