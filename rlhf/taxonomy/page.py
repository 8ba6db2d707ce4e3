"""The coverage page: one HTML file with a treemap, in the style of the training report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.report.formatting import percent
from finetune.report.templating import render_page
from rlhf.taxonomy.coverage import CategoryCoverage, Coverage
from rlhf.taxonomy.tree import ancestor
from rlhf.taxonomy.treemap import Rect, squarify

MARK = "· prompt coverage</title>"
"""In the head of every coverage page."""

TEMPLATES = Path(__file__).resolve().parent / "templates"
MAP = Rect(0, 0, 1056, 620)
HAN, LATIN = 12.0, 6.6
"""Width of a letter at the map's font size, in its units."""

PRIMARY_STRIP, SECONDARY_STRIP = 24.0, 18.0


@dataclass(frozen=True)
class Cell:
    """A rectangle of the map.

    Attributes:
        tier: 1, 2 or 3.
        hue: which of the six colours (1 to 6), 0 for unknown.
        label: text that fits in it, perhaps none.
    """

    rect: Rect
    tier: int
    hue: int
    label: str
    title: str


def render(coverage: Coverage) -> str:
    """The page as HTML; all text from the data and the taxonomy is escaped."""
    return render_page(
        "coverage.html.j2",
        folder=TEMPLATES,
        style="coverage.css",
        coverage=coverage,
        cards=_cards(coverage),
        cells=treemap(coverage),
        map=MAP,
        secondary=_grouped(coverage),
        most=max((each.rows for each in coverage.tiers[1].categories), default=0) or 1,
        percent=percent,
        built=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _cards(coverage: Coverage) -> list[tuple[str, str, str]]:
    """(label, value, note) of the headline numbers."""
    _, secondary, tertiary = coverage.tiers
    used = len(secondary.categories) - len(secondary.empty)
    leaves = len(tertiary.categories) - len(tertiary.empty)
    return [
        ("Prompts", f"{coverage.rows:,}", f"secondary category unknown: {secondary.unknown:,}"),
        (
            "Secondary categories",
            f"{used} of {len(secondary.categories)}",
            f"tertiary: {leaves} of {len(tertiary.categories)}",
        ),
        (
            "Evenness",
            percent(secondary.evenness),
            f"{secondary.entropy:.2f} of {secondary.max_entropy:.2f} bits, secondary tier",
        ),
        (
            "Near-duplicates",
            percent(coverage.near_duplicates / coverage.rows),
            f"repeats of another prompt: {coverage.near_duplicates:,}",
        ),
    ]


def _grouped(coverage: Coverage) -> list[dict[str, Any]]:
    """The secondary categories with the tertiary ones below them, for the table."""
    _, secondary, tertiary = coverage.tiers
    thin = {each.id for tier in coverage.tiers for each in tier.thin}
    return [
        {
            "own": each,
            "thin": each.id in thin,
            "children": [(c, c.id in thin) for c in tertiary.categories if ancestor(c.id, 2) == each.id],
        }
        for each in secondary.categories
    ]


def treemap(coverage: Coverage) -> list[Cell]:
    """Rectangles of all categories with prompts, outer ones first; what no tier knows is a block of its own."""
    blocks: list[tuple[CategoryCoverage | None, int]] = [
        (each, each.rows) for each in coverage.tiers[0].categories if each.rows
    ]
    if coverage.tiers[0].unknown:
        blocks.append((None, coverage.tiers[0].unknown))
    blocks.sort(key=lambda block: -block[1])
    cells: list[Cell] = []
    for (category, rows), rect in zip(blocks, squarify([rows for _, rows in blocks], MAP)):
        if category is None:
            cells.append(_cell(rect.inset(1), 1, 0, "未知", f"unknown · {rows:,}"))
            continue
        hue = (int(category.id) - 1) % 6 + 1
        cells.append(_cell(rect.inset(1), 1, hue, category.zh, _title(category)))
        cells += _inner(coverage, category, rect.inset(2, PRIMARY_STRIP), 2, hue)
    return cells


def _inner(coverage: Coverage, parent: CategoryCoverage, area: Rect, tier: int, hue: int) -> list[Cell]:
    """The categories below one, in the area that its label leaves; rows of unknown child keep their space."""
    members = [
        each
        for each in coverage.tiers[tier - 1].categories
        if each.rows and ancestor(each.id, tier - 1) == parent.id
    ]
    members.sort(key=lambda each: -each.rows)
    unknown = parent.rows - sum(each.rows for each in members)
    sizes = [each.rows for each in members] + ([unknown] if unknown > 0 else [])
    cells: list[Cell] = []
    for each, rect in zip(members, squarify(sizes, area)):
        cells.append(_cell(rect.inset(0.75), tier, hue, each.zh, _title(each)))
        if tier == 2:
            strip = SECONDARY_STRIP if rect.height > 2.5 * SECONDARY_STRIP else 0.0
            if strip:
                cells += _inner(coverage, each, rect.inset(1, strip), 3, hue)
    return cells


def _cell(rect: Rect, tier: int, hue: int, label: str, title: str) -> Cell:
    width = sum(HAN if ord(letter) > 0x2E7F else LATIN for letter in label)
    fits = width + 10 <= rect.width and rect.height >= 15
    return Cell(rect, tier, hue, label if fits else "", title)


def _title(category: CategoryCoverage) -> str:
    return f"{category.id} {category.zh} · {category.en}: {category.rows:,} ({percent(category.share)})"
