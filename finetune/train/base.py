"""The frozen base as training uses it, and what it asks of the machine."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.baichuan.load import Base
    from finetune.baichuan.modeling import BaichuanForCausalLM
    from finetune.recipe.schema import Recipe
    from finetune.recipe.train_section import Train


def check_gpu_settings(train: Train) -> None:
    """Refuse what needs a GPU where there is none.

    Raises:
        UserError: naming the setting.
    """
    import torch

    from finetune.baichuan.kernels import choose_kernels
    from finetune.baichuan.load import pick_device

    choose_kernels(train.kernels, pick_device())
    if torch.cuda.is_available():
        return
    if train.compile and not _has_compiler():
        raise UserError(
            "train.compile: torch.compile needs a C++ compiler where there is no GPU, and finds none",
            hint="install g++ (or name another in the variable CXX), or use train.compile=false",
        )
    if train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: {train.optimizer} needs a GPU, and this machine has none",
            hint="use train.optimizer=adamw",
        )
    if train.activation_offloading:
        raise UserError(
            "train.activation_offloading needs a GPU: without one, activations are in host memory anyway",
            hint="use train.activation_offloading=false",
        )


def _has_compiler() -> bool:
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


def load_base(recipe: Recipe, base: Base) -> BaichuanForCausalLM:
    """The base, frozen, as the recipe's sections model and train want it.

    Raises:
        UserError: as `finetune.baichuan.load.load_model` does.
    """
    from finetune.baichuan.load import load_model

    model = load_model(recipe.model, base, compiled=recipe.train.compile)
    prepare_base(recipe, model)
    return model


def prepare_base(recipe: Recipe, model: BaichuanForCausalLM) -> None:
    """Have a loaded model compute as the recipe's section train wants it."""
    from finetune.baichuan.checkpointing import Checkpointing
    from finetune.baichuan.compiling import compile_layers
    from finetune.baichuan.kernels import choose_kernels, use_liger

    train = recipe.train
    model.config.z_loss_weight = train.z_loss_weight
    model.config.use_cache = False
    model.checkpointing = Checkpointing.of(train)
    if choose_kernels(train.kernels, model.device, compiled=train.compile) == "liger":
        use_liger(model)
    if train.compile:
        compile_layers(model)
