"""torch.compile, a decoder layer at a time.

All layers are one graph with other weights, so compiling takes as long as one layer does. A second graph is made
when rows of another length come, with the length left open; from then on none. (The first layer has graphs of its
own where its input needs no gradient.) Checkpointing is a part of the graph, wherever transformers puts it: what is
to be kept of a layer has to be seen inside. Generation and evaluation, whose caches and modes would each want graphs
of their own, run as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.baichuan.layers import BaichuanDecoderLayer
    from finetune.baichuan.modeling import BaichuanForCausalLM


def compile_layers(model: BaichuanForCausalLM) -> None:
    """Have training run compiled layers; each is compiled when it first runs, adapter and all."""
    model.model.layers_are_compiled = True
    compiled = torch.compile(GradientCheckpointingLayer.__call__)
    for layer in model.model.layers:
        layer.compiled = compiled


def run_compiled(compiled: Callable, layer: BaichuanDecoderLayer, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A layer's forward pass, in training.

    Args:
        compiled: from `compile_layers`, of the layer and the rest.
        args, kwargs: the layer's.
    """
    cache = kwargs.get("past_key_values")
    if cache is not None:
        own = cache.layers[layer.self_attn.layer_idx :][:1]
        # A cache that has only just been made holds nothing; in training nobody reads what would go into it.
        kwargs["past_key_values"] = next(
            (Prefix(it.keys, it.values) for it in own if it.keys is not None), None
        )
    return compiled(layer, *args, **kwargs)


@dataclass(frozen=True)
class Prefix:
    """The part of a layer in a prefix, in place of the cache, which is another object at each step.

    Attributes:
        keys, values: (batch, heads, virtual tokens, head_dim).
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prefix and the rows, as transformers' caches return them."""
        return torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
