"""Rows into batches: padded, or packed with their documents kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.baichuan.chat import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Collator:
    """Makes a batch of tensors, all int64 of shape (rows, longest row), padded on the right.

    Rows with `seq_lengths` are packs. Their batch has input_ids, labels and position_ids, and no
    attention_mask: the model finds the documents from the positions, which begin again at 0 in each
    (transformers' find_packed_sequence_indices), and padding is one more document of its own. Other rows give
    input_ids, labels and attention_mask.

    Attributes:
        pad_token_id: fills input_ids; labels are filled with -100.
        pad_to_multiple_of: lengthen rows to a multiple of this, which some kernels run faster on.
        places: also say where labels and documents are (`supervised`, `documents`), since to ask a device is to
            wait for it. Not for models that put vectors in front of the rows.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    places: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of rows as the data sets of `prepare` yield them."""
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, Any] = {
            "input_ids": _stack([row["input_ids"] for row in rows], width, self.pad_token_id),
            "labels": _stack([row["labels"] for row in rows], width, IGNORE_INDEX),
        }
        if "seq_lengths" in rows[0]:
            batch["position_ids"] = _stack([_positions(row["seq_lengths"], width) for row in rows], width, 0)
        else:
            batch["attention_mask"] = _stack([[1] * len(row["input_ids"]) for row in rows], width, 0)
        if self.places:
            from finetune.baichuan.documents import Documents

            batch["supervised"] = supervised_positions(batch["labels"])
            batch["documents"] = Documents.of([length for row in rows for length in _lengths(row, width)])
        return batch


def collator_for(tokenizer: PreTrainedTokenizerBase, *, places: bool = False) -> Collator:
    """The collator that fits a tokenizer; EOS pads where it has no pad token."""
    pad = tokenizer.pad_token_id
    return Collator(tokenizer.eos_token_id if pad is None else pad, places=places)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """The positions whose next token is a label.

    Args:
        labels: (rows, length), -100 where nothing is learned; that of a row's first token is never predicted.

    Returns:
        int64, row x length + column of each.
    """
    import torch

    learned = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    return learned.flatten().nonzero()[:, 0]


def _lengths(row: dict[str, Any], width: int) -> list[int]:
    """Tokens of each document of a row, and of the padding behind them."""
    lengths = [int(length) for length in row.get("seq_lengths", [len(row["input_ids"])])]
    padding = width - sum(lengths)
    return [*lengths, padding] if padding else lengths


def _positions(lengths: Sequence[int], width: int) -> list[int]:
    """0, 1, 2, ... for each document, then for the padding."""
    padding = width - sum(lengths)
    return [position for length in [*lengths, padding] for position in range(length)]


def _stack(rows: Sequence[Sequence[int]], width: int, fill: int) -> torch.Tensor:
    import torch

    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
