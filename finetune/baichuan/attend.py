"""The attention product under each implementation, with ALiBi and with packed documents kept apart.

A batch whose documents are known (`Documents`) needs no mask: SDPA and FlashAttention attend within each of
them. A mask would cost SDPA its fast kernels, on a GPU FlashAttention's, on a CPU the half of the scores that
causality leaves out; eager and FlexAttention get one (the latter's is by blocks).

ALiBi is folded into the head dimension (`finetune.baichuan.attention`), except where the kernel has a bias of
its own that is as exact: FlashAttention 2 (`alibi_slopes`, slope x key position added to float32 scores), where
folding would also take a head of 128 to the kernels for 192; and FlexAttention (`score_mod`), whose kernels
round the head up to a power of two.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.baichuan.attention import eager_attention, fold_alibi
from finetune.baichuan.documents import Documents

HALF = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD = 256
"""Largest head dimension of FlashAttention's kernels, ALiBi's columns included."""
ALLOWED_ERROR = 0.06
"""Of a kernel in 16 bits, relative. bfloat16 makes up to 0.03, a document that begins one token late 0.13."""

logger = logging.getLogger(__name__)


def takes_documents(implementation: str) -> bool:
    """Whether an implementation attends within documents without a mask."""
    return implementation == "sdpa" or "flash" in implementation


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    slopes: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Causal attention under the implementation that the module's config names.

    Args:
        module: the attention layer.
        query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim).
        attention_mask: as transformers makes it for the implementation; None is causal attention.
        scaling: multiplies the scores.
        slopes: ALiBi's, float32 of shape (heads,).
        key_positions: integers of shape (batch, keys), for ALiBi; None counts the slots.
        documents: attend within each, in place of a mask.

    Returns:
        output (batch, queries, heads, head_dim), and the weights where the implementation gives them.
    """
    name = str(module.config._attn_implementation)  # type: ignore[union-attr]
    head_dim = query.shape[-1]
    if slopes is not None:
        if name == "flash_attention_2" and attention_mask is None and query.dtype in HALF:
            return flash_alibi(query, key, value, slopes, scaling, documents), None
        if name == "flex_attention":
            return flex_alibi(module, query, key, value, attention_mask, slopes, scaling, key_positions), None
        query, key, value = fold_alibi(query, key, value, slopes, scaling, key_positions)
    if documents is not None and name == "sdpa":
        return documents_attention(query, key, value, documents, scaling)[..., :head_dim], None
    if documents is not None:
        longest = documents.longest
        kwargs |= {"cu_seq_lens_q": documents.bounds, "cu_seq_lens_k": documents.bounds}
        kwargs |= {"max_length_q": longest, "max_length_k": longest}
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
    output, weights = implementation(
        module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, **kwargs
    )
    return output[..., :head_dim], weights


def documents_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float
) -> torch.Tensor:
    """Causal attention within each document: torch's variable-length kernel, or SDPA on one after another.

    Args:
        query, key, value: (batch, heads, length, head_dim).
        documents: those of the batch.
        scaling: multiplies the scores.

    Returns:
        (batch, length, heads, head_dim).
    """
    batch, heads, length, head_dim = query.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    one_by_one = query.dtype not in HALF or query.device.type != "cuda" or head_dim > MAX_FLASH_HEAD
    if one_by_one or not varlen_works(query.device, query.dtype, head_dim):
        output = each_document(q, k, v, documents.lengths, scaling)
    else:
        output = varlen(q, k, v, documents, scaling)
    return output.view(batch, length, heads, head_dim)


