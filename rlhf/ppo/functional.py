"""The mathematics of PPO on responses: pure functions of tensors, no models, no state.

Shapes: b responses of at most t tokens. ``mask`` (b, t) is 1 (bool, integer or float) on the response tokens
that count, the end-of-sequence token included, and 0 elsewhere: padding on either side, and holes between
counted tokens, which time steps over. What stands at uncounted places is never read, so it may be anything,
NaN too. All results are 0 there.

Losses and statistics are sums over counted tokens divided by ``count``. Where a batch is cut into micro-batches,
or shared by processes, give each part the count of the whole: the parts add up to the value of the whole batch,
however it was cut.

Sources: Schulman et al. 2016 (GAE) and 2017 (PPO); Ziegler et al. 2019 (language models, per-token KL penalty,
adaptive coefficient); Ouyang et al. 2022 (InstructGPT); Schulman 2020, "Approximating KL divergence"; the
Baichuan 2 report (defaults).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

KlEstimator = Literal["k1", "k3"]
KlSchedule = Literal["constant", "linear", "cosine", "exponential"]
Stats = dict[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over all processes."""

_EPS = 1e-8


# --- masked arithmetic --------------------------------------------------------------------------------------


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of ``values`` (b, t) where ``mask`` (b, t) is set: a scalar, whatever stands elsewhere."""
    return torch.where(mask.bool(), values, torch.zeros_like(values)).sum()


def masked_mean(
    values: torch.Tensor, mask: torch.Tensor, *, count: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Mean of ``values`` (b, t) over counted tokens: a scalar, 0 if there are none.

    Args:
        count: divide by this instead of the counted tokens here: those of the whole batch.
    """
    divisor = mask.bool().sum() if count is None else count
    return masked_sum(values, mask) / torch.as_tensor(divisor, device=values.device).clamp(min=1)


def whiten(
    values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True, reduce: Reduce | None = None
) -> torch.Tensor:
    """Values with mean 0 and variance 1 over the counted tokens.

    Args:
        values, mask: (b, t).
        shift_mean: false keeps the mean, as rewards are whitened (their sign has a meaning), while advantages
            are centred.
        reduce: sums a tensor over processes, so that all of them whiten with the same mean and variance.

    Returns:
        (b, t), 0 at uncounted places. The variance is that of the population (divided by n).
    """
    counted = mask.bool()
    reduce = reduce or (lambda tensor: tensor)
    count, total = reduce(torch.stack([counted.sum().to(values.dtype), masked_sum(values, counted)]))
    mean = total / count.clamp(min=1)
    variance = reduce(masked_sum((values - mean).square(), counted)) / count.clamp(min=1)
    white = (values - mean) * torch.rsqrt(variance + _EPS)
    return torch.where(counted, white if shift_mean else white + mean, torch.zeros_like(values))


def last_counted(mask: torch.Tensor) -> torch.Tensor:
    """One-hot (b, t), bool: the last counted token of each row; nothing in a row where none counts."""
    counted = mask.bool()
    after = counted.flip(-1).cumsum(-1).flip(-1)  # counted tokens from here on, this one included
    return counted & (after == 1)


# --- reward shaping -----------------------------------------------------------------------------------------


