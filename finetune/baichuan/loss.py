"""The loss of Baichuan 2: next-token cross-entropy and max-z, with the logits whole or in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finetune.baichuan.chat import IGNORE_INDEX
from finetune.baichuan.int8_rows import gradient_through, product_into

TILE_ELEMENTS = {"cuda": 2**26, "cpu": 2**24}
"""Logits that exist at once in the tiled loss, by device: 256 MiB and 64 MiB in float32.

A GPU needs some 500 rows to make up for reading the whole head; a CPU is as fast with a quarter of them.
"""


def tile_rows(vocab_size: int, device_type: str) -> int:
    """Positions whose logits exist at once in the tiled loss; above 128 a multiple of it, for matrix units."""
    rows = max(16, TILE_ELEMENTS.get(device_type, 2**26) // vocab_size)
    return rows - rows % 128 if rows > 128 else rows


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss_weight: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the next token plus ``z_loss_weight`` x mean(max_logit²).

    The max-z term averages over every shifted position, ignored ones too, as the official code does
    (Baichuan 2 report, section 2.5). With ``num_items_in_batch`` both terms are weighted by this batch's share
    of the supervised tokens, so that gradient accumulation and several processes add up to one global mean.

    Args:
        logits: (batch, length, vocab_size), any float dtype; computed in float32.
        labels: (batch, length), -100 where nothing is learned.
        num_items_in_batch: supervised tokens of the whole optimisation step, all processes.

    Returns:
        A float32 scalar; zero (with a gradient) if no label is supervised.
    """
    shifted = logits[:, :-1].float()
    targets = labels[:, 1:].to(logits.device)
    total = cross_entropy(
        shifted.reshape(-1, shifted.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    scale, z_scale = _scales(targets, z_loss_weight, num_items_in_batch)
    loss = total * scale
    if z_loss_weight:
        loss = loss + shifted.max(-1).values.pow(2).sum() * z_scale
    return loss


def tiled_causal_lm_loss(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    head_scales: torch.Tensor | None = None,
    z_loss_weight: float = 0.0,
    num_items_in_batch: torch.Tensor | int | None = None,
    supervised: torch.Tensor | None = None,
) -> torch.Tensor:
    """`causal_lm_loss` of ``hidden_states @ head_weight.T`` that never holds more than a tile of logits.

    Only positions that have a label are computed (all of them with max-z, which averages over all), and a
    frozen head gets no gradient. The gradient is computed with the value, so a tile's logits are never
    computed twice.

    Args:
        hidden_states: (batch, length, hidden_size).
        head_weight: (vocab_size, hidden_size), normalised already if the head is.
        labels: (batch, length), -100 where nothing is learned.
        head_scales: (vocab_size,), if the head is int8 (`finetune.baichuan.int8_rows`).
        z_loss_weight: weight of the max-z term.
        num_items_in_batch: supervised tokens of the whole optimisation step, all processes.
        supervised: where the labels are, from `finetune.data.collate.supervised_positions`; None asks the device,
            and waits for it.

    Returns:
        A float32 scalar.
    """
    labels = labels.to(hidden_states.device)
    scale, z_scale = _scales(labels[:, 1:], z_loss_weight, num_items_in_batch)
    if z_loss_weight:
        hidden, targets = hidden_states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    elif supervised is not None:
        hidden = hidden_states.flatten(0, 1).index_select(0, supervised)
        targets = labels.flatten().index_select(0, supervised + 1)
    else:
        learned = labels[:, 1:] != IGNORE_INDEX
        hidden, targets = hidden_states[:, :-1][learned], labels[:, 1:][learned]
    return _TiledLoss.apply(hidden, head_weight, head_scales, targets, scale, z_scale, bool(z_loss_weight))


def _scales(
    targets: torch.Tensor, z_loss_weight: float, num_items: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sums of cross-entropy and of max² are multiplied with, float32 scalars."""
    supervised = (targets != IGNORE_INDEX).sum().clamp(min=1)
    if num_items is None:
        num_items = supervised
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(targets.device)
    scale = torch.ones((), device=targets.device) / num_items
    return scale, z_loss_weight / max(1, targets.numel()) * supervised * scale


class _TiledLoss(torch.autograd.Function):
    """Sum over tiles of positions; keeps the gradient of the hidden states instead of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        weight_scales: torch.Tensor | None,
        targets: torch.Tensor,
        scale: torch.Tensor,
        z_scale: torch.Tensor,
        with_z: bool,
    ) -> torch.Tensor:
        # Gradients are kept without `scale`: divided by the tokens of a step they would vanish in float16.
        z_ratio = z_scale / scale
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        tile = tile_rows(weight.shape[0], hidden.device.type)
        dtype = weight.dtype if weight_scales is None else hidden.dtype
        # The same buffers for all tiles: fresh memory costs a CPU as much as the arithmetic on it.
        shape = (min(tile, hidden.shape[0]), weight.shape[0])
        buffers = [torch.empty(shape, dtype=torch.float32, device=hidden.device)]
        # A CPU's softmax goes over a row after another and may write where it reads.
        buffers += buffers if hidden.device.type == "cpu" else [torch.empty_like(buffers[0])]
        for start in range(0, hidden.shape[0], tile):
            rows = hidden[start : start + tile].to(dtype)
            target = targets[start : start + tile]
            logits, probabilities = (buffer[: len(rows)] for buffer in buffers)
            if weight_scales is not None:
                product_into(logits, rows, weight, weight_scales)
            elif dtype == torch.float32:
                torch.mm(rows, weight.T, out=logits)
            else:
                logits.copy_(rows @ weight.T)
            learned = target != IGNORE_INDEX
            index = target.clamp(min=0)[:, None]
            # Without max-z only its value: finding its place takes a CPU four times as long.
            top, where = logits.max(-1) if with_z else (logits.amax(-1), None)
            chosen = logits.gather(1, index)[:, 0]
            # One fused pass; the likeliest token's exp(0) / sum gives the sum back.
            torch.softmax(logits, -1, out=probabilities)
            log_sum = top - probabilities.amax(-1).log()
            loss += ((log_sum - chosen) * learned).sum() * scale
            if with_z:
                loss += top.pow(2).sum() * z_scale
            if not (needs_hidden or needs_weight):
                continue
            grad, counted = probabilities, learned.float()[:, None]
            if with_z:  # without, every position here has a label
                grad.mul_(counted)
            grad.scatter_add_(1, index, -counted)
            if where is not None:
                grad.scatter_add_(1, where[:, None], (2 * z_ratio * top)[:, None])
            if weight_grad is not None:
                weight_grad += (grad.to(dtype).T @ rows).float()
            if hidden_grad is not None:
                if weight_scales is not None:
                    through = gradient_through(grad, weight, weight_scales, dtype)
                else:
                    through = grad.to(dtype) @ weight
                hidden_grad[start : start + tile] = through.to(hidden.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad, scale)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        hidden_grad, weight_grad, scale = ctx.saved_tensors
        factor = outputs[0].float() * scale
        if hidden_grad is not None:
            hidden_grad = (hidden_grad.float() * factor).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = (weight_grad * factor).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None
