"""Models of real shapes with random weights, and the naive attention that the original code does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from finetune.baichuan import BaichuanConfig, BaichuanForCausalLM
from finetune.baichuan.attention import alibi_slopes
from finetune.baichuan.layers import BaichuanRMSNorm
from finetune.baichuan.load import quantization_config

VOCAB = 125_696
SHAPES: dict[str, dict[str, Any]] = {
    "nano": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cpu": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
"""Shapes by name; every one has the whole vocabulary of Baichuan 2."""


def config_of(shape: str, positions: str, length: int) -> BaichuanConfig:
    """The configuration of a shape, positions ``rope`` or ``alibi``."""
    return BaichuanConfig(
        vocab_size=VOCAB,
        position_embedding=positions,
        norm_head=True,
        model_max_length=length,
        max_position_embeddings=length,
        z_loss_weight=0.0,
        **SHAPES[shape],
    )


def random_model(
    config: BaichuanConfig, device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> BaichuanForCausalLM:
    """A frozen model as `finetune.baichuan.load.load_model` leaves one, its weights random.

    Each matrix is made, and quantised, on the device before the next: a quantised 13B needs no more room than
    its 4-bit weights.
    """
    with torch.device("meta"):
        model = BaichuanForCausalLM(config)
    if quantization != "none":
        _put_quantised_layers(model, quantization, dtype)
    _fill(model, device, dtype)
    model.requires_grad_(False)
    model.freeze_head()
    return model


def random_llama(
    config: BaichuanConfig, device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> Any:
    """Stock Llama of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {key: getattr(config, key) for key in SHAPES["cpu"]}
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.model_max_length,
        tie_word_embeddings=False,
        pad_token_id=0,
        **shape,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    if quantization != "none":
        _put_quantised_layers(model, quantization, dtype)
    _fill(model, device, dtype)
    return model.requires_grad_(False)


def _put_quantised_layers(model: Any, quantization: str, dtype: torch.dtype) -> None:
    from transformers.integrations import replace_with_bnb_linear

    settings = quantization_config(quantization, dtype)
    with torch.device("meta"):
        replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
    model.is_loaded_in_4bit = quantization == "nf4"  # peft and trl ask the model
    model.is_loaded_in_8bit = quantization == "int8"


@torch.no_grad()
def _fill(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter random values, and every buffer what it would have after loading."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if type(module).__module__.startswith("bitsandbytes"):
                shape = torch.Size((module.out_features, module.in_features))
                module.weight = _quantised(random(shape), module, device)
            elif parameter.ndim == 1:
                setattr(module, name, nn.Parameter(torch.ones(parameter.shape, device=device, dtype=dtype)))
            else:
                setattr(module, name, nn.Parameter(random(parameter.shape)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(
                name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device), persistent=False
            )
    for module in model.modules():
        if list(module.named_buffers(recurse=False)):
            module._is_hf_initialized = False
            model._init_weights(module)


def _quantised(weight: torch.Tensor, module: Any, device: torch.device) -> Any:
    """A matrix as bitsandbytes holds it after loading, for one of its layers."""
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        kept = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": True}
        return bnb.nn.Params4bit(weight, module=module, **kept)._quantize(device)
    return bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)._quantize(device)


class NaiveMask:
    """The dense ALiBi mask, (heads, length, length), made once for a model and length as the original does."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = slopes
        self._made: torch.Tensor | None = None

    def get(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """The mask of a length, the one that is kept if it fits."""
        if self._made is None or self._made.shape[-1] != length or self._made.dtype != dtype:
            steps = torch.arange(length, device=self.slopes.device)
            mask = self.slopes[:, None, None] * (steps[None, :] - steps[:, None])
            self._made = mask.masked_fill(steps[None, :] > steps[:, None], float("-inf")).to(dtype)
        return self._made


class NaiveAttention(nn.Module):
    """Attention as the original 13B code has it: scores of every head in memory, a dense ALiBi mask added."""

    def __init__(self, attention: Any, mask: NaiveMask) -> None:
        super().__init__()
        self.W_pack, self.o_proj = attention.W_pack, attention.o_proj
        self.heads, self.head_dim = mask.slopes.numel(), attention.head_dim
        self.mask = mask

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, self.heads, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask.get(length, query.dtype)
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim) + mask
        output = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(output), None


class NaiveHead(nn.Module):
    """The original NormHead in training: normalised at every step."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, nn.functional.normalize(self.weight))


def plain_norm(hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMS norm in separate operations, in float32."""
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden_states.dtype)


def make_naive(model: BaichuanForCausalLM) -> BaichuanForCausalLM:
    """Put the naive attention, norms and head into a model; its loss over float32 logits is the caller's."""
    for module in model.modules():
        if isinstance(module, BaichuanRMSNorm):
            module.normalise = plain_norm
    mask = NaiveMask(alibi_slopes(model.config.num_attention_heads).to(model.device))
    for layer in model.model.layers:
        layer.self_attn = NaiveAttention(layer.self_attn, mask)
    model.lm_head = NaiveHead(model.lm_head.stored_weight.data)
    return model
