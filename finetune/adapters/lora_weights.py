"""What a saved LoRA adapter holds, as updates of weight matrices."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.build import INITS_THAT_CHANGE_THE_BASE
from finetune.errors import UserError

if TYPE_CHECKING:
    import torch

TILE = 1 << 20
"""Values of a matrix that are updated at once: their float32 copies stay in the processor's cache."""

UNDERSTOOD = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    ]
)
"""Keys of adapter_config.json that are read here, or change nothing once training is over."""

PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class LoraUpdate:
    """What LoRA adds to one matrix: ``scaling`` x B A, and DoRA's magnitudes if it has them.

    Attributes:
        a: (rank, in).
        b: (out, rank).
        scaling: factor of B A.
        magnitude: (out,), or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The merged matrix, (out, in), computed in float32.

        With magnitudes m (DoRA, Liu et al. 2024): m x (W + s B A) / ‖W + s B A‖, norms over rows.

        Args:
            weight: (out, in).
            dtype: of the result; None is float32.
        """
        import torch

        result = torch.empty(weight.shape, dtype=dtype or torch.float32)
        a, b = self.a.float(), self.b.float()
        step = max(1, TILE // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            merged = torch.addmm(weight[rows].float(), b[rows], a, alpha=self.scaling)
            if self.magnitude is not None:
                merged *= (self.magnitude[rows].float() / merged.norm(dim=1))[:, None]
            result[rows] = merged
        return result


def check_lora_config(config: dict[str, Any], adapter: Path, *, doing: str = "merge") -> None:
    """Refuse variants of LoRA whose effect is more than what `read_updates` reads.

    Args:
        config: of adapter_config.json.
        adapter: its folder, for messages.
        doing: what it is wanted for, for messages.

    Raises:
        UserError: naming the setting.
    """
    init = str(config.get("init_lora_weights"))
    if init.startswith((*INITS_THAT_CHANGE_THE_BASE, "lora_ga")):
        raise UserError(
            f"{adapter}: its initialisation ({init}) moved a part of the base into it, so that it does not fit "
            "the unchanged base",
            hint=f"{doing} the adapter/ folder of a finished run, which is plain LoRA, not a checkpoint",
        )
    for key, value in config.items():
        if key not in UNDERSTOOD and value and value != "none":
            raise UserError(
                f"{adapter}: adapter_config.json: cannot {doing} an adapter with {key}: {value}",
                hint="only LoRA, rsLoRA and DoRA matrices are understood; use it with --adapter beside its base",
            )


def read_updates(adapter: Path, config: dict[str, Any], *, doing: str = "merge") -> dict[str, LoraUpdate]:
    """The updates of a LoRA adapter by the name of the weight they change; see `check_lora_config`.

    Raises:
        UserError: if the adapter is damaged or holds something that is not understood (nothing is dropped
            silently).
    """
    from safetensors.torch import load_file

    damaged = "the adapter is damaged: save or copy it again"
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        suffix = next((part for part in PARTS if name.endswith("." + part)), None)
        if suffix is None:
            raise UserError(
                f"{adapter}: cannot {doing} {key!r}",
                hint="only LoRA, rsLoRA and DoRA matrices are understood",
            )
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{adapter}: {key} holds values that are not finite",
                hint=f"training diverged, or the file is damaged: {doing} an earlier checkpoint",
            )
        parts.setdefault(name.removesuffix("." + suffix), {})[PARTS[suffix]] = tensor
    if not parts:
        raise UserError(f"{adapter}: holds no LoRA matrices")
    wanted = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    updates = {}
    for module, found in parts.items():
        if set(found) != wanted:
            raise UserError(
                f"{adapter}: {module} has only {', '.join(sorted(found))}, expected {', '.join(sorted(wanted))}",
                hint=damaged,
            )
        a, b = found["lora_A"], found["lora_B"]
        rank = _pattern(config, "rank_pattern", module, config["r"])
        if a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(
                f"{adapter}: {module}: A has rank {a.shape[0]}, B {b.shape[1]}, adapter_config.json says {rank}",
                hint=damaged,
            )
        magnitude = found.get("lora_magnitude_vector")
        updates[f"{module}.weight"] = LoraUpdate(a, b, scaling(config, module), magnitude)
    return updates


def scaling(config: dict[str, Any], module: str) -> float:
    """What B A of a module is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
    rank = _pattern(config, "rank_pattern", module, config["r"])
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(config: dict[str, Any], name: str, module: str, default: float) -> float:
    for key, value in (config.get(name) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):  # as peft reads them
            return value
    return default


def check_fit(
    updates: dict[str, LoraUpdate],
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    adapter: Path,
    base: Path,
) -> None:
    """Refuse an adapter of another model, and one that lacks matrices that it was trained with.

    Args:
        updates: from `read_updates`.
        config: the adapter's.
        shapes: of the base's weights by name.
        adapter: its folder, for messages.
        base: its folder, for messages.

    Raises:
        UserError: naming the matrix.
    """
    hint = "the adapter was trained on another model: give its base with --base"
    for name, update in updates.items():
        found, expected = (update.b.shape[0], update.a.shape[1]), shapes.get(name)
        if expected is None or len(expected) != 2 or not name.startswith("model.layers."):
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                hint = (
                    "Baichuan packs q, k and v: turn the adapter with `finetune convert-adapter --to packed`"
                )
            raise UserError(f"{adapter}: changes {name}, which {base} does not have", hint=hint)
        if found != expected:
            raise UserError(
                f"{adapter}: {name} is {found[0]}x{found[1]}, in {base} it is {expected[0]}x{expected[1]}",
                hint=hint,
            )
    lacking = sorted(_targeted(config, shapes) - updates.keys())
    if lacking:
        raise UserError(
            f"{adapter}: lacks {len(lacking)} of the matrices that its target_modules name: "
            + ", ".join(lacking[:3]),
            hint="the adapter is damaged: save or copy it again",
        )


def _targeted(config: dict[str, Any], names: Collection[str]) -> set[str]:
    """Weights that peft must have adapted; empty where only peft's own rules tell."""
    targets = config.get("target_modules")
    if not targets or any(config.get(key) for key in ("exclude_modules", "layers_to_transform")):
        return set()
    modules = {name.removesuffix(".weight"): name for name in names}
    if isinstance(targets, str):
        return {name for module, name in modules.items() if re.fullmatch(targets, module)}
    suffixes = tuple("." + target for target in targets)
    return {name for module, name in modules.items() if module in targets or module.endswith(suffixes)}
