"""The reward model: a decoder with an adapter and a scalar head, over batches of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.data.collate import Collator
from rlhf.reward.adapter import ScoreHead

if TYPE_CHECKING:
    from peft import PeftModel


class RewardModel(nn.Module):
    """Scores of responses, each read at its last token.

    Args:
        body: a BaichuanForCausalLM with the adapter on it; its language-model head is not used.
        head: None is a new one.
    """

    accepts_loss_kwargs = True  # the trainer counts the prompts of a whole step for the loss

    def __init__(self, body: PeftModel, head: ScoreHead | None = None) -> None:
        super().__init__()
        self.body = body
        self.head = (head or ScoreHead(body.config.hidden_size)).to(body.device)

    @property
    def config(self) -> Any:
        """The base's."""
        return self.body.config

    def forward(
        self,
        input_ids: torch.Tensor,
        ends: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores (n,), float32.

        Args:
            input_ids: (rows, width), a response or a pack of them to a row.
            ends: row and column of the last token of each response, both of shape (n,).
            attention_mask: (rows, width), where rows are padded.
            position_ids: (rows, width), beginning again in each response, where rows are packed.
        """
        decoder = self.body.get_base_model().model
        outputs = decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return self.head(outputs.last_hidden_state[ends])

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **more: Any) -> None:
        """As in transformers; without reentry, which loses gradients where the embeddings are frozen."""
        settings = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        self.body.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings, **more)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Save the adapter as peft does."""
        self.body.save_pretrained(folder, **kwargs)


@dataclass(frozen=True)
class GroupCollator:
    """Prompts with their responses into one batch for `RewardModel`: no group is divided between batches.

    Attributes:
        rows: makes tensors of rows.
        pack_to: tokens of a row, into which several responses are packed; None gives each a row, padded.
    """

    rows: Collator
    pack_to: int | None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows as `PreferenceSet` yields them.

        Returns:
            input_ids and attention_mask or position_ids as `Collator` makes them; `ends`; `group_sizes`, a list;
            `levels` (n,) and `graded` (prompts,); `labels` (prompts,), zeros for transformers to count prompts by.
        """
        responses = [ids for item in items for ids in item["input_ids"]]
        packs = [[number] for number in range(len(responses))]
        if self.pack_to is not None:
            packs = first_fit([len(ids) for ids in responses], self.pack_to)
        rows: list[dict[str, Any]] = []
        ends = torch.empty(2, len(responses), dtype=torch.int64)
        for row, pack in enumerate(packs):
            lengths = [len(responses[number]) for number in pack]
            ids = [token for number in pack for token in responses[number]]
            rows.append({"input_ids": ids, "labels": ids})
            if self.pack_to is not None:
                rows[-1]["seq_lengths"] = lengths
            for number, end in zip(pack, torch.tensor(lengths).cumsum(0) - 1):
                ends[0, number], ends[1, number] = row, end
        batch: dict[str, Any] = self.rows(rows)
        return {
            **batch,
            "ends": (ends[0], ends[1]),
            "group_sizes": [len(item["input_ids"]) for item in items],
            "levels": torch.tensor([level for item in items for level in item["levels"]]),
            "graded": torch.tensor([item["graded"] for item in items]),
            "labels": torch.zeros(len(items), dtype=torch.int64),
        }


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a bin: first-fit decreasing.

    Args:
        lengths: of the items; one longer than the capacity gets a bin of its own.
        capacity: of a bin.

    Returns:
        Positions of the items in each bin, in their order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = next((at for at, free in enumerate(room) if free >= lengths[item]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= lengths[item]
    return [sorted(members) for members in bins]
