"""Files into rows: JSONL, JSON and plain text here, tables in `tables.py`.

A row that cannot be read is handed on as a `BadRow` with its line, so that one broken line does not
hide the others; a file that cannot be read at all is a `UserError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.encoding import decode_file, decode_line, refuse_utf16, strip_bom
from finetune.data.records import BadRow, Location, Row, kind_of
from finetune.data.tables import read_csv, read_parquet
from finetune.errors import UserError

CONTAINER_KEYS = ("data", "train", "rows", "examples", "items")
TURN_KEYS = ("conversations", "conversation", "messages", "history")
SUFFIXES = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".txt": "text",
}


def read_rows(path: Path, name: str | None = None) -> Iterator[Row | BadRow]:
    """The rows of one file, in order. A text file is one row, a document.

    Args:
        path: a file whose suffix is one of `SUFFIXES`.
        name: how messages call the file; the path as given by default.

    Raises:
        UserError: the file is missing, empty, of an unknown kind or unreadable as a whole.
    """
    name = name or str(path)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(
            f"{name}: a data file's name ends in one of {', '.join(SUFFIXES)}",
            hint="rename the file if it is of one of these kinds",
        )
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{name}: the file is empty", hint="a data file holds at least one row")
        if kind == "CSV":
            yield from read_csv(path, name)
        elif kind == "Parquet":
            yield from read_parquet(path, name)
        elif kind == "text":
            yield Row({"text": decode_file(path.read_bytes(), name)}, Location(name, 1))
        elif _is_json_document(path):
            yield from _read_json_document(path, name)
        else:
            yield from _read_json_lines(path, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _is_json_document(path: Path) -> bool:
    """Whether the file is one JSON document rather than an object a line.

    The suffix does not tell: many public data sets are called .json and hold an object a line.
    """
    with path.open("rb") as file:
        first = b""
        for line in file:
            first = strip_bom(line).strip()
            if first:
                break
        if first.startswith(b"["):
            return True
        if path.suffix.lower() != ".json":
            return False
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            return True  # an object over several lines, or a broken one: the document reader says where
        return not any(line.strip() for line in file)


def _read_json_lines(path: Path, name: str) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                refuse_utf16(raw, name)
                raw = strip_bom(raw)
            if not raw.strip():
                continue
            location = Location(name, number)
            try:
                value = json.loads(decode_line(raw.rstrip(b"\r\n")))
            except json.JSONDecodeError as error:
                yield BadRow(location, f"not JSON: {error.msg} at column {error.colno}")
            except ValueError as error:
                yield BadRow(location, str(error))
            except RecursionError:
                yield BadRow(location, "not JSON that can be read: nested too deeply")
            else:
                yield _as_row(value, location)


def _read_json_document(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        document = json.loads(decode_file(path.read_bytes(), name))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}",
            hint="expected a list of objects, or one object a line",
        ) from error
    except RecursionError as error:
        raise UserError(f"{name}: not JSON that can be read: nested too deeply") from error
    for number, item in enumerate(_items(document, name), start=1):
        yield _as_row(item, Location(name, number, "item"))


def _as_row(value: Any, location: Location) -> Row | BadRow:
    if isinstance(value, dict):
        return Row(value, location)
    return BadRow(location, f"expected a JSON object, found {kind_of(value)}")


def _items(document: Any, name: str) -> list[Any]:
    """The rows of a JSON document: a list, the list under a key such as "data", or a lone object."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        lists = [
            key for key, value in document.items() if _is_list_of_objects(value) and key not in TURN_KEYS
        ]
        for key in CONTAINER_KEYS:
            if key in lists:
                return document[key]
        if len(lists) == 1 and len(document) == 1:
            return document[lists[0]]
        if not lists:
            return [document]
        found = f"an object with the keys {', '.join(map(repr, list(document)[:8]))}"
    else:
        found = kind_of(document)
    raise UserError(
        f"{name}: expected a list of objects, found {found}",
        hint=f'write [{{...}}, ...] or {{"data": [{{...}}, ...]}} (or {", ".join(CONTAINER_KEYS[1:])})',
    )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
