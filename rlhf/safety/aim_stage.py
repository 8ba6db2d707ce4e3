"""Stage `aim`: from a red-team result to the data that the stages after it learn from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_json, write_text
from rlhf.safety.aim import (
    ATTACKS_FILE,
    BENIGN_FILE,
    DPO_FILE,
    HARMLESS_FILE,
    HELPFUL_FILE,
    Answered,
    Rows,
    Target,
    aimed_files,
    choose_target,
)
from rlhf.safety.attacks import benign_prompts
from rlhf.safety.step import run_step
from rlhf.safety.taxonomy import SafetyTaxonomy, load_safety_taxonomy

if TYPE_CHECKING:
    from rlhf.safety.recipe import AimRecipe

AIM_FILE = "aim.json"
SHOWN_VALUES = 5


def run(recipe: AimRecipe, *, resume: bool, overwrite: bool) -> Path:
    """Write the files of `rlhf.safety.aim.aimed_files`, and `aim.json` about them.

    Raises:
        UserError: no red-team result, an id that does not exist, or files that cannot be read.
    """
    files = (AIM_FILE, DPO_FILE, HARMLESS_FILE, HELPFUL_FILE, BENIGN_FILE, ATTACKS_FILE)
    return run_step(
        recipe, lambda folder: _write(recipe, folder), files=files, resume=resume, overwrite=overwrite
    )


def check(recipe: AimRecipe, *, device: str | None = None) -> None:
    """Look at the red-team result, if it is there already, and at the other files.

    Raises:
        UserError: what would stop the stage.
    """
    print(f"{recipe.name}: stage aim, into {recipe.output_dir}")
    taxonomy = _taxonomy(recipe)
    for value in recipe.aim.values or ():
        taxonomy.value(value, "aim.values")
    print(f"ordinary prompts: {len(_ordinary(recipe)):,}")
    if Path(recipe.resolve(recipe.aim.redteam)).exists():
        _tell(_target(recipe, taxonomy)[0], taxonomy)
    else:
        print(f"note: {recipe.aim.redteam} is not there yet")


def _write(recipe: AimRecipe, folder: Path) -> dict[str, Any]:
    aim, taxonomy = recipe.aim, _taxonomy(recipe)
    target, result = _target(recipe, taxonomy)
    _tell(target, taxonomy)
    files = aimed_files(
        target,
        taxonomy,
        asked=[row["messages"][-1]["content"] for row in [*result["answers"], *result["benign_answers"]]],
        benign=_benign(),
        ordinary=_ordinary(recipe),
        dpo_prompts=aim.dpo_prompts,
        reward_prompts=aim.reward_prompts,
        ppo_prompts=aim.ppo_prompts,
        ordinary_share=aim.ordinary_share,
        seed=recipe.seed,
    )
    for name, rows in files.items():
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"wrote    {folder / name}: {len(rows):,} rows")
    about = {"redteam": aim.redteam, "values": target.values, "note": target.note}
    write_json(folder / AIM_FILE, about | {"rows": {name: len(rows) for name, rows in files.items()}})
    return {"cards": _cards(target, taxonomy, files), "warnings": [target.note] if target.note else []}


def _taxonomy(recipe: AimRecipe) -> SafetyTaxonomy:
    return load_safety_taxonomy(*(Path(recipe.resolve(path)) for path in recipe.aim.overlays))


def _target(recipe: AimRecipe, taxonomy: SafetyTaxonomy) -> tuple[Target, dict[str, Any]]:
    from rlhf.safety.redteam import read_result

    folder = recipe.resolve(recipe.aim.redteam)
    if not Path(folder).exists():
        raise UserError(
            f"aim.redteam: {recipe.aim.redteam}: no such folder",
            hint="run stage redteam first, and give its output_dir",
        )
    result = read_result(folder)
    return choose_target(result, taxonomy, at_most=recipe.aim.at_most, values=recipe.aim.values), result


def _benign() -> list[Answered]:
    return [Answered(list(p.messages), str(p.response), "benign") for p in benign_prompts("train")]


def _ordinary(recipe: AimRecipe) -> list[Answered]:
    """Each prompt once, in an order of the seed."""
    found = [each for path in recipe.aim.ordinary for each in read_answered(path, recipe.resolve)]
    random.Random(recipe.seed).shuffle(found)
    return list({each.messages[-1]["content"]: each for each in found}.values())


def read_answered(path: str, resolve: Callable[[str], str] = str) -> list[Answered]:
    """Prompts with a good answer, of conversations (their last answer) or preferences (the best one).

    Raises:
        UserError: a file is missing, of another layout, or has rows that cannot be used.
    """
    from finetune.data.loading import load_source as load_conversations
    from finetune.data.loading import refuse_bad_rows
    from finetune.data.records import BadRow
    from finetune.data.sources import open_source
    from finetune.recipe.schema import Source
    from rlhf.preferences.layouts import layout_of
    from rlhf.preferences.loading import load_source as load_preferences

    source = Source(path=path)
    first = next(
        (row for _, read in open_source(path, resolve, called="aim.ordinary") for row in read()), None
    )
    if first is None or isinstance(first, BadRow) or layout_of(first.columns) is None:
        conversations = load_conversations(source, stage="sft", resolve=resolve)
        refuse_bad_rows([r for f in conversations for r in f.bad_rows], sum(f.rows for f in conversations))
        turns = [record.messages for file in conversations for record in file.records]
        return [Answered(messages[:-1], messages[-1]["content"]) for messages in turns if messages]
    preferences = load_preferences(source, resolve=resolve)
    refuse_bad_rows([r for f in preferences for r in f.bad_rows], sum(f.rows for f in preferences))
    return [Answered(p.prompt, p.responses[0].text, p.category) for f in preferences for p in f.preferences]


def _tell(target: Target, taxonomy: SafetyTaxonomy) -> None:
    if target.note:
        print(f"note: {target.note}")
    shown = ", ".join(f"{v} {taxonomy.values[v].en}" for v in target.values[:SHOWN_VALUES])
    more = len(target.values) - SHOWN_VALUES
    print(f"aimed at {len(target.values)} safety values: {shown}{f' and {more} more' if more > 0 else ''}")


def _cards(target: Target, taxonomy: SafetyTaxonomy, files: dict[str, Rows]) -> list[dict[str, str]]:
    areas = len({value[0] for value in target.values})
    counts = (("Rows for DPO", DPO_FILE), ("Rows on harmlessness", HARMLESS_FILE))
    return [
        {
            "label": "Safety values aimed at",
            "value": f"{len(target.values)}",
            "note": f"of {len(taxonomy.values)}, in {areas} areas",
        },
        *({"label": label, "value": f"{len(files[name]):,}", "note": name} for label, name in counts),
        {"label": "Attack prompts for PPO", "value": f"{len(files[ATTACKS_FILE]):,}", "note": ATTACKS_FILE},
    ]
