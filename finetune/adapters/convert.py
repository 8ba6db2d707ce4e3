"""LoRA on ``W_pack`` to LoRA on q_proj, k_proj, v_proj and back, exact in function.

Baichuan stacks q, k and v along the output rows of one matrix; Llama, and Baichuan models turned into Llama ones,
have three. Splitting an update s B A shares A and cuts the rows of B. Packing stacks the different A's and puts
the B's on a block diagonal, so the rank is the sum of theirs. Where the A's are the same matrix, as after
splitting, it is stacked once, and a round trip gives back what it began with.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.adapters.build import check_adapter_folder
from finetune.adapters.lora_weights import LoraUpdate, check_lora_config, read_updates
from finetune.errors import UserError
from finetune.words import plural

if TYPE_CHECKING:
    import torch

PACKED = "W_pack"
SPLIT = ("q_proj", "k_proj", "v_proj")
PREFIX = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
"""Keys that peft saves an update under."""


@dataclass(frozen=True)
class Conversion:
    """What `convert_adapter` did.

    Attributes:
        folder: the new adapter.
        layers: attention layers that were converted.
        rank: largest rank among the new matrices.
        relative_error: ‖difference‖ / ‖update‖ over all updates whose rank was reduced (Frobenius).
        largest_error: the same for the layer where it is largest.
    """

    folder: Path
    layers: int
    rank: int
    relative_error: float = 0.0
    largest_error: float = 0.0

    def summary(self) -> str:
        """One line for a terminal."""
        text = f"{plural(self.layers, 'layer')}, rank {self.rank}"
        if self.relative_error:
            text += f", relative error {self.relative_error:.2e}, in one layer up to {self.largest_error:.2e}"
        return text


def convert_adapter(
    adapter: Path | str, output: Path | str, *, to: Literal["packed", "split"], rank: int | None = None
) -> Conversion:
    """Write a LoRA adapter for the other layout of q, k and v.

    Matrices other than these are copied. The recorded base is kept: a split adapter fits what `export_model`
    writes with ``format="llama"``, a packed one the official weights.

    Args:
        adapter: a LoRA adapter (rsLoRA, DoRA and differing ranks included).
        output: folder to write; must not exist. It is there complete or not at all.
        to: ``split`` for q_proj, k_proj and v_proj; ``packed`` for W_pack.
        rank: with ``packed``, reduce larger ranks to this one by truncated singular value decomposition.

    Raises:
        UserError: for anything but LoRA, one that is in this layout already, or one that cannot be
            converted exactly.
    """
    from safetensors.torch import save_file

    from finetune.baichuan.shards import check_output, staging

    adapter, output = Path(adapter), Path(output)
    config = check_adapter_folder(adapter)
    _check_convertible(adapter, config, to, rank)
    check_output(output)
    modules: dict[str, LoraUpdate] = {}
    others: dict[str, LoraUpdate] = {}
    for name, update in read_updates(adapter, config, doing="convert").items():
        module = name.removesuffix(".weight")
        (modules if module.rpartition(".")[2] in (PACKED, *SPLIT) else others)[module] = update
    _check_no_head(adapter, others)
    _check_direction(adapter, modules, to)

    converted, losses = _split_all(modules) if to == "split" else _pack_all(adapter, modules, rank)
    new_config = _new_config(config, converted, others | converted)
    with staging(output) as folder:
        save_file(
            _as_tensors(others | converted), folder / "adapter_model.safetensors", metadata={"format": "pt"}
        )
        text = json.dumps(new_config, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        _copy_companions(adapter, folder, to)
    total = sum(norm**2 for _, norm in losses)
    return Conversion(
        folder=output,
        layers=len({_layer(module) for module in converted}),
        rank=max(update.a.shape[0] for update in converted.values()),
        relative_error=(sum(lost**2 for lost, _ in losses) / total) ** 0.5 if total else 0.0,
        largest_error=max((lost / norm for lost, norm in losses if norm), default=0.0),
    )


def _split_all(modules: dict[str, LoraUpdate]) -> tuple[dict[str, LoraUpdate], list[tuple[float, float]]]:
    parts = {module: zip(SPLIT, split(packed)) for module, packed in modules.items()}
    return {_layer(module) + name: part for module in parts for name, part in parts[module]}, []


def _pack_all(
    adapter: Path, modules: dict[str, LoraUpdate], rank: int | None
) -> tuple[dict[str, LoraUpdate], list[tuple[float, float]]]:
    """The packed updates by module, and what each reduction of rank lost of how much."""
    packed, losses = {}, []
    for layer in dict.fromkeys(_layer(module) for module in modules):
        update = pack([modules.get(layer + name) for name in SPLIT], adapter=adapter)
        if rank is not None and update.a.shape[0] > rank:
            update, lost, norm = reduce_rank(update, rank)
            losses.append((lost, norm))
        packed[layer + PACKED] = update
    return packed, losses


def split(packed: LoraUpdate) -> list[LoraUpdate]:
    """The updates of q, k and v that one of W_pack is made of: A shared, rows of B (and magnitudes) cut."""
    rows = packed.b.shape[0] // 3
    magnitudes = [None] * 3 if packed.magnitude is None else packed.magnitude.split(rows)
    return [
        LoraUpdate(packed.a, b, packed.scaling, magnitude)
        for b, magnitude in zip(packed.b.split(rows), magnitudes)
    ]


def pack(parts: list[LoraUpdate | None], *, adapter: Path | str = "adapter") -> LoraUpdate:
    """One update of W_pack that does what those of q, k and v do; None leaves its rows as they are.

    Raises:
        UserError: q, k and v of different shapes, or DoRA on some of the three only: the others' magnitudes are
            the base's row norms, which an adapter does not know.
    """
    import torch

    present = [part for part in parts if part is not None]
    first = present[0]
    if len({(update.b.shape[0], update.a.shape[1]) for update in present}) > 1:
        raise UserError(
            f"{adapter}: q, k and v differ in shape, as in models with grouped-query attention",
            hint="Baichuan has none: this adapter belongs to another model",
        )
    magnitudes = [None if part is None else part.magnitude for part in parts]
    if any(m is not None for m in magnitudes) and any(m is None for m in magnitudes):
        raise UserError(
            f"{adapter}: DoRA on some of q_proj, k_proj and v_proj cannot be packed: the magnitudes of the "
            "others are missing",
            hint="train it on all three, or merge it into the weights",
        )
    different: list[torch.Tensor] = []
    for update in present:
        if not any(torch.equal(update.a, known) for known in different):
            different.append(update.a)
    ranks = [a.shape[0] for a in different]
    blocks = []
    for part in parts:
        if part is None:
            blocks.append(first.b.new_zeros(first.b.shape[0], sum(ranks)))
            continue
        b = part.b
        if part.scaling != first.scaling:
            b = b.float() * (part.scaling / first.scaling)
        block = b.new_zeros(b.shape[0], sum(ranks))
        index = next(i for i, known in enumerate(different) if torch.equal(part.a, known))
        start = sum(ranks[:index])
        block[:, start : start + b.shape[1]] = b
        blocks.append(block)
    magnitude = None if magnitudes[0] is None else torch.cat([m for m in magnitudes if m is not None])
    return LoraUpdate(torch.cat(different), torch.cat(blocks), first.scaling, magnitude)


def reduce_rank(module: LoraUpdate, rank: int) -> tuple[LoraUpdate, float, float]:
    """The closest update of a smaller rank (Eckart-Young), float32.

    From the singular values of B A, found through QR decompositions of both: the full matrix is never made.

    Returns:
        The reduced update, and the Frobenius norms of what was lost and of what there was, scaling included.
    """
    import torch

    left, left_core = torch.linalg.qr(module.b.double())
    right, right_core = torch.linalg.qr(module.a.double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T)
    root = values[:rank].sqrt()
    b = left @ (u[:, :rank] * root)
    a = (root[:, None] * v[:rank]) @ right.T
    lost, norm = values[rank:].norm().item(), values.norm().item()
    reduced = LoraUpdate(a.float().contiguous(), b.float().contiguous(), module.scaling, module.magnitude)
    return reduced, abs(module.scaling) * lost, abs(module.scaling) * norm


# --- reading ------------------------------------------------------------------------------------------------


def _check_convertible(adapter: Path, config: dict[str, Any], to: str, rank: int | None) -> None:
    if to not in ("packed", "split"):
        raise UserError(f"--to: found {to!r}, expected packed or split")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{adapter}: a {kind} adapter has nothing to convert: it changes no matrices",
            hint="its vectors fit the packed and the split model as they are",
        )
    for key in ("modules_to_save", "target_modules"):
        names = config.get(key)
        _check_no_head(adapter, names if isinstance(names, list) else [])
    check_lora_config(config, adapter, doing="convert")
    if rank is not None and rank < 1:
        raise UserError(f"--rank: found {rank}, expected a positive number")
    if rank is not None and to == "split":
        raise UserError("--rank is for packing", hint="splitting keeps the rank: leave --rank out")


def _check_no_head(adapter: Path, names: Iterable[str]) -> None:
    for name in names:
        if name.rpartition(".")[2] == "lm_head":
            raise UserError(
                f"{adapter}: trains the head, which Baichuan 2 normalises and Llama does not",
                hint="use it with --adapter beside its own base",
            )


def _check_direction(adapter: Path, modules: dict[str, LoraUpdate], to: str) -> None:
    names = {module.rsplit(".", 1)[-1] for module in modules}
    if not names:
        raise UserError(
            f"{adapter}: changes none of q, k and v, so there is nothing to convert",
            hint="it fits the packed and the split model as it is",
        )
    if PACKED in names and len(names) > 1:
        raise UserError(f"{adapter}: changes both {PACKED} and {', '.join(sorted(names - {PACKED}))}")
    if (PACKED in names) == (to == "packed"):
        raise UserError(
            f"{adapter}: is {to} already (it changes {', '.join(sorted(names))})",
            hint=f"--to {'split' if to == 'packed' else 'packed'} is the other way",
        )


# --- writing ------------------------------------------------------------------------------------------------


def _layer(module: str) -> str:
    """``model.layers.3.self_attn.`` of any module in it."""
    return module.rpartition(".")[0] + "."


def _as_tensors(modules: dict[str, LoraUpdate]) -> dict[str, torch.Tensor]:
    """Keys and tensors as peft saves them; safetensors wants no shared memory, which A has after splitting."""
    tensors = {}
    for module, lora in modules.items():
        for part, tensor in zip(PARTS, (lora.a, lora.b, lora.magnitude)):
            if tensor is not None:
                tensors[f"{PREFIX}{module}.{part}"] = tensor.contiguous().clone()
    return tensors


def _new_config(
    config: dict[str, Any], converted: dict[str, LoraUpdate], updates: dict[str, LoraUpdate]
) -> dict[str, Any]:
    """The configuration with the new targets, and a rank and alpha for each module that give its scaling."""
    ranks = {module: update.a.shape[0] for module, update in updates.items()}
    alphas = {}
    for module, rank in ranks.items():
        alpha = updates[module].scaling * (rank**0.5 if config.get("use_rslora") else rank)
        alphas[module] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    # Where one rank and one alpha do for all, say so plainly: not everything reads patterns.
    default_rank = ranks[next(iter(ranks))] if len(set(ranks.values())) == 1 else config["r"]
    default_alpha = alphas[next(iter(alphas))] if len(set(alphas.values())) == 1 else config["lora_alpha"]
    return config | {
        "r": default_rank,
        "lora_alpha": default_alpha,
        "init_lora_weights": True,
        "target_modules": _targets(config, converted, ranks),
        "exclude_modules": None,
        "rank_pattern": _pattern(ranks, default_rank),
        "alpha_pattern": _pattern(alphas, default_alpha),
    }


def _targets(config: dict[str, Any], converted: dict[str, LoraUpdate], modules: Iterable[str]) -> list[str]:
    """Names as before with q, k, v and W_pack exchanged; instead of a regular expression, all modules."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("exclude_modules"):
        return sorted(modules)
    to = sorted({module.rsplit(".", 1)[-1] for module in converted})
    renamed = []
    for target in targets:
        parent, dot, name = target.rpartition(".")
        renamed += [parent + dot + new for new in to] if name in (PACKED, *SPLIT) else [target]
    return sorted(set(renamed))


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """What differs from the default: by matrix name where all layers agree, by module where they do not."""
    by_name: dict[str, set[Any]] = {}
    for module, value in values.items():
        by_name.setdefault(module.rsplit(".", 1)[-1], set()).add(value)
    pattern = {}
    for module, value in values.items():
        name = module.rsplit(".", 1)[-1]
        if value != default:
            pattern[name if len(by_name[name]) == 1 else module] = value
    return pattern


def _copy_companions(adapter: Path, folder: Path, to: str) -> None:
    """Tokenizer, chat template and model card; the card says what was done."""
    written = {path.name for path in folder.iterdir()}
    for path in _files(adapter):
        if path.name not in written:
            shutil.copyfile(path, folder / path.name)
    card = folder / "README.md"
    if card.is_file():
        fits = (
            "models whose q, k and v are separate" if to == "split" else "models whose q, k and v are W_pack"
        )
        note = f"\n## Conversion\n\nConverted with `finetune convert-adapter --to {to}`: this adapter fits {fits}.\n"
        card.write_text(card.read_text(encoding="utf-8").rstrip("\n") + "\n" + note, encoding="utf-8")


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".bin")
