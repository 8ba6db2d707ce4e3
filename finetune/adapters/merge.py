"""A LoRA adapter into the weights of its base, one weight file at a time.

Memory stays near one weight file plus the adapter. The delta is computed in float32; what the adapter does not
touch, the head among it, is copied bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.build import INITS_THAT_CHANGE_THE_BASE, check_adapter_folder
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to one matrix: ``scaling`` x B A, and DoRA's magnitudes if it has them."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged matrix, float32 of shape (out, in).

        With magnitudes m (DoRA, Liu et al. 2024): m x (W + s B A) / ‖W + s B A‖, norms over rows.
        """
        merged = weight.float() + self.scaling * (self.b.float() @ self.a.float())
        if self.magnitude is not None:
            merged *= (self.magnitude.float() / merged.norm(dim=1))[:, None]
        return merged


def merge_adapter(
    adapter: Path | str,
    output: Path | str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> Path:
    """Write base plus adapter as a plain model folder.

    Args:
        adapter: adapter folder.
        output: folder to write; must not exist. It is there complete or not at all.
        base: name, folder or hub id; None is the base that the adapter names.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps each tensor's own.
        max_shard_size: largest weight file, such as ``5GB``.
        progress: show a bar when stderr is a terminal.

    Returns:
        ``output``.

    Raises:
        UserError: for anything but LoRA, an adapter that does not fit the base, a quantised base, an existing
            output, or too little disk.
    """
    from finetune.baichuan.load import resolve_base

    adapter, output = Path(adapter), Path(output)
    config = check_adapter_folder(adapter)
    shard_bytes = parse_size(max_shard_size)
    if output.exists():
        raise UserError(f"{output}: exists already", hint="choose another --output, or remove it")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{adapter}: a {config.get('peft_type')} adapter has no weights to merge into",
            hint="only LoRA changes weights; use this one with --adapter beside its base",
        )
    init = str(config.get("init_lora_weights"))
    if init.startswith(INITS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"{adapter}: its initialisation ({init}) moved a part of the base into it, so that it does not fit "
            "the unchanged base",
            hint="merge the adapter/ folder of a finished run, which is plain LoRA, not a checkpoint",
        )
    identity = base or config.get("base_model_name_or_path")
    if not identity:
        raise UserError(f"{adapter}: names no base", hint="say which with --base")
    resolved = resolve_base(identity, revision=None if base else config.get("revision"))
    if resolved.quantized:
        raise UserError(
            f"{resolved.folder}: the weights are quantised, nothing can be added to them exactly",
            hint="merge onto the 16-bit release of the same model with --base",
        )
    updates = read_updates(adapter, config)
    _check_shapes(updates, resolved.folder, adapter)
    _check_disk(resolved.folder, output, dtype)

    with staging(output) as folder:
        _merge_weights(resolved.folder, folder, updates, dtype, shard_bytes, progress=progress)
        _copy_companions(resolved, folder, dtype)
        if (adapter / "tokenizer.json").is_file():
            for file in COPIED[1:]:
                if (adapter / file).is_file():
                    shutil.copyfile(adapter / file, folder / file)
    return output


def read_updates(adapter: Path, config: dict[str, Any]) -> dict[str, LoraUpdate]:
    """The updates of a LoRA adapter by the name of the weight they change.

    Raises:
        UserError: if the adapter holds something that is not understood (nothing is dropped silently).
    """
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        for part in (
            "lora_A.weight",
            "lora_B.weight",
            "lora_magnitude_vector",
            "lora_magnitude_vector.weight",
        ):
            if name.endswith("." + part):
                module = name.removesuffix("." + part)
                parts.setdefault(module, {})[part.removesuffix(".weight")] = tensor
                break
        else:
            raise UserError(f"{adapter}: cannot merge {key!r}", hint="only LoRA and DoRA matrices are merged")
    updates = {}
    for module, found in parts.items():
        if not {"lora_A", "lora_B"} <= set(found):
            raise UserError(f"{adapter}: {module} has only {', '.join(sorted(found))}")
        scaling = _scaling(config, module)
        updates[f"{module}.weight"] = LoraUpdate(
            found["lora_A"], found["lora_B"], scaling, found.get("lora_magnitude_vector")
        )
    if not updates:
        raise UserError(f"{adapter}: holds no LoRA matrices")
    return updates