def each_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """SDPA on one document after another; all of shape (tokens, heads, head_dim)."""
    parts = []
    for pieces in zip(*(each.split(lengths) for each in (query, key, value)), strict=True):
        q, k, v = (piece.transpose(0, 1)[None] for piece in pieces)
        part = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scaling: float
) -> torch.Tensor:
    """torch's FlashAttention for documents of differing lengths; all of shape (tokens, heads, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, bounds = documents.longest, documents.bounds
    q, k, v = (each.contiguous() for each in (query, key, value))
    output = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(output, torch.Tensor)  # a tuple where more was asked for
    return output


@functools.lru_cache
def varlen_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `varlen` runs on a device and agrees with SDPA on one document after another, gradients included.

    Where it does not (before Ampere, torch built without FlashAttention) the reason is logged, once.
    """
    lengths = [70, 1, 129]
    bounds = torch.tensor([0, 70, 71, 200], dtype=torch.int32, device=device)
    documents, scaling = Documents(bounds, lengths), head_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, sum(lengths), 2, head_dim, generator=generator).to(device, dtype)

    def output_and_gradients(kernel: Any) -> list[torch.Tensor]:
        inputs = [each.detach().clone().requires_grad_() for each in drawn[:3]]
        output = kernel(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, drawn[3])]

    def both() -> list[list[torch.Tensor]]:
        found = output_and_gradients(lambda q, k, v: varlen(q, k, v, documents, scaling))
        return [found, output_and_gradients(lambda q, k, v: each_document(q, k, v, lengths, scaling))]

    try:
        # Whoever asks may be within autocast, or a checkpointed layer, which would take this for a part of itself
        # and miss it the second time. All such modes are a thread's own.
        with ThreadPoolExecutor(1) as thread:
            found, wanted = thread.submit(lambda: on_device(device, both)).result()
        errors = [relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
        if not max(errors) < ALLOWED_ERROR:
            raise RuntimeError(f"relative errors {', '.join(f'{error:.2f}' for error in errors)}")
    except Exception as error:  # whatever a kernel raises: there is another way
        logger.warning("packed rows are slower, torch's variable-length attention fails: %s", brief(error))
        return False
    return True


def on_device(device: torch.device, work: Callable[[], Any]) -> Any:
    """What the work gives, with the device as this thread's current one: a new thread begins with GPU 0."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return work()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    actual, expected = actual.detach().float(), expected.detach().float()
    difference = (actual - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt())


def brief(error: Exception) -> str:
    """What an error says, its first line, not all of a long one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def flash_alibi(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    scaling: float,
    documents: Documents | None,
) -> torch.Tensor:
    """FlashAttention 2 with its own ALiBi, of rows without padding; shapes as in `attend`."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    settings = {"softmax_scale": scaling, "causal": True, "alibi_slopes": slopes.float().contiguous()}
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    if documents is None:
        return flash_attn_func(q, k, v, **settings)
    output = flash_attn_varlen_func(
        *(each.flatten(0, 1) for each in (q, k, v)),
        cu_seqlens_q=documents.bounds,
        cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        **settings,
    )
    return output.view_as(q)


def flex_alibi(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: Any,
    slopes: torch.Tensor,
    scaling: float,
    key_positions: torch.Tensor | None,
) -> torch.Tensor:
    """FlexAttention with ALiBi added to float32 scores; shapes as in `attend`, the mask by blocks."""
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    keys = key.shape[2]
    if key_positions is None:
        key_positions = torch.arange(keys, device=key.device)[None]
    elif key_positions.shape[1] < keys:  # a static cache with room left
        key_positions = nn.functional.pad(key_positions, (0, keys - key_positions.shape[1]))
    positions = key_positions.to(key.device).expand(query.shape[0], -1).float()

    def add_alibi(score: Any, row: Any, head: Any, _: Any, slot: Any) -> Any:
        return score + slopes[head] * positions[row, slot]

    output = compile_friendly_flex_attention(
        query,
        key,
        value,
        training=module.training,
        score_mod=add_alibi,
        block_mask=block_mask,
        scale=scaling,
    )
    assert isinstance(output, torch.Tensor)  # a tuple where more was asked for
    return output.transpose(1, 2).contiguous()
