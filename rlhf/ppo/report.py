"""What PPO adds to a run's report: responses with their scores over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.report.files import read_jsonl

MAX_STEPS = 12

Row = dict[str, Any]


def rollout_section(path: Path) -> list[dict[str, Any]]:
    """The section that shows a rollouts.jsonl, in the form of `finetune.report.sections`; none without rows."""
    rows = read_jsonl(path) if path.is_file() else []
    steps = sorted({row["step"] for row in rows})
    if not steps:
        return []
    count = min(MAX_STEPS, len(steps))
    shown = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        {
            "title": "Responses over time",
            "text": "Sampled from the policy while it was trained: of each step shown the worst, a middling and the "
            f"best response. {path.name} has those of all {len(steps)} steps that were kept.",
            "tables": [_table(step, [row for row in rows if row["step"] == step]) for step in shown],
        }
    ]


def _table(step: int, rows: list[Row]) -> dict[str, Any]:
    parts = list(rows[0]["parts"]) if len(rows[0]["parts"]) > 1 else []
    return {
        "title": f"Iteration {step}",
        "columns": ["score", *parts, "KL, nats", "prompt", "response"],
        "rows": [
            [
                f"{row['score']:.3f}",
                *(f"{row['parts'][name]:.3f}" for name in parts),
                f"{row['kl']:.1f}",
                row["messages"][-1]["content"],
                row["response"] + ("" if row["ended"] else " […]"),
            ]
            for row in rows
        ],
    }