def _scaling(config: dict[str, Any], module: str) -> float:
    def pick(pattern: str, default: float) -> float:
        for key, value in (config.get(pattern) or {}).items():
            if module == key or module.endswith("." + key):
                return value
        return default

    rank = pick("rank_pattern", config["r"])
    alpha = pick("alpha_pattern", config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MiB`` or ``1000000``.

    Raises:
        UserError: if it is no positive size.
    """
    compact = text.strip().upper().replace(" ", "")
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if compact.endswith(u)), "")
    try:
        size = int(float(compact.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--max-shard-size: found {text!r}, expected a size such as 5GB or 500MB")
    return size


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``output`` when all went well, and leaves nothing when not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def iterate_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a model folder, holding one file at a time."""
    from safetensors import safe_open

    from finetune.baichuan.checkpoints import find_weight_files, read_bin

    for path in find_weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                    yield name, file.get_tensor(name)
        else:
            yield from read_bin(path).items()


def _check_shapes(updates: dict[str, LoraUpdate], base: Path, adapter: Path) -> None:
    from finetune.baichuan.configuration import BaichuanConfig

    config = BaichuanConfig.from_pretrained(base)
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = {
        "W_pack": (3 * hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }
    for name, update in updates.items():
        matrix = name.split(".")[-2]
        layer = next((int(part) for part in name.split(".") if part.isdigit()), -1)
        found = (update.b.shape[0], update.a.shape[1])
        expected = shapes.get(matrix)
        if expected is None or layer >= config.num_hidden_layers:
            raise UserError(
                f"{adapter}: changes {name}, which {base} does not have",
                hint="the adapter was trained on another model: give its base with --base",
            )
        if found != expected:
            raise UserError(
                f"{adapter}: {name} is {found[0]}x{found[1]}, in {base} it is {expected[0]}x{expected[1]}",
                hint="the adapter was trained on another model: give its base with --base",
            )


def _check_disk(base: Path, output: Path, dtype: str | None) -> None:
    from finetune.baichuan.checkpoints import find_weight_files

    needed = sum(path.stat().st_size for path in find_weight_files(base))
    if dtype == "float32":
        needed *= 2  # at most: the base may be 16-bit
    parent = next(folder for folder in [output.parent, *output.parent.parents] if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"{output}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            hint="free some disk, or write to another one",
        )


def _merge_weights(
    base: Path,
    folder: Path,
    updates: dict[str, LoraUpdate],
    dtype: str | None,
    shard_bytes: int,
    *,
    progress: bool,
) -> None:
    import torch

    shards = ShardWriter(folder, shard_bytes)
    pending = set(updates)
    with _bar("merging", len(updates), shown=progress) as advance:
        for name, weight in iterate_weights(base):
            kept = weight.dtype if dtype is None else getattr(torch, dtype)
            if name in updates:
                weight = updates[name].apply(weight)
                pending.discard(name)
                advance()
            if weight.is_floating_point():
                weight = weight.to(kept)
            shards.add(name, weight.contiguous())
    if pending:
        raise UserError(f"{base}: has no {', '.join(sorted(pending)[:3])}", hint="give the right --base")
    shards.finish()


class ShardWriter:
    """Writes tensors as safetensors files of limited size, with an index when there are several."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; earlier ones are written out when the file would grow too large."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.pending, self.folder / f"part-{len(self.written)}", metadata={"format": "pt"})
        self.written.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, give the files their usual names, and write the index."""
        self._flush()
        count = len(self.written)
        weight_map = {}
        for index, names in enumerate(self.written):
            file = "model.safetensors"
            if count > 1:
                file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self.folder / f"part-{index}", self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))


def _copy_companions(base: Any, folder: Path, dtype: str | None) -> None:
    from finetune.baichuan.configuration import BaichuanConfig

    config = BaichuanConfig.from_pretrained(base.folder)
    if dtype is not None:
        config.dtype = dtype
    config.architectures = ["BaichuanForCausalLM"]
    config.save_pretrained(folder)
    for name in COPIED:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    for licence in base.folder.glob("*LICENSE*"):
        shutil.copyfile(licence, folder / licence.name)


@contextmanager
def _bar(title: str, total: int, *, shown: bool) -> Iterator[Any]:
    import sys

    if not shown or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
