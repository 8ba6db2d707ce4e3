"""The pages of a red-team run and of two compared: self-contained HTML without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.report.formatting import percent
from finetune.report.templating import render_page
from rlhf.safety.results import compare_answers

TEMPLATES = Path(__file__).resolve().parent / "templates"
SHOWN_UNSAFE = 30
SHOWN_UNJUDGED = 15
SHOWN_REFUSALS = 15
NO_CHANGE = 0.0005
MAP_ASIDE = (
    "Safe answers in percent. A dot: some answers of the square could not be judged, and count as not safe. Point at "
    "a square for its counts."
)

COMPARISON_TITLE = "Red team, before and after"


@dataclass(frozen=True)
class Cell:
    """A square of a heat map: `share` is 0 to 1, None where nothing was asked."""

    share: float | None
    text: str
    detail: str
    unjudged: int = 0


@dataclass(frozen=True)
class Card:
    """A headline number; of two runs with what it was before. `better` is None where nothing changed."""

    label: str
    value: str
    note: str
    before: str = ""
    change: str = ""
    better: bool | None = None


@dataclass(frozen=True)
class HeatMap:
    """Attack types by row, areas by column, with what all of a row or column makes."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[Cell]]]


def render(result: dict[str, Any]) -> str:
    """The page of one run. All that models and files bring is escaped."""
    summary = result["summary"]
    return _page(
        "redteam.html.j2",
        title="Red team",
        subtitle=subtitle(result),
        notices=notices(result),
        cards=cards(summary),
        maps=[heat_map(result, "Safe answers, attack × area")],
        tables=[rate_table(result, "attacks", "attack"), rate_table(result, "areas", "area")],
        lists=answer_lists(result),
        weakest=weakest(result),
        facts=facts(result),
    )


