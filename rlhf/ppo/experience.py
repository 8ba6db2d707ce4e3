"""What a rollout has taught: the tensors that are learned from, and the numbers that are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf.ppo.functional import Reduce, explained_variance, kl_per_token

if TYPE_CHECKING:
    from finetune.data.records import Message
    from rlhf.ppo.rollout import Rollout


@dataclass
class Experience:
    """A rollout with all that is learned from it; tensors (b, t) or (b,) on the device.

    Attributes:
        rollout: prompts and responses of this process.
        messages: the conversations, responses last.
        scores: (b,), joint scores of the rewards.
        raw: (b,) by part, as the rewards gave them.
        logprobs, ref_logprobs, values: (b, t), of actor, reference and critic before the update.
        entropy: (b, t), of the actor.
        advantages, returns: (b, t), from GAE.
    """

    rollout: Rollout
    messages: list[list[Message]]
    scores: torch.Tensor
    raw: dict[str, torch.Tensor]
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def kl(self) -> torch.Tensor:
        """(b,), estimate (k1) of the KL to the reference of each response, in nats."""
        return kl_per_token(self.logprobs, self.ref_logprobs, self.rollout.mask).sum(-1)


def describe(experience: Experience, responses: int, reduce: Reduce) -> dict[str, float]:
    """Means over responses, or over tokens, of all processes.

    Args:
        responses: how many there are in all processes.
        reduce: sums a tensor over processes.

    Returns:
        ``reward`` and ``reward_std`` (joint scores), ``reward/NAME`` (raw scores, where they differ from the
        joint ones), ``kl`` (nats a response, to the reference), ``entropy`` (nats a token),
        ``explained_variance``, ``response_length`` (tokens), ``eos_share``, ``repetition``.
    """
    rollout, mask = experience.rollout, experience.rollout.mask
    raw = {f"reward/{name}": scores.to(mask.device) for name, scores in experience.raw.items()}
    if len(raw) == 1 and torch.equal(*raw.values(), experience.scores):
        raw = {}
    rows = range(len(rollout.prompts))
    per_response = {
        "reward": experience.scores,
        "kl": experience.kl,
        **raw,
        "response_length": rollout.lengths,
        "eos_share": rollout.ended,
        "repetition": torch.tensor([repetition(rollout.response_ids(row)) for row in rows]),
    }
    sums = torch.stack([numbers.to(mask.device).double().sum() for numbers in per_response.values()])
    means = dict(zip(per_response, (reduce(sums) / responses).tolist()))
    entropy, tokens = reduce(torch.stack([experience.entropy.sum(), mask.sum()])).tolist()
    explained = explained_variance(experience.values, experience.returns, mask, reduce=reduce)
    reward = means.pop("reward")
    # Around the mean: from the mean square, equal rewards would seem to differ by rounding.
    squares = reduce((experience.scores.to(mask.device).double() - reward).square().sum())
    return {
        "reward": reward,
        "reward_std": (float(squares) / responses) ** 0.5,
        "kl": means.pop("kl"),
        "entropy": entropy / max(tokens, 1),
        "explained_variance": float(explained),
        **means,
    }


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """Share of a response's token n-grams that it has had before: 0 says nothing twice, near 1 is a loop."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
