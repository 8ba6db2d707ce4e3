"""Quantised bases as the numbers that training computes with.

QLoRA's forward pass multiplies by matrices that were rounded to 4 bits and expanded again. An adapter learns to
work on those, so merging can be asked to begin from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.baichuan.checkpoints import DATA_SUFFIX, STATE_SUFFIX, bitsandbytes_state_dict
from finetune.baichuan.shards import iterate_weights
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

INT8_STATISTICS = (".SCB", ".weight_format")


def as_trained(
    name: str, weight: torch.Tensor, kind: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A weight as training on a quantised base multiplies by it; what is never quantised comes back as it is.

    Loading casts to the compute dtype and then quantises, with the settings of
    `finetune.baichuan.load.quantization_config`.

    Args:
        name: of the weight.
        weight: of the 16- or 32-bit base.
        kind: ``nf4`` or ``int8``.
        dtype: that the base is computed in.
        device: where to quantise: training's kind, to round alike.

    Returns:
        A tensor of ``dtype`` on the CPU.
    """
    from finetune.export.quantize import QUANTIZED, quantized_tensors

    if not QUANTIZED.fullmatch(name):
        return weight
    parts = dict(quantized_tensors([(name, weight)], kind, device, dtype))
    packed = parts.pop(name)
    return _dequantize(name, packed, parts).to(dtype)


def stored_weights(
    folder: Path, dtype: torch.dtype, *, opened: Callable[[Path], None] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a folder that is quantised on disk, one file at a time, quantised ones expanded.

    Reads bitsandbytes checkpoints (nf4 and int8, as transformers saves them) and the official 4-bit releases.

    Args:
        folder: model folder.
        dtype: of the expanded matrices.
        opened: called with each file before it is read.

    Raises:
        UserError: if a quantised matrix lacks its statistics.
    """
    # A matrix and its statistics may lie in different files. They are small beside it.
    statistics = {name: value for name, value in iterate_weights(folder) if is_statistic(name)}
    for name, value in iterate_weights(folder, opened=opened):
        if name in statistics:
            continue
        parts = {key: value for key, value in statistics.items() if key.startswith(_stem(name) + ".")}
        if name.endswith(DATA_SUFFIX):
            entries = bitsandbytes_state_dict({name: value, **parts}, folder)
            name = name.removesuffix(".data")
            packed = entries.pop(name)
            yield name, _dequantize(name, packed, entries).to(dtype)
        elif str(value.dtype) in ("torch.uint8", "torch.int8"):
            yield name, _dequantize(name, value, parts).to(dtype)
        else:
            yield name, value


def _stem(name: str) -> str:
    """The module of a weight."""
    return name.removesuffix(".data").removesuffix(".weight")


def is_statistic(name: str) -> bool:
    """Whether an entry belongs to a quantised matrix and is none itself."""
    if name.endswith((STATE_SUFFIX, *INT8_STATISTICS)):
        return True
    return ".weight." in name and not name.endswith(DATA_SUFFIX)


def _dequantize(name: str, packed: torch.Tensor, parts: dict[str, Any]) -> torch.Tensor:
    """Expand one matrix, given its statistics by their full names."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

    if f"{_stem(name)}.SCB" in parts:
        return int8_vectorwise_dequant(packed, parts[f"{_stem(name)}.SCB"])
    state = {
        key.removeprefix(name + "."): value for key, value in parts.items() if key.startswith(name + ".")
    }
    try:
        quant_state = QuantState.from_dict(state, device=packed.device)
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{name}: a quantised matrix without its statistics ({error})", hint="download the model again"
        ) from error
    return dequantize_4bit(packed, quant_state)
