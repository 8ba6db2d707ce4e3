"""How well prompts are classified, on a labelled set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.taxonomy.classifier import Prediction
from rlhf.taxonomy.tree import TIERS, Taxonomy, ancestor, tier_of


@dataclass(frozen=True)
class TierScore:
    """One tier's result.

    Attributes:
        rows: labelled in this tier.
        accuracy: share of rows whose best guess is right, known or not.
        known: share of rows whose category counts as known at the threshold.
        precision: share of the known ones that are right; None where none is known.
    """

    tier: str
    rows: int
    accuracy: float
    known: float
    precision: float | None


@dataclass(frozen=True)
class CategoryScore:
    """One category's result: precision is None where it was never guessed, recall where it was never right to."""

    id: str
    zh: str
    en: str
    rows: int
    guessed: int
    precision: float | None
    recall: float | None


def score_tiers(predictions: Sequence[Prediction], labels: Sequence[str]) -> list[TierScore]:
    """Accuracy, and precision at the threshold, of every tier in which something is labelled."""
    scores = []
    for tier, title in enumerate(TIERS, start=1):
        pairs = [
            (p, ancestor(label, tier)) for p, label in zip(predictions, labels) if tier_of(label) >= tier
        ]
        if not pairs:
            continue
        right = sum(p.path[tier - 1] == label for p, label in pairs)
        known = [p.at(tier) == label for p, label in pairs if p.at(tier)]
        scores.append(
            TierScore(
                title, len(pairs), right / len(pairs), len(known) / len(pairs), _share(sum(known), len(known))
            )
        )
    return scores


def score_categories(
    predictions: Sequence[Prediction], labels: Sequence[str], taxonomy: Taxonomy, tier: int = 2
) -> list[CategoryScore]:
    """Precision and recall of the best guess, for every category of a tier."""
    pairs = [
        (p.path[tier - 1], ancestor(label, tier))
        for p, label in zip(predictions, labels)
        if tier_of(label) >= tier
    ]
    scores = []
    for each in taxonomy.tiers[tier - 1]:
        rows = sum(label == each.id for _, label in pairs)
        guessed = sum(guess == each.id for guess, _ in pairs)
        right = sum(guess == label == each.id for guess, label in pairs)
        scores.append(
            CategoryScore(
                each.id, each.zh, each.en, rows, guessed, _share(right, guessed), _share(right, rows)
            )
        )
    return scores


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def tables(
    predictions: Sequence[Prediction], labels: Sequence[str], taxonomy: Taxonomy
) -> list[tuple[list[str], list[list[str]]]]:
    """(headers, rows) of the tables that the command prints: tiers, then secondary categories."""
    tiers = [
        [s.tier, str(s.rows), _percent(s.accuracy), _percent(s.known), _percent(s.precision)]
        for s in score_tiers(predictions, labels)
    ]
    categories = [
        [s.id, s.zh, s.en, str(s.rows), str(s.guessed), _percent(s.precision), _percent(s.recall)]
        for s in score_categories(predictions, labels, taxonomy)
    ]
    return [
        (["tier", "prompts", "accuracy", "known", "right if known"], tiers),
        (["id", "category", "", "prompts", "guessed", "precision", "recall"], categories),
    ]


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
