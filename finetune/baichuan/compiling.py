"""torch.compile, a decoder layer at a time.

All layers are one graph with other weights, so compiling takes as long as one layer does. A second graph is made
when rows of another length come, with the length left open; from then on none. Generation and evaluation, whose
caches and modes would each want graphs of their own, run as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from finetune.baichuan.layers import BaichuanDecoderLayer
    from finetune.baichuan.modeling import BaichuanForCausalLM


def compile_layers(model: BaichuanForCausalLM) -> None:
    """Have training run compiled layers; each is compiled when it first runs, adapter and all."""
    model.model.layers_are_compiled = True
    for layer in model.model.layers:
        _compile_in_training(layer)


def _compile_in_training(layer: BaichuanDecoderLayer) -> None:
    compiled = torch.compile(layer._call_impl)

    def call(*args: Any, **kwargs: Any) -> Any:
        train = layer.training and torch.is_grad_enabled()
        return compiled(*args, **kwargs) if train else layer._call_impl(*args, **kwargs)

    # Where nn.Module.compile puts what __call__ then runs; copies and pickles of the module leave it out.
    layer._compiled_call_impl = call
