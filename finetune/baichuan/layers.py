"""What a Baichuan decoder layer is made of, under the official parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.baichuan.attend import attend
from finetune.baichuan.attention import alibi_slopes, rotate
from finetune.baichuan.compiling import run_compiled
from finetune.baichuan.configuration import BaichuanConfig


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm, computed in float32: torch's own, one kernel on a GPU."""
    # Autocast would hand out float32, twice the memory, although the kernel computes in it anyway.
    with torch.autocast(hidden_states.device.type, enabled=False):
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)


@use_kernel_forward_from_hub("RMSNorm")
class BaichuanRMSNorm(nn.Module):
    """Root-mean-square norm; `normalise` is how."""

    normalise: Callable = staticmethod(rms_norm)

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.normalise(hidden_states, self.weight, self.variance_epsilon)


class BaichuanRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, in float32."""

    inv_freq: torch.Tensor

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(config), persistent=False)

    @staticmethod
    def frequencies(config: BaichuanConfig) -> torch.Tensor:
        """Inverse frequencies, float32 of shape (head_dim / 2,)."""
        dim = config.head_dim
        return 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of shape (batch, length, head_dim) for positions of shape (batch, length)."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class BaichuanAlibi(nn.Module):
    """Holds the slopes as a buffer, so that they survive creation on the meta device."""

    slopes: torch.Tensor

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("slopes", alibi_slopes(config.num_attention_heads), persistent=False)

    def forward(self) -> torch.Tensor:
        """Slopes, float32 of shape (heads,)."""
        return self.slopes.float()


class BaichuanMLP(nn.Module):
    """SwiGLU feed-forward; `gated` is how gate and up come together."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.silu = config.hidden_act == "silu"

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """(…, intermediate_size) twice → once."""
        return self.act_fn(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class BaichuanAttention(nn.Module):
    """Self-attention with one packed projection for q, k and v; `rotate` is how RoPE turns the first two."""

    rotate: Callable = staticmethod(rotate)

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        slopes: torch.Tensor | None = None,
        key_positions: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)

        if rotary is not None:
            query, key = self.rotate(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            slopes=slopes,
            key_positions=key_positions,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights


class BaichuanDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and around a residual."""

    compiled: Callable | None = None
    """From `finetune.baichuan.compiling`, where training is to run compiled."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = BaichuanRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key != "compiled"
        }  # which cannot be pickled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None and self.training and torch.is_grad_enabled():
            return run_compiled(self.compiled, self, *args, **kwargs)
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