def prepare_scores(
    scores: torch.Tensor,
    ended: torch.Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> torch.Tensor:
    """What a reward model said, as PPO learns from it: normalised, then clipped, then penalised.

    Args:
        scores: (b,), raw.
        ended: (b,), whether the response ended by itself (with EOS) and was not cut at the length limit.
        mean, std: of scores on held-out data, so that different reward models have one scale. A deviation of
            0 (all rewards equal) is not divided by.
        clip: bound on the absolute normalised score; None is none. A single absurd score then cannot carry
            off the policy.
        missing_eos_penalty: subtracted, after clipping, from responses that did not end.

    Returns:
        (b,)
    """
    normalised = (scores - mean) / (std if std > 0 else 1.0)
    if clip is not None:
        normalised = normalised.clamp(-clip, clip)
    return normalised - missing_eos_penalty * (~ended.bool()).to(normalised.dtype)


def kl_per_token(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, *, estimator: KlEstimator = "k1"
) -> torch.Tensor:
    """Estimate of KL(policy ‖ reference) at each sampled token.

    Args:
        logprobs, ref_logprobs: (b, t), of the sampled tokens, in nats.
        estimator: ``k1`` is log p − log q, unbiased and of either sign; ``k3`` is q/p − 1 − log(q/p), unbiased
            too, never negative, and of lower variance (Schulman 2020).

    Returns:
        (b, t), nats.
    """
    zeros = torch.zeros_like(logprobs)
    log_ratio = torch.where(mask.bool(), logprobs - ref_logprobs, zeros)
    if estimator == "k1":
        return log_ratio
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"estimator: expected k1 or k3, found {estimator!r}")


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    kl_estimator: KlEstimator = "k1",
) -> torch.Tensor:
    """Reward of each token: the KL penalty everywhere, and the response's score on its last counted token.

    The penalty is a part of the reward, not of the loss (Ziegler et al. 2019): the critic learns it too, and
    it is no longer differentiated.

    Args:
        scores: (b,), from `prepare_scores`.
        logprobs: (b, t), of the policy that sampled.
        ref_logprobs: (b, t), of the reference.
        mask: (b, t). A row without a counted token has nowhere to put its score, and gets none.
        kl_coef: weight of the penalty.
        kl_estimator: see `kl_per_token`.

    Returns:
        (b, t)
    """
    penalty = -kl_coef * kl_per_token(logprobs, ref_logprobs, mask, estimator=kl_estimator)
    on_last = torch.where(last_counted(mask), scores[:, None].to(penalty.dtype), torch.zeros_like(penalty))
    return (penalty + on_last).detach()


# --- advantages ---------------------------------------------------------------------------------------------


@torch.no_grad()
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over the counted tokens of each row (Schulman et al. 2016).

    δ = r + γ V' − V and A = δ + γλ A', where the primes are of the next *counted* token: a hole takes no time
    and neither decays nor bootstraps. After the last counted token both are 0: a response is an episode that
    terminates, also where it was cut at the length limit (its penalty is in the score).

    Args:
        rewards: (b, t), from `shape_rewards`.
        values: (b, t), the critic before the update; V at a token is of the state *before* that token.
        mask: (b, t).
        gamma: discount; 1 because a response has a known end.
        lam: 1 is Monte Carlo, 0 one-step temporal difference.

    Returns:
        advantages (b, t) and returns (b, t), returns = advantages + values; both 0 at uncounted places.
    """
    counted = mask.bool()
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0]) if values.shape[1] else values.new_zeros(values.shape[0])
    next_value = following.clone()
    for step in reversed(range(values.shape[1])):
        here = counted[:, step]
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = torch.where(here, delta + gamma * lam * following, following)
        next_value = torch.where(here, values[:, step], next_value)
        advantages[:, step] = torch.where(here, following, torch.zeros_like(following))
    returns = torch.where(counted, advantages + values, torch.zeros_like(values))
    return advantages, returns


# --- losses -------------------------------------------------------------------------------------------------


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float = 0.1,
    count: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, Stats]:
    """PPO's clipped surrogate, −min(ρA, clip(ρ, 1±ε)A), averaged over counted tokens.

    Args:
        logprobs: (b, t), of the policy being trained; the gradient flows into these.
        old_logprobs: (b, t), of the policy that sampled.
        advantages: (b, t).
        mask: (b, t).
        clip: ε.
        count: counted tokens of the whole optimisation step; None is those here.

    Returns:
        The loss, a scalar, and statistics with the same normalisation, detached: ``clip_fraction`` (share of
        tokens where the clipped term is the one that counts, so their gradient is 0), ``approx_kl`` (k3
        estimate of KL(old ‖ new), in nats a token) and ``ratio`` (mean ρ).
    """
    counted = mask.bool()
    # Zero before the exponential, not after: the gradient of exp(inf) * 0 is NaN.
    log_ratio = torch.where(counted, logprobs - old_logprobs, torch.zeros_like(logprobs))
    weights = torch.where(counted, advantages, torch.zeros_like(advantages)).detach()
    ratio = log_ratio.exp()
    plain = -weights * ratio
    clipped = -weights * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain, clipped), counted, count=count)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean((clipped > plain).to(ratio.dtype), counted, count=count),
            "approx_kl": masked_mean(ratio - 1 - log_ratio, counted, count=count),
            "ratio": masked_mean(ratio, counted, count=count),
        }
    return loss, stats


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None,
    count: torch.Tensor | float | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Half the squared error of the critic, averaged over counted tokens; the larger of plain and clipped.

    Args:
        values: (b, t), of the critic being trained; the gradient flows into these.
        old_values: (b, t), of the critic before the update.
        returns: (b, t), from `gae`.
        mask: (b, t).
        clip: how far from ``old_values`` a prediction may go and still earn from it; None does not clip.
        count: counted tokens of the whole optimisation step; None is those here.

    Returns:
        The loss, a scalar, and ``value_clip_fraction`` (share of tokens where the clipped error is the larger
        one), detached.
    """
    counted = mask.bool()
    zeros = torch.zeros_like(values)
    values = torch.where(counted, values, zeros)
    old_values = torch.where(counted, old_values, zeros).detach()
    returns = torch.where(counted, returns, zeros).detach()
    error = (values - returns).square()
    if clip is None:
        return 0.5 * masked_mean(error, counted, count=count), {"value_clip_fraction": error.new_zeros(())}
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped_error = (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(error, clipped_error), counted, count=count)
    fraction = masked_mean((clipped_error > error).to(error.dtype), counted, count=count)
    return loss, {"value_clip_fraction": fraction.detach()}


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, reduce: Reduce | None = None
) -> torch.Tensor:
    """1 − Var(returns − values) / Var(returns) over counted tokens: 1 is a perfect critic, 0 a constant one.

    Args:
        values, returns, mask: (b, t).
        reduce: sums a tensor over processes.

    Returns:
        A scalar; 0 where all returns are equal, so that there is nothing to explain.
    """
    reduce = reduce or (lambda tensor: tensor)
    counted = mask.bool()
    error = returns - values
    sums = torch.stack([counted.sum().to(values.dtype), masked_sum(returns, mask), masked_sum(error, mask)])
    count, return_sum, error_sum = reduce(sums)
    count = count.clamp(min=1)
    squares = torch.stack(
        [
            masked_sum((returns - return_sum / count).square(), mask),
            masked_sum((error - error_sum / count).square(), mask),
        ]
    )
    return_square, error_square = reduce(squares)
    varied = return_square > 0
    return torch.where(varied, 1 - error_square / torch.where(varied, return_square, 1.0), 0.0)


