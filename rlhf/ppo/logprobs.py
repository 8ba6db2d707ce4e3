"""Log-probabilities of sampled tokens, with never more than a tile of logits in memory.

A response of 256 tokens has 256 × 125,696 logits, 128 MiB in float32, and training wants them for a whole
batch, three times over (logits, log-softmax, gradient). The loss of PPO needs one number for each token. Its
gradient for the hidden state, W[y] − p·W, does not depend on the loss that it will be multiplied with, so it is
computed together with the value, while the tile's logits are there, and they are never computed twice.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune.baichuan.loss import tile_rows


def tiled_logprobs(
    hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and entropy of the distribution that it was drawn from.

    Args:
        hidden: (n, hidden_size), the hidden states that predict the targets.
        head_weight: (vocab_size, hidden_size), frozen, normalised already if the head is.
        targets: (n,), token ids.
        temperature: divides the logits: the policy is what is sampled from.

    Returns:
        logprobs (n,), float32, differentiable by ``hidden``; entropy (n,), float32, in nats, without gradient.
    """
    return _TiledLogprobs.apply(hidden, head_weight, targets, temperature)


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if ctx.needs_input_grad[1]:
            raise ValueError("the head must be frozen")
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        tile = tile_rows(weight.shape[0], hidden.device.type)
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            index = targets[rows, None]
            logits = (hidden[rows].to(weight.dtype) @ weight.T).float().div_(temperature)
            # The fused softmax twice as fast as logsumexp; the likeliest token's exp(0) / sum gives the sum back.
            p = logits.softmax(-1)
            log_sum = logits.amax(-1) - p.amax(-1).log()
            logprobs[rows] = logits.gather(1, index)[:, 0] - log_sum
            with torch.autocast(hidden.device.type, enabled=False):  # which would have 16 bits do for it
                entropy[rows] = log_sum - torch.linalg.vecdot(p, logits)
            del logits
            if jacobian is not None:
                grad = p.neg_()
                grad.scatter_add_(1, index, torch.ones_like(grad[:, :1]))
                jacobian[rows] = ((grad.to(weight.dtype) @ weight) / temperature).to(hidden.dtype)
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple:
        (jacobian,) = ctx.saved_tensors
        return (outputs[0][:, None] * jacobian.float()).to(jacobian.dtype), None, None, None
