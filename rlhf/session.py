"""A run of a stage of rlhf: that of `finetune.train.runner`, and the adapter that it may start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetune.adapters.base_identity import check_same_base
from finetune.adapters.build import attach_adapter, check_adapter_folder, load_adapter
from finetune.adapters.training_note import read_training_note
from finetune.baichuan.load import base_is_sharded
from finetune.errors import UserError
from finetune.train.runner import Session
from rlhf.preferences import PreferenceSet, PreparedPreferences
from rlhf.recipe import RlhfRecipe

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.baichuan.load import Base
    from finetune.recipe.schema import Recipe

TRAINING_PROMPTS = 200
"""How many of them the result is measured on where nothing is held out."""


class RlhfSession(Session):
    """Starts from a new LoRA adapter or goes on from one."""

    @classmethod
    def settle(cls, recipe: Recipe, base: Base) -> Recipe:
        """As for every stage; section adapter becomes that of the adapter to start from.

        Raises:
            UserError: also if FSDP or ZeRO-3 would cut the base up over the processes.
        """
        if base_is_sharded():
            raise UserError(
                f"stage {recipe.stage} needs the whole base in each process, and FSDP or ZeRO-3 cuts it up",
                hint="use recipes/accelerate/ddp.yaml, with model.quantization=nf4 if the base is too large",
            )
        return super().settle(with_start_adapter(cast(RlhfRecipe, recipe), base), base)

    def load_model(self) -> Any:
        """The frozen base."""
        from finetune.train.base import load_base

        return load_base(self.recipe, self.base)

    def attach(self, model: Any) -> PeftModel:
        """The trainable adapter on a base, new or the one to start from."""
        from transformers import set_seed

        set_seed(self.recipe.seed)
        start = start_folder(cast(RlhfRecipe, self.recipe))
        if start is None:
            return attach_adapter(model, self.recipe.adapter, self.base)
        model.name_or_path = model.config.name_or_path = self.base.identity
        peft_model = load_adapter(model, start, trainable=True)
        peft_model.peft_config["default"].base_model_name_or_path = self.base.identity
        _set_dropout(peft_model, self.recipe.adapter.dropout)
        return peft_model

    def choose_judged(self, data: PreparedPreferences) -> PreferenceSet:
        """What the result is measured on: the held-out set, or a part of the training set if there is none."""
        if data.validation is not None:
            return data.validation
        return PreferenceSet(list(zip(data.train.preferences, data.train.tokens))[:TRAINING_PROMPTS])


def _set_dropout(model: PeftModel, probability: float) -> None:
    """The recipe's dropout in place of the one that a loaded adapter was trained with."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    model.peft_config["default"].lora_dropout = probability
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout["default"] = nn.Dropout(probability) if probability > 0 else nn.Identity()


def start_folder(recipe: RlhfRecipe) -> Path | None:
    """The adapter to start from, on this machine."""
    return None if recipe.model.adapter is None else Path(recipe.resolve(recipe.model.adapter))


def with_start_adapter(recipe: RlhfRecipe, base: Base) -> RlhfRecipe:
    """The recipe with the settings of the adapter that it starts from in its section adapter.

    Raises:
        UserError: the folder is no adapter, or none that can be gone on from on this base.
    """
    folder = start_folder(recipe)
    if folder is None:
        return recipe
    if not folder.is_dir():
        raise UserError(f"model.adapter: {folder}: no such folder", hint="give a run's adapter/ folder")
    config = check_adapter_folder(folder)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"model.adapter: {folder}: a {config.get('peft_type')} adapter, and stage {recipe.stage} needs LoRA",
            hint="train the first stage with adapter.method=lora, or merge another adapter and start from that",
        )
    _check_base(folder, base)
    targets: Any = config.get("target_modules")
    settings = recipe.adapter.model_copy(
        update={
            "rank": config["r"],
            "alpha": float(config["lora_alpha"]),
            "targets": targets if isinstance(targets, str) else sorted(targets),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
            "init": "default",
        }
    )
    return recipe.model_copy(update={"adapter": settings})


def _check_base(adapter: Path, base: Base) -> None:
    """Refuse an adapter on weights that its training did not see, if it recorded which those were."""
    note = read_training_note(adapter)
    if not note.get("base_fingerprint"):
        return
    try:
        check_same_base(adapter, {}, note, base)
    except UserError as error:
        hint = f"set model.base={note.get('base')}, or start from an adapter of {base.name}"
        raise UserError(f"model.adapter: {error.args[0]}", hint=hint) from error
