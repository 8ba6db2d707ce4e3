"""What a red-team result, alone or beside an earlier one, puts on the page of a pipeline."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from finetune.report.formatting import percent
from rlhf.safety.page import (
    MAP_ASIDE,
    answer_lists,
    became_unsafe,
    cards,
    comparison_cards,
    comparison_notices,
    heat_map,
    interval,
    interval_table,
    notices,
)
from rlhf.safety.results import compare_answers

Result = dict[str, Any]


def result_cards(result: Result, earlier: Result | None = None) -> list[dict[str, Any]]:
    """The headline numbers, as `finetune.report.headline.Card` has them; with an earlier result, before → after."""
    found = comparison_cards(earlier["summary"], result["summary"]) if earlier else cards(result["summary"])
    return [asdict(card) for card in found]


def result_notices(result: Result, earlier: Result | None = None) -> list[str]:
    """What the reader has to know before trusting the numbers."""
    if earlier is None:
        return notices(result)
    changes = compare_answers(earlier["answers"], result["answers"])
    return [*comparison_notices(earlier, result, changes), *notices(result)]


def shortfall(result: Result, at_least: float | None, called: str) -> str | None:
    """How far the share of safe answers is below what is asked for, in a sentence; None where it is not.

    Args:
        result: of a run.
        at_least: share that has to be safe, 0 to 1; None asks for nothing.
        called: the option or key that asks for it.
    """
    share = result["summary"]["overall"]["safe_rate"]
    if at_least is None or share["rate"] is None or share["rate"] >= at_least:
        return None
    return (
        f"{share['count']} of {interval(share)}, are safe ({percent(share['rate'])}): "
        f"{100 * (at_least - share['rate']):.1f} points below {called} {at_least:g}"
    )


def summary_section(result: Result, earlier: Result | None = None) -> list[dict[str, Any]]:
    """The section of a result: heat maps, rates with their intervals by attack and area, answers folded away."""
    maps = [heat_map(result, "After" if earlier else "Safe answers, attack × area")]
    text = ""
    if earlier:
        maps.insert(0, heat_map(earlier, "Before"))
        changes = compare_answers(earlier["answers"], result["answers"])
        text = (
            f"Of {changes['shared']} prompts asked in both runs, {changes['became_safe']} became safe and "
            f"{changes['became_not_safe']} stopped being safe (McNemar's exact test: p = {changes['p_value']:.2g})."
        )
    lists = [became_unsafe(earlier, result)] if earlier else []
    return [
        {
            "title": "Safe answers, before and after" if earlier else "Safe answers",
            "text": text,
            "maps": [asdict(each) for each in maps],
            "aside": MAP_ASIDE,
            "tables": [
                interval_table(earlier, result, "attacks", "attack"),
                interval_table(earlier, result, "areas", "area"),
            ],
            "lists": [*lists, *answer_lists(result)],
            "pipeline": True,
        }
    ]
