"""What layers keep for the backward pass, counted, and by attention implementation."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_memory import CONFIG_7B, CONFIG_13B, recipe
from tiny_model import tiny_model

from finetune.baichuan import BaichuanConfig
from finetune.baichuan.layers import BaichuanRMSNorm
from finetune.train.activations import AttentionBytes, attention_bytes
from finetune.train.memory import predict_memory

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 2}
TOKENS = 512


class Norm(torch.autograd.Function):
    """One kernel, as on a GPU, which keeps its input; on a CPU 16 bits take several, in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.clone()


def saved_bytes(encoding: str, implementation: str, layers: int, *, dropout: float, half: bool) -> int:
    """What autograd saves of a forward pass with LoRA, counted by storage."""
    model = tiny_model(encoding, num_hidden_layers=layers, **SMALL).requires_grad_(False)
    model.to(torch.bfloat16 if half else torch.float32)
    for module in model.modules() if half else ():
        if isinstance(module, BaichuanRMSNorm):
            module.normalise = lambda hidden, *_: Norm.apply(hidden)
    model.config._attn_implementation = implementation  # transformers would look for packages
    targets = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules=targets)).train()
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    made.enable_input_require_grads()
    weights = {parameter.data_ptr() for parameter in made.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.arange(TOKENS)[None] + 1100, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in weights)


def predicted_activations(
    encoding: str, implementation: str, layers: int, *, dropout: float, half: bool
) -> int:
    made = recipe(
        model={"base": "b", "attention": implementation},
        adapter={"rank": 2, "dropout": dropout},
        train={"gradient_checkpointing": False, "batch_size": 1, "kernels": "none"},
        data={"train": "t", "max_length": TOKENS},
    )
    config = BaichuanConfig(position_embedding=encoding, num_hidden_layers=layers, **SMALL).to_dict()
    kind = "cuda" if half else "cpu"  # where 16 bits are computed with
    return predict_memory(made, config, 0, device_type=kind).parts["activations"]


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dropout", "half"), [(0.0, False), (0.05, False), (0.0, True)])
def test_activations_are_what_autograd_saves(
    encoding: str, implementation: str, dropout: float, half: bool
) -> None:
    """To 2 %: what two more layers add. In 16 bits as a GPU would, weights in bfloat16 under autocast."""
    case: dict[str, Any] = {"dropout": dropout, "half": half}
    saved = [saved_bytes(encoding, implementation, layers, **case) for layers in (2, 4)]
    predicted = [predicted_activations(encoding, implementation, layers, **case) for layers in (2, 4)]
    assert saved[1] - saved[0] == pytest.approx(predicted[1] - predicted[0], rel=0.02)


class Kernel(torch.autograd.Function):
    """Saves what FlashAttention's and FlexAttention's functions save, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(query)  # its dimensions in the order in which the queries lie in memory
        ctx.save_for_backward(query, key, value, output, torch.zeros(query.shape[:-1]))
        return output


@pytest.mark.parametrize(
    ("implementation", "encoding"),
    [("flash_attention_2", "alibi"), ("flex_attention", "alibi"), ("flex_attention", "rope")],
)
def test_kernels_of_gpus_are_given_no_copies(
    monkeypatch: pytest.MonkeyPatch, implementation: str, encoding: str
) -> None:
    """Their functions stood in for; how they are called is ours, and what they keep is theirs."""
    import transformers.integrations.flex_attention as flex

    calls: list[str] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        calls.append(implementation)
        return Kernel.apply(query, key, value)  # type: ignore[no-any-return]

    package = ModuleType("flash_attn")
    package.flash_attn_func = package.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", kernel)
    case: dict[str, Any] = {"dropout": 0.0, "half": True}
    saved = [saved_bytes(encoding, implementation, layers, **case) for layers in (2, 4)]
    predicted = [predicted_activations(encoding, implementation, layers, **case) for layers in (2, 4)]
    assert len(calls) == 2 + 4
    assert saved[1] - saved[0] == pytest.approx(predicted[1] - predicted[0], rel=0.02)


def test_checkpointed_activations_are_what_autograd_saves() -> None:
    """The inputs of the layers."""
    model = tiny_model("rope", num_hidden_layers=4, **SMALL).requires_grad_(False).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.arange(TOKENS)[None] + 1100, use_cache=False)
    hidden = [tensor for key, tensor in held.items() if key not in weights and tensor.is_floating_point()]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in hidden if tensor.shape[-1] == 256)
    made = recipe(
        train={"gradient_checkpointing": True, "batch_size": 1}, data={"train": "t", "max_length": TOKENS}
    )

    def predicted_for(layers: int) -> int:
        config = BaichuanConfig(num_hidden_layers=layers, **SMALL).to_dict()
        return predict_memory(made, config, 0, device_type="cpu").parts["activations"]

    assert kept == predicted_for(6) - predicted_for(1)  # and the input of the last norm


def test_attention_by_implementation() -> None:
    """Bytes of a token in 16 bits, of the released shapes: rows of 4,096."""
    rope = {name: attention_bytes(name, CONFIG_7B, width=2, length=4096) for name in IMPLEMENTATIONS}
    alibi = {name: attention_bytes(name, CONFIG_13B, width=2, length=4096) for name in IMPLEMENTATIONS}
    read = AttentionBytes(5 * 4096 * 2, 4096 * 2 + 32 * 4, output_is_read=True)
    assert rope["sdpa"] == rope["flash_attention_2"] == rope["flash_attention_3"] == read
    assert rope["flex_attention"] == read
    own = AttentionBytes(3 * 5120 * 2, 5120 * 2 + 40 * 4, output_is_read=True)
    assert alibi["flash_attention_2"] == alibi["flex_attention"] == own
    folded = AttentionBytes(3 * 40 * 136 * 2, 40 * 136 * 2 + 40 * 4, output_is_read=False)
    assert alibi["sdpa"] == alibi["flash_attention_3"] == folded
    # Scores have a softmax in float32 and, in 16 bits, what it is rounded to.
    weights = 32 * 4096 * 6
    assert rope["eager"] == AttentionBytes(2 * 4096 * 4 + 3 * 4096 * 2 + weights, 0, output_is_read=False)


def test_checkpointing_keeps_no_output_that_it_does_not_see() -> None:
    """FlexAttention's is made inside a compiled function; eager attention is plain products."""

    def activations(implementation: str, keep: str | bool) -> int:
        made = recipe(
            model={"base": "b", "attention": implementation},
            train={"gradient_checkpointing": keep, "batch_size": 1},
            data={"train": "t", "max_length": 4096},
        )
        return predict_memory(made, CONFIG_13B, 0, device_type="cuda").parts["activations"]

    products = (5 * 5120 + 2 * 13_696) * 2
    kept = {
        name: (activations(name, "matmul") - activations(name, True)) / (40 * 4096) - products
        for name in IMPLEMENTATIONS
    }
    wide, narrow = 40 * 136 * 2 + 160, 5120 * 2 + 160
    assert kept == {
        "eager": 0,
        "sdpa": wide,
        "flash_attention_2": narrow,
        "flash_attention_3": wide,
        "flex_attention": 0,
    }
