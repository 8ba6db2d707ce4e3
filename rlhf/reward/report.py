"""A reward model's metrics as tables on the terminal and as a section of the run's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.words import are, plural
from rlhf.preferences import Preference
from rlhf.reward.metrics import RewardMetrics, Share

HISTOGRAM_BINS = 16
PAPER_ACCURACY = {"1": 0.545, "2": 0.611, "3": 0.702, "4": 0.778, "5": 0.815}
"""Of the Baichuan 2 report's reward model, by gap."""

MAX_CATEGORIES = 60
CURVES = (
    {"key": "accuracy", "title": "Pairs in the right order", "share": True},
    {"key": "mean_score", "title": "Mean score"},
    {"key": "score_std", "title": "Deviation of scores", "from_zero": True},
)
"""What the lines of metrics.jsonl say, in the form of `finetune.report.sections`."""


def print_metrics(metrics: RewardMetrics, *, held_out: bool, what: str = "scores") -> None:
    """Accuracy by gap and by first-tier category, and the distribution of scores (or `what` they are)."""
    from rich.console import Console
    from rich.table import Table

    out = Console()
    where = "held-out" if held_out else "training"
    table = Table(title=f"Accuracy on {where} pairs", title_justify="left")
    table.add_column("")
    for name in ("pairs", "accuracy"):
        table.add_column(name, justify="right")
    for name, share in _rows(metrics):
        table.add_row(name, f"{share.pairs:,}", f"{share.accuracy:.1%}")
    out.print(table)
    out.print(
        f"{what}  mean {metrics.mean:.3f}, deviation {metrics.std:.3f}, of {metrics.responses:,} responses; "
        f"calibration error {metrics.calibration_error:.3f}",
        highlight=False,
    )


def _rows(metrics: RewardMetrics) -> list[tuple[str, Share]]:
    rows = [(f"gap {gap}", share) for gap, share in metrics.by_gap.items()]
    rows += [(f"category {name}", share) for name, share in metrics.by_first_tier.items()]
    return [*rows, ("all", Share(metrics.accuracy, metrics.pairs))]


def report_section(
    metrics: RewardMetrics,
    preferences: Sequence[Preference],
    scores: Sequence[Sequence[float]],
    *,
    held_out: bool,
    samples: int,
    heading: str = "Reward model",
    text: str | None = None,
) -> dict[str, Any]:
    """The section of report.html, in the form of `finetune.report.sections`.

    Args:
        metrics: of the preferences.
        preferences: that were judged.
        scores: of their responses.
        held_out: whether they were kept from training.
        samples: prompts to show with all of their responses and scores.
        heading: of the section.
        text: paragraph below it; None is that of a reward model.
    """
    gaps = [
        [gap, f"{share.pairs:,}", f"{share.accuracy:.1%}", f"{PAPER_ACCURACY[gap]:.1%}"]
        for gap, share in metrics.by_gap.items()
    ]
    tables = [
        {
            "title": "By annotated gap",
            "columns": ["gap", "pairs", "accuracy", "Baichuan 2 report"],
            "rows": gaps,
        }
    ]
    for tier, shares in (("first", metrics.by_first_tier), ("second", metrics.by_second_tier)):
        rows = [[name, f"{share.pairs:,}", f"{share.accuracy:.1%}"] for name, share in shares.items()]
        title = f"By {tier}-tier category"
        tables.append(
            {"title": title, "columns": ["category", "pairs", "accuracy"], "rows": rows[:MAX_CATEGORIES]}
        )
    tables.append(_sample_table(preferences, scores, samples))
    where = "held-out" if held_out else "training (nothing was held out)"
    return {
        "title": heading,
        "text": text
        or (
            f"{metrics.accuracy:.1%} of {plural(metrics.pairs, f'{where} pair')} {are(metrics.pairs)} in the right "
            f"order. The scores of {metrics.responses:,} responses have mean {metrics.mean:.3f} and deviation "
            f"{metrics.std:.3f}: PPO "
            f"normalises with these. Confidence and accuracy differ by {metrics.calibration_error:.3f} on average."
        ),
        "tables": [table for table in tables if table["rows"]],
        "charts": [*_gap_chart(metrics), _score_chart(metrics), *_calibration_chart(metrics)],
    }


def _gap_chart(metrics: RewardMetrics) -> list[dict[str, Any]]:
    if len(metrics.by_gap) < 2:
        return []
    points = [[int(gap), share.accuracy] for gap, share in metrics.by_gap.items()]
    paper = [[int(gap), PAPER_ACCURACY[gap]] for gap in metrics.by_gap]
    lines = [
        {"label": "this model", "role": "train", "points": points},
        {"label": "Baichuan 2 report", "role": "other", "points": paper},
    ]
    return [{"title": "Accuracy by gap", "x": "gap", "lines": lines}]


def _score_chart(metrics: RewardMetrics) -> dict[str, Any]:
    """Share of the best and of the worst responses in each stretch of scores."""
    low = min(*metrics.best_scores, *metrics.worst_scores)
    high = max(*metrics.best_scores, *metrics.worst_scores)
    width = (high - low) / HISTOGRAM_BINS or 1.0

    def shares(scores: Sequence[float]) -> list[list[float]]:
        counts = [0] * HISTOGRAM_BINS
        for score in scores:
            counts[min(int((score - low) / width), HISTOGRAM_BINS - 1)] += 1
        return [[low + (place + 0.5) * width, count / len(scores)] for place, count in enumerate(counts)]

    lines = [
        {"label": "best response", "role": "validation", "points": shares(metrics.best_scores)},
        {"label": "worst response", "role": "train", "points": shares(metrics.worst_scores)},
    ]
    return {"title": "Share of responses by score", "x": "score", "lines": lines}


def _calibration_chart(metrics: RewardMetrics) -> list[dict[str, Any]]:
    if len(metrics.calibration) < 2:
        return []
    points = [[each.confidence, each.accuracy] for each in metrics.calibration]
    ideal = [[each.confidence, each.confidence] for each in metrics.calibration]
    lines = [
        {"label": "this model", "role": "train", "points": points},
        {"label": "calibrated", "role": "other", "points": ideal},
    ]
    return [{"title": "Accuracy by confidence", "x": "confidence", "lines": lines}]


def _sample_table(
    preferences: Sequence[Preference], scores: Sequence[Sequence[float]], samples: int
) -> dict[str, Any]:
    rows = []
    shown = min(samples, len(preferences))
    for number in range(shown):
        at = (2 * number + 1) * len(preferences) // (2 * shown)
        preference = preferences[at]
        for place, (response, score) in enumerate(zip(preference.responses, scores[at])):
            prompt = preference.prompt[-1]["content"] if place == 0 else ""
            rows.append([prompt, str(place + 1), f"{score:.2f}", response.text])
    return {
        "title": "Responses, best first as annotated",
        "columns": ["prompt", "place", "score", "response"],
        "rows": rows,
    }
