"""What PPO adds to a run's report: words for its numbers, and responses with their scores over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.report.files import read_jsonl

MAX_STEPS = 12

Row = dict[str, Any]


def curves(rewards: Sequence[str]) -> list[Row]:
    """What the lines of metrics.jsonl say, in the form of `finetune.report.sections`.

    Args:
        rewards: names of the reward's parts.
    """
    return [
        {"key": "reward", "title": "Reward, normalised"},
        *({"key": f"reward/{name}", "title": f"Reward, raw: {name}"} for name in rewards),
        {"key": "cost", "title": "Mean harm, normalised"},
        {"key": "multiplier", "title": "Price of harm (multiplier)", "from_zero": True},
        {"key": "kl", "title": "KL to the reference, nats a response", "from_zero": True},
        {"key": "entropy", "title": "Entropy of the policy, nats a token", "from_zero": True},
        {"key": "response_length", "title": "Response length, tokens", "from_zero": True},
        {"key": "eos_share", "title": "Responses that end by themselves", "share": True},
        {"key": "repetition", "title": "4-grams that a response repeats", "share": True},
        {"key": "clip_fraction", "title": "Tokens clipped in the policy's loss", "share": True},
        {"key": "explained_variance", "title": "Variance of returns explained by the critic"},
        {"key": "kl_coef", "title": "KL coefficient", "from_zero": True},
        {"key": "reward_std", "title": "Deviation of rewards in an iteration", "from_zero": True},
        {"key": "approx_kl", "title": "KL of an update, nats a token", "from_zero": True},
        {"key": "policy_loss", "title": "Policy loss"},
        {"key": "value_loss", "title": "Value loss", "from_zero": True},
        {"key": "value_clip_fraction", "title": "Tokens clipped in the value loss", "share": True},
        {"key": "ratio", "title": "Probability ratio of new to old policy, mean"},
        {"key": "grad_norm", "title": "Gradient norm of the actor", "from_zero": True},
        {"key": "critic_grad_norm", "title": "Gradient norm of the critic", "from_zero": True},
        {"key": "updates", "title": "Optimiser steps an iteration", "from_zero": True},
        *(
            {"key": f"{phase}_seconds", "title": f"Seconds of {what}", "from_zero": True}
            for phase, what in (("rollout", "sampling"), ("scoring", "scoring"), ("update", "the update"))
        ),
    ]


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
