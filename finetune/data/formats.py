"""Layouts of rows: which one a file has, and how each becomes messages or text.

| layout          | columns                                                     |
|-----------------|-------------------------------------------------------------|
| sharegpt        | conversations: [{"from": "human", "value": ...}, ...]        |
| messages        | messages: [{"role": "user", "content": ...}, ...]            |
| alpaca          | instruction, output; optional input, history                |
| prompt_response | a pair such as prompt and response, question and answer     |
| text            | text (or content): a raw document                           |

All but text may have a column `system`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.checking import check_messages, check_text
from finetune.data.records import Message, Record, Row, RowError, kind_of
from finetune.errors import UserError

SAMPLE_ROWS = 1000

PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "response"),
    ("input", "output"),
    ("问题", "回答"),
    ("问题", "答案"),
)
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sharegpt": (("conversations",), ("conversation",)),
    "messages": (("messages",),),
    "alpaca": (("instruction", "output"),),
    "prompt_response": PAIRS,
    "text": (("text",), ("content",)),
}
"""For each layout, the sets of columns that make it: the first that a file has is taken."""

ROLE_ALIASES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Layout:
    """How the rows of one file are laid out.

    Attributes:
        name: a key of `COLUMNS`.
        columns: the columns that hold the content, for example ("question", "answer").
    """

    name: str
    columns: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        """Whether the rows are raw text rather than conversations."""
        return self.name == "text"

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)})"

    def to_record(self, row: Row, *, system: str | None = None) -> Record:
        """A row in normalised form, checked.

        Args:
            system: system message for a conversation that brings none.

        Raises:
            RowError: the row cannot be used; says why.
        """
        if self.is_text:
            text = row.columns.get(self.columns[0])
            check_text(text, self.columns[0])
            return Record(text=text, location=row.location)
        messages = _TO_MESSAGES[self.name](row.columns, self.columns)
        check_messages(messages)
        if messages[0]["role"] != "system":
            front = system_of(row.columns) or system
            if front:
                messages = [{"role": "system", "content": front}, *messages]
        return Record(messages=messages, location=row.location)


def detect(rows: Sequence[Row], *, stage: str, name: str, expected: str = "auto") -> Layout:
    """The layout of a file, from its first rows.

    That is the one whose columns more than half of the rows have, null counting as absent if that settles
    it. Where a conversation and a rendered `text` stand side by side, the stage decides.

    Args:
        rows: at least one row.
        stage: "sft" or "pretrain".
        name: how messages call the file.
        expected: the layout that the recipe names, or "auto".

    Raises:
        UserError: no layout fits, more than one does, or the rows are not what the stage learns.
    """
    sample = rows[:SAMPLE_ROWS]
    fitting = _fitting(sample, stage) if expected == "auto" else _fitting_named(sample, expected)
    if not fitting:
        raise _unknown(sample, name, expected)
    if len(fitting) > 1:
        raise UserError(
            f"{name}: more than one layout fits: {', '.join(map(str, fitting))}",
            hint="name one with data.format, or leave only rows and columns of one layout in the file",
        )
    _check_stage(fitting[0], stage, name)
    return fitting[0]


def _fitting(sample: Sequence[Row], stage: str) -> list[Layout]:
    """The layout that fits the rows; none, or several, if that cannot be told."""
    counts: Counter[Layout] = Counter()
    for null_is_absent in (True, False):
        counts = Counter(layout for row in sample for layout in _layouts_of(row.columns, null_is_absent))
        fitting = [layout for layout, count in counts.items() if 2 * count > len(sample)]
        if fitting:
            break
    else:
        fitting = list(counts)  # rows of different layouts, or too few of any
    texts = [layout for layout in fitting if layout.is_text]
    others = [layout for layout in fitting if not layout.is_text]
    if texts and others:
        return texts if stage == "pretrain" else others
    return fitting


def _fitting_named(sample: Sequence[Row], name: str) -> list[Layout]:
    """The columns of a layout that the recipe names, as most rows have them; none if no row has any."""
    counts = Counter(layout for row in sample for layout in _layouts_of(row.columns, False))
    return [layout for layout, _ in counts.most_common() if layout.name == name][:1]


def _layouts_of(columns: Mapping[str, Any], null_is_absent: bool) -> list[Layout]:
    """All layouts whose columns a row has."""
    present = {key for key, value in columns.items() if value is not None or not null_is_absent}
    if {"chosen", "rejected"} <= present:
        return []
    found = []
    for name, alternatives in COLUMNS.items():
        fitting = [needed for needed in alternatives if present.issuperset(needed)]
        if name == "prompt_response":
            # Alpaca's own columns are no pair, and a pair may overlap with it.
            fitting = [
                pair for pair in fitting if pair != ("input", "output") or "instruction" not in present
            ]
            found += [Layout(name, pair) for pair in fitting]
        elif fitting:
            found.append(Layout(name, fitting[0]))
    return found


def _unknown(sample: Sequence[Row], name: str, expected: str) -> UserError:
    columns = list(dict.fromkeys(column for row in sample for column in row.columns))
    listed = ", ".join(repr(column) for column in columns[:12]) or "none"
    if {"chosen", "rejected"} <= set(columns):
        return UserError(
            f"{name}: preference data (columns {listed}), expected conversations or text",
            hint="preferences are for the stages reward and dpo",
        )
    if expected != "auto":
        needed = " or ".join(" + ".join(needed) for needed in COLUMNS[expected])
        return UserError(
            f"{name}: no row has the columns of format {expected} ({needed}); found {listed}",
            hint="set data.format: auto, or rename the columns",
        )
    known = "; ".join(f"{key}: {' or '.join(' + '.join(c) for c in sets)}" for key, sets in COLUMNS.items())
    return UserError(
        f"{name}: the layout is not recognised: columns {listed}",
        hint=f"rename the columns to those of a known layout ({known})",
    )


def _check_stage(layout: Layout, stage: str, name: str) -> None:
    if layout.is_text and stage == "sft":
        raise UserError(
            f"{name}: raw text (column '{layout.columns[0]}'), and stage sft learns conversations",
            hint="set stage: pretrain to learn raw text, or give conversations",
        )
    if not layout.is_text and stage == "pretrain":
        raise UserError(
            f"{name}: conversations ({layout}), and stage pretrain learns raw text",
            hint="set stage: sft to learn conversations, or give the texts in a column 'text'",
        )


def turns_in(columns: Mapping[str, Any], names: tuple[str, ...]) -> list[Message]:
    """The messages listed in the first of the named columns."""
    turns = list_in(columns, names[0])
    return [to_message(turn, number) for number, turn in enumerate(turns, start=1)]


def to_message(turn: Any, number: int) -> Message:
    """A turn of ShareGPT's or OpenAI's kind as a message; `number` is what to call it.

    Raises:
        RowError: it has no role or content, or an unknown role.
    """
    if not isinstance(turn, dict):
        raise RowError(f"turn {number}: expected an object with role and content, found {turn!r:.40}")
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise RowError(f"turn {number}: no role: expected 'from' or 'role', found {_keys(turn)}")
    if "content" not in turn and "value" not in turn:
        raise RowError(f"turn {number}: no content: expected 'value' or 'content', found {_keys(turn)}")
    alias = ROLE_ALIASES.get(role.strip().lower()) if isinstance(role, str) else None
    if alias is None:
        raise RowError(f"turn {number}: role {role!r} is unknown, expected one of {', '.join(ROLE_ALIASES)}")
    return {"role": alias, "content": _joined(turn.get("content", turn.get("value")), number)}


def _joined(content: Any, number: int) -> Any:
    """OpenAI's content in parts as one string; anything else unchanged, for the check to judge."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {} for part in content]
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        kinds = sorted({str(part.get("type")) for part in parts})
        raise RowError(
            f"turn {number}: content in parts of type {', '.join(kinds)}, only text can be learned"
        )
    return "".join(part["text"] for part in parts)


