"""What the layers keep for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe

OFFLOADED_INPUTS = 3
"""Layers' inputs that are on the device at once where they are kept in host memory: those that are copied."""


def activation_bytes(
    recipe: Recipe, config: dict[str, Any], *, tokens: int, length: int, width: int, device_type: str
) -> tuple[int, int]:
    """Bytes on the device that all layers keep, and beside them those of one layer that is computed again.

    Args:
        recipe: the run.
        config: the base's configuration as a dictionary.
        tokens: of a batch.
        length: tokens of a row.
        width: bytes of a value of the computation.
        device_type: ``cuda`` or ``cpu``.
    """
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keep = recipe.train.gradient_checkpointing
    implementation = _attention_of(recipe, config, device_type)
    attention = attention_bytes(implementation, config, width=width, length=length)
    layer = _whole_layer(recipe, config, attention, width=width, device_type=device_type)
    if not keep:
        return int(tokens * layers * layer), 0
    inputs = min(layers, OFFLOADED_INPUTS) if recipe.train.activation_offloading else layers
    output = (
        0.0 if implementation == "flex_attention" else attention.output
    )  # of which checkpointing sees nothing
    beside = {"attention": output, "matmul": output + (3 * hidden + hidden + 2 * wide + hidden) * width}
    kept = beside[keep] if isinstance(keep, str) else 0
    return int(tokens * (inputs * hidden * width + layers * kept)), int(tokens * layer)


def host_bytes(recipe: Recipe, config: dict[str, Any], *, tokens: int, width: int) -> int:
    """Bytes of pinned host memory that `train.activation_offloading` takes; torch rounds each tensor up to 2^n."""
    if not recipe.train.activation_offloading:
        return 0
    return config["num_hidden_layers"] * 2 ** (tokens * config["hidden_size"] * width - 1).bit_length()


@dataclass(frozen=True)
class AttentionBytes:
    """What the attention of a layer keeps of a token, in bytes.

    Attributes:
        inputs: queries, keys and values; eager attention's weights.
        output: the kernel's output and the logarithm of each row's sum, a float32 for each head. Eager attention
            keeps none.
        output_is_read: whether the matrix behind reads that output itself, not a part or a copy of it.
    """

    inputs: float
    output: float
    output_is_read: bool


def attention_bytes(
    implementation: str, config: dict[str, Any], *, width: int, length: int
) -> AttentionBytes:
    """What an implementation keeps (`finetune.baichuan.attend`).

    RoPE turns q and k into new tensors, and v is read where `W_pack` put it, so that all of its output stays.
    FlashAttention 2 and FlexAttention add ALiBi themselves, and read all three there; for the others it is
    folded into wider heads.

    Args:
        implementation: as transformers calls it.
        config: the base's configuration as a dictionary.
        width: bytes of a value of the computation.
        length: tokens of a row.
    """
    from finetune.baichuan.attention import ALIBI_DIMS

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    alibi = config["position_embedding"] == "alibi"
    folded = alibi and implementation not in ("flash_attention_2", "flex_attention")
    wide = hidden + ALIBI_DIMS * heads if folded else hidden
    values = wide if folded else 3 * hidden
    if implementation == "eager":  # scores and their softmax in float32, the weights as wide as the values
        weights = heads * length * (4 if width == 4 else 4 + width)
        return AttentionBytes(2 * wide * 4 + values * width + weights, 0, output_is_read=False)
    turned = 0 if alibi and not folded else 2 * wide
    return AttentionBytes((turned + values) * width, wide * width + 4 * heads, output_is_read=not folded)


def _attention_of(recipe: Recipe, config: dict[str, Any], device_type: str) -> str:
    """The implementation that the run takes, as far as what is installed here tells."""
    import torch

    from finetune.baichuan.attention_choice import choose_attention
    from finetune.baichuan.load import compute_dtype, pick_device

    settings = recipe.model
    if settings.attention != "auto":
        return settings.attention
    if device_type != "cuda" or not torch.cuda.is_available():
        return "sdpa"
    device = pick_device()
    dtype, encoding = compute_dtype(settings.dtype, device), config["position_embedding"]
    return choose_attention("auto", device, dtype, encoding, compiled=recipe.train.compile).implementation


def _whole_layer(
    recipe: Recipe, config: dict[str, Any], attention: AttentionBytes, *, width: int, device_type: str
) -> float:
    """Bytes that one layer saves for its backward pass, for each token.

    Frozen matrices save nothing. Kept are the inputs of both norms, what attention keeps, gate, its activation,
    and up. LoRA learns from its inputs: in float32 they are there already where they are not the norms' outputs
    or the feed-forward's product, in 16 bits each matrix makes a copy, and so it does behind dropout, which
    keeps its mask. (tests/unit/test_activations.py counts what autograd saves.)
    """
    hidden, wide, adapter = config["hidden_size"], config["intermediate_size"], recipe.adapter
    # Liger's SwiGLU computes the activation of the gate again.
    saved = (2 * hidden + (2 if _uses_liger(recipe, device_type) else 3) * wide) * width
    saved += attention.inputs + attention.output
    if adapter.method != "lora":
        return saved
    inputs = 4 * hidden + wide
    if adapter.dropout:
        return saved + inputs * (width + (1 if device_type == "cuda" else 4))
    if width < 4:
        return saved + inputs * width
    own = 2 * hidden + wide + (0 if attention.output_is_read else hidden)
    return saved + own * width


def _uses_liger(recipe: Recipe, device_type: str) -> bool:
    """Whether the run does, as far as what is installed here tells."""
    import torch

    from finetune.baichuan.kernels import choose_kernels

    wanted = recipe.train.kernels
    if wanted != "auto":
        return wanted == "liger"
    return choose_kernels(wanted, torch.device(device_type), compiled=recipe.train.compile) == "liger"
