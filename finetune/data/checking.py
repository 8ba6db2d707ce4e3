"""What a conversation or a text must fulfil before anything is learned from it.

Turns are counted from 1 in the order of the row's own list, a system message included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.records import RowError, kind_of

ROLES = ("system", "user", "assistant")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Check a conversation: an optional system message, then user and assistant in turn, text in each.

    Args:
        messages: [{"role": ..., "content": ...}, ...]

    Raises:
        RowError: the first thing that is wrong, with the turn.
    """
    if not messages:
        raise RowError("the conversation has no turns")
    previous = None
    for turn, message in enumerate(messages, start=1):
        role = message["role"]
        _check_order(turn, role, previous)
        _check_content(f"turn {turn} ({role})", message["content"])
        previous = role
    if previous != "assistant":
        raise RowError(
            f"turn {len(messages)}: ends with role '{previous}', expected an answer of the assistant"
        )


def _check_order(turn: int, role: Any, previous: str | None) -> None:
    if role not in ROLES:
        raise RowError(f"turn {turn}: role {role!r} is unknown, expected one of {', '.join(ROLES)}")
    if role == "system":
        if turn > 1:
            raise RowError(
                f"turn {turn}: role 'system' follows '{previous}', expected it first or not at all"
            )
    elif role == previous:
        raise RowError(f"turn {turn}: role '{role}' follows '{previous}'")
    elif role == "assistant" and previous != "user":
        where = "starts with role 'assistant'" if turn == 1 else f"role 'assistant' follows '{previous}'"
        raise RowError(f"turn {turn}: {where}, expected 'user'")


def _check_content(where: str, content: Any) -> None:
    if content is None:
        raise RowError(f"{where}: the content is null")
    _check_string(f"{where}: the content", content)
    check_encodable(content, where)


def check_text(text: Any, column: str = "text") -> None:
    """Check a raw text: a string with something in it that can be encoded.

    Raises:
        RowError: what is wrong, with the column.
    """
    if text is None:
        raise RowError(f"column '{column}' is missing or null")
    _check_string(f"column '{column}'", text)
    check_encodable(text, f"column '{column}'")


def _check_string(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind_of(value)}, expected a string")
    if not value.strip():
        raise RowError(f"{name} is empty")


def check_encodable(text: str, where: str) -> None:
    """Refuse what UTF-8 cannot express (half a surrogate pair) and NUL, the trace of a damaged file.

    Raises:
        RowError: names the character and its place, counted from 1.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise RowError(f"{where}: lone surrogate {code} at character {error.start + 1}") from error
    if "\0" in text:
        raise RowError(f"{where}: NUL at character {text.index(chr(0)) + 1}")
