"""bitsandbytes checkpoints, written a matrix at a time, in the layout that transformers saves and reads.

The matrices of the layers are quantised with the settings that training uses
(`finetune.baichuan.load.quantization_config`); embeddings, head and norms stay as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

    from finetune.baichuan.configuration import BaichuanConfig

QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn\.(W_pack|o_proj)|mlp\.(gate|up|down)_proj)\.weight")
BLOCK = 64
"""Values that share a scale in nf4, bitsandbytes' default."""


def check_quantizable(config: BaichuanConfig, folder: Path | str) -> None:
    """Refuse weights that are quantised already.

    Raises:
        UserError: if they are.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder}: the weights are quantised already",
            hint="export the 16-bit release of the same model, or what was merged onto it",
        )


def quantized_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    kind: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the checkpoint, on the CPU, one tensor of the model at a time.

    Args:
        tensors: names and tensors of a Baichuan model.
        kind: ``nf4`` or ``int8``.
        device: where to quantise.
        dtype: of what is quantised and of what stays; None keeps each tensor's own.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that this does not need
    quantize = _nf4 if kind == "nf4" else _int8
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if tensor.is_floating_point() and dtype is not None:
            tensor = tensor.to(dtype)
        if QUANTIZED.fullmatch(name):
            for part, value in quantize(name, tensor.to(device)):
                yield part, value.cpu().clone()  # bitsandbytes' code book is one tensor for all
        else:
            yield name, tensor


def _nf4(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Packed 4-bit values, (numel / 2, 1), and their statistics, themselves quantised (QLoRA)."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    yield name, packed
    for statistic, value in state.as_dict(packed=True).items():
        yield f"{name}.{statistic}", value


def _int8(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """8-bit values, (out, in), and the largest magnitude of each row (LLM.int8)."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    values, largest, _ = int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    module = name.removesuffix("weight")
    yield name, values
    yield module + "SCB", largest
    yield module + "weight_format", torch.tensor(0, dtype=torch.uint8)  # row-major, the only one left


def write_quantized_companions(source: Path, folder: Path, kind: str, dtype: str) -> None:
    """Config with the quantisation settings, generation config, tokenizer and licence notices.

    Args:
        source: the Baichuan folder.
        folder: where to write.
        kind: ``nf4`` or ``int8``.
        dtype: of the weights that are not quantised, and of the computation.
    """
    import torch

    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.load import quantization_config
    from finetune.export.companions import write_companions

    config = BaichuanConfig.from_pretrained(source)
    config.architectures = ["BaichuanForCausalLM"]
    config.dtype = dtype
    config.quantization_config = quantization_config(kind, getattr(torch, dtype)).to_dict()
    write_companions(source, folder, config)
