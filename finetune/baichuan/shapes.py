"""Which weights a Baichuan model has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.configuration import BaichuanConfig


def weight_shapes(config: BaichuanConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights of a Baichuan causal model."""
    hidden, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = {
        "self_attn.W_pack": (3 * hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def complete_weights(
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, once each is known to have its shape, and at the end all to have been there.

    Args:
        tensors: names and tensors, as read.
        shapes: from `weight_shapes`.
        folder: where they are read from, for messages.
        advance: called with the number of values of each tensor, once it has been used.

    Raises:
        UserError: a weight has another shape, or is missing.
    """
    missing = set(shapes)
    for name, tensor in tensors:
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{folder}: {name} is {_by(tensor.shape)}, expected {_by(shapes[name])}",
                hint="config.json and weights do not belong together",
            )
        missing.discard(name)
        yield name, tensor
        advance(tensor.numel())
    if missing:
        raise UserError(
            f"{folder}: {plural(len(missing), 'weight')} missing: {', '.join(sorted(missing)[:4])}",
            hint="the folder does not hold a complete Baichuan model: download it again",
        )


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
