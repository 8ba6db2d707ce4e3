"""The stages: what each runs, and the recipe that it takes. Names only, imported when they are needed.

This table is all that finetune knows of other packages.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """What stands behind a recipe's `stage`, each as "module:name".

    Attributes:
        run: function `(recipe, *, resume: bool, overwrite: bool) -> Path`, which returns the run folder.
        recipe: class of its recipe, derived from `finetune.recipe.schema.Step`. Its module is
            imported to read a recipe: it imports pydantic, and nothing heavier.
        check: function `(recipe, *, device: str | None) -> None` that validates and prints everything short of
            training.
        plan: function `(recipe, *, device: str) -> None` that prints what a step of a pipeline takes of a card
            while what it trains on is not there; of stages that train.
    """

    run: str
    recipe: str = "finetune.recipe.schema:Recipe"
    check: str = "finetune.check:check_training"
    plan: str = "finetune.check:plan_by_shapes"

    def load(self, part: str) -> Any:
        """The function or class that an attribute names.

        Args:
            part: "run", "recipe", "check" or "plan".
        """
        module, _, name = getattr(self, part).partition(":")
        return getattr(importlib.import_module(module), name)


def _rlhf(name: str, recipe: str) -> Stage:
    stage = f"rlhf.{name}.stage"
    return Stage(
        f"{stage}:run", recipe=f"rlhf.{name}.recipe:{recipe}", check=f"{stage}:check", plan=f"{stage}:plan"
    )


STAGES: dict[str, Stage] = {
    "pretrain": Stage("finetune.train.pretrain:run"),
    "sft": Stage("finetune.train.sft:run"),
    "merge": Stage(
        "finetune.adapters.merge_stage:run",
        recipe="finetune.recipe.merge:MergeRecipe",
        check="finetune.adapters.merge_stage:check",
    ),
    "reward": _rlhf("reward", "RewardRecipe"),
    "dpo": _rlhf("dpo", "DPORecipe"),
    "ppo": _rlhf("ppo", "PPORecipe"),
    "redteam": Stage(
        "rlhf.safety.redteam_stage:run",
        recipe="rlhf.safety.recipe:RedTeamRecipe",
        check="rlhf.safety.redteam_stage:check",
    ),
    "aim": Stage(
        "rlhf.safety.aim_stage:run",
        recipe="rlhf.safety.recipe:AimRecipe",
        check="rlhf.safety.aim_stage:check",
    ),
}
"""A recipe's `stage` → what stands behind it."""
