"""What the report says about the data, from the `data_report.json` that `finetune.data.DataReport` writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.report.page import Facts, as_text, facts

MAX_BAD_ROWS = 100
_SET_COLUMNS = {
    "rows": "rows",
    "tokens.count": "documents",
    "tokens.total": "tokens",
    "tokens.min": "shortest",
    "tokens.median": "median",
    "tokens.p95": "95th percentile",
    "tokens.max": "longest",
    "tokens.truncated_share": "truncated",
    "tokens.supervised_share": "supervised",
    "packing.efficiency": "packs filled",
}
_FILE_COLUMNS = {
    "file": "file",
    "split": "split",
    "format": "format",
    "weight": "weight",
    "rows": "rows",
    "kept": "kept",
    "sampled": "sampled",
    "bad": "bad",
    "duplicates": "duplicates",
    "held_out": "held out",
    "tokens.total": "tokens",
}
_CATEGORY_COLUMNS = {"category": "secondary category", "rows": "distinct rows", "taken": "taken"}
# In the settings already, or put into words by the warnings.
_SKIPPED = {"stage", "max_length", "leaked", "shared_prompts"}


@dataclass
class Table:
    """A table of text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers only, to be aligned on the right."""
        return [all(cell[:1].isdigit() for cell in column if cell) for column in zip(*self.rows)]


@dataclass
class DataSection:
    """The data summary: warnings, single facts, tables, and the rows that could not be used."""

    warnings: list[str] = field(default_factory=list)
    facts: Facts = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    bad_rows: list[tuple[str, str]] = field(default_factory=list)
    bad_rows_left_out: int = 0
    odd_rows: list[tuple[str, str]] = field(default_factory=list)
    odd_rows_left_out: int = 0
    near_duplicates: list[tuple[str, str]] = field(default_factory=list)
    near_duplicates_left_out: int = 0

    def __bool__(self) -> bool:
        return bool(self.warnings or self.facts or self.tables or self.bad_rows or self.odd_rows)


def data_section(data: dict[str, Any]) -> DataSection:
    """The section for a data report; keys that are not known are shown as facts, missing ones left out."""
    rest = {key: value for key, value in data.items() if key not in _SKIPPED}
    sets = {name: part for name in ("train", "validation") if isinstance(part := rest.pop(name, None), dict)}
    bad = [row for row in _list_of_objects(rest.pop("bad_rows", None)) if "reason" in row]
    odd = [row for row in _list_of_objects(rest.pop("odd_rows", None)) if "reason" in row]
    sampling = rest.pop("sampling", None)
    sampling = dict(sampling) if isinstance(sampling, dict) else {}
    repeats = _list_of_objects(sampling.pop("near_duplicates", None))
    categories = _list_of_objects(sampling.pop("categories", None))
    if sampling:
        rest["sampling"] = {**sampling, "near_duplicates_left_out": len(repeats)}
    tables = [
        _table(
            "Data sets", {"set": "", **_SET_COLUMNS}, [{"set": name, **part} for name, part in sets.items()]
        ),
        _table("Files", _FILE_COLUMNS, _list_of_objects(rest.pop("files", None))),
        _table(
            "Sample by category",
            _CATEGORY_COLUMNS,
            [{**each, "category": f"{each.get('id', '')} {each.get('name', '')}"} for each in categories],
        ),
    ]
    return DataSection(
        warnings=[str(warning) for warning in rest.pop("warnings", None) or []],
        facts=[(_words(key), text) for key, text in facts(rest, grouped=True)],
        tables=[table for table in tables if table.rows],
        bad_rows=[(_where(row), str(row["reason"])) for row in bad[:MAX_BAD_ROWS]],
        bad_rows_left_out=max(0, len(bad) - MAX_BAD_ROWS),
        odd_rows=[(_where(row), str(row["reason"])) for row in odd[:MAX_BAD_ROWS]],
        odd_rows_left_out=max(0, len(odd) - MAX_BAD_ROWS),
        near_duplicates=[
            (str(each.get("row", "")), f"nearly repeats {each.get('repeats', '')}")
            for each in repeats[:MAX_BAD_ROWS]
        ],
        near_duplicates_left_out=max(0, len(repeats) - MAX_BAD_ROWS),
    )


def _list_of_objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _table(title: str, columns: dict[str, str], items: list[dict[str, Any]]) -> Table:
    """A row an item; columns that no item has anything for are left out."""
    flat = [dict(facts(item, grouped=True)) for item in items]
    used = [key for key in columns if any(key in item for item in flat)]
    return Table(
        title, [columns[key] for key in used], [[item.get(key, "") for key in used] for item in flat]
    )


def _where(row: dict[str, Any]) -> str:
    """`file:7`, or `file, row 7` where rows of the file are no lines of text."""
    file, number, unit = (row.get(key) for key in ("file", "line", "unit"))
    if number is None:
        return str(file or "")
    return f"{file}:{number}" if unit in (None, "line") else f"{file}, {unit} {as_text('', number)}"


def _words(key: str) -> str:
    return key.replace(".", " · ").replace("_", " ")
