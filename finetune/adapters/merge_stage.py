"""Stage merge: what `python -m finetune merge` does, as a step of a pipeline."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.main_process import in_main_process

if TYPE_CHECKING:
    from finetune.recipe.merge import MergeRecipe


def run(recipe: MergeRecipe, *, resume: bool, overwrite: bool) -> Path:
    """Merge as the recipe says; of several processes the main one does.

    Args:
        recipe: of stage merge.
        resume: has no effect: a merge is there whole or not at all.
        overwrite: replace the merged model that the folder holds, once the new one is whole.

    Raises:
        UserError: as `finetune.adapters.merge_adapter`.
    """
    in_main_process(lambda: _merge(recipe, overwrite=overwrite))
    return Path(recipe.output_dir)


def _merge(recipe: MergeRecipe, *, overwrite: bool) -> None:
    from finetune.adapters.merge import merge_adapter, merge_summary
    from finetune.quiet import quiet_libraries

    quiet_libraries()
    settings, output = recipe.merge, Path(recipe.output_dir)
    adapter = Path(recipe.resolve(settings.adapter))
    replaced = output.is_dir() and (output / "merge.json").is_file()
    if replaced and not overwrite:
        if _is_this_merge(output, adapter, recipe):
            print(f"merged   {output}, already")
            return
        raise UserError(
            f"output_dir: {output} holds another merge already",
            hint="replace it with --overwrite, remove it, or set another output_dir",
        )
    target = output.with_name(f".{output.name}.new") if replaced else output
    if replaced:
        shutil.rmtree(target, ignore_errors=True)  # of a killed attempt
    merge_adapter(
        adapter,
        target,
        base=settings.base,
        force_base=settings.force_base,
        onto=settings.onto,
        format=settings.format,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
        verify=settings.verify,
        progress=True,
    )
    if replaced:
        shutil.rmtree(output)
        target.rename(output)
    lines, _ = merge_summary(output)
    for line in [*lines, f"merged   {output}"]:
        print(line)


def _is_this_merge(output: Path, adapter: Path, recipe: MergeRecipe) -> bool:
    """Whether a merged folder was made of this adapter, with these settings."""
    try:
        record: dict[str, Any] = json.loads((output / "merge.json").read_text(encoding="utf-8"))
        (made_of,) = record["adapters"]
        digest = made_of["files"]["adapter_model.safetensors"]["sha256"]
        settings = record["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
        return False
    asked = recipe.merge.model_dump(include={"format", "dtype", "onto", "max_shard_size"})
    return all(value is None or settings.get(key) == value for key, value in asked.items())


def check(recipe: MergeRecipe, *, device: str | None = None) -> None:
    """Look at the adapter, if it is there already, and at the settings.

    Raises:
        UserError: what would stop the merge.
    """
    from finetune.adapters.build import check_adapter_folder
    from finetune.adapters.merge import REWARD_MODEL
    from finetune.adapters.merge_plan import SCORE_FILE
    from finetune.adapters.verify import promise
    from finetune.baichuan.shards import parse_size

    parse_size(recipe.merge.max_shard_size)
    folder = Path(recipe.resolve(recipe.merge.adapter))
    print(f"{recipe.name}: stage merge, {recipe.merge.adapter} into {recipe.output_dir}")
    if folder.is_dir():
        check_adapter_folder(folder)
    else:
        print(f"note: {recipe.merge.adapter} is not there yet")
    if (folder / SCORE_FILE).is_file():
        print(REWARD_MODEL)
    elif recipe.merge.verify is not False:
        print(f"verification: {promise()}")
    if Path(recipe.output_dir).exists():
        print(f"note: {recipe.output_dir} exists already")