def _keys(turn: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in turn) or "nothing"


def _from_alpaca(columns: Mapping[str, Any], names: tuple[str, ...]) -> list[Message]:
    instruction, output = (string_in(columns, name) for name in names)
    extra = columns.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"column 'input' is {kind_of(extra)}, expected a string")
    question = f"{instruction}\n{extra}" if extra and extra.strip() else instruction
    return [*history_of(columns), *_exchange(question, output)]


def _from_pair(columns: Mapping[str, Any], names: tuple[str, ...]) -> list[Message]:
    question, answer = (string_in(columns, name) for name in names)
    return [*history_of(columns), *_exchange(question, answer)]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def history_of(columns: Mapping[str, Any]) -> list[Message]:
    """Earlier rounds: [[question, answer], ...]."""
    if not columns.get("history"):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(list_in(columns, "history"), start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"column 'history': round {number} is {pair!r:.40}, expected [question, answer]")
        messages += _exchange(*pair)
    return messages


def system_of(columns: Mapping[str, Any]) -> str | None:
    """The row's system message, None where there is none."""
    system = columns.get("system")
    if system is None or system == "":
        return None
    check_text(system, "system")
    return str(system)


def string_in(columns: Mapping[str, Any], name: str) -> str:
    """A column's text, checked."""
    value = columns.get(name)
    check_text(value, name)
    return str(value)


def list_in(columns: Mapping[str, Any], name: str) -> list[Any]:
    """A column's list; in tables it may be written as JSON."""
    value = columns.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"column '{name}' is a string and not JSON: {error}") from error
    if value is None:
        raise RowError(f"column '{name}' is missing or null")
    if not isinstance(value, list):
        raise RowError(f"column '{name}' is {kind_of(value)}, expected a list")
    return value


_TO_MESSAGES = {
    "sharegpt": turns_in,
    "messages": turns_in,
    "alpaca": _from_alpaca,
    "prompt_response": _from_pair,
}