def render_comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The page of two runs, the first named before."""
    changes = compare_answers(before["answers"], after["answers"])
    return _page(
        "compare.html.j2",
        title=COMPARISON_TITLE,
        subtitle=f"{subtitle(before)}  →  {subtitle(after)}",
        notices=[
            *comparison_notices(before, after, changes),
            *(f"Before: {notice}" for notice in notices(before)),
            *(f"After: {notice}" for notice in notices(after)),
        ],
        cards=comparison_cards(before["summary"], after["summary"]),
        changes=changes,
        maps=[heat_map(before, "Before"), heat_map(after, "After")],
        tables=[
            change_table(before, after, "attacks", "attack"),
            change_table(before, after, "areas", "area"),
        ],
        lists=[became_unsafe(before, after)],
    )


def _page(template: str, **content: Any) -> str:
    return render_page(
        template,
        folder=TEMPLATES,
        style="redteam.css",
        built=datetime.now().strftime("%Y-%m-%d %H:%M"),
        map_aside=MAP_ASIDE,
        **content,
    )


# --- what stands on the pages -------------------------------------------------------------------------------


def subtitle(result: dict[str, Any]) -> str:
    """Model and adapter."""
    return " + ".join(part for part in (result.get("model"), result.get("adapter")) if part)


def notices(result: dict[str, Any]) -> list[str]:
    """What the reader has to know before trusting the numbers."""
    overall = result["summary"]["overall"]
    total, unjudged = overall["safe_rate"]["total"], overall["unjudged"]
    found = []
    if unjudged:
        found.append(
            f"{unjudged} of {total} answers could not be judged. They count as not safe; were all of them safe, "
            f"the rate would be {percent((overall['safe'] + unjudged) / total)}."
        )
    available = result.get("prompts_available", total)
    if total < available:
        found.append(f"Asked were {total} of {available} prompts; the intervals are wide accordingly.")
    if result["summary"]["benign"] is None:
        found.append("Over-refusal was not measured: a model that refuses everything looks safe here.")
    return found


def comparison_notices(before: dict[str, Any], after: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    """What makes two runs less than comparable."""
    found = []
    for key, name in (
        ("judge", "judges"),
        ("max_new_tokens", "lengths of answers"),
        ("system", "system messages"),
        ("taxonomy_version", "versions of the taxonomy"),
    ):
        if before.get(key) != after.get(key):
            found.append(f"The runs had different {name}: {before.get(key)!r} and {after.get(key)!r}.")
    if changes["only_before"] or changes["only_after"]:
        found.append(
            f"The runs were not asked the same: {changes['shared']} prompts in both, {changes['only_before']} "
            f"only before, {changes['only_after']} only after."
        )
    return found


def cards(summary: dict[str, Any]) -> list[Card]:
    """The headline: safe answers, those that are not, and over-refusal where it was measured."""
    overall, benign = summary["overall"], summary["benign"]
    shown = [
        _card("Safe answers", overall["safe_rate"]),
        Card(
            "Unsafe · unjudged",
            f"{overall['unsafe']} · {overall['unjudged']}",
            f"of {overall['safe_rate']['total']} answers",
        ),
    ]
    return [*shown, _card("Over-refusal", benign["refusal_rate"])] if benign else shown


def _card(label: str, share: dict[str, Any]) -> Card:
    return Card(label, _percent(share["rate"]), f"{share['count']} of {interval(share)}")


def interval(share: dict[str, Any]) -> str:
    """`314, 95 % interval 78.5–86.9 %`."""
    return f"{share['total']}, 95 % interval {100 * share['low']:.1f}–{100 * share['high']:.1f} %"


def comparison_cards(before: dict[str, Any], after: dict[str, Any]) -> list[Card]:
    """Safe, unsafe and unjudged shares and over-refusal, before → after, with the change in points."""
    pairs = [
        ("Safe answers", before["overall"]["safe_rate"], after["overall"]["safe_rate"], 1),
        ("Unsafe", _share(before, "unsafe"), _share(after, "unsafe"), -1),
        ("Unjudged", _share(before, "unjudged"), _share(after, "unjudged"), -1),
    ]
    if before["benign"] and after["benign"]:
        pairs.append(("Over-refusal", before["benign"]["refusal_rate"], after["benign"]["refusal_rate"], -1))
    return [_comparison_card(*pair) for pair in pairs]


def _comparison_card(label: str, first: dict[str, Any], second: dict[str, Any], good: int) -> Card:
    change = second["rate"] - first["rate"]
    return Card(
        label,
        _percent(second["rate"]),
        f"{first['count']} of {first['total']} → {second['count']} of {second['total']}",
        before=_percent(first["rate"]),
        change=points(change),
        better=None if abs(change) < NO_CHANGE else change * good > 0,
    )


def _share(summary: dict[str, Any], label: str) -> dict[str, Any]:
    count, total = summary["overall"][label], summary["overall"]["safe_rate"]["total"]
    return {"count": count, "total": total, "rate": count / total if total else 0.0}


def points(change: float) -> str:
    """A difference of shares in percentage points: +32.1 points."""
    return f"{100 * change:+.1f} points".replace("-", "\N{MINUS SIGN}")


def heat_map(result: dict[str, Any], title: str) -> HeatMap:
    """Safe rates of attack × area, with all areas in the last column and all attacks in the last row."""
    summary, names = result["summary"], result["names"]
    areas = _ordered(summary["areas"], names["areas"])
    attacks = _ordered(summary["attacks"], names["attacks"])
    rows = [
        (
            names["attacks"].get(attack, attack),
            [cell(summary["cells"].get(attack, {}).get(area)) for area in areas]
            + [cell(summary["attacks"][attack])],
        )
        for attack in attacks
    ]
    rows.append(("all", [cell(summary["areas"][area]) for area in areas] + [cell(summary["overall"])]))
    columns = [(area, names["areas"].get(area, area)) for area in areas] + [("all", "all areas")]
    return HeatMap(title, columns, rows)


def cell(counts: dict[str, Any] | None) -> Cell:
    """A square of the heat map from the counts of its answers."""
    if counts is None or counts["safe_rate"]["rate"] is None:
        return Cell(None, "", "nothing asked")
    share = counts["safe_rate"]
    detail = (
        f"{counts['safe']} safe, {counts['unsafe']} unsafe, {counts['unjudged']} unjudged; "
        f"95 % interval {100 * share['low']:.0f}–{100 * share['high']:.0f} %"
    )
    return Cell(share["rate"], f"{100 * share['rate']:.0f}", detail, counts["unjudged"])


def rate_table(result: dict[str, Any], kind: str, heading: str) -> dict[str, Any]:
    """Counts and rates by attack or area."""
    summary, names = result["summary"][kind], result["names"][kind]
    rows = []
    for identity in _ordered(summary, names):
        counts = summary[identity]
        share = counts["safe_rate"]
        rows.append(
            [
                _named(identity, names),
                *(str(counts[label]) for label in ("safe", "unsafe", "unjudged")),
                _percent(share["rate"]),
                f"{100 * share['low']:.1f}–{100 * share['high']:.1f} %",
            ]
        )
    return {
        "title": f"By {heading}",
        "columns": [heading, "safe", "unsafe", "unjudged", "safe rate", "95 % interval"],
        "rows": rows,
    }


def change_table(before: dict[str, Any], after: dict[str, Any], kind: str, heading: str) -> dict[str, Any]:
    """Safe rates before and after by attack or area."""
    first, second = before["summary"][kind], after["summary"][kind]
    names = {**before["names"][kind], **after["names"][kind]}
    rows = []
    for identity in _ordered({**first, **second}, names):
        rates = [side[identity]["safe_rate"] if identity in side else None for side in (first, second)]
        shown = [f"{_percent(r['rate'])} of {r['total']}" if r else "–" for r in rates]
        change = points(rates[1]["rate"] - rates[0]["rate"]) if rates[0] and rates[1] else "–"
        rows.append([_named(identity, names), *shown, change])
    return {"title": f"By {heading}", "columns": [heading, "before", "after", "change"], "rows": rows}


def interval_table(
    before: dict[str, Any] | None, after: dict[str, Any], kind: str, heading: str
) -> dict[str, Any]:
    """Safe rates with their 95 % intervals by attack or area, and what they were before, if that is known."""
    names = after["names"][kind]
    rows = []
    for identity in _ordered(after["summary"][kind], names):
        share = after["summary"][kind][identity]["safe_rate"]
        row = [_named(identity, names)]
        if before is not None:
            counts = before["summary"][kind].get(identity)
            then = counts["safe_rate"] if counts else None
            row += [_with_interval(then), _with_interval(share)]
            row.append(points(share["rate"] - then["rate"]) if then else "–")
        else:
            row += [_with_interval(share), str(share["total"])]
        rows.append(row)
    columns = ["before (95 % interval)", "after (95 % interval)", "change"]
    if before is None:
        columns = ["safe (95 % interval)", "answers"]
    return {"title": f"By {heading}", "columns": [heading, *columns], "rows": rows}


def _with_interval(share: dict[str, Any] | None) -> str:
    if share is None or share["rate"] is None:
        return "–"
    return f"{percent(share['rate'])} ({100 * share['low']:.0f}–{100 * share['high']:.0f})"


def weakest(result: dict[str, Any], count: int = 10) -> list[str]:
    """The safety values with the lowest safe rates, as text."""
    values, names = result["summary"]["values"], result["names"]["values"]
    below = [v for v in values if values[v]["safe_rate"]["rate"] < 1]
    below.sort(key=lambda v: (values[v]["safe_rate"]["rate"], -values[v]["safe_rate"]["total"], v))
    return [
        f"{v} {names.get(v, '')} ({values[v]['safe']} of {values[v]['safe_rate']['total']} safe)"
        for v in below[:count]
    ]


def answer_lists(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to read, folded away: unsafe, unjudged, refusals of harmless prompts."""
    unsafe = [row for row in result["answers"] if row["label"] == "unsafe"]
    unjudged = [row for row in result["answers"] if row["label"] == "unjudged"]
    refused = [row for row in result["benign_answers"] if row["refusal"] == "refuses"]
    return [
        folded("unsafe answers", unsafe, SHOWN_UNSAFE),
        folded("answers that could not be judged", unjudged, SHOWN_UNJUDGED),
        folded("refusals of harmless prompts", refused, SHOWN_REFUSALS),
    ]


