"""Fused GPU kernels for the small operations of a layer: norm, SwiGLU and rotary embedding, by liger-kernel.

Each is memory traffic: several reads and writes of a hidden state become one, and SwiGLU keeps two tensors for the
backward pass in place of three. Functions on our modules are replaced; parameters, names and results stay.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


def choose_kernels(wanted: str, device: torch.device, *, compiled: bool = False) -> str:
    """The kernels to use: ``liger`` or ``none``.

    Args:
        wanted: as in the recipe's train.kernels; ``auto`` is liger where it is installed and can run.
        device: of the model.
        compiled: whether torch.compile fuses these operations already.

    Raises:
        UserError: liger is asked for and cannot be had.
    """
    there = device.type == "cuda" and find_spec("liger_kernel") is not None
    if wanted == "auto":
        return "liger" if there and not compiled else "none"
    if wanted == "liger" and not there:
        raise UserError(
            f"train.kernels: liger is not available here ({device.type})",
            hint="pip install liger-kernel on a machine with a GPU, or use train.kernels=auto",
        )
    return wanted


def use_liger(model: nn.Module) -> None:
    """Have a model's layers compute with liger's kernels."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    from finetune.baichuan.layers import BaichuanAttention, BaichuanMLP, BaichuanRMSNorm

    for module in model.modules():
        replaced: Any = module
        if isinstance(module, BaichuanRMSNorm):
            replaced.normalise = partial(_rms_norm, LigerRMSNormFunction)
        elif isinstance(module, BaichuanMLP) and module.silu:
            replaced.gated = LigerSiLUMulFunction.apply
        elif isinstance(module, BaichuanAttention):
            replaced.rotate = LigerRopeFunction.apply


def _rms_norm(kernel: Any, hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    # "llama": statistics in float32, the product in the input's type. Its gradient must not overwrite the one
    # that flows past the norm, on the residual.
    return kernel.apply(hidden_states, weight, epsilon, 0.0, "llama", False)
