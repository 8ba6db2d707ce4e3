"""Answers that wait for a judge, in a file: a judge that raises costs no generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.records import kind_of
from finetune.errors import UserError
from finetune.files import write_text
from finetune.report.files import read_json
from rlhf.safety.attacks import AttackPrompt

KEPT_FILE = "answers.json"


def keep(path: Path, content: dict[str, Any]) -> None:
    """Write answers, and how they came about.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_kept(path: Path, version: int, keys: Sequence[str], row_keys: Sequence[str]) -> dict[str, Any]:
    """What `keep` wrote.

    Args:
        path: the file, or one with the same content and more, such as redteam.json.
        version: its `format_version`.
        keys: the lists of rows that it has to hold, the first of them not empty.
        row_keys: what each row has to hold.

    Raises:
        UserError: no such file, or one without answers.
    """
    hint = "give the file of answers that an earlier run of the same command left"
    if path.is_dir():
        found = sorted(path.glob(f"*{KEPT_FILE}"))
        raise UserError(
            f"{path}: is a folder, expected a file of answers", hint=f"give {found[0]}" if found else hint
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint=hint)
    content = read_json(path, hint=f"repair it, {hint}, or have the model answer again without --answers")
    if content.get("format_version") != version:
        raise UserError(
            f"{path}: expected answers of format {version}, found {content.get('format_version')!r}",
            hint=hint,
        )
    for key in keys:
        rows = content.get(key)
        if not isinstance(rows, list):
            raise UserError(f"{path}: expected a list {key!r}, found {kind_of(rows)}", hint=hint)
        if not rows and key == keys[0]:
            raise UserError(f"{path}: no {key} in it", hint=hint)
        for number, row in enumerate(rows, start=1):
            missing = [name for name in row_keys if name not in row] if isinstance(row, dict) else row_keys
            if missing:
                raise UserError(f"{path}: {key}, row {number}: without {', '.join(missing)}", hint=hint)
    return content


def prompt_row(prompt: AttackPrompt) -> dict[str, Any]:
    """A prompt for JSON; `prompt_of` reads it."""
    row = {
        "id": prompt.id,
        "messages": [dict(message) for message in prompt.messages],
        "attack": prompt.attack,
        "value": prompt.value,
        "group": prompt.group,
    }
    return {key: value for key, value in row.items() if value is not None}


def prompt_of(row: dict[str, Any]) -> AttackPrompt:
    """The prompt that `prompt_row` wrote, or a row with more."""
    return AttackPrompt(
        row["id"], tuple(row["messages"]), row.get("attack"), row.get("value"), row.get("group")
    )
