"""What a run stands on beside its recipe: a continued run that finds something else there is another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.user_functions import is_function

if TYPE_CHECKING:
    from rlhf.ppo.prompts import Prompt
    from rlhf.ppo.recipe import PPORecipe

WEIGHT_FILES = ("adapter_model.safetensors", "score.safetensors", "reward.json")


def inputs_of(recipe: PPORecipe, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digests, by what they are of: the prompts, the adapter that is begun from, and reward adapters.

    Reward functions are code, which may be mended in between, and merged reward models are too large to be read.
    """
    ids = json.dumps([prompt.ids for prompt in prompts])
    found = {"the prompts": hashlib.sha256(ids.encode()).hexdigest()}
    folders = {f"ppo.reward {part.path}": part.path for part in recipe.reward_parts()}
    if recipe.model.adapter:
        folders[f"model.adapter {recipe.model.adapter}"] = recipe.model.adapter
    for name, path in folders.items():
        folder = Path(recipe.resolve(path))
        if not is_function(path) and (folder / "adapter_config.json").is_file():
            found[name] = _digest(folder)
    return found


def check_inputs(found: dict[str, str], saved: dict[str, str], *, checkpoint: Path) -> None:
    """Refuse to go on with other inputs than those of a checkpoint.

    Raises:
        UserError: naming what has changed.
    """
    changed = [name for name in saved if found.get(name) != saved[name]]
    if changed:
        raise UserError(
            f"{checkpoint}: cannot be gone on from, since {' and '.join(changed)} changed after it was written",
            hint="restore what was there, or start again with --overwrite",
        )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
