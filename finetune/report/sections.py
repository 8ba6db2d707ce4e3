"""Sections that a stage adds to the report, kept as data in the run folder's `sections.json`.

The file holds an object whose `sections` is a list of objects with

    title    heading
    text     a paragraph (optional)
    tables   [{"title", "columns": [text, ...], "rows": [[text, ...], ...]}, ...] (optional)
    charts   [{"title", "x": what the horizontal axis is, "lines": [{"label", "role", "points": [[x, y], ...]}]}, ...]
             (optional); role is train, validation or other and decides the colour
    maps     [{"title", "columns": [[short name, name], ...], "rows": [[name, [square, ...]], ...]}, ...] heat maps
             (optional); a square is {"share": 0 to 1 or null, "text", "detail", "unjudged": how many, for a dot}
    aside    what the heat maps show (optional)
    lists    [{"title", "count", "left_out", "whole": file that has all, "items": [{"context": messages, "prompt",
             "answer", "about"}]}, ...] exchanges to fold away (optional)
    pipeline true to stand on the page of a pipeline, too (optional)

and may hold a list `curves`: what the stage's numbers in metrics.jsonl are, each drawn before the others, in order,

    key        in metrics.jsonl; `eval_KEY` is drawn beside it
    title      in words, with the unit
    from_zero  have the axis begin at 0 (optional)
    share      of a whole: in percent, from 0 (optional)

so that `finetune report` can build the page again without knowing the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.files import write_json
from finetune.report.curves import Chart, Line, plain_chart
from finetune.report.data_summary import Table

SECTIONS_FILE = "sections.json"


@dataclass
class Section:
    """A section ready to be drawn by the template."""

    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    aside: str = ""
    lists: list[dict[str, Any]] = field(default_factory=list)
    pipeline: bool = False


def write_sections(
    run_dir: Path, sections: Sequence[dict[str, Any]], *, curves: Sequence[dict[str, Any]] = ()
) -> None:
    """Write `sections.json`, whole or not at all."""
    content: dict[str, Any] = {"sections": list(sections)}
    write_json(run_dir / SECTIONS_FILE, content | ({"curves": list(curves)} if curves else {}))


def sections_of(content: dict[str, Any]) -> list[Section]:
    """What `sections.json` holds, as the template shows it; what is no section is left out."""
    found = content.get("sections") or []
    return [_section(each) for each in found if isinstance(each, dict) and each.get("title")]


def _section(content: dict[str, Any]) -> Section:
    tables = [
        Table(
            str(table["title"]),
            [str(c) for c in table["columns"]],
            [[str(c) for c in row] for row in table["rows"]],
        )
        for table in content.get("tables") or []
    ]
    charts = [
        plain_chart(
            str(chart["title"]),
            [
                Line(
                    str(line["label"]),
                    [(x, y) for x, y in line["points"]],
                    role=str(line["role"]),
                    markers=True,
                )
                for line in chart["lines"]
            ],
            x_name=str(chart["x"]),
        )
        for chart in content.get("charts") or []
    ]
    return Section(
        str(content["title"]),
        str(content.get("text") or ""),
        tables,
        [c for c in charts if c],
        maps=content.get("maps") or [],
        aside=str(content.get("aside") or ""),
        lists=content.get("lists") or [],
        pipeline=bool(content.get("pipeline")),
    )
