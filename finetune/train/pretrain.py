"""Stage ``pretrain``: continued pre-training on raw text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.train.runner import run_stage

if TYPE_CHECKING:
    from finetune.recipe.schema import Recipe


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train an adapter on raw text; see `finetune.train.runner.run_stage`."""
    return run_stage(recipe, resume=resume, overwrite=overwrite)
