"""What the layers keep for the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

OFFLOADED_INPUTS = 3
"""Layers' inputs that are on the device at once where they are kept in host memory: those that are copied."""


def activation_bytes(
    recipe: Recipe, config: dict[str, Any], *, tokens: int, width: int, device_type: str
) -> tuple[int, int]:
    """Bytes on the device that all layers keep, and beside them those of one layer that is computed again.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        tokens: of a batch.
        width: bytes of a value of the computation.
        device_type: ``cuda`` or ``cpu``.
    """
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keep = recipe.train.gradient_checkpointing
    layer = _whole_layer(recipe, config, width=width, device_type=device_type)
    if not keep:
        return int(tokens * layers * layer), 0
    inputs = min(layers, OFFLOADED_INPUTS) if recipe.train.activation_offloading else layers
    attention = (
        hidden * width + 4 * config["num_attention_heads"]
    )  # the output, and a float32 for each row of it
    beside = {
        "attention": attention,
        "matmul": attention + (3 * hidden + hidden + 2 * wide + hidden) * width,
    }
    kept = beside[keep] if isinstance(keep, str) else 0
    return int(tokens * (inputs * hidden * width + layers * kept)), int(tokens * layer)


def host_bytes(recipe: Recipe, config: dict[str, Any], *, tokens: int, width: int) -> int:
    """Bytes of pinned host memory that `train.activation_offloading` takes; torch rounds each tensor up to 2^n."""
    if not recipe.train.activation_offloading:
        return 0
    return config["num_hidden_layers"] * 2 ** (tokens * config["hidden_size"] * width - 1).bit_length()


def _whole_layer(recipe: Recipe, config: dict[str, Any], *, width: int, device_type: str) -> float:
    """Bytes that one layer saves for its backward pass, for each token.

    Frozen matrices save nothing. Kept are the inputs of both norms, q, k, v and the attention's output, gate,
    its activation, and up. LoRA learns from its inputs: in float32 they are there already where they are not the
    norms' outputs or the feed-forward's product, in 16 bits each matrix makes a copy, and so it does behind
    dropout, which keeps its mask. (tests/unit/test_memory.py counts what autograd saves.)
    """
    hidden, wide, adapter = config["hidden_size"], config["intermediate_size"], recipe.adapter
    if config["position_embedding"] == "alibi":  # eight features are appended to each head
        heads = hidden * (1 + 8 * config["num_attention_heads"] / hidden)
        attention = 4 * heads
    else:  # q and k turned, and all three as they were: v is a part of them
        heads = hidden
        attention = 6 * hidden
    # Liger's SwiGLU computes the activation of the gate again.
    saved = (2 * hidden + attention + (2 if _uses_liger(recipe, device_type) else 3) * wide) * width
    if adapter.method != "lora":
        return saved
    inputs = 4 * hidden + wide
    if adapter.dropout:
        return saved + inputs * (width + (1 if device_type == "cuda" else 4))
    if width < 4:
        return saved + inputs * width
    own = 2 * hidden + wide + (hidden if heads != hidden else 0)
    return saved + own * width


def _uses_liger(recipe: Recipe, device_type: str) -> bool:
    """Whether the run does, as far as what is installed here tells."""
    import torch

    from finetune.baichuan.kernels import choose_kernels

    wanted = recipe.train.kernels
    if wanted != "auto":
        return wanted == "liger"
    return choose_kernels(wanted, torch.device(device_type), compiled=recipe.train.compile) == "liger"
