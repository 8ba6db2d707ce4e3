"""What travels through the data pipeline: rows as read, rows refused, and checked records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a row stands, so that whoever has to mend it finds it.

    Attributes:
        file: the path or hub id as the user wrote it (for a glob or folder: the file found).
        number: counted from 1.
        unit: what is counted: "line" (JSONL, CSV, text), "item" (JSON list) or "row" (Parquet, hub).
    """

    file: str
    number: int
    unit: str = "line"

    def __str__(self) -> str:
        if self.unit == "line":
            return f"{self.file}:{self.number}"
        return f"{self.file}: {self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read: an object with named columns."""

    columns: dict[str, Any]
    location: Location


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be learned from, and why."""

    location: Location
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: file, line (the number), unit and reason."""
        where = self.location
        return {"file": where.file, "line": where.number, "unit": where.unit, "reason": self.reason}


@dataclass(frozen=True)
class Record:
    """A checked row in normalised form: either a conversation or raw text.

    Attributes:
        messages: [{"role": "system" | "user" | "assistant", "content": str}, ...], or None for text.
        text: the raw text, or None for a conversation.
        location: where it was read.
    """

    messages: list[Message] | None = None
    text: str | None = None
    location: Location = field(default_factory=lambda: Location("", 0))

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal content, wherever it was read."""
        content = json.dumps(self.text if self.messages is None else self.messages, sort_keys=True)
        return hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest()

    @property
    def prompt(self) -> str | None:
        """What the first user turn asks; None for raw text."""
        for message in self.messages or []:
            if message["role"] == "user":
                return message["content"]
        return None


class RowError(ValueError):
    """Why a row cannot be used; becomes a `BadRow` where its location is known."""


def kind_of(value: Any) -> str:
    """A value's kind in JSON's words, for messages."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number"}
    kinds |= {str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
