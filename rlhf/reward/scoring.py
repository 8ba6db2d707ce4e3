"""Scores of conversations by a saved reward model, for use from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.baichuan.chat import build_example
from finetune.data.collate import collator_for
from rlhf.reward.adapter import LoadedReward
from rlhf.reward.model import GroupCollator, RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNCUT = 2**31 - 1


@torch.no_grad()
def score_conversations(
    reward: LoadedReward,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    normalised: bool = True,
    batch_size: int = 8,
) -> list[float]:
    """How good the last answer of each conversation is.

    The reward adapter becomes the model's active one.

    Args:
        reward: from `rlhf.reward.adapter.load_reward`.
        tokenizer: the base's.
        conversations: messages with role and content, the assistant's last.
        normalised: scores with mean 0 and deviation 1 on the held-out responses of training, in place of raw ones.
        batch_size: conversations at once.

    Raises:
        UserError: roles out of order, or a last message that is not the assistant's.
    """
    reward.model.set_adapter(reward.name)
    model = RewardModel(reward.model, reward.head).eval()
    collate = GroupCollator(collator_for(tokenizer), pack_to=None)
    rows = [build_example(tokenizer, messages, max_length=UNCUT)["input_ids"] for messages in conversations]
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))  # like lengths together: little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        items: list[dict[str, Any]] = [
            {"input_ids": [rows[at]], "levels": [0.0], "graded": False} for at in chosen
        ]
        batch = collate(items)
        device = reward.model.device
        found = model(
            batch["input_ids"].to(device),
            tuple(end.to(device) for end in batch["ends"]),
            attention_mask=batch["attention_mask"].to(device),
        )
        for at, score in zip(chosen, found.tolist()):
            scores[at] = (score - reward.info.mean) / reward.info.std if normalised else score
    return scores
