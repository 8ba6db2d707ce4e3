"""The page of a pipeline: its steps in order, the few numbers of each, and links to their reports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_text
from finetune.report.files import read_json
from finetune.report.formatting import is_number
from finetune.report.headline import Card, cards
from finetune.report.page import STAGE_NAMES, notices
from finetune.report.run_folder import read_run
from finetune.report.sections import Section, sections_of
from finetune.report.templating import render_page

if TYPE_CHECKING:
    from finetune.recipe.schema import Step


@dataclass
class StepSection:
    """What the page says of a step.

    Attributes:
        status: `finished`, `interrupted`, `unfinished`, or `not begun`.
        links: (name, address relative to the page) of its own reports.
        sections: of its report, those that stand here too.
    """

    name: str
    stage: str
    folder: str
    status: str
    links: list[tuple[str, str]] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


def build_pipeline_page(folder: Path, name: str, steps: Sequence[Step]) -> Path:
    """Write `report.html` into the folder of a pipeline, from what its steps have left so far."""
    from finetune.report.html import REPORT_FILE

    sections = [_section(step, folder) for step in steps]
    html = render_page(
        "pipeline.html.j2",
        name=name,
        sections=sections,
        done=sum(section.status == "finished" for section in sections),
        built=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    path = folder / REPORT_FILE
    write_text(path, html)
    return path


def _section(step: Step, page_folder: Path) -> StepSection:
    folder = Path(step.output_dir)
    stage = STAGE_NAMES.get(step.stage, step.stage)
    section = StepSection(step.name, stage, step.output_dir, "not begun")
    if (folder / "merge.json").is_file():
        section.status, section.cards = "finished", _merge_cards(folder)
        return section
    try:
        run = read_run(folder)
    except UserError:
        return section
    section.status, section.cards, section.notices = run.status, cards(run), notices(run)
    section.sections = [each for each in sections_of(run.sections) if each.pipeline]
    pages = run.result.get("pages") or [{"name": "full report", "file": "report.html"}]
    section.links = [
        (page["name"], Path(os.path.relpath(folder / page["file"], page_folder)).as_posix())
        for page in pages
        if (folder / page["file"]).is_file()
    ]
    return section


def _merge_cards(folder: Path) -> list[Card]:
    """What verification found."""
    try:
        found: Any = read_json(folder / "merge.json").get("verification")
    except UserError:
        return []
    comparisons = found.get("comparisons") if isinstance(found, dict) else None
    if not comparisons:
        return []
    shown = {
        "max_difference": ("Largest logit difference", "{:.3g}"),
        "mean_kl": ("Mean KL, nats", "{:.3g}"),
        "agreement": ("Same next token", "{:.1%}"),
    }
    first = comparisons[0]
    note = f"against {first.get('reference')}"
    return [
        Card(label, form.format(first[key]), note=note)
        for key, (label, form) in shown.items()
        if is_number(first.get(key))
    ]
