"""Rows of preference data into checked preferences: a prompt and its responses, best first.

| layout | columns                                                                                        |
|--------|------------------------------------------------------------------------------------------------|
| ranked | a prompt, `responses`: [{"text", "rank" or "score", optional source_model, stage}, ...]         |
| pair   | a prompt, `chosen`, `rejected`, each a text, a message or a whole conversation; optional `gap` |

The prompt is `messages` or `conversations` (or `prompt` as a list of messages), or a text in `prompt`,
`instruction` (with `input` and `history`), `question`, `query` or `问题`; conversations in `chosen` and
`rejected` may bring it themselves. All may have `system` and `category`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from finetune.data.checking import check_messages, check_text
from finetune.data.formats import history_of, list_in, string_in, system_of, to_message, turns_in
from finetune.data.records import Location, Message, Row, RowError, kind_of
from finetune.words import plural

TURN_COLUMNS = ("messages", "conversations", "conversation", "prompt")
TEXT_COLUMNS = ("prompt", "instruction", "question", "query", "问题")
SCORE_COLUMNS = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


@dataclass(frozen=True)
class Response:
    """One answer to a prompt.

    Attributes:
        text: what it says.
        level: how good it is among the answers to the same prompt, more is better; only differences count.
        source_model: who wrote it; None where that is not known.
        stage: at which stage of its training, such as sft or ppo.
    """

    text: str
    level: float
    source_model: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class Preference:
    """A prompt with its responses, best first.

    Attributes:
        prompt: messages, the last one the user's.
        responses: at least two, not all equally good.
        graded: whether differences of level are known gaps, or only say which is better.
        category: id or name of the prompt's category.
        location: where it was read.
    """

    prompt: list[Message]
    responses: tuple[Response, ...]
    graded: bool
    category: str | None = None
    location: Location = field(default_factory=lambda: Location("", 0))

    @cached_property
    def prompt_digest(self) -> bytes:
        """16 bytes that are equal for equal prompts."""
        return _digest(self.prompt)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal content."""
        return _digest([self.prompt, [(response.text, response.level) for response in self.responses]])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions of the better and the worse response of every pair that is no tie."""
        levels = [response.level for response in self.responses]
        places = range(len(levels))
        return [(i, j) for i in places for j in places if i < j and levels[i] > levels[j]]

    def gap(self, better: int, worse: int) -> float | None:
        """By how much one response is better than another; None where only the order is known."""
        return self.responses[better].level - self.responses[worse].level if self.graded else None


def layout_of(columns: Mapping[str, Any]) -> str | None:
    """The layout of a row, None if it holds no preference."""
    if "responses" in columns:
        return "ranked"
    return "pair" if {"chosen", "rejected"} <= columns.keys() else None


def to_preference(row: Row, *, system: str | None = None) -> Preference:
    """A row in normalised form, checked.

    Args:
        row: of a layout above.
        system: system message for a prompt that brings none.

    Raises:
        RowError: the row cannot be used; says why.
    """
    columns = row.columns
    layout = layout_of(columns)
    if layout is None:
        listed = ", ".join(map(repr, columns)) or "none"
        raise RowError(
            f"no preference: expected 'responses', or 'chosen' and 'rejected', found columns {listed}"
        )
    if layout == "ranked":
        prompt = _prompt(columns)
        responses, graded = _ranked(columns), True
    else:
        prompt, responses, graded = _pair(columns)
    if not prompt:
        raise RowError("no prompt: expected 'messages', 'conversations', or a text such as 'prompt'")
    if prompt[0]["role"] != "system" and (front := system_of(columns) or system):
        prompt = [{"role": "system", "content": front}, *prompt]
    _check(prompt, responses)
    ordered = tuple(sorted(responses, key=lambda response: -response.level))
    return Preference(prompt, ordered, graded, _category(columns), row.location)


def _prompt(columns: Mapping[str, Any]) -> list[Message]:
    """The messages before the responses; empty if the row has none."""
    for name in TURN_COLUMNS:
        if isinstance(columns.get(name), list) or (name != "prompt" and columns.get(name) is not None):
            return turns_in(columns, (name,))
    for name in TEXT_COLUMNS:
        if columns.get(name) is not None:
            question = string_in(columns, name)
            extra = columns.get("input") if name == "instruction" else None
            if isinstance(extra, str) and extra.strip():
                question = f"{question}\n{extra}"
            return [*history_of(columns), {"role": "user", "content": question}]
    return []


def _ranked(columns: Mapping[str, Any]) -> list[Response]:
    entries = list_in(columns, "responses")
    if len(entries) < 2:
        raise RowError(f"{plural(len(entries), 'response')}, expected at least 2 to compare")
    kinds = {key for entry in entries if isinstance(entry, dict) for key in ("rank", "score") if key in entry}
    if len(kinds) != 1:
        found = "both" if kinds else "neither"
        raise RowError(f"responses: expected either 'rank' or 'score' in each of them, found {found}")
    return [
        _ranked_response(entry, number, kinds.copy().pop()) for number, entry in enumerate(entries, start=1)
    ]


def _ranked_response(entry: Any, number: int, key: str) -> Response:
    where = f"response {number}"
    if not isinstance(entry, dict):
        raise RowError(f"{where} is {kind_of(entry)}, expected an object with text and {key}")
    value = _number(entry.get(key), f"{where}: {key}")
    if key == "rank" and (value < 1 or value != int(value)):
        raise RowError(f"{where}: rank is {value:g}, expected 1 (the best), 2, ...")
    return Response(
        entry.get("text", entry.get("content")),  # type: ignore[arg-type]  # checked with the prompt
        -value if key == "rank" else value,
        _name(entry.get("source_model"), f"{where}: source_model"),
        _name(entry.get("stage"), f"{where}: stage"),
    )


def _pair(columns: Mapping[str, Any]) -> tuple[list[Message], list[Response], bool]:
    """Prompt, chosen and rejected response, and whether the gap between them is known."""
    prompt = _prompt(columns)
    texts = []
    for name in ("chosen", "rejected"):
        before, text = _one_of_pair(columns[name], name)
        if before and not prompt:
            prompt = before
        elif before and before not in (prompt, prompt[1:] if prompt[0]["role"] == "system" else prompt):
            raise RowError(f"column '{name}': the conversation does not begin as the prompt does")
        texts.append(text)
    gap = _gap(columns)
    if gap is not None and gap <= 0:
        raise RowError(f"the chosen response is not better than the rejected one (gap {gap:g})")
    responses = [Response(texts[0], 1.0 if gap is None else gap), Response(texts[1], 0.0)]
    return prompt, responses, gap is not None


def _one_of_pair(value: Any, name: str) -> tuple[list[Message], str]:
    """The messages before a response, if it comes as a conversation, and its text."""
    if isinstance(value, dict):
        value = [{"role": "assistant", **value}]
    if not isinstance(value, list):
        check_text(value, name)
        return [], str(value)
    messages = [to_message(turn, number) for number, turn in enumerate(value, start=1)]
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError(f"column '{name}': expected an answer of the assistant at its end")
    return messages[:-1], messages[-1]["content"]


def _gap(columns: Mapping[str, Any]) -> float | None:
    for name in ("gap", "margin"):
        if columns.get(name) is not None:
            return _number(columns[name], f"column '{name}'")
    for better, worse in SCORE_COLUMNS:
        if columns.get(better) is not None and columns.get(worse) is not None:
            return _number(columns[better], f"column '{better}'") - _number(
                columns[worse], f"column '{worse}'"
            )
    return None


def _check(prompt: Sequence[Message], responses: Sequence[Response]) -> None:
    """What makes a preference unusable, first of all its conversations."""
    if prompt[-1]["role"] != "user":
        raise RowError(f"the prompt ends with role '{prompt[-1]['role']}', expected a question of the user")
    for number, response in enumerate(responses, start=1):
        try:
            check_messages([*prompt, {"role": "assistant", "content": response.text}])
        except RowError as error:
            raise RowError(f"with response {number}: {error}") from error
    seen: dict[str, int] = {}
    for number, response in enumerate(responses, start=1):
        first = seen.setdefault(response.text.strip(), number)
        if first != number:
            raise RowError(f"responses {first} and {number} are the same text")
    if len({response.level for response in responses}) == 1:
        raise RowError(f"all {len(responses)} responses are equally good: there is nothing to compare")


def _category(columns: Mapping[str, Any]) -> str | None:
    value = columns.get("category")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise RowError(f"column 'category' is the number {value:g}, expected text such as \"2.01\"")
    return _name(value, "column 'category'")


def _name(value: Any, where: str) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind_of(value)}, expected a string")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        shown = kind_of(value) if not isinstance(value, float) else f"{value}"
        raise RowError(f"{where} is {shown}, expected a number")
    return float(value)


def _digest(content: Any) -> bytes:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