def became_unsafe(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Answers that were safe before and are not after."""
    safe = {str(row["messages"]) for row in before["answers"] if row["label"] == "safe"}
    worse = [row for row in after["answers"] if row["label"] != "safe" and str(row["messages"]) in safe]
    return folded("answers safe before, not safe after", worse, SHOWN_UNSAFE)


def folded(title: str, rows: Sequence[dict[str, Any]], shown: int) -> dict[str, Any]:
    """A list to fold away, from every area alike; says how many it leaves out."""
    chosen = _from_all_areas(rows, shown)
    items = [
        {
            "context": row["messages"][:-1],
            "prompt": row["messages"][-1]["content"],
            "answer": row["answer"],
            "about": " · ".join(row[key] for key in ("value", "group", "attack", "reason") if row.get(key)),
        }
        for row in chosen
    ]
    left_out = len(rows) - len(items)
    return {"title": title, "count": len(rows), "left_out": left_out, "items": items, "whole": "redteam.json"}


def _from_all_areas(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    queues: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        queues.setdefault((row.get("value") or row.get("group") or "")[:1], []).append(row)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count and any(queues.values()):
        chosen += [queue.pop(0) for queue in queues.values() if queue]
    return chosen[:count]


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """How the run was made."""
    keys = ("model", "adapter", "quantization", "system", "prompts", "judge", "max_new_tokens", "created")
    return [(key.replace("_", " "), str(result[key])) for key in keys if result.get(key) is not None]


def _ordered(found: Iterable[str], names: dict[str, str]) -> list[str]:
    """Ids that were found, in the order of the taxonomy, then others."""
    found = list(found)
    return [name for name in names if name in found] + sorted(name for name in found if name not in names)


def _named(identity: str, names: dict[str, str]) -> str:
    name = names.get(identity, identity)
    return name if len(identity) > 1 else f"{identity} {name}"


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)
