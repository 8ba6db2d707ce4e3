"""Positions of tokens behind padding, and documents packed into one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling


def unmasked_positions(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Positions of the keys, masked slots not counted, of a mask (batch, keys); None of any other."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return ((attention_mask != 0).cumsum(-1) - 1).clamp(min=0)


def flash_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, documents: torch.Tensor | None
) -> dict[str, Any]:
    """Where the documents packed into a batch begin, as FlashAttention wants to know; empty if there are none.

    transformers finds them by itself in batches of one row only, and in larger ones would let the documents
    of a row attend to each other.
    """
    if documents is not None:
        restarts = documents.diff(dim=-1) != 0
    elif attention_mask is None:
        restarts = position_ids.diff(dim=-1) != 1
    else:
        return {}
    if not bool(restarts.any()):
        return {}
    starts = nn.functional.pad(restarts, (1, 0), value=True).flatten()
    bounds = nn.functional.pad(starts.nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_numbers(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The attention mask if it numbers packed documents (1, 1, 1, 2, 2, …), else None."""
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return None
    if attention_mask.is_floating_point():
        return None
    if is_torchdynamo_compiling():  # no looking at values; zeros and ones are right as one document, too
        return attention_mask
    return attention_mask if bool(attention_mask.max() > 1) else None
