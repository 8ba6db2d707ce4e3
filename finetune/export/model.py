"""A model folder into one that other software loads, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from finetune.baichuan.shapes import complete_weights, weight_shapes
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.shards import ShardWriter

Format = Literal["llama", "int8", "nf4"]
BYTES_PER_VALUE = {"int8": 1.0, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Of quantised matrices, statistics included (less those of int8: four bytes a row)."""


@dataclass(frozen=True)
class Export:
    """What `export_model` wrote.

    Attributes:
        folder: the exported model.
        format: ``llama``, ``int8`` or ``nf4``.
        source_bytes: of the weight files read.
        bytes: of the weight files written.
        unquantized_bytes: those of them in weights that are not quantised.
    """

    folder: Path
    format: str
    source_bytes: int
    bytes: int
    unquantized_bytes: int

    def summary(self) -> str:
        """One line for a terminal."""
        text = f"{_size(self.source_bytes)} → {_size(self.bytes)}"
        if self.format != "llama":
            share = f"{_size(self.unquantized_bytes)} of them"
            text += f", {share} embeddings, head and norms, which are not quantised"
        return text


def export_model(
    model: Path | str,
    output: Path | str,
    *,
    format: Format,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> Export:
    """Write a model for other software to load.

    One tensor is held at a time, with what quantising it takes, whatever the size of the model.

    Args:
        model: folder, catalogue name or hub id of a Baichuan model in 16 or 32 bits.
        output: folder to write; must not exist. It is there complete or not at all.
        format: ``llama`` (RoPE models) is loaded by stock ``LlamaForCausalLM`` and ``AutoTokenizer``;
            ``nf4`` and ``int8`` are bitsandbytes checkpoints of the Baichuan classes.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        max_shard_size: largest weight file, such as ``5GB``.
        progress: show a bar when stderr is a terminal.

    Raises:
        UserError: for a model that the format cannot hold, an incomplete one, an existing output, or too
            little disk.
    """
    from finetune.baichuan.checkpoints import find_weight_files
    from finetune.baichuan.configuration import BaichuanConfig
    from finetune.baichuan.load import resolve_base
    from finetune.baichuan.shards import ShardWriter, check_disk, check_output, parse_size, staging
    from finetune.export.llama import check_llama, write_llama_companions
    from finetune.export.quantize import check_quantizable, write_quantized_companions

    if format not in get_args(Format):
        raise UserError(f"--format: found {format!r}, expected one of {', '.join(get_args(Format))}")
    output, shard_bytes = Path(output), parse_size(max_shard_size)
    check_output(output)
    if (Path(model) / "adapter_config.json").is_file():
        raise UserError(
            f"{model}: an adapter, not a model",
            hint=f"merge it first, and export that: finetune merge --adapter {model} --output DIR",
        )
    source = resolve_base(str(model), called="--model").folder
    config = BaichuanConfig.from_pretrained(source)
    (check_llama if format == "llama" else check_quantizable)(config, source)
    source_bytes = sum(file.stat().st_size for file in find_weight_files(source))
    check_disk(output, sum(_expected_bytes(config, format, dtype, source_bytes)))

    with staging(output) as folder:
        shards = ShardWriter(folder, shard_bytes)
        written = _write_weights(shards, source, config, format, dtype, progress=progress)
        shards.finish()
        if format == "llama":
            write_llama_companions(source, folder, written)
        else:
            write_quantized_companions(source, folder, format, written)
        _, unquantized = _expected_bytes(config, format, written, source_bytes)
        done = Export(output, format, source_bytes, shards.total_bytes, unquantized)
        _write_record(folder, done, str(model), written)
    return done


def _write_weights(
    shards: ShardWriter,
    source: Path,
    config: BaichuanConfig,
    format: Format,
    dtype: str | None,
    *,
    progress: bool,
) -> str:
    """Write the weights; returns the dtype of those that are not quantised."""
    import torch

    from finetune.baichuan.load import pick_device
    from finetune.baichuan.shards import iterate_weights, progress_bar
    from finetune.export.llama import llama_tensors
    from finetune.export.quantize import quantized_tensors

    target = getattr(torch, dtype) if dtype else None
    shapes = weight_shapes(config)
    kept = dtype
    with progress_bar(f"exporting {format}", sum(map(prod, shapes.values())), shown=progress) as advance:
        read = complete_weights(iterate_weights(source), shapes, source, advance)
        if format == "llama":
            tensors = llama_tensors(read, config, target)
        else:
            tensors = quantized_tensors(read, format, pick_device(), target)
        for name, tensor in tensors:
            shards.add(name, tensor.contiguous())
            if name == "model.norm.weight":
                kept = str(tensor.dtype).removeprefix("torch.")
    assert kept is not None  # `complete_weights` has seen model.norm.weight
    return kept


def _expected_bytes(
    config: BaichuanConfig, format: Format, dtype: str | None, source_bytes: int
) -> tuple[int, int]:
    """Bytes that an export takes in quantised matrices and in all other weights.

    Without a dtype, a value has as many bytes as one of the source has on average.
    """
    import torch

    from finetune.export.quantize import QUANTIZED

    sizes = {name: prod(shape) for name, shape in weight_shapes(config).items()}
    value_bytes = getattr(torch, dtype).itemsize if dtype else source_bytes / sum(sizes.values())
    quantized = sum(size for name, size in sizes.items() if format != "llama" and QUANTIZED.fullmatch(name))
    others = sum(sizes.values()) - quantized
    return int(quantized * BYTES_PER_VALUE.get(format, 0)), int(others * value_bytes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _write_record(folder: Path, done: Export, model: str, dtype: str) -> None:
    """``export.json``: what was made of what."""
    from importlib.metadata import version

    from finetune import __version__

    software = {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}
    record = {
        "model": model,
        "dtype": dtype,
        **asdict(done),
        "software": {"finetune": __version__, **software},
    }
    del record["folder"]
    (folder / "export.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
