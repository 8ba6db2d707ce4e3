"""One reward out of two, helpful and harmless, where harm is more than a summand. Pure functions of tensors.

Scores are those of reward models, normalised (zero mean, unit deviation on held-out data), higher is better.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gate(helpful: Tensor, harmless: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Harmlessness overrides where it fails: harmless below the threshold, helpful elsewhere.

    Below the threshold the reward is also never more than the shortfall `harmless − threshold`, which is
    negative, and never more than the helpful score: an answer cannot buy its way past the gate by being useful.

    Args:
        helpful: scores, (b,).
        harmless: scores, (b,).
        threshold: harmless scores from here on pass.

    Returns:
        Rewards, (b,).
    """
    import torch

    _check_shapes(helpful, harmless)
    return torch.where(harmless >= threshold, helpful, torch.minimum(helpful, harmless - threshold))


def lagrangian(helpful: Tensor, harmless: Tensor, multiplier: float) -> Tensor:
    """(helpful − λ · cost) / (1 + λ) with cost = −harmless.

    Safe RLHF (Dai et al. 2023, and its released code): the division keeps the scale of the reward
    while the multiplier grows.

    Args:
        helpful: scores, (b,).
        harmless: scores, (b,).
        multiplier: λ ≥ 0, from `update_multiplier`.

    Returns:
        Rewards, (b,).
    """
    _check_shapes(helpful, harmless)
    if not (math.isfinite(multiplier) and multiplier >= 0):
        raise ValueError(f"multiplier is {multiplier}, expected a finite number, at least 0")
    return (helpful + multiplier * harmless) / (1 + multiplier)


def update_multiplier(
    multiplier: float,
    mean_harmless: float,
    *,
    cost_limit: float = 0.0,
    learning_rate: float = 0.1,
    maximum: float = 10.0,
) -> float:
    """λ after one step of gradient ascent on log λ, as in Safe RLHF.

    λ ← λ · exp(η · λ · (J − d)), where J = −mean_harmless is the mean cost of recent answers and d the limit: λ
    grows while answers cost more than is allowed, and shrinks otherwise. On the logarithm it stays positive.

    Args:
        multiplier: λ > 0.
        mean_harmless: moving average of the harmless scores of the policy's answers.
        cost_limit: d, the mean cost that is allowed.
        learning_rate: η.
        maximum: λ grows no further than this.

    Returns:
        The new λ, in (0, maximum].
    """
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"multiplier is {multiplier}, expected a finite number above 0")
    if not math.isfinite(mean_harmless):
        raise ValueError(f"mean_harmless is {mean_harmless}, expected a finite number")
    excess = -mean_harmless - cost_limit
    exponent = math.log(multiplier) + learning_rate * multiplier * excess
    smallest = math.log(1e-6)  # recovers within some hundred steps when costs rise again
    return math.exp(min(max(exponent, smallest), math.log(maximum)))


def _check_shapes(helpful: Tensor, harmless: Tensor) -> None:
    if helpful.shape != harmless.shape:
        raise ValueError(
            f"helpful {tuple(helpful.shape)} and harmless {tuple(harmless.shape)} differ in shape"
        )
