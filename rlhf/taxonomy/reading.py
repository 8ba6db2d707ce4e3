"""Prompts out of data files: conversations, pairs, preferences, bare prompts, raw text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.formats import COLUMNS, PAIRS, ROLE_ALIASES
from finetune.data.records import BadRow, Row
from finetune.data.sources import open_source
from finetune.errors import UserError
from finetune.words import plural
from rlhf.taxonomy.tree import Taxonomy

TURNS = tuple(name for layout in ("sharegpt", "messages") for (name,) in COLUMNS[layout])
TEXTS = (*dict.fromkeys(question for question, _ in PAIRS), *(name for (name,) in COLUMNS["text"]))
SHOWN = 5


@dataclass(frozen=True)
class PromptRow:
    """A row and the prompt in it.

    Attributes:
        row: as it was read, with its place.
        prompt: what the first user turn asks; of raw text, the text.
    """

    row: Row
    prompt: str


@dataclass(frozen=True)
class PromptFile:
    """The rows of a file, folder, pattern or hub data set that have a prompt, and those that have none."""

    name: str
    rows: list[PromptRow]
    without: list[BadRow] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The prompts, in the order of the rows."""
        return [each.prompt for each in self.rows]

    def note(self) -> str | None:
        """What was left out, in a sentence; None where nothing was."""
        if not self.without:
            return None
        first = "; ".join(map(str, self.without[:SHOWN]))
        rows = plural(len(self.without) + len(self.rows), "row")
        return f"{len(self.without):,} of {rows} without a prompt: {first}"


def read_prompts(path: str | Path, *, called: str = "FILE") -> PromptFile:
    """The prompts of a data file in any layout that training reads, or with a column of bare prompts.

    Args:
        path: file, folder, pattern or hub data set.
        called: what the user gave it as, for messages.

    Raises:
        UserError: the file is missing, empty or unreadable, or no row has a prompt.
    """
    name = str(path)
    rows: list[PromptRow] = []
    without: list[BadRow] = []
    readable = False
    for _, read in open_source(name, called=called):
        for row in read():
            readable |= isinstance(row, Row)
            prompt = prompt_of(row.columns) if isinstance(row, Row) else None
            if isinstance(row, Row) and prompt is not None:
                rows.append(PromptRow(row, prompt))
            else:
                without.append(row if isinstance(row, BadRow) else BadRow(row.location, _reason(row)))
    if not rows:
        listed = "".join(f"\n  {row}" for row in without[:SHOWN])
        expected = f"expected turns in {', '.join(TURNS)}, or text in one of {', '.join(TEXTS)}"
        raise UserError(
            f"{name}: no row has a prompt{listed}",
            hint=expected if readable else "none can be read: mend these rows, or save the file again",
        )
    return PromptFile(name, rows, without)


def prompt_of(columns: Mapping[str, Any]) -> str | None:
    """What a row's first user turn asks; None if it has no such turn."""
    for name in (*TURNS, "prompt"):
        prompt = _first_question(columns.get(name))
        if prompt:
            return prompt
    for name in TEXTS:
        text = columns.get(name)
        if isinstance(text, str) and text.strip():
            extra = columns.get("input") if name == "instruction" else None
            return f"{text.strip()}\n{extra}" if isinstance(extra, str) and extra.strip() else text.strip()
    return None


def _first_question(turns: Any) -> str | None:
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a table's cell
        try:
            turns = json.loads(turns)
        except ValueError:
            return None
    if not isinstance(turns, list):
        return None
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if isinstance(role, str) and ROLE_ALIASES.get(role.strip().lower()) == "user":
            text = turn.get("content", turn.get("value"))
            return text.strip() or None if isinstance(text, str) else None
    return None


def _reason(row: Row) -> str:
    return f"columns {', '.join(map(repr, list(row.columns)[:6])) or 'none'}, and no question in them"


def read_labelled(path: str | Path, taxonomy: Taxonomy, *, called: str = "FILE") -> list[tuple[str, str]]:
    """(prompt, category id) of each row of a labelled file: a prompt, and a column `category`; see `read_prompts`.

    Raises:
        UserError: as `read_prompts`; or a category is missing or does not exist.
    """
    found = read_prompts(path, called=called)
    if found.without:
        raise UserError(f"{found.without[0]}", hint="every row of a labelled file needs a prompt")
    return [
        (each.prompt, taxonomy.check_id(each.row.columns.get("category"), str(each.row.location)))
        for each in found.rows
    ]
