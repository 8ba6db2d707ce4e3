"""Reading the small files of a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one a line.

    A last line that breaks off is left out: it is what a process leaves that was ended while it wrote. Other
    characters that Unicode counts as line ends (U+2028, say) may stand in JSON strings and end no line.

    Raises:
        UserError: another line is no JSON object.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UserError(
                f"{path}:{number}: expected a JSON object, found {line[:60]!r}",
                hint="the file was changed after the run wrote it; remove or repair the line",
            )
    return rows


def read_json(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        hint: what to do where it holds none.

    Raises:
        UserError: the file holds no JSON object; names the line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        found = f"{error.msg} (column {error.colno})"
        raise UserError(f"{path}:{error.lineno}: not readable as JSON: {found}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as JSON: {error}", hint=hint) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}", hint=hint)
    return content
