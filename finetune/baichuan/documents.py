"""Positions of tokens behind padding, and documents packed into one row."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie, its rows laid end to end; stretches of padding count as documents.

    Attributes:
        bounds: int32 of shape (documents + 1,), where each begins, and the end of the last.
        lengths: tokens of each, in order.
    """

    bounds: torch.Tensor
    lengths: list[int]

    @classmethod
    def of(cls, lengths: list[int]) -> Documents:
        """Documents of these lengths, on the CPU."""
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)

    def to(self, *args: Any, **kwargs: Any) -> Documents:
        """With the bounds elsewhere, as `torch.Tensor.to`: batches are moved by this name."""
        return Documents(self.bounds.to(*args, **kwargs), self.lengths)

    def pin_memory(self, *args: Any) -> Documents:
        """With the bounds in memory that a GPU copies from by itself; loaders of data call this."""
        return Documents(self.bounds.pin_memory(*args), self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)


def unmasked_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions of the keys, masked slots not counted, of a mask (batch, keys); None of any other."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)


def find_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Documents | None:
    """The documents of a batch that has no cache, or None where only a mask can tell who attends to whom.

    With them causal attention needs no mask: each document, and each stretch of padding, is a sequence of its
    own. A document in several pieces (padding between virtual tokens and the text) does need one.

    Args:
        position_ids: (batch, length); where they restart, a document begins, unless there is a mask.
        attention_mask: (batch, length), 0 on padding, other integers number the documents of a row.
    """
    if is_torchdynamo_compiling():  # no looking at values
        return None
    if attention_mask is None:
        restarts = position_ids.diff(dim=-1) != 1
    elif attention_mask.shape != position_ids.shape or attention_mask.is_floating_point():
        return None
    else:
        numbers = attention_mask.long()
        restarts = numbers.diff(dim=-1) != 0
        seen = numbers.cummax(-1).values[:, :-1]
        again = restarts & (numbers[:, 1:] > 0) & (numbers[:, 1:] <= seen)
        if bool(again.any()):
            return None
    starts = nn.functional.pad(restarts, (1, 0), value=True).flatten()
    bounds = nn.functional.pad(starts.nonzero()[:, 0], (0, 1), value=starts.numel())
    return Documents(bounds.to(torch.int32), bounds.diff().tolist())


def document_numbers(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The attention mask if it numbers packed documents (1, 1, 1, 2, 2, …), else None."""
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return None
    if attention_mask.is_floating_point():
        return None
    if is_torchdynamo_compiling():  # no looking at values; zeros and ones are right as one document, too
        return attention_mask
    return attention_mask if bool(attention_mask.max() > 1) else None
