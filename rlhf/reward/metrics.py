"""What a reward model's scores of held-out responses say: accuracy by gap and category, spread, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.preferences import Preference

BINS = 5
"""Of confidence, from 0.5 to 1."""


@dataclass(frozen=True)
class Share:
    """How many of some pairs are in the right order; equal scores count half."""

    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Bin:
    """Pairs about whose order the model is about equally sure.

    Attributes:
        confidence: mean probability that it gives to the order it prefers, 0.5 to 1.
        accuracy: how often that order is right.
        pairs: how many.
    """

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class RewardMetrics:
    """Measured on a set of preferences.

    Attributes:
        loss: the ranking loss, a mean over prompts.
        accuracy: share of pairs in the right order.
        pairs, responses: how many.
        mean, std: of all scores.
        by_gap: annotated gap → share, gaps rounded to whole numbers, those above 5 counted as 5.
        by_first_tier, by_second_tier: category → share; of the id "2.01.003", "2" and "2.01".
        calibration: by confidence.
        calibration_error: mean difference between confidence and accuracy, weighted by pairs.
        best_scores, worst_scores: of the best and the worst response to each prompt.
    """

    loss: float
    accuracy: float
    pairs: int
    responses: int
    mean: float
    std: float
    by_gap: dict[str, Share]
    by_first_tier: dict[str, Share]
    by_second_tier: dict[str, Share]
    calibration: list[Bin]
    calibration_error: float
    best_scores: list[float]
    worst_scores: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Pair:
    difference: float
    gap: float | None
    category: str | None

    @property
    def right(self) -> float:
        return 1.0 if self.difference > 0 else 0.5 if self.difference == 0 else 0.0


def evaluate(
    preferences: Sequence[Preference], scores: Sequence[Sequence[float]], *, margin: float = 0.0
) -> RewardMetrics:
    """Measure scores against the annotated order.

    Args:
        preferences: at least one.
        scores: of each one's responses, in their order.
        margin: that the loss was trained with, a step of gap.
    """
    pairs: list[_Pair] = []
    losses = []
    for preference, values in zip(preferences, scores, strict=True):
        own = []
        for better, worse in preference.pairs:
            pair = _Pair(values[better] - values[worse], preference.gap(better, worse), preference.category)
            steps = 1.0 if pair.gap is None else pair.gap
            own.append(_softplus(-(pair.difference - margin * steps)))
            pairs.append(pair)
        losses.append(fmean(own))
    flat = [score for values in scores for score in values]
    bins = _calibration(pairs)
    return RewardMetrics(
        loss=fmean(losses),
        accuracy=fmean(pair.right for pair in pairs),
        pairs=len(pairs),
        responses=len(flat),
        mean=fmean(flat),
        std=pstdev(flat),
        by_gap=_shares([(_gap_name(pair.gap), pair) for pair in pairs if pair.gap is not None]),
        by_first_tier=_shares([(_tier(pair.category, 1), pair) for pair in pairs if pair.category]),
        by_second_tier=_shares([(_tier(pair.category, 2), pair) for pair in pairs if pair.category]),
        calibration=bins,
        calibration_error=sum(abs(each.confidence - each.accuracy) * each.pairs for each in bins)
        / len(pairs),
        best_scores=[values[0] for values in scores],
        worst_scores=[values[-1] for values in scores],
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _gap_name(gap: float) -> str:
    return str(min(max(round(gap), 1), 5))


def _tier(category: str | None, tier: int) -> str:
    return ".".join((category or "").split(".")[:tier])


def _shares(named: Sequence[tuple[str, _Pair]]) -> dict[str, Share]:
    groups: dict[str, list[_Pair]] = {}
    for name, pair in named:
        groups.setdefault(name, []).append(pair)
    return {
        name: Share(fmean(pair.right for pair in groups[name]), len(groups[name])) for name in sorted(groups)
    }


def _calibration(pairs: Sequence[_Pair]) -> list[Bin]:
    groups: dict[int, list[tuple[float, float]]] = {}
    for pair in pairs:
        confidence = 1 / (1 + math.exp(-min(abs(pair.difference), 700.0)))
        place = min(int((confidence - 0.5) * 2 * BINS), BINS - 1)
        groups.setdefault(place, []).append((confidence, pair.right))
    return [
        Bin(fmean(c for c, _ in group), fmean(right for _, right in group), len(group))
        for _, group in sorted(groups.items())
    ]
