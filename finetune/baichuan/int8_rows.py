"""Embeddings and head with their rows in 8 bits.

A row is int8 with a float32 scale of its own, its largest magnitude / 127: every value is off by half a step at
most, whatever the other rows are like. bfloat16 holds all of int8 exactly, so products are with the integers
themselves and only their results are scaled. Half the memory of 16 bits: 1 GB for the 7B model's two matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from finetune.baichuan.modeling import BaichuanForCausalLM

STEP = 8192
"""Rows that are unpacked at a time: 64 MiB of the 7B model's in bfloat16."""


@torch.no_grad()
def quantise_rows(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in 8 bits.

    Args:
        matrix: (rows, columns), float.

    Returns:
        int8 (rows, columns) and float32 scales (rows,): ``integers * scales[:, None]`` is the matrix again.
    """
    integers = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    for start in range(0, matrix.shape[0], STEP):
        part = slice(start, start + STEP)
        rows = matrix[part].float()
        scales[part] = rows.abs().amax(1) / 127
        integers[part] = (rows / scales[part].clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return integers, scales


def product_into(
    logits: torch.Tensor, hidden: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor
) -> None:
    """``logits = hidden @ matrix.T`` of a matrix in 8 bits, some thousand of its rows at a time.

    Args:
        logits: float32 (n, rows), written.
        hidden: (n, columns), float.
        integers, scales: from `quantise_rows`.
    """
    for start in range(0, integers.shape[0], STEP):
        part = slice(start, start + STEP)
        logits[:, part] = hidden @ integers[part].to(hidden.dtype).T
    logits *= scales


def gradient_through(
    grad: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``grad @ matrix`` of a matrix in 8 bits.

    Args:
        grad: float32 (n, rows), overwritten.
        integers, scales: from `quantise_rows`.
        dtype: to multiply in.

    Returns:
        float32 (n, columns).
    """
    scaled = grad.mul_(scales).to(dtype)
    result = torch.zeros(grad.shape[0], integers.shape[1], dtype=torch.float32, device=grad.device)
    for start in range(0, integers.shape[0], STEP):
        part = slice(start, start + STEP)
        result += scaled[:, part] @ integers[part].to(dtype)
    return result


class _Int8Rows(nn.Module):
    """Holds a matrix of (vocab_size, hidden_size); its dtype remains that of the computation."""

    scales: torch.Tensor

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        integers, scales = quantise_rows(matrix)
        self.weight = nn.Parameter(integers, requires_grad=False)
        # No parameter: a model's dtype is that of its first parameter that is no integer.
        self.register_buffer("scales", scales, persistent=False)
        self.dtype = matrix.dtype


class Int8Embedding(_Int8Rows):
    """An embedding whose rows are 8 bits wide until they are looked up."""

    @property
    def num_embeddings(self) -> int:
        """Rows, as `torch.nn.Embedding` calls them; peft draws first vectors from them."""
        return self.weight.shape[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(…,) token ids → (…, hidden_size)."""
        return (self.weight[ids].float() * self.scales[ids][..., None]).to(self.dtype)


class Int8Head(_Int8Rows):
    """A frozen head in 8 bits, normalised before if it is to be."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (…, vocab_size) of hidden states (…, hidden_size)."""
        hidden = hidden_states.to(self.dtype)
        starts = range(0, self.weight.shape[0], STEP)
        parts = [hidden @ self.weight[start : start + STEP].to(self.dtype).T for start in starts]
        return (torch.cat(parts, -1) * self.scales).to(hidden_states.dtype)


def quantise_embeddings(model: BaichuanForCausalLM) -> None:
    """Put embeddings and head into 8 bits, one after the other; the head is frozen and normalised before."""
    model.freeze_head()
    embeddings: nn.Module = Int8Embedding(model.model.embed_tokens.weight)
    model.model.embed_tokens = embeddings  # type: ignore[assignment]
    head: nn.Module = Int8Head(model.lm_head.weight)
    model.lm_head = head  # type: ignore[assignment]
