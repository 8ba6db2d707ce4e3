"""Position encodings and the attention product.

ALiBi adds slope x key position to every score. Instead of a bias matrix for each head, the bias is folded into
the head dimension: the slope is appended to each query and the position to each key, so that their dot product
is the bias and any causal kernel computes ALiBi without a mask. A constant per row drops out of the softmax, so
the slot of a key in the sequence serves as its position, whatever the packing. Padding is another matter: it may
stand between the virtual tokens of P-Tuning or a prefix and the text, so masked slots are not counted.

bfloat16 holds 8 significant bits, too few for a position or a slope. Both are split into parts that it holds
exactly: a position into 256a + b, a slope into three parts; kernels accumulate the products in float32.
"""

from __future__ import annotations

import math

import torch
from torch import nn

ALIBI_DIMS = 8
"""Dimensions appended to queries and keys: 3 slope parts x 2 position parts, padded to a multiple of 8."""

_SLOPE_PARTS = 3
_POSITION_BASE = 256


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes of ALiBi, float32 of shape (num_heads,).

    A geometric sequence when ``num_heads`` is a power of two; otherwise the sequence of the next lower power,
    followed by every other slope of the next higher one (Press et al. 2022, and its reference code).
    """

    def power_of_two(n: int) -> list[float]:
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = power_of_two(closest)
    if closest != num_heads:
        slopes += power_of_two(2 * closest)[0::2][: num_heads - closest]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_query_features(slopes: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """What is appended to queries: slope / scaling in three parts that ``dtype`` holds exactly, twice.

    Args:
        slopes: float32 of shape (heads,).
        scaling: what the attention multiplies scores with, undone here.
        dtype: of the queries.

    Returns:
        ``dtype`` of shape (heads, ALIBI_DIMS).
    """
    remainder = slopes.float() / scaling
    parts = []
    for _ in range(_SLOPE_PARTS):
        part = remainder.to(dtype)
        parts.append(part)
        remainder = remainder - part.float()
    stacked = torch.stack(parts, dim=-1)
    zeros = stacked.new_zeros(stacked.shape[0], ALIBI_DIMS - 2 * _SLOPE_PARTS)
    return torch.cat([stacked, stacked, zeros], dim=-1)


def alibi_key_features(positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is appended to keys: the position in two parts, 256a and b, each next to every slope part.

    Args:
        positions: integers of shape (batch, keys).
        dtype: of the keys.

    Returns:
        ``dtype`` of shape (batch, keys, ALIBI_DIMS); exact in bfloat16 below 65,536.
    """
    low = positions % _POSITION_BASE
    high = positions - low
    columns = [high] * _SLOPE_PARTS + [low] * _SLOPE_PARTS
    columns += [torch.zeros_like(positions)] * (ALIBI_DIMS - 2 * _SLOPE_PARTS)
    return torch.stack(columns, dim=-1).to(dtype)


def fold_alibi(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    scaling: float,
    key_positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Append the ALiBi features to queries and keys, and zeros to values (fused kernels want equal sizes).

    Args:
        query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim).
        slopes: float32 of shape (heads,).
        scaling: what the attention multiplies scores with.
        key_positions: integers of shape (batch, keys), or fewer keys where a static cache has room left; None
            counts the slots.

    Returns:
        query, key and value with head_dim + ALIBI_DIMS; cut the attention's output back to head_dim.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    q_features = alibi_query_features(slopes.to(query.device), scaling, query.dtype)
    if key_positions is None:
        key_positions = torch.arange(keys, device=key.device)[None]
    elif key_positions.shape[1] < keys:
        key_positions = nn.functional.pad(key_positions, (0, keys - key_positions.shape[1]))
    k_features = alibi_key_features(key_positions.to(key.device), key.dtype)
    query = torch.cat([query, q_features[None, :, None].expand(batch, heads, queries, -1)], dim=-1)
    key = torch.cat([key, k_features[:, None].expand(batch, heads, keys, -1)], dim=-1)
    value = nn.functional.pad(value, (0, ALIBI_DIMS))
    return query, key, value


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """Rotary position embedding, computed in float32 as the official code does.

    Args:
        query, key: (batch, heads, length, head_dim).
        cos, sin: float32 of shape (batch, length, head_dim).
    """
    cos, sin = cos[:, None], sin[:, None]

    def apply(x: torch.Tensor) -> torch.Tensor:
        xf = x.float()
        half = xf.shape[-1] // 2
        turned = torch.cat((-xf[..., half:], xf[..., :half]), dim=-1)
        return (xf * cos + turned * sin).to(x.dtype)

    return apply(query), apply(key)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain tensor operations, for ``output_attentions`` and as the reference.

    Scores are float32, since folded ALiBi puts positions into them; autocast would take 16 bits for them.

    Returns:
        output (batch, queries, heads, head_dim) and weights (batch, heads, queries, keys).
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask.float()
    weights = nn.functional.softmax(scores, dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