# --- coefficient of the KL penalty --------------------------------------------------------------------------


def kl_coefficient(
    step: int,
    total_steps: int,
    *,
    start: float = 0.2,
    end: float = 0.005,
    schedule: KlSchedule = "linear",
) -> float:
    """The coefficient at a step of a fixed course from ``start`` (step 0) to ``end`` (``total_steps`` and after).

    Args:
        step: from 0.
        total_steps: length of the course.
        start, end: both positive for ``exponential``.
        schedule: ``constant`` stays at ``start``; ``linear``; ``cosine``, slow at both ends; ``exponential``,
            the same factor at every step. (`adapt_kl_coefficient` follows the KL instead.)

    Raises:
        ValueError: an unknown schedule, or an exponential one that touches 0.
    """
    share = min(max(step / total_steps, 0.0), 1.0) if total_steps > 0 else 0.0
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * share
    if schedule == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
    if schedule == "exponential":
        if start <= 0 or end <= 0:
            raise ValueError(f"schedule exponential needs start and end above 0, found {start} and {end}")
        return start * (end / start) ** share
    known = "constant, linear, cosine or exponential"
    raise ValueError(f"schedule: expected {known}, found {schedule!r}")


def adapt_kl_coefficient(
    coefficient: float, kl: float, *, target: float, responses: int, horizon: int = 10_000
) -> float:
    """The coefficient after a batch, pulled so that the KL approaches a target (Ziegler et al. 2019, section 2.2).

    Args:
        coefficient: before.
        kl: mean KL of the batch's responses to the reference, nats a response.
        target: what it should be, nats a response.
        responses: in the batch, over all processes.
        horizon: responses over which a proportional error of 1 changes the coefficient e-fold; errors count up
            to 0.2 either way.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * responses / horizon)
